"""CP decomposition of a stack whose slices are streamed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trawl.decompose.cp_core import CoreLimits, CoreSolution, Triple, core_error, leading_triplets, solve_core
from trawl.decompose.method import (
    Compute,
    Engine,
    Shape,
    check_one,
    check_options,
    check_start,
    logger,
    report_cap,
    report_sweep,
    weigh,
)
from trawl.decompose.range_finder import hidden_basis, row_subspace, sum_up
from trawl.decompose.reference import reference_cp
from trawl.decompose.source import SliceSource, TensorSlices
from trawl.decompose.streaming import Stream, TransposedSlices
from trawl.decompose.svd import SVD
from trawl.decompose.weighted import weighted_fit
from trawl.decompose.weights import Weights
from trawl.errors import RankError
from trawl.factors import Factors
from trawl.interpolation import stored_entries

EXACT_BELOW = 0.1
COMPRESSION = 2  # columns of the compressing bases for each CP component
SMALL_CORE = 1 << 16  # entries up to which float64 and several starts cost less than one read of the stack
TRIAL_SWEEPS = 12  # for each of several starts; the best is then known
NEARLY_NOTHING = 1e-2  # of the energy missed by the compression: the stack may have exactly this structure
CORE_TOL = 0.1  # of tol, for sweeps over a core that start from a smaller CP: they cost little
LOSSLESS = 0.1  # of the core's error: less lost by the compression cannot be won back by sweeps over the stack
ROUNDING = 1e-6
PUSH_STEP, PUSH_MOST = 0.5, 0.9  # extrapolation grows while the error falls: half of the sweeps to the same error
TYPICAL_CORE_SWEEPS = 20
TYPICAL_SWEEPS = 8
POWER_STEPS = 1


@dataclass(frozen=True)
class CP:
    """CP decomposition, ``W_s ≈ left · diag(core[s]) · rightᵀ`` with unit columns in left and right.

    Attributes:
        rank: number of components.
        n_iter_max: cap on sweeps of alternating least squares over the whole stack.
        tol: change of relative error between sweeps under which they stop.
        seed: for random starts.
        engine: ``tensorly`` takes the whole stack into memory and is the reference.
        compute: ``bfloat16`` lets the range finder use bfloat16 products.
    """

    rank: int
    n_iter_max: int = 50
    tol: float = 3e-5
    seed: int = 0
    engine: Engine = "streaming"
    compute: Compute = "float32"

    def __post_init__(self) -> None:
        check_options(self.engine, self.compute, self.n_iter_max, self.tol)

    def ranks(self, shape: Shape) -> Shape:
        """Ranks (stack, inner, hidden) of the factors."""
        return shape[0], self.rank, self.rank

    def max_rank(self, shape: Shape) -> int:
        """Largest rank: with min(S·inner, S·hidden, inner·hidden) components any tensor is exact."""
        size, inner, hidden = shape
        return min(size * inner, size * hidden, inner * hidden)

    def check_rank(self, shape: Shape, where: str) -> None:
        """Raise RankError, naming ``where``, for a rank that a stack of this shape cannot have."""
        check_one("CP rank", self.rank, self.max_rank(shape), shape, where)

    def parameters(self, shape: Shape) -> int:
        """Number of entries that a checkpoint stores, exactly ``Factors.parameters`` in interpolative form."""
        return stored_entries(shape, self.ranks(shape), full=False)

    def flops(self, shape: Shape) -> int:
        """Floating-point operations of a typical run: the compression, the core's sweeps, two thin products a slice."""
        core = 6 * shape[0] * (COMPRESSION * self.rank) ** 2 * self.rank * TYPICAL_CORE_SWEEPS
        return core + 4 * math.prod(shape) * self.rank * (TYPICAL_SWEEPS + (POWER_STEPS + 2) * COMPRESSION)

    def working_set(self, shape: Shape) -> int:
        """Peak bytes beside the slices: the compressed slices, the core, and the factors."""
        size, inner, hidden = shape
        width = COMPRESSION * self.rank
        return 4 * (2 * size * inner * width + size * width**2 + 6 * (inner + hidden) * self.rank)

    def decompose(self, source: SliceSource, start: Factors | None = None, weights: Weights | None = None) -> Factors:
        """Return CP factors of a stack.

        Minimizes Σ_s ‖X_s − left · diag(core[s]) · rightᵀ‖²: the stack is compressed to about 2·rank columns a mode,
        its small core decomposed, the result expanded and polished by alternating least squares on the stack itself.

        Args:
            source: the stack (S, inner, hidden).
            start: its CP at a smaller rank: those components, and as new ones the leading triplets of what they leave
                of the core, are where sweeps begin. Of one slice, its SVD at a larger rank, which is cut.
            weights: second moments that weigh the error, see :func:`trawl.decompose.weighted.weighted_fit`.
        Returns: left (inner, rank) and right (hidden, rank) with unit columns, core (S, rank).
        Raises: RankError: rank is below 1 or above ``max_rank``, or below start's. ShapeError: the stack holds NaN or
            Inf.
        Cost: O(S inner hidden rank) a sweep over the stack and O(S rank³) one over the core; peak O(S inner rank) and
        one block of a slice.
        Reference: Bro & Andersson 1998, doi:10.1016/S0169-7439(98)00011-2; Kolda & Bader 2009, section 3.4,
        doi:10.1137/07070111X
        """
        shape = source.shape
        self.check_rank(shape, f"stack of shape {shape}")
        if start is not None:
            check_start(start, shape, self.engine, core_axes=2)
        weights = weigh(weights, shape, self.engine, start if shape[0] > 1 else None)
        if self.engine == "tensorly":
            return reference_cp(source, self.rank, self.n_iter_max, self.tol, self.seed)
        if shape[0] == 1:  # a CP of one slice is its truncated SVD
            one = SVD(self.rank, self.n_iter_max, self.tol, self.seed, compute=self.compute)
            return one.decompose(source, start, weights)
        if weights is not None:
            return weighted_fit(source, self.decompose(source), weights, self.n_iter_max, self.tol)
        if start is not None and start.rank[2] > self.rank:
            raise RankError(f"CP factors of rank {start.rank[2]} do not fit into rank {self.rank}; give smaller ones")
        if shape[1] < shape[2]:
            if start is not None:
                start = replace(start, left=start.right, right=start.left)
            swapped = _streamed(self, Stream(TransposedSlices(source), self.compute), start)
            return replace(swapped, left=swapped.right, right=swapped.left)
        return _streamed(self, Stream(source, self.compute), start)


