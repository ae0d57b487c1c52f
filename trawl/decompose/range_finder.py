"""Orthonormal bases of dominant subspaces: of matrices in memory, and of a stack's hidden mode."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from trawl.decompose.streaming import Stream

SMALL_SIDE = 1024  # up to this size a Gram matrix costs less than passes of thin products
EXACT_SIDE = 256  # up to this size eigenvectors cost no more than steps of subspace iteration
OVERSAMPLING = 8
START_STEPS = 4  # of subspace iteration from a random start


def gaussian(rows: int, columns: int, seed: int) -> Tensor:
    """Return a Gaussian matrix that depends on its arguments only, whatever the device."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def orthonormal(y: Tensor) -> Tensor:
    """Return Q (n, k) with orthonormal columns that span the columns of y (n, k), k ≤ n.

    Twice through the Cholesky factor of YᵀY (CholeskyQR2), which is matrix products where Householder's QR is a
    sequence of thin updates; the latter takes over where y is ill-conditioned, and completes dependent columns.

    Cost: O(n k²).
    Reference: Fukaya et al. 2014, doi:10.1109/ScalA.2014.11
    """
    q = y
    for _ in range(2):
        norms = torch.linalg.vector_norm(q, dim=0)
        q = q / norms  # a column of zeros gives NaN, which fails below
        factor, failed = torch.linalg.cholesky_ex(q.T @ q)
        if bool(failed) or not bool(factor.diagonal().min() > 1e-2):
            return _householder(y)
        q = torch.linalg.solve_triangular(factor, q.T, upper=False).T
    return q


def _householder(y: Tensor) -> Tensor:
    """Orthonormalize by Householder's QR, whose Q is orthonormal whatever y is."""
    norms = torch.linalg.vector_norm(y, dim=0)
    q: Tensor = torch.linalg.qr(y / torch.where(norms > 0, norms, 1.0))[0]
    return q


def row_subspace(
    m: Tensor, k: int, start: Tensor | None = None, *, steps: int = 2, precise: bool = True, seed: int = 0
) -> Tensor:
    """Return an orthonormal basis of the leading right singular subspace of a matrix.

    ``span V ≈ argmax ‖M V‖`` over orthonormal V with k columns; exact where a side of M is small, otherwise after
    ``steps`` steps of subspace iteration from ``start``.

    Args:
        m: (rows, n).
        k: number of columns, at most n; columns beyond the rank of m complete the basis.
        start: (n, k) orthonormal, or None for a random start and ``START_STEPS`` steps.
        steps: subspace iterations from a given start.
        precise: whether directions far below the leading ones count; squares are then formed in float64.
        seed: for the random start.
    Returns: (n, k).
    Cost: O(rows n k steps), or O(rows n min(rows, n)) where the smaller side is small.
    Reference: Halko, Martinsson & Tropp 2011, algorithm 4.4, doi:10.1137/090771806
    """
    rows, n = m.shape
    if k >= n:
        return torch.eye(n, dtype=m.dtype, device=m.device)
    if min(rows, n) <= (EXACT_SIDE if start is not None else 2 * EXACT_SIDE):
        return _exact_row_subspace(m, k, torch.float64 if precise else m.dtype, seed)
    if start is None:
        start, steps = orthonormal(m.T @ gaussian(rows, min(k + OVERSAMPLING, n), seed).to(m)), START_STEPS
    v = start
    for _ in range(steps):
        v = orthonormal(m.T @ orthonormal(m @ v))
    if v.shape[1] == k:
        return v
    small = m @ v
    return v @ _leading_eigenvectors(small.T @ small, k)


def _exact_row_subspace(m: Tensor, k: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Take eigenvectors of the smaller Gram matrix; in float64, squaring loses nothing that a float32 m has."""
    rows, n = m.shape
    squared = m.to(dtype)
    if n <= rows:
        return _leading_eigenvectors(squared.T @ squared, k).to(m.dtype)
    vectors = _leading_eigenvectors(squared @ squared.T, min(k, rows)).to(m.dtype)
    basis = m.T @ vectors
    if k > rows:
        basis = torch.cat([basis, gaussian(n, k - rows, seed).to(m)], dim=1)
    return orthonormal(basis)


def _leading_eigenvectors(symmetric: Tensor, k: int) -> Tensor:
    """Return eigenvectors of the k largest eigenvalues, largest first."""
    vectors: Tensor = torch.linalg.eigh(symmetric)[1]
    return vectors[:, -k:].flip(1)


def hidden_basis(stream: Stream, k: int, power_steps: int, seed: int) -> Tensor:
    """Return a basis that is close to the leading subspace of the hidden mode: a start for sweeps.

    Eigenvectors of ``Σ_s X_sᵀ X_s``, which is formed where hidden is small; otherwise by a randomized range finder with
    ``power_steps`` power iterations, each one read of every slice.

    Args:
        stream: the stack.
        k: number of columns, at most hidden.
        power_steps: power iterations after the first product.
        seed: for the Gaussian test matrix.
    Returns: (hidden, k), orthonormal.
    Cost: O(S inner hidden k) a step, or O(S inner hidden²) where hidden ≤ 1024; peak one slice and (inner + hidden) k.
    Reference: Halko, Martinsson & Tropp 2011, algorithm 4.4, doi:10.1137/090771806
    """
    hidden = stream.shape[2]
    if hidden <= SMALL_SIDE:
        gram = sum_up(panel.gram() for panel in stream.panels())
        return row_subspace(gram, k, seed=seed)
    v = gaussian(hidden, min(k + OVERSAMPLING, hidden), seed)
    for _ in range(power_steps + 1):
        total = sum_up(panel.left(panel.right(v, fast=stream.fast).T, fast=stream.fast) for panel in stream.panels())
        v = orthonormal(total.T)
    return v[:, :k]


def sum_up(parts: Iterable[Tensor]) -> Tensor:
    """Add tensors as they come, into the first."""
    iterator = iter(parts)
    total = next(iterator)
    for part in iterator:
        total.add_(part)
    return total
