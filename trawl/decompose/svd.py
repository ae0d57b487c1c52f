"""Truncated singular value decomposition of one matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trawl.decompose.method import Compute, Engine, Shape, check_one, check_options, report_cap, report_sweep
from trawl.decompose.range_finder import OVERSAMPLING, gaussian, orthonormal
from trawl.decompose.reference import reference_svd
from trawl.decompose.source import SliceSource
from trawl.decompose.streaming import Stream, TransposedSlices
from trawl.errors import ShapeError
from trawl.factors import Factors

EXACT_SIDE = 256  # a matrix with a side up to this is decomposed exactly
EXACT_BELOW = 0.1
TYPICAL_SWEEPS = 3


@dataclass(frozen=True)
class SVD:
    """Truncated singular value decomposition of a stack of one slice, ``W ≈ left · diag(core[0]) · rightᵀ``.

    Attributes:
        rank: number of singular triplets.
        n_iter_max: cap on subspace iterations.
        tol: change of relative error between iterations under which they stop.
        seed: for the Gaussian test matrix.
        engine: ``tensorly`` stands for the reference: an exact SVD in memory.
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
        """Number of factor entries, exactly ``Factors.parameters``."""
        return (shape[0] + shape[1] + shape[2]) * self.rank

    def flops(self, shape: Shape) -> int:
        """Floating-point operations of a typical run: two thin products an iteration."""
        return 4 * math.prod(shape) * (self.rank + OVERSAMPLING) * (TYPICAL_SWEEPS + 1)

    def working_set(self, shape: Shape) -> int:
        """Peak bytes beside the matrix: a few bases of rank + oversampling columns."""
        return 4 * 4 * (shape[1] + shape[2]) * (self.rank + OVERSAMPLING)

    def decompose(self, source: SliceSource) -> Factors:
        """Return the leading singular triplets of one matrix.

        ``W ≈ Σ_j σ_j u_j v_jᵀ``, σ descending, from subspace iteration on WᵀW; exact for a matrix with a small side.

        Args:
            source: a stack (1, inner, hidden).
        Returns: left (inner, rank), right (hidden, rank), core (1, rank), the singular values.
        Raises: RankError: rank is below 1 or above min(inner, hidden). ShapeError: more than one slice, NaN or Inf.
        Cost: O(inner hidden rank) an iteration; peak O((inner + hidden) rank) and one block of the matrix.
        Reference: Halko, Martinsson & Tropp 2011, algorithms 4.4 and 5.1, doi:10.1137/090771806
        """
        shape = source.shape
        self.check_rank(shape, f"stack of shape {shape}")
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
        kind = stream.zeros()
        left, right = torch.eye(inner, method.rank, **kind), torch.eye(hidden, method.rank, **kind)
        return Factors(left, right, torch.zeros(1, method.rank, **kind), None, 0.0, 0, True)
    width = hidden if hidden <= EXACT_SIDE else min(method.rank + OVERSAMPLING, hidden)
    if width == hidden:
        whole = stream.right_products(torch.eye(hidden))[0].T  # X itself, upcast and scaled
        u, sigma, vt = torch.linalg.svd(whole, full_matrices=False)
        v, sweep, converged, error = vt.T, 0, True, _error(sigma[: method.rank], stream.norm_squared)
    else:
        u, sigma, v, error, sweep, converged = _subspace_iteration(stream, method, width)
    u, sigma, v = u[:, : method.rank], sigma[: method.rank], v[:, : method.rank]
    if error < EXACT_BELOW:
        error = math.sqrt(stream.residual_squared(u, torch.diag(sigma)[None], v) / stream.norm_squared)
    core = (sigma / stream.scale)[None]
    return Factors(u.contiguous(), v.contiguous(), core, None, error, sweep, converged)


def _subspace_iteration(stream: Stream, method: SVD, width: int) -> tuple[Tensor, Tensor, Tensor, float, int, bool]:
    """Iterate ``u ← orth(W v), v ← orth(Wᵀ u)`` until the energy of the leading triplets stands still."""
    v = gaussian(stream.shape[2], width, method.seed)
    error, converged, sweep = float("inf"), False, 0
    while sweep < method.n_iter_max and not converged:
        sweep += 1
        u = orthonormal(stream.right_products(v)[0].T)
        z = stream.left_products(u)[0].T  # Wᵀ u = v σ rotation
        v, sigma, rotation = _thin_svd(z)
        before, error = error, _error(sigma[: method.rank], stream.norm_squared)
        converged = abs(before - error) < method.tol
        report_sweep("SVD", sweep, error, before)
    if not converged:
        report_cap("SVD", method.n_iter_max, before - error, method.tol)
    return u @ rotation, sigma, v, error, sweep, converged


def _thin_svd(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return V, σ, Q of ``z = V diag(σ) Qᵀ``, z (n, k) with n ≥ k."""
    q = orthonormal(z)
    small, sigma, rotation = torch.linalg.svd(q.T @ z)
    return q @ small, sigma, rotation.T


def _error(sigma: Tensor, norm_squared: float) -> float:
    """Relative error √(1 − Σ σ² / ‖W‖²)."""
    return math.sqrt(max(0.0, 1.0 - float(sigma.double().square().sum()) / norm_squared))