def _streamed(method: CP, stream: Stream, neighbour: Factors | None) -> Factors:
    """Compress, decompose the core, expand and polish; inner ≥ hidden."""
    size, inner, hidden = stream.shape
    if stream.empty:
        kind = stream.factor_kind()
        b, c, a = (torch.zeros(n, method.rank, **kind) for n in (inner, hidden, size))
        return Factors(b, c, a, None, 0.0, 0, True)
    u, v, core, missed = _compress(stream, COMPRESSION * method.rank, method.seed)
    norm = torch.linalg.vector_norm(core.double())
    unit_core = (core / norm).to(core.dtype)
    small = core.numel() <= SMALL_CORE
    if neighbour is None or (missed < NEARLY_NOTHING and (small or v.shape[1] < hidden)):
        trials = TRIAL_SWEEPS if small or missed < NEARLY_NOTHING else 0
        trials = method.n_iter_max if size * inner * hidden <= SMALL_CORE else trials
        solved = solve_core(unit_core, method.rank, CoreLimits(method.n_iter_max, method.tol, trials), method.seed)
    else:
        solved = _extend(unit_core, _within(neighbour, u, v, stream.scale / float(norm)), method)
    a, b, c = (part.to(core.dtype) for part in solved.factors)
    start = (a * norm.to(core.dtype), u @ b, v @ c)
    error = math.sqrt(missed + (1.0 - missed) * solved.error**2)
    logger.info("CP core of shape %s: fit %.6f after %d sweeps", tuple(core.shape), 1.0 - error, solved.sweeps)
    if solved.sweeps and missed <= max(LOSSLESS * solved.error, ROUNDING) ** 2:
        (a, b, c), sweeps, converged = start, solved.sweeps, solved.converged  # sweeps over the stack repeat these
        if not converged:
            report_cap("CP", method.n_iter_max, solved.change, method.tol)
    else:
        push_step = 0.0 if neighbour is None else PUSH_STEP
        (a, b, c), error, sweeps, converged = _polish(method, stream, start, error, push_step)
    if error < EXACT_BELOW:
        error = math.sqrt(stream.residual_squared(b, torch.diag_embed(a), c) / stream.norm_squared)
    (b, b_norms), (c, c_norms) = _unit(b), _unit(c)
    core = a * b_norms * c_norms / stream.scale
    return Factors(b.contiguous(), c.contiguous(), core, None, error, sweeps, converged)


