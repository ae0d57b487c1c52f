"""The output folder of a run: shards, config, index and side files, from the sealed files of its stacks."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from trawl.checkpoint import Checkpoint
from trawl.descriptor import Descriptor
from trawl.factors import Factors
from trawl.narrowing import NarrowedTensors, Narrowing
from trawl.observers import Observer
from trawl.planned import Plan, PlannedStack
from trawl.records import write_index, write_json
from trawl.shards import copy_file, sealed
from trawl.stacking import Stack
from trawl.workspace import Workspace
from trawl.writing import Advance, DenseWriter, FactoredWriter, SquaredErrors


def load_result(item: PlannedStack, path: Path) -> Factors | Narrowing:
    """Return what a stack's sealed file holds."""
    return Factors.load(path)[0] if item.method else Narrowing.load(path)


def factor_path(workspace: Workspace, stack: Stack) -> Path:
    """Where a stack's factor file lies while a run works."""
    return workspace.factors / f"{stack.name}.safetensors"


def last_norm_path(workspace: Workspace) -> Path:
    """Where the tensors of the norm in front of the head lie while a run works that scales it."""
    return workspace.factors / "last-norm.safetensors"  # no stack has such a name


def load_last_norm(workspace: Workspace) -> tuple[float, dict[str, Tensor]]:
    """Return what the norm in front of the head is scaled by, and its tensors by name; 1 and none where it stays."""
    path = last_norm_path(workspace)
    if not path.exists():
        return 1.0, {}
    with safe_open(path, framework="pt") as file:
        return float(file.metadata()["gain"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def write_shards(planned: Plan, workspace: Workspace, absmax: Mapping[str, float], observer: Observer) -> SquaredErrors:
    """Write the output's shards, and return how far they are from the source.

    A shard's squared errors are sealed beside the factor files right after it, so that a resumed run keeps both or
    makes both again. Of units that are left out errors are measured when they are chosen.
    """

    @lru_cache(maxsize=1)  # shards hold stacks in runs
    def factors(name: str) -> Factors:
        return Factors.load(workspace.factors / f"{name}.safetensors")[0].interpolated()

    @lru_cache(maxsize=1)
    def narrowing(name: str) -> Narrowing:
        return Narrowing.load(workspace.factors / f"{name}.safetensors")

    stacks = tuple(item.stack for item in planned.factored)
    checkpoint = planned.checkpoint
    jobs: list[tuple[str, int, Callable[[Path, Advance], SquaredErrors]]]
    if planned.layouts:
        narrowed = NarrowedTensors(checkpoint, planned.narrowed, narrowing).get if planned.narrowed else _unchanged
        _, last_norm = load_last_norm(workspace)
        descriptor = planned.descriptor or Descriptor(())
        compressed = FactoredWriter(
            checkpoint,
            descriptor,
            stacks,
            factors,
            absmax,
            lambda name: last_norm[name] if name in last_norm else narrowed(name),
        )
        jobs = [(layout.name, layout.nbytes, partial(compressed.write, layout)) for layout in planned.layouts]
    else:
        denoised = DenseWriter(checkpoint, stacks, factors, absmax)
        jobs = [(shard.name, shard.nbytes, partial(denoised.write, shard)) for shard in checkpoint.shards]
    total, done = planned.output_bytes, 0
    errors = SquaredErrors()
    workspace.keep({name for name, _, _ in jobs})

    def advance(count: int) -> None:
        nonlocal done
        done += count
        observer("writing", done, total)

    for name, nbytes, write in jobs:
        record = workspace.factors / f"{name}.errors.json"
        target = workspace.staged / name
        if target.exists() and record.exists():
            part = SquaredErrors.from_json(json.loads(record.read_bytes()))
            advance(nbytes)
        else:
            part = write(target, advance)
            with sealed(record) as file:
                file.write(json.dumps(part.to_json()).encode())
        errors.merge(part)
    return errors


def _unchanged(_: str) -> None:
    """Say of every tensor that it stays as it is."""


def write_config(planned: Plan, staged: Path) -> None:
    """Replace the copied config.json and index by those of a factored or a narrow checkpoint."""
    if not planned.layouts:
        return
    config = dict(planned.narrowed.config if planned.narrowed else planned.checkpoint.config)
    if planned.descriptor:
        config["quantization_config"] = planned.descriptor.to_json()
    write_json(staged / "config.json", config)
    write_index(planned.checkpoint.folder, planned.layouts, staged)


def copy_side_files(checkpoint: Checkpoint, staged: Path) -> None:
    """Carry over configuration, tokenizer, chat template and whatever else lies beside the weights."""
    for name in checkpoint.side_files:
        target = staged / name
        target.parent.mkdir(parents=True, exist_ok=True)
        copy_file(checkpoint.folder / name, target)
