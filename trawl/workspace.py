"""OUT and OUT.partial: where a run works, how it is resumed, and how its output appears by one rename."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trawl.errors import PlanError, ResumeError
from trawl.shards import sealed, sync_folder, sync_tree


@dataclass(frozen=True)
class Workspace:
    """The folders of one run.

    ``OUT.partial/`` holds ``lock`` (held by the run that works there), ``run.json`` (the run's identity), ``factors/``
    (sealed factor files), ``moments/`` (of a calibration), ``out/`` (what becomes OUT) and, for the moment between two
    renames, ``replaced/`` (what was OUT). It is private to the user;
    ``out/`` is made as the umask says. Publishing renames ``out/`` to OUT and removes the rest.

    Attributes:
        out: the folder that the run makes.
    """

    out: Path

    def __post_init__(self) -> None:
        if self.out.name in ("", "..", "."):
            raise PlanError(f"output {self.out} has no name of its own; name the folder to make with -o")

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
    def search(self) -> Path:
        """Where a search for a budget keeps what it measures, until the run that it is for is complete."""
        return self.out.with_name(self.out.name + ".search")

    @property
    def _replaced(self) -> Path:
        """Where the folder goes whose place the output takes, until that is there."""
        return self.partial / "replaced"

    def check(self, source: Path, *, resume: bool | None, overwrite: bool, needed: int, finished: bool = False) -> None:
        """Raise before anything is written if the output cannot be placed.

        Args:
            source: the checkpoint's folder.
            resume: whether an interrupted run is to be gone on with; None where that is not possible.
            overwrite: whether an existing OUT, and an interrupted run, may be replaced.
            needed: bytes that the run will write.
            finished: whether OUT may be there, since it is still to be seen whether it is what this run would make.
        Raises: PlanError: the place is taken, inside the source, not writable, or too small.
        """
        out, origin = self.out.resolve(), source.resolve()
        if out == origin or origin in out.parents:
            raise PlanError(
                f"output {self.out} equals or lies inside the source {source}; choose another folder with -o"
            )
        if out in origin.parents:
            raise PlanError(f"output {self.out} contains the source {source}; choose another folder with -o")
        self._check_free(overwrite=overwrite or finished)
        if os.path.ismount(self.out):
            raise PlanError(
                f"output {self.out} is a mount point, which no rename can replace; choose a folder inside it"
            )
        self._check_partial()
        if self.partial.exists() and not (resume or overwrite):
            ways = "" if resume is None else "--resume to go on, or "
            raise PlanError(f"{self.partial} holds an interrupted run; pass {ways}--overwrite to start anew")
        parent = next(folder for folder in (out.parent, *out.parent.parents) if folder.exists())
        if not parent.is_dir():
            raise PlanError(f"cannot write {self.out}: {parent} is no folder; choose another folder with -o")
        if not os.access(parent, os.W_OK):
            raise PlanError(f"cannot write into {parent}; choose another folder with -o")
        there = folder_bytes(self.partial) if resume or overwrite else 0
        free = shutil.disk_usage(parent).free + there
        if needed > free:
            raise PlanError(f"the disk of {parent} is too small: {needed:,} bytes needed, {free:,} free")

    def _check_free(self, *, overwrite: bool) -> None:
        """Raise where OUT is there, be it a link to nowhere, and is not to be replaced, or is no checkpoint."""
        if os.path.lexists(self.out) and not overwrite:
            raise PlanError(f"output {self.out} exists; pass --overwrite to replace it, or another folder with -o")
        if self.out.exists() and not (self.out / "config.json").exists() and not _is_empty(self.out):
            raise PlanError(f"output {self.out} is no checkpoint, and is not replaced; choose another folder with -o")

    def _check_partial(self) -> None:
        """Raise where the folder to work in is somebody else's, or another run works there now."""
        if not os.path.lexists(self.partial):
            return
        known = {"lock", "run.json", "run.json.partial", "factors", "moments", "out", "replaced"}
        held = {path.name for path in self.partial.iterdir()} if self.partial.is_dir() else {""}
        if held - known or self.partial.is_symlink():
            raise PlanError(f"{self.partial} is no run's folder; move it away, or choose another -o")
        if (self.partial / "lock").exists():
            with self._held(fcntl.LOCK_SH):
                pass

    @contextlib.contextmanager
    def _held(self, how: int) -> Iterator[None]:
        """Hold the lock file; it dies with the process."""
        path = self.partial / "lock"
        with path.open("a") as lock:
            try:
                fcntl.flock(lock, how | fcntl.LOCK_NB)
            except BlockingIOError as e:
                raise PlanError(f"another run is working in {self.partial}; wait for it, or choose another -o") from e
            if not path.exists() or not os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                raise PlanError(f"another run has just finished in {self.partial}; look at {self.out}")
            yield

    @contextlib.contextmanager
    def locked(self, identity: Mapping[str, Any], *, resume: bool, overwrite: bool) -> Iterator[None]:
        """Make the folders, hold them against a second run, and check what an interrupted run left.

        An error that comes before anything is sealed leaves no folders.

        Args:
            identity: what the output depends on; kept in run.json.
            resume: whether sealed files of a run with the same identity are kept.
            overwrite: as for :meth:`check`; another run may have made OUT since.
        Raises: ResumeError: the interrupted run was another one. PlanError: another process works there now.
        """
        self.partial.parent.mkdir(parents=True, exist_ok=True)
        self.partial.mkdir(mode=0o700, exist_ok=True)
        with self._held(fcntl.LOCK_EX):
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
            try:
                self._check_free(overwrite=overwrite)
                yield
            except BaseException:
                if self.partial.exists() and not any(self._sealed()) and not os.path.lexists(self._replaced):
                    _remove(self.partial)
                raise

    def _sealed(self) -> Iterator[Path]:
        """Yield what a resumed run could use."""
        return (path for folder in (self.factors, self.moments, self.staged) for path in folder.rglob("*"))

    def keep(self, names: Container[str]) -> None:
        """Remove what an interrupted run staged, except for files of these names."""
        for path in self.staged.iterdir():
            if path.name not in names:
                _remove(path)

    def discard(self) -> None:
        """Throw away what the run made so far, which nothing can go on from."""
        for folder in (self.factors, self.moments, self.staged):
            _remove(folder)

    def clear(self) -> None:
        """Remove what a run left that was killed right after its output had appeared."""
        self._check_partial()
        if self.partial.exists():
            with self._held(fcntl.LOCK_EX):
                _remove(self.partial)

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

    def publish(self, *, overwrite: bool) -> None:
        """Make the staged folder appear as OUT, by one rename, and remove the workspace.

        Raises: PlanError: somebody else has made OUT since, and it is not to be replaced.
        """
        sync_tree(self.staged)
        self._check_free(overwrite=overwrite)
        _remove(self._replaced)
        if os.path.lexists(self.out):
            self.out.rename(self._replaced)
        self.staged.rename(self.out)
        sync_folder(self.out.resolve().parent)
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


def _is_empty(path: Path) -> bool:
    """Whether a path is a folder without anything in it."""
    return path.is_dir() and not any(path.iterdir())


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def folder_bytes(folder: Path) -> int:
    """Return the bytes of all files under a folder, 0 where there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
