"""Locks that die with their process: a file that others wait for, and a folder that one run at a time works in."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from trawl.errors import PlanError

PRIVATE = 0o700


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an empty lock file in a ``with`` block, against other processes and threads, which wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def may_write(folder: Path) -> bool:
    """Whether something can be made in a folder, if it is there; one that only is to be read needs no lock."""
    return not folder.exists() or os.access(folder, os.W_OK)


@contextmanager
def held(folder: Path, mode: int = 0o777) -> Iterator[None]:
    """Hold a folder against other runs in a ``with`` block; one in which nothing was made is removed.

    Args:
        folder: made if absent.
        mode: that it is made with.
    Raises: PlanError: another run works there now, or there can be no such folder.
    """
    new = not folder.exists()
    with _lock(folder, mode):
        try:
            yield
        except BaseException:
            if new and [path.name for path in folder.iterdir()] == ["lock"]:
                shutil.rmtree(folder)
            raise


def _lock(folder: Path, mode: int) -> IO[str]:
    """Return the locked file of a folder; it is made again where who held it before has just removed the folder."""
    path = folder / "lock"
    while True:
        try:
            folder.mkdir(mode=mode, parents=True, exist_ok=True)
        except OSError as e:
            raise PlanError(f"cannot work in {folder}: {e.strerror}; choose another folder") from e
        with suppress(FileNotFoundError):
            lock = path.open("a")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as e:
                lock.close()
                raise PlanError(f"another run is working in {folder}; wait for it, or choose another folder") from e
            if path.exists() and os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                return lock
            lock.close()
