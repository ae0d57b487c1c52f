"""Refitting a plan's narrowed FCs, block by block, on what the original model computes."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

import torch

from trawl.calibration import Calibration
from trawl.calibration.gathering import BATCH_TOKENS
from trawl.calibration.streaming import Block, BlockChain
from trawl.families import FC
from trawl.models import fast_products
from trawl.narrowing import Cut, Narrowing
from trawl.narrowing.selection import root_of
from trawl.observers import Observer, silent
from trawl.planning import Plan
from trawl.refitting.fitting import Refit
from trawl.refitting.inner import InnerFunction


def seal_refitted(
    planned: Plan, calibration: Calibration, paths: Mapping[str, Path], observer: Observer = silent
) -> dict[str, float]:
    """Refit what writes and what reads the units that stay, and seal the narrowings anew.

    Per FC, up and then gate change by what gives the original FC's outputs best, see
    :mod:`trawl.refitting.solving`, and the reader is solved anew after each. A sixteenth of the text judges: a
    change that does not help there is dropped.

    Args:
        planned: with narrowed FCs.
        calibration: the text.
        paths: by stack the sealed file; those that are refitted already stay as they are.
        observer: told of progress, in blocks.
    Returns: seconds by stack, without the passes of the model.
    Raises: PlanError: an FC's units depend on one another, or the model cannot be run block by block.
        CheckpointError: NaN or Inf comes up, or what was fitted does not fit the stored dtype.
    Cost: a forward pass, and some sixty products of all tokens with a matrix of each FC's size. Memory: the hidden
        states of all windows, and of one FC the inputs, the outputs twice and the units that stay.
    """
    assert planned.narrowed is not None
    cuts = {
        cut.stack.layers[0]: cut
        for cut in planned.narrowed.cuts
        if cut.reader.role in FC and cut.keep < cut.units and not Narrowing.load(paths[cut.stack.name]).refitted
    }
    if not cuts:
        return {}
    items = {item.stack.name: item for item in planned.stacks}
    seconds: dict[str, float] = {}
    total = max(cuts) + 1
    chain, windows = calibration.chain, calibration.windows
    with fast_products() if calibration.compute == "bf16" else nullcontext():
        batches = chain.enter(torch.split(windows, max(BATCH_TOKENS // windows.shape[1], 1)))
        for number in range(total):
            observer("refitting", number, total)
            with chain.loaded(number) as block:
                if number not in cuts:
                    batches = [block.run(batch) for batch in batches]
                    continue
                name = cuts[number].stack.name
                fc = _open(planned, chain, block, cuts[number], calibration)
                batches = fc.read(batches)
                began = time.perf_counter()
                found = fc.solve(Narrowing.load(paths[name]))
                found.save(paths[name], {"stack": items[name].to_json()})
                seconds[name] = time.perf_counter() - began
    observer("refitting", total, total)
    return seconds


def _open(planned: Plan, chain: BlockChain, block: Block, cut: Cut, calibration: Calibration) -> Refit:
    """Return the FC of a block, as yet without tokens."""
    parts, checkpoint = cut.stack.slices, planned.checkpoint
    names = chain.weights_of(block.number)
    shapes = {part: checkpoint.tensors[part.tensor].shape for part in parts}
    inner = InnerFunction(block, parts, {part: names[part.tensor][0] for part in parts}, shapes)
    outputs = planned.moments.outputs.matrix(cut.reader) if planned.moments and planned.moments.outputs else None
    dtype = torch.bfloat16 if calibration.compute == "bf16" else torch.float32
    return Refit(checkpoint, inner, dtype, None if outputs is None else root_of(outputs.to(chain.device)))
