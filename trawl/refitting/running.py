"""Narrowing and refitting a plan's FCs, block by block, on what the compressed model feeds them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors.torch import save as serialize
from torch import Tensor

from trawl.calibration import Calibration
from trawl.calibration.block import Batch, Block
from trawl.calibration.gathering import BATCH_TOKENS
from trawl.calibration.streaming import BlockChain
from trawl.factors import Factors
from trawl.families import OUTSIDE
from trawl.models import fast_products
from trawl.narrowing import Cut, Narrowing, padded_tensors
from trawl.observers import Observer, silent
from trawl.planned import Plan
from trawl.processor import multiplies_bfloat16
from trawl.refitting.fitting import Refit, judging
from trawl.refitting.inner import InnerFunction
from trawl.refitting.last_norm import find_last_norm, scale_last_norm
from trawl.shards import sealed
from trawl.writing import fill, slice_of


def seal_refitted(
    planned: Plan, calibration: Calibration, paths: Mapping[str, Path], last_norm: Path, observer: Observer = silent
) -> dict[str, float]:
    """Choose the units of FCs that stay, refit what writes and what reads them, and seal the narrowings.

    Block by block, both models run: the original one, and the compressed one with all that is sealed. Of each FC units
    are chosen by what it computes of the compressed model's inputs; then up and gate change by what gives these outputs
    best, and half of what the residual stream misses by then, see :mod:`trawl.refitting.solving`, and the reader is
    solved anew. A sixteenth of the text judges: changes that do not help there are dropped. An FC behind which a norm
    stands is fitted on the original model's inputs instead, to its own outputs alone. Where the compressed model was
    run, and neither embeddings nor head are decomposed, the norm in front of the head is scaled last, see
    :mod:`trawl.refitting.last_norm`.

    Args:
        planned: with FCs to refit; all its other stacks are sealed.
        calibration: the text.
        paths: by stack where its file lies or is to lie; those of FCs that are there stay as they are.
        last_norm: likewise of the tensors of the norm in front of the head; of none where it stays as it is.
        observer: told of progress, in blocks.
    Returns: seconds by stack, without the passes of the model.
    Raises: PlanError: an FC's units depend on one another, or the model cannot be run block by block.
        CheckpointError: NaN or Inf comes up, or what was fitted does not fit the stored dtype.
    Cost: three forward passes, and some forty-five products of all tokens with a matrix of each FC's size; of every
        second token that judges six products with the head. Memory: the hidden states of all windows four times,
        and of one FC inputs and outputs, twice for a moment, and the slopes of its writers in bfloat16.
    """
    cuts = {cut.stack.layers[0]: cut for cut in planned.refitted}
    unfinished = {number for number, cut in cuts.items() if not paths[cut.stack.name].exists()}
    if not unfinished and last_norm.exists():
        return {}
    chain, windows = calibration.chain, calibration.windows
    items = {item.stack.name: item for item in planned.stacks}
    adds = _adds(planned, chain, cuts[min(cuts)], chain.enter([windows[:1]])[0])
    seconds: dict[str, float] = {}
    total = len(chain)
    with fast_products() if calibration.compute == "bf16" else nullcontext():
        at_once = min(BATCH_TOKENS // windows.shape[1], len(windows) // 2)  # a batch is left to judge, where it can be
        original = chain.enter(torch.split(windows, max(at_once, 1)))
        compressed = original
        scales = adds and _scales_last_norm(planned, chain, original[0])
        for number in range(total):
            observer("refitting", number, total)
            left = _run(chain, number, {}, original)
            if number in unfinished:
                with chain.loaded(number, _changed(planned, number, paths) if adds else {}) as block:
                    fc = _open(planned, chain, block, cuts[number], calibration.compute)
                    fc.read(compressed if adds else original, left if adds else None)
                    began, name = time.perf_counter(), cuts[number].stack.name
                    fc.solve().save(paths[name], {"stack": items[name].to_json()})
                    seconds[name] = time.perf_counter() - began
            changed = _changed(planned, number, paths)
            if not adds or (compressed is original and not changed):
                compressed = left
            else:
                compressed = _run(chain, number, changed, compressed)
            original = left
    gain, scaled = _scaled_last_norm(chain, original, compressed) if scales else (1.0, {})
    with sealed(last_norm) as file:
        file.write(serialize(scaled, metadata={"gain": str(gain)}))
    observer("refitting", total, total)
    return seconds


def _scales_last_norm(planned: Plan, chain: BlockChain, batch: Batch) -> bool:
    """Whether the norm in front of the head is to be scaled; what is wrong with the head shows before hours pass."""
    if any(part.role in OUTSIDE for item in planned.stacks for part in item.stack.slices):
        return False
    with chain.outer_weights():
        return find_last_norm(chain, batch) is not None


def _scaled_last_norm(
    chain: BlockChain, original: Sequence[Batch], compressed: Sequence[Batch]
) -> tuple[float, dict[str, Tensor]]:
    """Return by what the norm in front of the head is scaled, and its tensors, as the batches that judge say."""
    judges = sorted(judging(len(original)))
    return scale_last_norm(chain, [original[each] for each in judges], [compressed[each] for each in judges])


def _adds(planned: Plan, chain: BlockChain, cut: Cut, batch: Batch) -> bool:
    """Whether what an FC gives is added to the residual stream as it is, as one batch shows."""
    reader, number = cut.reader, cut.stack.layers[0]
    stored = planned.checkpoint.read(reader.tensor)
    with slice_of(without := stored.clone(), reader.view) as written:
        written.zero_()
    name = chain.weights_of(number)[reader.tensor][0]
    return chain.adds(number, batch, (name, reader.view.apply(stored)), {reader.tensor: without})


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
