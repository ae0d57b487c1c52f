"""Writing safetensors shards: kernel copies where nothing changes, streamed bytes where it does, sealed by rename."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

FICLONE = 0x40049409  # ioctl of btrfs, xfs, bcachefs: share the extents of another file
COPY_CHUNK = 1 << 26


@dataclass(frozen=True)
class FileRange:
    """Bytes ``start`` to ``stop`` of a file, to be copied as they are."""

    path: Path
    start: int
    stop: int


@contextlib.contextmanager
def sealed(path: Path) -> Iterator[BinaryIO]:
    """Open ``path`` for writing so that it appears whole or not at all: written aside, fsynced, renamed.

    After an error nothing is left: what a failed fsync leaves on disk nobody knows, and a full disk needs the room.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to tell of
            partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename inside ``folder`` durable: fsync the directory itself, or a file in the same way."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path, *, files: bool = False) -> None:
    """Make what lies in a folder durable, at any depth: every name and, if asked, every file's bytes."""
    for path in sorted(folder.rglob("*"), reverse=True):  # what is inside comes before the folder that names it
        if path.is_dir() or files:
            sync_folder(path)
    sync_folder(folder)


def write_shard(path: Path, header: bytes, parts: Iterable[FileRange | Tensor]) -> None:
    """Write one shard from its header and its parts in byte order.

    Args:
        path: the shard to create; it appears by rename.
        header: the length bytes and JSON of a safetensors file.
        parts: contiguous tensors, or ranges of existing files; neighbouring ranges are copied in one go.
    Raises: OSError: disk full, unreadable source; nothing is left under ``path``.
    Cost: every byte once; ranges go through the kernel and never enter this process.
    """
    with sealed(path) as file:
        file.write(header)
        for part in _joined(parts):
            if isinstance(part, Tensor):
                file.write(tensor_bytes(part))
            else:
                _copy_range(part, file)


def copy_file(source: Path, path: Path) -> None:
    """Copy a file whole, sharing its extents where the file system can; ``path`` appears by rename."""
    with source.open("rb") as origin, sealed(path) as file:
        try:
            fcntl.ioctl(file.fileno(), FICLONE, origin.fileno())
        except OSError as e:
            if e.errno not in (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.EPERM, errno.ENOSYS):
                raise
            _copy_range(FileRange(source, 0, os.fstat(origin.fileno()).st_size), file)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return a contiguous CPU tensor's bytes without copying them."""
    data: memoryview = tensor.reshape(-1).view(torch.uint8).numpy().data
    return data


def _joined(parts: Iterable[FileRange | Tensor]) -> Iterator[FileRange | Tensor]:
    """Merge neighbouring ranges of the same file."""
    pending: FileRange | None = None
    for part in parts:
        if isinstance(part, FileRange) and pending and (part.path, part.start) == (pending.path, pending.stop):
            pending = FileRange(part.path, pending.start, part.stop)
            continue
        if pending:
            yield pending
        pending = part if isinstance(part, FileRange) else None
        if isinstance(part, Tensor):
            yield part
    if pending:
        yield pending


def _copy_range(part: FileRange, file: BinaryIO) -> None:
    """Append a range of another file, by copy_file_range where the kernel can and by plain reads where not."""
    file.flush()
    with part.path.open("rb") as source:
        offset = part.start
        while offset < part.stop:
            count = min(part.stop - offset, COPY_CHUNK)
            try:
                copied = os.copy_file_range(source.fileno(), file.fileno(), count, offset_src=offset)
            except OSError as e:
                if e.errno not in (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM):
                    raise
                source.seek(offset)
                copied = file.write(source.read(count))
                file.flush()
            if copied == 0:
                raise OSError(errno.EIO, f"file ended at byte {offset}, expected {part.stop}", str(part.path))
            offset += copied
