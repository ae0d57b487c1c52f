"""Narrowing and refitting a plan's FCs, block by block, on what the compressed model feeds them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from trawl.calibration import Calibration
from trawl.calibration.gathering import BATCH_TOKENS
from trawl.calibration.streaming import Batch, Block, BlockChain
from trawl.factors import Factors
from trawl.families import Placement
from trawl.models import fast_products
from trawl.narrowing import Cut, Narrowing, padded_tensors
from trawl.narrowing.cuts import bias_of
from trawl.observers import Observer, silent
from trawl.planned import Plan
from trawl.processor import multiplies_bfloat16
from trawl.refitting.fitting import Refit
from trawl.refitting.inner import InnerFunction
from trawl.refitting.outputs import refit_o
from trawl.writing import fill, slice_of


def seal_refitted(
    planned: Plan, calibration: Calibration, paths: Mapping[str, Path], observer: Observer = silent
) -> dict[str, float]:
    """Choose the units of FCs that stay, refit what writes and what reads them, and seal the narrowings.

    Block by block, both models run: the original one, and the compressed one with all that is sealed. The o in front of
    an FC that is narrowed takes over half of what the residual stream misses there. Of each FC units are chosen by what
    it computes of the compressed model's inputs; then up and gate change by what gives these outputs
    best, and half of what the residual stream misses by then, see :mod:`trawl.refitting.solving`, and the reader is
    solved anew. A sixteenth of the text judges: changes that do not help there are dropped. An FC behind which a norm
    stands is fitted on the original model's inputs instead, to its own outputs alone.

    Args:
        planned: with FCs to refit; all its other stacks are sealed.
        calibration: the text.
        paths: by stack where its file lies or is to lie; those of FCs that are there stay as they are.
        observer: told of progress, in blocks.
    Returns: seconds by stack, without the passes of the model.
    Raises: PlanError: an FC's units depend on one another, or the model cannot be run block by block.
        CheckpointError: NaN or Inf comes up, or what was fitted does not fit the stored dtype.
    Cost: three forward passes and two of attention, and some forty-five products of all tokens with a matrix of each
        FC's size. Memory: the hidden states of all windows four times, and of one FC inputs and outputs, twice for a
        moment, and the slopes of its writers in bfloat16.
    """
    cuts = {cut.stack.layers[0]: cut for cut in planned.refitted}
    unfinished = {number for number, cut in cuts.items() if not paths[cut.stack.name].exists()}
    if not unfinished:
        return {}
    chain, windows = calibration.chain, calibration.windows
    items = {item.stack.name: item for item in planned.stacks}
    batch = chain.enter([windows[:1]])[0]
    adds = _adds(planned, chain, cuts[min(cuts)].reader, batch)
    seconds: dict[str, float] = {}
    total = max(unfinished) + 1
    with fast_products() if calibration.compute == "bf16" else nullcontext():
        original = chain.enter(torch.split(windows, max(BATCH_TOKENS // windows.shape[1], 1)))
        compressed = original
        for number in range(total):
            observer("refitting", number, total)
            left = _run(chain, number, {}, original)
            if number in unfinished:
                cut, changed, o = cuts[number], _changed(planned, number, paths) if adds else {}, None
                if adds and compressed is not original and cut.o and _adds(planned, chain, cut.o, batch, cut.reader):
                    o = _refitted_o(planned, chain, cut.o, original, compressed)
                    changed |= {} if o is None else _stored(planned, cut.o, o)
                with chain.loaded(number, changed) as block:
                    fc = _open(planned, chain, block, cut, calibration.compute)
                    fc.read(compressed if adds else original, left if adds else None)
                    began, name = time.perf_counter(), cut.stack.name
                    replace(fc.solve(), o=o).save(paths[name], {"stack": items[name].to_json()})
                    seconds[name] = time.perf_counter() - began
            changed = _changed(planned, number, paths)
            if not adds or (compressed is original and not changed):
                compressed = left
            else:
                compressed = _run(chain, number, changed, compressed)
            original = left
    observer("refitting", total, total)
    return seconds


def _adds(planned: Plan, chain: BlockChain, part: Placement, batch: Batch, behind: Placement | None = None) -> bool:
    """Whether what a matrix gives is added to the residual stream as it is, as one batch shows.

    What reads the stream ``behind`` it is silenced.
    """
    stored = part.view.apply(planned.checkpoint.read(part.tensor))
    without = _stored(planned, part, torch.zeros_like(stored))
    quiet = _stored(planned, behind, stored.new_zeros(behind.shape)) if behind else None
    name = chain.weights_of(part.layer)[part.tensor][0]
    return chain.adds(part.layer, batch, (name, stored), without, quiet)


def _refitted_o(
    planned: Plan, chain: BlockChain, part: Placement, original: Sequence[Batch], compressed: Sequence[Batch]
) -> Tensor | None:
    """Return an o where it changes, canonical, in the stored dtype."""
    checkpoint = planned.checkpoint
    stored, bias = part.view.apply(checkpoint.read(part.tensor)), bias_of(checkpoint, part.tensor)
    with chain.loaded(part.layer) as block:
        name = chain.weights_of(part.layer)[part.tensor][0]
        read = checkpoint.read(bias) if bias else None
        return refit_o(block, name, stored, original, compressed, bias=read)


def _stored(planned: Plan, part: Placement, values: Tensor) -> dict[str, Tensor]:
    """Return a stored tensor, by its name, in which one slice is another."""
    stored = planned.checkpoint.read(part.tensor).clone()
    part.view.scatter(values, stored)
    return {part.tensor: stored}


def _run(chain: BlockChain, number: int, changed: Mapping[str, Tensor], batches: Sequence[Batch]) -> list[Batch]:
    """Run batches through a block."""
    with chain.loaded(number, changed) as block:
        return [block.run(batch) for batch in batches]


def _changed(planned: Plan, number: int, paths: Mapping[str, Path]) -> dict[str, Tensor]:
    """Return what the compressed model has in place of a block's stored tensors, of all stacks sealed by now."""
    checkpoint = planned.checkpoint
    found: dict[str, Tensor] = {}
    cuts = {cut.stack.name: cut for cut in planned.narrowed.cuts} if planned.narrowed else {}
    for item in planned.stacks:
        path = paths[item.stack.name]
        slices = [s for s, part in enumerate(item.stack.slices) if part.layer == number]
        if not slices or not path.exists():
            continue
        if item.stack.name in cuts:
            found |= padded_tensors(checkpoint, cuts[item.stack.name], Narrowing.load(path))
            continue
        factors = Factors.load(path)[0]
        for s in slices:
            part = item.stack.slices[s]
            target = found.setdefault(part.tensor, checkpoint.read(part.tensor).clone())
            with slice_of(target, part.view) as written:
                fill(factors, item.stack.places[s], written)
    return found


def _open(planned: Plan, chain: BlockChain, block: Block, cut: Cut, compute: str) -> Refit:
    """Return the FC of a block, as yet without tokens."""
    parts, checkpoint = cut.stack.slices, planned.checkpoint
    names = chain.weights_of(block.number)
    shapes = {part: checkpoint.tensors[part.tensor].shape for part in parts}
    inner = InnerFunction(block, parts, {part: names[part.tensor][0] for part in parts}, shapes)
    outputs = planned.moments.outputs.matrix(cut.reader) if planned.moments and planned.moments.outputs else None
    low = compute == "bf16" and multiplies_bfloat16(chain.device)
    return Refit(checkpoint, cut, inner, torch.bfloat16 if low else torch.float32, outputs)
