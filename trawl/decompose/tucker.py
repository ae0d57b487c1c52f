"""Tucker decomposition of a stack whose slices are streamed."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trawl.decompose.method import (
    Compute,
    Engine,
    Shape,
    check_one,
    check_options,
    check_start,
    report_cap,
    report_sweep,
    weigh,
)
from trawl.decompose.range_finder import hidden_basis, orthonormal, row_subspace
from trawl.decompose.reference import reference_tucker
from trawl.decompose.source import SliceSource
from trawl.decompose.streaming import Stream, TransposedSlices
from trawl.decompose.weighted import weighted_fit
from trawl.decompose.weights import Weights
from trawl.errors import RankError
from trawl.factors import Factors
from trawl.interpolation import stored_entries

EXACT_BELOW = 0.1  # a relative error under this is measured entry by entry: 1 − kept energy has lost digits by then
TYPICAL_SWEEPS = 6
POWER_STEPS = 2
NEAR = 0.5  # of tol: from a larger decomposition sweeps begin so near the end that each changes less
PUSH_STEP, PUSH_MOST = 0.5, 0.9  # extrapolation grows while the error falls: half of the sweeps to the same error


@dataclass(frozen=True)
class Tucker:
    """Tucker decomposition, ``T ≈ core ×₀ stack ×₁ left ×₂ right`` with orthonormal factor matrices.

    Attributes:
        rank: per mode (stack, inner, hidden); an INT means (S, INT, INT), which keeps the stack mode as it is.
        n_iter_max: cap on sweeps of higher-order orthogonal iteration.
        tol: change of relative error between sweeps under which they stop.
        seed: for random starts.
        engine: ``tensorly`` takes the whole stack into memory and is the reference.
        compute: ``bfloat16`` lets the range finder use bfloat16 products.
    """

    rank: int | tuple[int, int, int]
    n_iter_max: int = 50
    tol: float = 2e-5
    seed: int = 0
    engine: Engine = "streaming"
    compute: Compute = "float32"

    def __post_init__(self) -> None:
        check_options(self.engine, self.compute, self.n_iter_max, self.tol)
        if not isinstance(self.rank, int):
            object.__setattr__(self, "rank", tuple(self.rank))

    def ranks(self, shape: Shape) -> Shape:
        """Ranks (stack, inner, hidden) of the factors."""
        return (shape[0], self.rank, self.rank) if isinstance(self.rank, int) else self.rank

    def max_rank(self, shape: Shape) -> Shape:
        """Largest rank of each mode, (S, inner, hidden); an INT may be at most the smaller of the last two."""
        return shape

    def check_rank(self, shape: Shape, where: str) -> None:
        """Raise RankError, naming ``where``, for a rank that a stack of this shape cannot have."""
        if isinstance(self.rank, int):
            check_one("Tucker rank", self.rank, min(shape[1:]), shape, where)
            return
        if len(self.rank) != 3:
            raise RankError(f"{where}: Tucker rank {self.rank} has {len(self.rank)} entries; give INT or R0,R1,R2")
        for mode, rank, largest in zip(("stack", "inner", "hidden"), self.rank, shape, strict=True):
            check_one(f"Tucker {mode} rank", rank, largest, shape, where)

    def parameters(self, shape: Shape) -> int:
        """Number of entries that a checkpoint stores, exactly ``Factors.parameters`` in interpolative form."""
        return stored_entries(shape, self.ranks(shape), full=True)

    def flops(self, shape: Shape) -> int:
        """Floating-point operations of a typical run: the start and a few sweeps of two thin products a slice."""
        _, r1, r2 = self.ranks(shape)
        return 2 * math.prod(shape) * ((r1 + r2) * TYPICAL_SWEEPS + 2 * (POWER_STEPS + 1) * r2)

    def working_set(self, shape: Shape) -> int:
        """Peak bytes beside the slices: all products of a half sweep, twice over while a subspace is found in them."""
        size, inner, hidden = shape
        _, r1, r2 = self.ranks(shape)
        return 4 * (4 * size * max(inner * r2, hidden * r1) + 4 * (inner * r1 + hidden * r2))

    def decompose(self, source: SliceSource, start: Factors | None = None, weights: Weights | None = None) -> Factors:
        """Return Tucker factors of a stack.

        Minimizes ‖T − core ×₀ stack ×₁ left ×₂ right‖ by higher-order orthogonal iteration: with ``right`` fixed,
        ``left`` becomes the leading subspace of ``[X_1 right … X_S right]``, and the other way round; the next sweep
        starts from an extrapolated ``right``.

        Args:
            source: the stack (S, inner, hidden).
            start: its Tucker factors at a hidden rank at least as large; sweeps begin at the leading subspace of their
                core in place of one of the stack.
            weights: second moments that weigh the error, see :func:`trawl.decompose.weighted.weighted_fit`; the stack
                mode is not compressed by them.
        Returns: left (inner, r1), right (hidden, r2), core (r0, r1, r2), stack (S, r0) or None where r0 = S.
        Raises: RankError: a rank is below 1 or above the mode's size, or start's are smaller. ShapeError: the stack
            holds NaN or Inf.
        Cost: O(S inner hidden (r1 + r2)) a sweep; peak O(S max(inner, hidden) r) and one block of a slice.
        Reference: De Lathauwer, De Moor & Vandewalle 2000, doi:10.1137/S0895479898346995; Kolda & Bader 2009, section
        4.2, doi:10.1137/07070111X; start: Halko, Martinsson & Tropp 2011, doi:10.1137/090771806
        """
        shape = source.shape
        self.check_rank(shape, f"stack of shape {shape}")
        ranks = self.ranks(shape)
        if start is not None:
            check_start(start, shape, self.engine, core_axes=3)
        weights = weigh(weights, shape, self.engine, start)
        if weights is not None:
            if ranks[0] < shape[0]:
                raise RankError(f"weighted Tucker keeps the stack mode; give rank {shape[0]} for it, not {ranks[0]}")
            return weighted_fit(source, self.decompose(source), weights, self.n_iter_max, self.tol)
        if self.engine == "tensorly":
            return reference_tucker(source, ranks, self.n_iter_max, self.tol, self.seed)
        if shape[1] < shape[2]:  # the smaller side is where the start is found
            if start is not None:
                start = replace(start, left=start.right, right=start.left, core=start.core.transpose(1, 2))
            stream = Stream(TransposedSlices(source), self.compute)
            swapped = _hooi(self, stream, (ranks[0], ranks[2], ranks[1]), start)
            core = swapped.core.transpose(1, 2).contiguous()
            return replace(swapped, left=swapped.right, right=swapped.left, core=core)
        return _hooi(self, Stream(source, self.compute), ranks, start)


def _hooi(method: Tucker, stream: Stream, ranks: Shape, start: Factors | None) -> Factors:
    """Sweep until the change of relative error is under ``tol``; inner ≥ hidden."""
    r0, r1, r2 = ranks
    if stream.empty:
        return _zero(stream, ranks)
    tol = method.tol * (NEAR if start else 1.0)
    v = _cut_basis(start, stream, r2) if start else hidden_basis(stream, r2, POWER_STEPS, method.seed)
    mixing: Tensor | None = None
    u: Tensor | None = None
    error, converged, sweep = float("inf"), False, 0
    ahead, push = v, 0.0
    while sweep < method.n_iter_max and not converged:
        sweep += 1
        precise = not EXACT_BELOW < error < 1.0
        y = _mix(stream.right_products(ahead), mixing)  # (S or r0, r2, inner)
        u = row_subspace(y.flatten(0, 1), r1, u, precise=precise, seed=method.seed)
        z = stream.left_products(u)  # (S, r1, hidden)
        last, v = v, row_subspace(_mix(z, mixing).flatten(0, 1), r2, ahead, precise=precise)
        core = z @ v  # (S, r1, r2)
        if r0 < stream.shape[0]:
            mixing = row_subspace(core.flatten(1).T, r0)
            core = torch.tensordot(mixing.T, core, dims=1)
        before, error = error, _error(core, stream.norm_squared)
        converged = abs(before - error) < tol or ranks == stream.shape
        report_sweep("Tucker", sweep, error, before)
        push = min(PUSH_MOST, push + PUSH_STEP) if error < before else 0.0
        ahead = _extrapolate(last, v, push)
    if not converged:
        report_cap("Tucker", method.n_iter_max, before - error, tol)
    assert u is not None
    if error < EXACT_BELOW:
        middles = core if mixing is None else torch.tensordot(mixing, core, dims=1)
        error = math.sqrt(stream.residual_squared(u, middles, v) / stream.norm_squared)
    return Factors(u, v, core / stream.scale, mixing, error, sweep, converged)


def _cut_basis(start: Factors, stream: Stream, rank: int) -> Tensor:
    """Return the leading ``rank`` directions of a larger decomposition's hidden mode, by the SVD of its core."""
    if start.rank[2] < rank:
        raise RankError(f"Tucker factors of ranks {start.rank} have fewer than {rank} directions; give larger ones")
    start = start.balanced().to(**stream.factor_kind())
    return orthonormal(start.right @ row_subspace(start.core.flatten(0, 1), rank))  # (hidden, rank)


