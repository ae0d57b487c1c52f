"""Densify: a factored checkpoint multiplied out again into an ordinary dense one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from trawl.checkpoint import DTYPES, Checkpoint, open_folder
from trawl.descriptor import DescribedStack, Descriptor
from trawl.descriptor_reader import parse_descriptor
from trawl.errors import CheckpointError, LoadError
from trawl.factors import Factors
from trawl.interpolation import ORDER, check_order, restored
from trawl.layout import ShardLayout, dense_layout
from trawl.observers import Observer, silent
from trawl.records import write_index, write_json
from trawl.shards import FileRange, copy_file, write_shard
from trawl.untrusted import own_file
from trawl.workspace import Workspace
from trawl.writing import fill, slice_of


def open_factored(folder: Path) -> tuple[Checkpoint, Descriptor]:
    """Open a factored checkpoint and check its descriptor against its headers.

    Args:
        folder: a local folder written by ``trawl compress --write factored``.
    Returns: the checkpoint and its descriptor.
    Raises: LoadError: it is not factored, or descriptor and shards contradict each other. CheckpointError: it is
        incomplete.
    Cost: headers only.
    """
    checkpoint = open_folder(folder, factored=True)
    described = checkpoint.config.get("quantization_config")
    if not described:
        raise LoadError(f"{folder} is not factored: its config.json has no quantization_config; it is dense already")
    descriptor = parse_descriptor(described, str(folder / "config.json"))
    descriptor.check_tensors(checkpoint.tensors, str(folder))
    return checkpoint, descriptor


def densify(model: str | Path, out: str | Path, *, overwrite: bool = False, observer: Observer = silent) -> Path:
    """Multiply a factored checkpoint out again into an ordinary dense one.

    Products are formed in float32 from the stored factors and rounded once. With factors stored in float32 the shards
    are byte-identical to those of ``--write dense`` with the same recipe, where the source was written by safetensors.

    Args:
        model: a factored checkpoint folder; never written to.
        out: the folder to make; it appears whole, by one rename.
        overwrite: replace an existing folder.
        observer: told of progress, in bytes.
    Returns: the finished folder.
    Raises: LoadError: the folder is not factored, or is damaged. PlanError: the output cannot be placed.
    Cost: one matrix product of its size times the rank for every replaced matrix; memory for one stored tensor.
    """
    checkpoint, descriptor = open_factored(Path(model))
    state = checkpoint.state()
    layouts = dense_layout(checkpoint, descriptor)
    workspace = Workspace(Path(out))
    needed = sum(layout.nbytes for layout in layouts)
    workspace.check(checkpoint.folder, resume=None, overwrite=overwrite, needed=needed)
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    with workspace.locked({"densify": checkpoint.fingerprint}, resume=False, overwrite=overwrite):
        done = 0
        for layout in layouts:
            write_shard(workspace.staged / layout.name, layout.header, _parts(checkpoint, descriptor, layout))
            done += layout.nbytes
            observer("multiplying out", done, needed)
        for side_file in checkpoint.side_files:
            target = workspace.staged / side_file
            target.parent.mkdir(parents=True, exist_ok=True)
            copy_file(checkpoint.folder / side_file, target)
        write_json(workspace.staged / "config.json", config)
        write_index(checkpoint.folder, layouts, workspace.staged)
        for name in ("README.md", "trawl.json"):  # what was done to the weights still holds
            if os.path.lexists(checkpoint.folder / name):
                copy_file(own_file(checkpoint.folder, name), workspace.staged / name)
        if checkpoint.state() != state:
            raise CheckpointError(f"{checkpoint.folder} changed while it was being read; run the command again")
        workspace.publish(overwrite=overwrite)
    return workspace.out


def _parts(checkpoint: Checkpoint, descriptor: Descriptor, layout: ShardLayout) -> Iterator[FileRange | Tensor]:
    """Yield a dense shard's contents in byte order."""

    @lru_cache(maxsize=1)
    def factors(stack: DescribedStack) -> Factors:
        # Copies, for bits as they were written: a product's last ones may depend on where in memory its factors begin.
        tensors = {factor: checkpoint.read(name).clone() for factor, name in stack.factor_names.items()}
        for side in stack.interpolated:
            check_order(tensors[side + ORDER], f"{checkpoint.folder}: tensor {stack.factor_names[side + ORDER]}")
        stored = Factors(**restored(tensors))  # type: ignore[arg-type]
        return stored.to(dtype=torch.float64 if stack.dtype == "F64" else torch.float32)

    narrow = {part.tensor: part for part in descriptor.narrow}
    for entry in layout.entries:
        if entry.name in narrow:
            yield narrow[entry.name].pad(checkpoint.read(entry.name))
            continue
        if entry.name not in descriptor.slices:
            info = checkpoint.tensors[entry.name]
            yield FileRange(checkpoint.folder / info.shard, info.start, info.stop)
            continue
        target = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        for stack, number in descriptor.slices[entry.name]:
            with slice_of(target, stack.slices[number].view) as written:
                fill(factors(stack), stack.places[number], written)
        yield target
