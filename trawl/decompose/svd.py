"""Truncated singular value decomposition of one matrix."""

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
from trawl.decompose.range_finder import OVERSAMPLING, gaussian, orthonormal
from trawl.decompose.reference import reference_svd
from trawl.decompose.source import SliceSource
from trawl.decompose.streaming import Stream, TransposedSlices
from trawl.decompose.weighted_svd import weighted_svd
from trawl.decompose.weights import Weights
from trawl.errors import RankError, ShapeError
from trawl.factors import Factors
from trawl.interpolation import stored_entries

EXACT_SIDE = 256  # a matrix with a side up to this is decomposed exactly
EXACT_BELOW = 0.1
TYPICAL_SWEEPS = 4


@dataclass(frozen=True)
class SVD:
    """Truncated singular value decomposition of a stack of one slice, ``W ≈ left · diag(core[0]) · rightᵀ``.

    Attributes:
        rank: number of singular triplets.
        n_iter_max: cap on blocks of the Krylov space.
        tol: blocks stop when one more would change the relative error by less, going by the last two changes.
        seed: for the Gaussian test matrix.
        engine: ``tensorly`` stands for the reference: an exact SVD in memory.
        compute: ``bfloat16`` lets the range finder use bfloat16 products.
    """

    rank: int
    n_iter_max: int = 50
    tol: float = 1e-3
    seed: int = 0
    engine: Engine = "streaming"
    compute: Compute = "float32"

    def __post_init__(self) -> None:
        check_options(self.engine, self.compute, self.n_iter_max, self.tol)

    def ranks(self, shape: Shape) -> Shape:
        """Ranks (stack, inner, hidden) of the factors."""
        return shape[0], self.rank, self.rank

    def max_rank(self, shape: Shape) -> int:
        """Largest rank, min(inner, hidden)."""
        return min(shape[1:])

    def check_rank(self, shape: Shape, where: str) -> None:
        """Raise RankError, naming ``where``, for a rank that the matrix cannot have; ShapeError for several slices."""
        if shape[0] != 1:
            raise ShapeError(
                f"{where}: SVD takes one matrix, this stack of shape {shape} has {shape[0]}; "
                "decompose the matrices one by one, or use CP or Tucker"
            )
        check_one("SVD rank", self.rank, self.max_rank(shape), shape, where)

    def parameters(self, shape: Shape) -> int:
        """Number of entries that a checkpoint stores, exactly ``Factors.parameters`` in interpolative form."""
        return stored_entries(shape, self.ranks(shape), full=False)

    def flops(self, shape: Shape) -> int:
        """Floating-point operations of a typical run: two thin products a block."""
        return 4 * math.prod(shape) * block_width(self.rank) * TYPICAL_SWEEPS

    def working_set(self, shape: Shape) -> int:
        """Peak bytes beside the matrix: the Krylov space and its image, while they grow by a block."""
        return 4 * 2 * (shape[1] + shape[2]) * block_width(self.rank) * (TYPICAL_SWEEPS + 1)

    def decompose(self, source: SliceSource, start: Factors | None = None, weights: Weights | None = None) -> Factors:
        """Return the leading singular triplets of one matrix.

        ``W ≈ Σ_j σ_j u_j v_jᵀ``, σ descending, within a randomized block Krylov space of WᵀW; exact where a side is
        small.

        Args:
            source: a stack (1, inner, hidden).
            start: its SVD at a larger rank, by the same weights, which is cut; the stack is not read without weights.
            weights: second moments that weigh the error, see :func:`trawl.decompose.weighted_svd.weighted_svd`.
        Returns: left (inner, rank), right (hidden, rank), core (1, rank), the singular values.
        Raises: RankError: rank is below 1 or above min(inner, hidden), or start has fewer triplets. ShapeError: more
            than one slice, NaN or Inf.
        Cost: O(inner hidden rank) a block; peak O((inner + hidden) rank · blocks) and one block of the matrix.
        Reference: Musco & Musco 2015, arXiv:1504.05477; Golub & Underwood 1977, doi:10.1016/B978-0-12-587260-7.50018-2
        """
        shape = source.shape
        self.check_rank(shape, f"stack of shape {shape}")
        if start is not None:
            check_start(start, shape, self.engine, core_axes=2)
        weights = weigh(weights, shape, self.engine)
        if weights is not None:
            return weighted_svd(source, self.rank, weights, start)
        if start is not None:
            return cut_svd(start, self.rank)
        if self.engine == "tensorly":
            return reference_svd(source, self.rank)
        return truncated_svd(source, self)