def _compress(stream: Stream, width: int, seed: int) -> tuple[Tensor, Tensor, Tensor, float]:
    """Return bases (inner, s1), (hidden, s2) of at most ``width`` columns, the core (S, s1, s2), and missed energy."""
    _, inner, hidden = stream.shape
    v = hidden_basis(stream, min(width, hidden), POWER_STEPS, seed)
    y = stream.right_products(v)  # (S, s2, inner)
    u = row_subspace(y.flatten(0, 1), min(width, inner), seed=seed)
    core = (y @ u).transpose(1, 2)  # (S, s1, s2)
    missed = max(0.0, 1.0 - float(core.double().square().sum()) / stream.norm_squared)
    if missed < EXACT_BELOW**2:  # small directions count, and the difference of two norms has lost digits
        if v.shape[1] < hidden:
            z = stream.left_products(u)  # (S, s1, hidden)
            v = row_subspace(z.flatten(0, 1), v.shape[1], v, seed=seed)
            core = z @ v
        missed = stream.residual_squared(u, core, v) / stream.norm_squared
    return u, v, core, missed


def _within(smaller: Factors, u: Tensor, v: Tensor, scale: float) -> Triple:
    """Return a smaller CP as one of the core that ``u`` and ``v`` compress ``scale`` times the stack to."""
    smaller = smaller.to(dtype=u.dtype, device=u.device)
    (b, b_norms), (c, c_norms) = _unit(u.T @ smaller.left), _unit(v.T @ smaller.right)
    return smaller.core * scale * b_norms * c_norms, b, c


def _extend(core: Tensor, kept: Triple, method: CP) -> CoreSolution:
    """Return a CP of a core from some components of it; new ones begin as leading triplets of what those leave."""
    core = core.double() if core.numel() <= SMALL_CORE else core
    a, b, c = (part.to(core.dtype) for part in kept)
    fresh = leading_triplets(core - (b * a[:, None, :]) @ c.T, method.rank - a.shape[1], method.seed)
    a, b, c = (torch.cat(parts, dim=1) for parts in zip((a, b, c), fresh, strict=True))
    error, sweep, change = core_error(core, a, b, c), 0, float("inf")
    sweeps = _sweeps(Stream(TensorSlices(core)), (a, b, c), error, PUSH_STEP)
    while sweep < method.n_iter_max and not abs(change) < CORE_TOL * method.tol:
        sweep, before = sweep + 1, error
        (a, b, c), error = next(sweeps)
        change = before - error
    return CoreSolution((a, b, c), core_error(core, a, b, c), sweep, change, abs(change) < method.tol)


