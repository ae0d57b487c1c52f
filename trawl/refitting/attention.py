"""The o of an attention in front of a refitted FC: it takes over half of what the compressed stream misses by then.

With z what o reads in the compressed model and m what the residual stream behind the attention misses there of the
original's, o grows by ``argmin E‖m/2 − Δᵀ z‖² + λ Σ_j E[z_j²] ‖Δ_j‖²``, where a token counts by
:func:`trawl.calibration.streaming.importance`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trawl.calibration.streaming import Batch, Block, importance
from trawl.errors import PlanError
from trawl.refitting.sums import REPAIRED, RIDGES, Summing, judging


class _Read(BaseException):
    """Raised where o would run: nothing behind it is wanted. No model code catches it."""


@torch.no_grad()
def refit_attention(
    block: Block, name: str, stored: Tensor, original: Sequence[Batch], compressed: Sequence[Batch]
) -> Tensor | None:
    """Return an o that gives half of what the stream misses on top; None where that does not help.

    Args:
        block: with its weights in memory.
        name: of o, as the block tells it.
        stored: o as it is stored, canonical (inner, hidden).
        original: what enters the block in the original model.
        compressed: what enters it in the compressed one.
    Returns: (inner, hidden) float64. Of the ridges, and o as it is, the best on the tokens that judge.
    Cost: two passes of the attention, and a product of all tokens with (inner, inner) and (inner, hidden).
    """
    low, chosen = stored.to(compressed[0].hidden.device, torch.float32), judging(len(compressed))
    parts = {judged: Summing(low.shape[0], low.shape[1], low.device) for judged in (False, True)}
    for number, (before, now) in enumerate(zip(original, compressed, strict=True)):
        exact, given = (_read(block, batch, name) for batch in (before, now))
        wanted = before.hidden.flatten(0, -2) + exact @ low  # but for biases, which both have
        missing = (before.hidden - now.hidden).flatten(0, -2) + (exact - given) @ low
        parts[number in chosen].add(given, REPAIRED * missing, importance(wanted))
    judged = parts[True].sums()
    fitted = parts[False].sums() if len(chosen) < len(compressed) else judged
    nothing, every = low.double().new_zeros(low.shape), torch.arange(len(low), device=low.device)
    changes = {ridge: fitted.problem(nothing, ridge, centred=False).solve(every) for ridge in RIDGES}
    errors = {ridge: judged.problem(nothing, ridge, centred=False).error(every, changes[ridge]) for ridge in RIDGES}
    best = min(errors, key=errors.__getitem__)
    if not judged.energy or errors[best] >= 1:
        return None
    whole = fitted if fitted is judged else fitted + judged
    return stored.to(low.device, torch.float64) + whole.problem(nothing, best, centred=False).solve(every)


def _read(block: Block, batch: Batch, name: str) -> Tensor:
    """Return what a weight reads, (tokens, in); the block is run no further."""
    found: list[Tensor] = []

    def stop(seen: str, x: Tensor) -> None:
        if seen == name:
            found.append(x.flatten(0, -2))
            raise _Read

    try:
        block.run(batch, stop)
    except _Read:
        return found[0]
    raise PlanError(f"layer {block.number} never comes to {name}; pass --no-refit")