def truncated_svd(source: SliceSource, method: SVD) -> Factors:
    """Return the leading singular triplets of a stack of one slice."""
    if source.shape[1] < source.shape[2]:
        swapped = truncated_svd(TransposedSlices(source), method)
        return replace(swapped, left=swapped.right, right=swapped.left)
    stream = Stream(source, method.compute)
    _, inner, hidden = stream.shape
    if stream.empty:
        kind = stream.factor_kind()
        left, right = torch.eye(inner, method.rank, **kind), torch.eye(hidden, method.rank, **kind)
        return Factors(left, right, torch.zeros(1, method.rank, **kind), None, 0.0, 0, True)
    if hidden <= EXACT_SIDE or 2 * method.rank >= hidden:
        whole = stream.right_products(torch.eye(hidden))[0].T  # X itself, upcast and scaled
        u, sigma, vt = torch.linalg.svd(whole, full_matrices=False)
        v, sweep, converged, error = vt.T, 0, True, _error(sigma[: method.rank].square(), stream.norm_squared)
    else:
        u, sigma, v, error, sweep, converged = _block_krylov(stream, method)
    u, sigma, v = u[:, : method.rank], sigma[: method.rank], v[:, : method.rank]
    if error < EXACT_BELOW:
        error = math.sqrt(stream.residual_squared(u, torch.diag(sigma)[None], v) / stream.norm_squared)
    core = (sigma / stream.scale)[None]
    return Factors(u.contiguous(), v.contiguous(), core, None, error, sweep, converged)


def cut_svd(factors: Factors, rank: int) -> Factors:
    """Return the leading triplets of a truncated SVD.

    ``error² = error_larger² + Σ_dropped σ² / ‖W‖²``, with ``‖W‖² = Σ σ² / (1 − error_larger²)``: triplets within one
    subspace, so that what is dropped is orthogonal to what stays and to what was missing before.
    """
    if factors.rank[2] < rank:
        raise RankError(f"an SVD of rank {rank} cannot be cut from one of rank {factors.rank[2]}; give one as large")
    parts = (factors.core, factors.left, factors.right)
    energies = torch.stack([torch.linalg.vector_norm(part.double(), dim=0) for part in parts]).prod(0).square()
    total = float(energies.sum())
    dropped = float(energies[rank:].sum()) / total if total else 0.0
    error = math.sqrt(factors.relative_error**2 + (1.0 - factors.relative_error**2) * dropped)
    left, right = factors.left[:, :rank].contiguous(), factors.right[:, :rank].contiguous()
    return replace(factors, left=left, right=right, core=factors.core[:, :rank].contiguous(), relative_error=error)


def _block_krylov(stream: Stream, method: SVD) -> tuple[Tensor, Tensor, Tensor, float, int, bool]:
    """Extend ``V = [V₁, WᵀW V₁, …]``, orthonormal, until the energy of the leading triplets within it stands still."""
    hidden, width = stream.shape[2], block_width(method.rank)
    fresh = orthonormal(gaussian(hidden, width, method.seed))
    v, y = fresh[:, :0], fresh[:0, :0]
    error, before, converged, sweep = 1.0, 1.0, False, 0
    while sweep < method.n_iter_max and not converged:
        sweep += 1
        product = stream.right_products(fresh, fast=True)[0]  # (width, inner)
        fresh = fresh.to(product)
        v, y = (fresh, product) if sweep == 1 else (torch.cat([v, fresh], dim=1), torch.cat([y, product]))
        last, before = before, error
        error = _error(torch.linalg.eigvalsh(y @ y.T)[-method.rank :], stream.norm_squared)
        change = before - error
        gain = change * min(1.0, change / (last - before)) if last > before else change  # changes shrink ever faster
        converged = (sweep > 1 and abs(gain) < method.tol) or v.shape[1] == hidden
        report_sweep("SVD", sweep, error, before)
        if not converged and sweep < method.n_iter_max:
            z = stream.left_products(product.T, fast=True)[0].T  # WᵀW fresh, (hidden, width)
            fresh = _orthogonal_to(v, z)[:, : hidden - v.shape[1]]
    if not converged:
        report_cap("SVD", method.n_iter_max, gain, method.tol)
    return *_leading(v, y, method.rank, precise=error < EXACT_BELOW), error, sweep, converged


def block_width(rank: int) -> int:
    """Columns of one block: about the rank, and wide enough to multiply fast."""
    return max(rank, 2 * OVERSAMPLING)


def _orthogonal_to(v: Tensor, z: Tensor) -> Tensor:
    """Orthonormalize the part of z that is orthogonal to v; the second time removes what rounding left."""
    for _ in range(2):
        z = orthonormal(z - v @ (v.T @ z))
    return z


def _leading(v: Tensor, y: Tensor, rank: int, *, precise: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, σ, V of the best rank-``rank`` approximation of W within v; y is (W v)ᵀ."""
    squared = y.double() if precise else y
    rotation = torch.linalg.eigh(squared @ squared.T)[1].flip(1)[:, :rank].to(y.dtype)
    q = orthonormal(y.T @ rotation)  # (inner, rank)
    small, sigma, turned = torch.linalg.svd((q.T @ y.T) @ rotation)
    return q @ small, sigma, v @ (rotation @ turned.T)


def _error(energies: Tensor, norm_squared: float) -> float:
    """Relative error √(1 − Σ σ² / ‖W‖²)."""
    return math.sqrt(max(0.0, 1.0 - float(energies.double().sum()) / norm_squared))
