"""CP decomposition of a stack whose slices are streamed."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trawl.decompose.method import Compute, Engine, Shape, check_one, check_options, report_cap, report_sweep
from trawl.decompose.range_finder import hidden_basis, row_subspace, sum_up
from trawl.decompose.reference import core_cp, reference_cp
from trawl.decompose.source import SliceSource
from trawl.decompose.streaming import Stream, TransposedSlices
from trawl.decompose.svd import SVD, truncated_svd
from trawl.factors import Factors

EXACT_BELOW = 0.1
COMPRESSION = 2  # columns of the compressing bases for each CP component
CORE_SWEEPS = 50
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
        """Number of factor entries, exactly ``Factors.parameters``."""
        return sum(shape) * self.rank

    def flops(self, shape: Shape) -> int:
        """Floating-point operations of a typical run: the compression, then sweeps of two thin products a slice."""
        return 4 * math.prod(shape) * self.rank * (TYPICAL_SWEEPS + (POWER_STEPS + 2) * COMPRESSION)

    def working_set(self, shape: Shape) -> int:
        """Peak bytes beside the slices: the compressed slices, the core, and the factors."""
        size, inner, hidden = shape
        width = COMPRESSION * self.rank
        return 4 * (2 * size * inner * width + size * width**2 + 6 * (inner + hidden) * self.rank)

    def decompose(self, source: SliceSource) -> Factors:
        """Return CP factors of a stack.

        Minimizes Σ_s ‖X_s − left · diag(core[s]) · rightᵀ‖²: the stack is compressed to about 2·rank columns a mode, its
        small core decomposed, the result expanded and polished by alternating least squares on the stack itself.

        Args:
            source: the stack (S, inner, hidden).
        Returns: left (inner, rank) and right (hidden, rank) with unit columns, core (S, rank).
        Raises: RankError: rank is below 1 or above ``max_rank``. ShapeError: the stack holds NaN or Inf.
        Cost: O(S inner hidden rank) a sweep; peak O(S inner rank) and one block of a slice.
        Reference: Bro & Andersson 1998, doi:10.1016/S0169-7439(98)00011-2; Kolda & Bader 2009, section 3.4,
        doi:10.1137/07070111X
        """
        shape = source.shape
        self.check_rank(shape, f"stack of shape {shape}")
        if self.engine == "tensorly":
            return reference_cp(source, self.rank, self.n_iter_max, self.tol, self.seed)
        if shape[0] == 1:  # a CP of one slice is its truncated SVD
            return truncated_svd(source, SVD(self.rank, self.n_iter_max, self.tol, self.seed, compute=self.compute))
        if shape[1] < shape[2]:
            swapped = _streamed(self, Stream(TransposedSlices(source), self.compute))
            return replace(swapped, left=swapped.right, right=swapped.left)
        return _streamed(self, Stream(source, self.compute))


def _streamed(method: CP, stream: Stream) -> Factors:
    """Compress, decompose the core, expand and polish; inner ≥ hidden."""
    size, inner, hidden = stream.shape
    if stream.empty:
        kind = stream.zeros()
        parts = (torch.zeros(n, method.rank, **kind) for n in (inner, hidden, size))
        return Factors(*parts, None, 0.0, 0, True)
    a, b, c, error = _start(method, stream)
    converged, sweep = False, 0
    while sweep < method.n_iter_max and not converged:
        sweep += 1
        a, b, c, energy = _sweep(stream, a, b, c)
        before, error = error, math.sqrt(max(0.0, 1.0 - energy / stream.norm_squared))
        converged = abs(before - error) < method.tol
        report_sweep("CP", sweep, error, before)
    if not converged:
        report_cap("CP", method.n_iter_max, before - error, method.tol)
    if error < EXACT_BELOW:
        error = math.sqrt(stream.residual_squared(b, torch.diag_embed(a), c) / stream.norm_squared)
    return Factors(b, c, a / stream.scale, None, error, sweep, converged)


def _start(method: CP, stream: Stream) -> tuple[Tensor, Tensor, Tensor, float]:
    """Return factor matrices (S, R), (inner, R), (hidden, R) from the CP of a compressed stack, and their error."""
    u, v, core = _compress(stream, COMPRESSION * method.rank, method.seed)
    size = torch.linalg.vector_norm(core)
    core = core / size
    a, b, c = core_cp(core, _leading_triplets(core, method.rank, method.seed), CORE_SWEEPS, method.tol)
    missed = float((core - (b * a[:, None, :]) @ c.T).double().square().sum())
    energy = float(size.double().square()) / stream.norm_squared
    return a * size, u @ b, v @ c, math.sqrt(max(0.0, 1.0 - energy + energy * missed))


def _compress(stream: Stream, width: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return bases (inner, s1) and (hidden, s2) of at most ``width`` columns, and the core (S, s1, s2) between them."""
    _, inner, hidden = stream.shape
    v = hidden_basis(stream, min(width, hidden), POWER_STEPS, seed)
    y = stream.right_products(v)  # (S, s2, inner)
    u = row_subspace(y.flatten(0, 1), min(width, inner), seed=seed)
    core = (y @ u).transpose(1, 2)  # (S, s1, s2)
    kept = float(core.double().square().sum()) / stream.norm_squared
    if kept > 1.0 - EXACT_BELOW**2 and v.shape[1] < hidden:  # small directions count: v is only a float32 start
        z = stream.left_products(u)  # (S, s1, hidden)
        v = row_subspace(z.flatten(0, 1), v.shape[1], v, seed=seed)
        core = z @ v
    return u, v, core


def _leading_triplets(core: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Start a CP from the largest singular triplets of all slices: a one-hot a, and no two components alike."""
    size = core.shape[0]
    u, sigma, vt = torch.linalg.svd(core, full_matrices=False)  # (S, s1, m), (S, m), (S, m, s2)
    count = sigma.shape[1]
    order = torch.argsort(sigma.flatten(), descending=True, stable=True)[:rank]
    of, which = order // count, order % count
    a = torch.nn.functional.one_hot(of, size).to(core.dtype) * sigma.flatten()[order, None]
    parts = a.T, u[of, :, which].T, vt[of, which].T
    extra = rank - order.numel()
    if extra > 0:
        generator = torch.Generator().manual_seed(seed)
        scale = float(sigma.max())
        parts = tuple(
            torch.cat([part, scale * torch.randn(part.shape[0], extra, generator=generator).to(part)], dim=1)
            for part in parts
        )
    return parts[0].contiguous(), parts[1].contiguous(), parts[2].contiguous()


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
    return (right_side.double().T @ inverse).to(right_side.dtype)
