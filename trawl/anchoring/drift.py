"""Drift: what weights read in the compressed model, and what that misses of what the original model computes.

A weight W of the original model gives ``W x + b`` for its input x. Given x', the input in the compressed model, the
matrix W̃ that gives the original output best is, with ``d = x − x'``,

    W̃ = argmin E‖W x − W̃ x'‖² + λ ‖W̃ − W‖² = W + W E[d x'ᵀ] (E[x' x'ᵀ] + λ 1)⁻¹,

W itself where nothing has drifted or nothing can be told of it; :class:`Halves` chooses λ. A weight that writes into
the residual stream can repair what the stream has lost on the way there as well: with d what the stream behind it
misses while it still is W,

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

from trawl.calibration.gathering import MomentSum
from trawl.calibration.streaming import Batch, Block
from trawl.errors import CheckpointError

SHRINKAGES = (1e-2, 1e-1, 1.0)  # λ to try, of the mean eigenvalue
EPSILON = 1e-6  # of mean squares, as in norms of models


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
    weight: float = 0.0

    @classmethod
    def of_widths(cls, outputs: int, inputs: int, device: torch.device) -> DriftSum:
        """Return the sums of no tokens."""
        missed = torch.zeros(outputs, inputs, dtype=torch.float64, device=device)
        return cls(MomentSum.of_width(inputs, device), missed, missed.new_zeros(inputs))

    def add(self, x: Tensor, deviation: Tensor, weight: Tensor) -> None:
        """Add the rows of x', (tokens, n), of d, (tokens, m), and of w, (tokens, 1)."""
        scaled = weight * x
        self.seen.add(weight.sqrt() * x)
        self.missed += deviation.T @ scaled
        self.total += scaled.sum(0)
        self.weight += float(weight.sum(dtype=torch.float64))


@dataclass(eq=False)
class Halves:
    """The sums of both halves of each batch, so that each may judge what the other says of d.

    λ is the one of ``SHRINKAGES`` by which the gain of either half leaves least of E‖d − gain x'‖² in the other; where
    none leaves less than no gain at all, there is none. Few tokens for many inputs are not followed so.

    Reference: Stone 1974, doi:10.1111/j.2517-6161.1974.tb00994.x
    """

    parts: tuple[DriftSum, DriftSum]
    of_output: bool

    @classmethod
    def of_widths(cls, outputs: int, inputs: int, device: torch.device, *, of_output: bool) -> Halves:
        """Return the sums of no tokens."""
        one, other = (DriftSum.of_widths(outputs, inputs, device) for _ in range(2))
        return cls((one, other), of_output)

    def add(self, x: Tensor, deviation: Tensor, weight: Tensor) -> None:
        """Add rows as :meth:`DriftSum.add` does, the first half to one part and the rest to the other."""
        middle = len(x) // 2
        for part, rows in zip(self.parts, (slice(middle), slice(middle, None)), strict=True):
            part.add(x[rows], deviation[rows], weight[rows])

    def drift(self) -> Drift:
        """Return what comes out, and free the sums."""
        one, other = self.parts
        tokens, weight = one.seen.tokens + other.seen.tokens, (one.weight + other.weight) or 1.0
        mean = (one.total + other.total).cpu() / weight
        halves = [(part.seen.matrix().double() * part.seen.tokens, part.missed.cpu()) for part in self.parts]
        shrinkage = _best_shrinkage(halves)
        seen, missed = (sum(pair[1:], start=pair[0]) for pair in zip(*halves, strict=True))
        gain = torch.zeros_like(missed) if shrinkage is None else _gain(seen, missed, shrinkage)
        return Drift((seen / weight).float(), mean, gain, tokens, self.of_output)


def _best_shrinkage(halves: Sequence[tuple[Tensor, Tensor]]) -> float | None:
    """Return the λ that serves best from either half to the other, None where none serves."""
    left = {}
    for shrinkage in SHRINKAGES:
        left[shrinkage] = 0.0
        for (seen, missed), (others_seen, others_missed) in (halves, halves[::-1]):
            gain = _gain(seen, missed, shrinkage)
            left[shrinkage] += float(((gain @ others_seen - 2 * others_missed) * gain).sum())
    best = min(left, key=left.__getitem__)
    return best if left[best] < 0.0 else None


def _gain(seen: Tensor, missed: Tensor, shrinkage: float) -> Tensor:
    """Return missed · (seen + λ 1)⁻¹."""
    ridged = seen.clone()
    ridged.diagonal().add_(shrinkage * float(seen.diagonal().mean()) or 1.0)
    return torch.cholesky_solve(missed.T, torch.linalg.cholesky(ridged)).T


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
    Cost: a run of both, up to the last weight wanted or, with ``stream``, to the end; (n + 2 m) · n operations a token,
        and about 2 n³ + 12 m n². Memory: for each input 2 n² + 2 m n entries of float64, and as much while λ is chosen.
    """
    sums: dict[str, Halves] = {}
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
                    sums[name] = Halves.of_widths(d.shape[1], x.shape[1], x.device, of_output=stream)
                sums[name].add(x, d, x.new_ones(len(x), 1) if behind is None else _importance(behind))
    for name, found in sums.items():
        if not all(part.total.isfinite().all() and part.missed.isfinite().all() for part in found.parts):
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


def _importance(stream: Tensor) -> Tensor:
    """Return how much an error in each token's stream (tokens, hidden) counts to what reads it normalised."""
    return 1.0 / (stream.square().mean(1, keepdim=True) + EPSILON)
