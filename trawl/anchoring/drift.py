"""Drift: what weights read in the compressed model, and what that misses of what the original model computes.

A weight W of the original model gives ``W x + b`` for its input x. Given x', the input in the compressed model, the
matrix W̃ that gives the original output best is, with ``d = x − x'``,

    W̃ = argmin E‖W x − W̃ x'‖² + λ ‖W̃ − W‖² = W + W E[d x'ᵀ] (E[x' x'ᵀ] + λ 1)⁻¹,

W itself where nothing has drifted or nothing was seen. A weight that writes into the residual stream can repair what
the stream has lost on the way there as well: with d what the stream behind it misses while it still is W,

    W̃ = argmin E‖W x' + d − W̃ x'‖² + λ ‖W̃ − W‖² = W + E[d x'ᵀ] (E[x' x'ᵀ] + λ 1)⁻¹.

There a token counts by 1 / mean(h²), with h the stream behind W in the original model: whatever reads the stream
normalises it first. Without that, the few tokens on which some models let the stream grow a thousandfold decide alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from trawl.calibration.block import Batch, Block, importance
from trawl.calibration.gathering import MomentSum
from trawl.errors import CheckpointError

SHRINKAGE = 1e-2  # λ, of the mean eigenvalue: what few tokens say is not followed far


@dataclass(frozen=True, eq=False)
class Drift:
    """Moments of one input x' of the compressed model, weighted means over tokens, and what they tell of d.

    Attributes:
        seen: E[x' x'ᵀ], (n, n) float32.
        mean: E[x'], (n,) float64.
        gain: E[d x'ᵀ] (E[x' x'ᵀ] + λ 1)⁻¹, (m, n) float64.
        tokens: how many.
        of_output: whether d is what the residual stream behind the weights misses, not x − x', what the input does.
    """

    seen: Tensor
    mean: Tensor
    gain: Tensor
    tokens: int
    of_output: bool


@dataclass(eq=False)
class DriftSum:
    """Σ w x' x'ᵀ, Σ w d x'ᵀ, Σ w x' and Σ w: products of each batch in float32, their sums in float64."""

    seen: MomentSum
    missed: Tensor
    total: Tensor
    of_output: bool
    weight: float = 0.0

    @classmethod
    def of_widths(cls, outputs: int, inputs: int, device: torch.device, *, of_output: bool) -> DriftSum:
        """Return the sums of no tokens."""
        missed = torch.zeros(outputs, inputs, dtype=torch.float64, device=device)
        return cls(MomentSum.of_width(inputs, device), missed, missed.new_zeros(inputs), of_output)

    def add(self, x: Tensor, deviation: Tensor, weight: Tensor) -> None:
        """Add the rows of x', (tokens, n), of d, (tokens, m), and of w, (tokens, 1)."""
        scaled = weight * x
        self.seen.add(weight.sqrt() * x)
        self.missed += deviation.T @ scaled
        self.total += scaled.sum(0)
        self.weight += float(weight.sum(dtype=torch.float64))

    def drift(self) -> Drift:
        """Return what comes out, and free the sums."""
        tokens, weight = self.seen.tokens, self.weight or 1.0
        seen = self.seen.matrix().mul_(tokens / weight)
        ridged = seen.double()
        ridged.diagonal().add_(SHRINKAGE * float(ridged.diagonal().mean()) or 1.0)
        gain = torch.cholesky_solve(self.missed.T.cpu() / weight, torch.linalg.cholesky(ridged)).T
        return Drift(seen, self.total.cpu() / weight, gain, tokens, self.of_output)


class _Enough(BaseException):
    """Raised when the last wanted input was seen: nothing behind it matters. No model code catches it."""


def inputs(block: Block, batch: Batch, wanted: Iterable[str], *, whole: bool) -> tuple[dict[str, Tensor], Batch]:
    """Run a block, and return the wanted inputs as rows; without ``whole`` only as far as the last of them."""
    found: dict[str, Tensor] = {}
    missing = set(wanted)

    def see(name: str, x: Tensor) -> None:
        if name in missing:
            found[name] = x.reshape(-1, x.shape[-1])
            missing.discard(name)
            if not missing and not whole:
                raise _Enough

    with suppress(_Enough):
        batch = block.run(batch, see)
    return found, batch


def observe(
    original: tuple[Block, Sequence[Batch]],
    compressed: tuple[Block, Sequence[Batch]],
    wanted: Iterable[str],
    *,
    stream: bool,
) -> dict[str, Drift]:
    """Run both models' batches through a block and return the drift of what some of its weights read.

    Args:
        original: the block of the original model, and the batches that enter it.
        compressed: the block of the compressed model, and its batches, of the same tokens.
        wanted: names of weights in the block.
        stream: whether to take for d what the block's output misses, in place of what the input does.
    Returns: drifts by name, one for all weights that are given the same tensor; none for an expert without tokens.
    Raises: CheckpointError: NaN or Inf comes up.
    Cost: a run of both, up to the last weight wanted or, with ``stream``, to the end; (n + 2 m) · n operations a token.
    """
    sums: dict[str, DriftSum] = {}
    first: dict[str, str] = {}
    for there, here in zip(original[1], compressed[1], strict=True):
        before, left = inputs(original[0], there, wanted, whole=stream)
        now, arrived = inputs(compressed[0], here, wanted, whole=stream)
        behind = left.hidden.flatten(0, -2) if stream else None
        lost = None if behind is None else behind - arrived.hidden.flatten(0, -2)
        given: dict[tuple[int, torch.Size], str] = {}
        for name, x in now.items():
            first.setdefault(name, given.setdefault((x.data_ptr(), x.shape), name))
            if first[name] == name:
                d = _missing(before.get(name), x, here.hidden.shape[:-1].numel()) if lost is None else lost
                if name not in sums:
                    sums[name] = DriftSum.of_widths(d.shape[1], x.shape[1], x.device, of_output=stream)
                sums[name].add(x, d, x.new_ones(len(x), 1) if behind is None else importance(behind))
    for name, found in sums.items():
        if not (found.total.isfinite().all() and found.missed.isfinite().all()):
            raise CheckpointError(
                f"layer {compressed[0].number}: the input of {name} holds NaN or Inf on the calibration text, in the "
                "original model or with the layers before it replaced; choose a larger rank"
            )
    drifts = {name: found.drift() for name, found in sums.items()}
    return {name: drifts[each] for name, each in first.items()}


def _missing(before: Tensor | None, now: Tensor, tokens: int) -> Tensor:
    """Return x − x'; nothing for an expert, whose tokens each model routes by itself: it keeps its function."""
    if before is None or before.shape != now.shape or len(now) != tokens:
        return torch.zeros_like(now)
    return before - now
