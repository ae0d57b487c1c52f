"""Anchored runs: a plan's stacks one block after the other, each fitted on what the compressed model feeds it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import torch

from trawl.anchoring.blocks import AnchoredBlock
from trawl.calibration import Calibration
from trawl.calibration.gathering import BATCH_TOKENS
from trawl.observers import Observer, silent
from trawl.planned import Plan, PlannedStack


def seal_anchored(
    planned: Plan,
    calibration: Calibration,
    paths: Mapping[str, Path],
    absmax: Mapping[str, float],
    observer: Observer = silent,
) -> dict[str, float]:
    """Seal the factors of a plan's stacks, each fitted on the inputs that the compressed model gives it.

    Block by block, and within a block in the order of the computation, each stack is decomposed in place of its
    matrices W as ``W̃``, what gives the original model's outputs best, weighed by the moments of the compressed model's
    inputs, see :mod:`trawl.anchoring.drift`. What is found stands in the compressed model from then on. A stack over
    several stages is found at its first; its later slices' middles are refitted when their inputs are known.

    Args:
        planned: of stacks within one layer each.
        calibration: the text.
        paths: by stack where its file is to lie; files that are there are used as they are.
        absmax: by stack the largest magnitude of any entry.
        observer: told of progress, in passes of both models through one block.
    Returns: seconds by stack, without the passes; 0 for one that was sealed before.
    Raises: CheckpointError: NaN or Inf comes up. PlanError: the model cannot be run block by block.
    Cost: both models go through every block up to the last stack, and once more for each stage in which stacks are to
        be found, as far as its inputs or, for o and down, to the end: at most five forward passes of each without the
        head. Memory: two blocks in float32, moments of the widest input in float64, all hidden states of both models.
    """
    chain, windows = calibration.chain, calibration.windows
    original = chain.enter(torch.split(windows, max(BATCH_TOKENS // windows.shape[1], 1)))
    compressed = original
    layers: dict[int, list[PlannedStack]] = defaultdict(list)
    for item in planned.stacks:
        layers[item.stack.layers[0]].append(item)
    seconds = {item.stack.name: 0.0 for item in planned.stacks}
    adds: dict[str, bool] = {}

    def block_of(number: int) -> AnchoredBlock:
        return AnchoredBlock(planned, chain, number, layers[number], paths, absmax, adds)

    count = max(layers) + 1
    blocks = map(block_of, range(count))
    done, total = 0, sum(1 + sum(bool(block.unfinished(roles)) for roles in block.stages) for block in blocks)
    for block in map(block_of, range(count)):
        for roles in block.stages:
            if block.unfinished(roles):
                for name, spent in block.find(roles, original, compressed).items():
                    seconds[name] += spent
                observer("anchoring", done := done + 1, total)
            block.put(roles)
        original, compressed = block.leave(original, compressed)
        observer("anchoring", done := done + 1, total)
    return seconds
