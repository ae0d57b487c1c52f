"""The o of an attention in front of a refitted FC: it takes over half of what the compressed stream misses by then.

With z what o reads in the compressed model and m what the residual stream behind the attention misses there of the
original's, o grows by ``argmin E‖m/2 − Δᵀ z‖² + ρ Σ_j E[z_j²] ‖Δ_j‖²``, where a token counts by
:func:`trawl.calibration.streaming.importance` of the original's stream there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trawl.calibration.streaming import Batch, Block, importance
from trawl.errors import PlanError
from trawl.narrowing.selection import Problem
from trawl.refitting.inner import Read
from trawl.refitting.judging import REPAIRED, RIDGES, judging
from trawl.refitting.sums import Summing


@torch.no_grad()
def refit_o(
    block: Block,
    name: str,
    stored: Tensor,
    original: Sequence[Batch],
    compressed: Sequence[Batch],
    *,
    bias: Tensor | None = None,
) -> Tensor | None:
    """Return an o that gives half of what the stream misses on top; None where that does not help.

    Of several ridges, and o as it is, the best on the tokens that judge; a single batch leaves none to judge.

    Args:
        block: with its weights in memory.
        name: of o, as the block tells it.
        stored: o as it is stored, canonical (inner, hidden).
        original: what enters the block in the original model.
        compressed: what enters it in the compressed one.
        bias: what is added to its outputs, (hidden,).
    Returns: (inner, hidden) in the stored dtype, on the CPU.
    Raises: PlanError: the block never comes to o.
    Cost: two passes of the attention, and a product of all tokens with (inner, inner) and three with (inner, hidden);
        O(inner³) for each ridge.
    """
    if len(compressed) < 2:
        return None
    low, chosen = stored.to(compressed[0].hidden.device, torch.float32), judging(len(compressed))
    parts = {judged: Summing(low.shape[0], low.shape[1], low.device) for judged in (False, True)}
    for number, (before, now) in enumerate(zip(original, compressed, strict=True)):
        exact, given = (_read(block, batch, name) for batch in (before, now))
        stream = before.hidden.flatten(0, -2) + exact @ low
        weight = importance(stream if bias is None else stream + bias.to(stream))
        missing = (before.hidden - now.hidden).flatten(0, -2) + (exact - given) @ low
        parts[number in chosen].add(given, REPAIRED * missing, weight)
    fitted, judged = parts[False].sums(), parts[True].sums()
    if not judged.energy:
        return None
    nothing, every = torch.zeros_like(low, dtype=torch.float64), torch.arange(len(low), device=low.device)
    judge, best, least = judged.problem(nothing, RIDGES[0], centred=False), None, 1.0
    for ridge in RIDGES:
        change = _grown(stored, fitted.problem(nothing, ridge, centred=False)) - stored.to(nothing)
        if (error := judge.error(every, change)) < least:  # nor is a change that does not fit the stored dtype
            best, least = ridge, error
    if best is None:
        return None
    found = _grown(stored, (fitted + judged).problem(nothing, best, centred=False)).to(stored.dtype).cpu()
    return found if bool(torch.isfinite(found).all()) else None


def _grown(stored: Tensor, problem: Problem) -> Tensor:
    """Return the values, float64, that storage has for a matrix with its best change."""
    change = problem.solve(torch.arange(len(stored), device=problem.second.device))
    return (stored.to(change) + change).to(stored.dtype).double()


def _read(block: Block, batch: Batch, name: str) -> Tensor:
    """Return what a weight reads, (tokens, in); the block is run no further."""
    found: list[Tensor] = []

    def stop(seen: str, x: Tensor) -> None:
        if seen == name:
            found.append(x.flatten(0, -2))
            raise Read

    try:
        block.run(batch, stop)
    except Read:
        return found[0]
    raise PlanError(f"layer {block.number} never comes to {name}; pass --no-refit")
