"""OUT and OUT.partial: where a run works, how it is resumed, and how its output appears by one rename."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trawl.errors import PlanError, ResumeError
from trawl.shards import sealed, sync_folder


@dataclass(frozen=True)
class Workspace:
    """The folders of one run.

    ``OUT.partial/`` holds ``run.json`` (the run's identity), ``factors/`` (sealed factor files), ``moments/`` (of a
    calibration) and ``out/`` (what becomes OUT). Publishing renames ``out/`` to OUT and removes the rest.

    Attributes:
        out: the folder that the run makes.
    """

    out: Path

    @property
    def partial(self) -> Path:
        """Where the run works."""
        return self.out.with_name(self.out.name + ".partial")

    @property
    def staged(self) -> Path:
        """The folder that becomes OUT."""
        return self.partial / "out"

    @property
    def factors(self) -> Path:
        """Sealed factor files, one a stack."""
        return self.partial / "factors"

    @property
    def moments(self) -> Path:
        """Moments of a calibration that keeps them nowhere else."""
        return self.partial / "moments"

    @property
    def _replaced(self) -> Path:
        return self.out.with_name(self.out.name + ".replaced")

    def check(self, source: Path, *, resume: bool, overwrite: bool, needed: int) -> None:
        """Raise before anything is written if the output cannot be placed.

        Args:
            source: the checkpoint's folder.
            resume: whether an interrupted run is to be gone on with.
            overwrite: whether an existing OUT, and an interrupted run, may be replaced.
            needed: bytes that the run will write.
        Raises: PlanError: the place is taken, inside the source, not writable, or too small.
        """
        out, origin = self.out.resolve(), source.resolve()
        if out == origin or origin in out.parents:
            raise PlanError(
                f"output {self.out} equals or lies inside the source {source}; choose another folder with -o"
            )
        if out in origin.parents:
            raise PlanError(f"output {self.out} contains the source {source}; choose another folder with -o")
        if self.out.exists() and not overwrite:
            raise PlanError(f"output {self.out} exists; pass --overwrite to replace it, or another folder with -o")
        if self.partial.exists() and not (resume or overwrite):
            raise PlanError(
                f"{self.partial} holds an interrupted run; pass --resume to go on, or --overwrite to start anew"
            )
        parent = next(folder for folder in (out.parent, *out.parent.parents) if folder.exists())
        if not os.access(parent, os.W_OK):
            raise PlanError(f"cannot write into {parent}; choose another folder with -o")
        there = folder_bytes(self.partial) if resume or overwrite else 0
        free = shutil.disk_usage(parent).free + there
        if needed > free:
            raise PlanError(f"the disk of {parent} is too small: {needed:,} bytes needed, {free:,} free")

    @contextlib.contextmanager
    def locked(self, identity: Mapping[str, Any], *, resume: bool) -> Iterator[None]:
        """Make the folders, hold them against a second run, and check what an interrupted run left.

        Args:
            identity: what the output depends on; kept in run.json.
            resume: whether sealed files of a run with the same identity are kept.
        Raises: ResumeError: the interrupted run was another one. PlanError: another process works there now.
        """
        self.partial.mkdir(parents=True, exist_ok=True)
        with (self.partial / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as e:
                raise PlanError(f"another run is working in {self.partial}; wait for it, or choose another -o") from e
            record = self.partial / "run.json"
            if resume and record.exists():
                self._check_identity(record, identity)
            else:
                for leftover in (record, self.factors, self.staged):
                    _remove(leftover)
                with sealed(record) as file:
                    file.write(json.dumps(identity, indent=2, sort_keys=True).encode())
            self.factors.mkdir(exist_ok=True)
            self.staged.mkdir(exist_ok=True)
            yield

    def _check_identity(self, record: Path, identity: Mapping[str, Any]) -> None:
        """Refuse to mix the sealed files of another run into this one."""
        try:
            before = json.loads(record.read_bytes())
        except (OSError, ValueError) as e:
            raise ResumeError(f"{record} is not readable: {e}; pass --overwrite to start anew") from e
        wanted = json.loads(json.dumps(identity))
        if differing := _differences(before, wanted):
            raise ResumeError(
                f"{self.partial} belongs to another run; it differs in {'; '.join(differing)}. "
                "Repeat that run's options, or pass --overwrite to start anew"
            )

    def publish(self) -> None:
        """Make the staged folder appear as OUT, by one rename, and remove the workspace."""
        sync_folder(self.staged)
        _remove(self._replaced)
        if self.out.exists():
            self.out.rename(self._replaced)
        self.staged.rename(self.out)
        sync_folder(self.out.resolve().parent)
        _remove(self._replaced)
        _remove(self.partial)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Name every entry in which two identities differ."""
    found = []
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key} ({_short(old)} then, {_short(new)} now)")
    return found


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 20 else text[:12] + "…"


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def folder_bytes(folder: Path) -> int:
    """Return the bytes of all files under a folder, 0 where there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