def _polish(
    method: CP, stream: Stream, start: Triple, error: float, push_step: float
) -> tuple[Triple, float, int, bool]:
    """Sweep over the stack until the change of relative error is under ``tol``."""
    factors, converged, sweep, before = start, False, 0, error
    sweeps = _sweeps(stream, start, error, push_step)
    while sweep < method.n_iter_max and not converged:
        sweep, before = sweep + 1, error
        factors, error = next(sweeps)
        converged = abs(before - error) < method.tol
        report_sweep("CP", sweep, error, before)
    if not converged:
        report_cap("CP", method.n_iter_max, before - error, method.tol)
    return factors, error, sweep, converged


def _sweeps(stream: Stream, start: Triple, error: float, push_step: float) -> Iterator[tuple[Triple, float]]:
    """Yield factors and relative error after every sweep of alternating least squares, without end.

    Each sweep begins at the last one's factors, moved on by ``push`` times their way from those before; where that
    raises the error it is made again from the factors themselves.

    Reference: Mitchell, Ye & De Sterck 2020, doi:10.1002/nla.2297
    """
    now, last, push = start, start, 0.0
    while True:
        a, b, c = (part + push * (part - before) for part, before in zip(now, last, strict=True)) if push else now
        a, b, c, energy = _sweep(stream, a, b, c)
        after = math.sqrt(max(0.0, 1.0 - energy / stream.norm_squared))
        if push and not after <= error:
            push = 0.0
            a, b, c, energy = _sweep(stream, *now)
            after = math.sqrt(max(0.0, 1.0 - energy / stream.norm_squared))
        else:
            push = min(PUSH_MOST, push + push_step)
        now, last, error = (a, b, c), now, after
        yield now, error


def _sweep(stream: Stream, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
    """Make one sweep of alternating least squares; return a, unit-column b and c, and the energy kept.

    With c fixed, ``Y_s = X_s c`` gives b; with b fixed, ``Z_s = X_sᵀ b`` gives row s of a from the old c, then c. Each
    product is used as it is made, so that none is kept.
    """
    right = c.T @ c
    total = sum_up(panel.right(c).mul_(a[s][:, None]) for s, panel in enumerate(stream.panels()))
    b, _ = _unit(_solve(right * (a.T @ a), total))
    left = b.T @ b
    rows: list[Tensor] = []
    total = sum_up(_weighted(panel.left(b), c, left * right, rows) for panel in stream.panels())
    a = torch.stack(rows)
    grams = left * (a.T @ a)
    c = _solve(grams, total)
    inner_product = (total.T.double() * c.double()).sum()
    model = (grams.double() * (c.T.double() @ c.double())).sum()
    c, norms = _unit(c)
    return a * norms, b, c, float(2 * inner_product - model)


def _weighted(z: Tensor, c: Tensor, grams: Tensor, rows: list[Tensor]) -> Tensor:
    """Append the least-squares row of a for one slice's ``z = (X_sᵀ b)ᵀ``, and return z weighted by it."""
    row = _solve(grams, (z * c.T).sum(dim=1)[:, None])[0]
    rows.append(row)
    return z.mul_(row[:, None])


def _unit(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Scale columns to unit length; a column of zeros stays as it is."""
    norms = torch.linalg.vector_norm(factor, dim=0)
    return factor / torch.where(norms > 0, norms, 1.0), norms


def _solve(gram: Tensor, right_side: Tensor) -> Tensor:
    """Return ``right_sideᵀ · gram⁻¹`` in float64, by pseudo-inverse where components have become dependent."""
    exact = gram.double()
    scale = exact.diagonal().clamp(min=torch.finfo(torch.float64).tiny).rsqrt()
    exact = exact * scale * scale[:, None]
    factor, failed = torch.linalg.cholesky_ex(exact)
    if bool(failed) or not bool(factor.diagonal().min() > 1e-5):
        inverse = torch.linalg.pinv(exact, rtol=1e-10, hermitian=True)
    else:
        inverse = torch.cholesky_inverse(factor)
    inverse = inverse * scale * scale[:, None]
    factor_matrix: Tensor = (right_side.double().T @ inverse).to(right_side.dtype)
    return factor_matrix