def _mix(products: Tensor, mixing: Tensor | None) -> Tensor:
    """Compress the leading, stack, axis of products."""
    return products if mixing is None else torch.tensordot(mixing.T, products, dims=1)


def _extrapolate(last: Tensor, basis: Tensor, push: float) -> Tensor:
    """Move on from ``basis`` by ``push`` times its way from ``last``, the latter turned to match."""
    if push == 0.0:
        return basis
    turned = last @ (last.T @ basis)
    return orthonormal(basis + push * (basis - turned))


def _error(core: Tensor, norm_squared: float) -> float:
    """Relative error of an orthogonal projection, √(1 − ‖core‖² / ‖T‖²)."""
    return math.sqrt(max(0.0, 1.0 - float(core.double().square().sum()) / norm_squared))


def _zero(stream: Stream, ranks: Shape) -> Factors:
    """Factors of a stack of zeros: orthonormal columns and an empty core; its relative error is 0 by definition."""
    size, inner, hidden = stream.shape
    r0, r1, r2 = ranks
    kind = stream.factor_kind()
    stack = torch.eye(size, r0, **kind) if r0 < size else None
    core = torch.zeros(r0, r1, r2, **kind)
    return Factors(torch.eye(inner, r1, **kind), torch.eye(hidden, r2, **kind), core, stack, 0.0, 0, True)
