"""Faults for a run: file operations that fail or kill, runs in processes of their own, and what must be the same after.

with disturbed(7, killed):              # the process dies in place of its seventh file operation
    trawl.compress(source, RECIPE, out)
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import trawl

OPERATIONS = ("mkdir", "fsync", "replace", "rename", "copy_file_range", "unlink", "rmdir")
RECIPE = trawl.Recipe(rank=2, roles="fc", layers="0-1", group_layers=1)

Observer = Callable[[str, int, int | None], None]
Fault = Callable[[str], None]

_CONTEXT = multiprocessing.get_context("forkserver")  # a server that has imported everything and run nothing
_CONTEXT.set_forkserver_preload(["trawl", "trawl_cli"])


@contextmanager
def disturbed(at: int, fault: Fault) -> Iterator[list[str]]:
    """Count the file operations of a ``with`` block, and call ``fault`` in front of number ``at``, counted from 0."""
    done: list[str] = []

    def counted(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            done.append(name)
            if len(done) == at + 1:
                fault(name)
            return real(*args, **kwargs)

        return call

    replaced: dict[str, Any] = {name: counted(name) for name in OPERATIONS}
    with mock.patch.multiple(os, **replaced):
        yield done


def killed(_operation: str) -> None:
    """Die as by a power switch: nothing is flushed, no handler runs."""
    os.kill(os.getpid(), signal.SIGKILL)


def failing(code: int) -> Fault:
    """Return a fault that raises the operating system's error of that number."""

    def fault(operation: str) -> NoReturn:
        raise OSError(code, f"{os.strerror(code)} (injected into {operation})")

    return fault


def killed_at(stage: str) -> Observer:
    """Return an observer that dies at the first report of a stage."""

    def observer(name: str, done: int, _total: int | None) -> None:
        if name.startswith(stage) and done:
            killed(name)

    return observer


def run_disturbed(source: Path, out: Path, at: int, options: dict[str, Any]) -> None:
    """Compress in a process that dies at a file operation."""
    with disturbed(at, killed):
        trawl.compress(source, RECIPE, out, **options)


def densify_disturbed(source: Path, out: Path, at: int) -> None:
    """Make a factored checkpoint dense in a process that dies at a file operation."""
    with disturbed(at, killed):
        trawl.densify(source, out)


def run_until(source: Path, out: Path, stage: str) -> None:
    """Compress in a process that dies at a stage."""
    trawl.compress(source, RECIPE, out, observer=killed_at(stage))


def run_limited(source: Path, out: Path, limit: int) -> None:
    """Compress with files of at most ``limit`` bytes, as on a disk that is full; exit 3 with the error as expected."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        trawl.compress(source, RECIPE, out)
    except OSError:
        os._exit(3)


def run_plain(source: Path, out: Path, recipe: trawl.Recipe, options: dict[str, Any]) -> None:
    """Compress, for a parent that kills at some moment."""
    trawl.compress(source, recipe, out, **options)


def run_command(arguments: list[str], errors: Path, memory: int = 0) -> None:
    """Run the command line with standard error in a file, with ``memory`` bytes more of address space than it has."""
    import trawl_cli  # type: ignore[import-not-found]  # checked under the name cli

    descriptor = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(descriptor, 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's processes ignore it
    sys.argv = ["trawl", *arguments]
    if memory:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory, resource.RLIM_INFINITY))
    trawl_cli.main()


def start(target: Callable[..., None], *args: Any) -> Any:
    """Start a function in a process of its own, which costs a few milliseconds."""
    process = _CONTEXT.Process(target=target, args=args, daemon=True)
    process.start()
    return process


def finished(target: Callable[..., None], *args: Any, seconds: float = 60) -> int | None:
    """Run a function in a process of its own; return its exit code, negative for a signal, None for a hang."""
    process = start(target, *args)
    process.join(seconds)
    code: int | None = process.exitcode
    if code is None:
        process.kill()
        process.join()
    return code


def contents(folder: Path) -> dict[str, Any]:
    """Return all that is in an output, without the seconds that it took and the command that was given."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    record = json.loads(files.pop("trawl.json"))
    record |= {"seconds": None, "command": None}
    record["stacks"] = [stack | {"seconds": None} for stack in record["stacks"]]
    return files | {"trawl.json": record, "README.md": files["README.md"].split(b"\n```\n")[0]}


def state(folder: Path) -> dict[str, Any]:
    """Return what must not change of a source: bytes, times and modes of everything in it."""
    return {
        str(path): (path.stat().st_mtime_ns, path.stat().st_mode, path.read_bytes() if path.is_file() else b"")
        for path in (folder, *folder.rglob("*"))
    }
