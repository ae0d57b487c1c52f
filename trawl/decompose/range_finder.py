"""Orthonormal bases of the dominant subspaces of tall matrices and of a stack's modes."""

from __future__ import annotations

import torch
from torch import Tensor

from trawl.decompose.streaming import Stream

SMALL_SIDE = 1024  # up to this size a Gram matrix and its eigenvectors cost less than passes of thin products
OVERSAMPLING = 8


def gaussian(rows: int, columns: int, seed: int) -> Tensor:
    """Return a Gaussian matrix that depends on its arguments only, whatever the device."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def orthonormal(y: Tensor) -> Tensor:
    """Return Q (n, k) with orthonormal columns that span the columns of y (n, k); n ≥ k.

    Twice through Cholesky factors of YᵀY (CholeskyQR2), a matrix product where Householder's QR is a sequence of thin
    updates; the latter takes over where y is ill-conditioned, and completes a basis where columns are dependent.

    Cost: O(n k²).
    Reference: Fukaya et al. 2014, doi:10.1109/ScalA.2014.11
    """
    if y.shape[1] == 0:
        return y
    q = y
    for _ in range(2):
        norms = torch.linalg.vector_norm(q, dim=0)
        if not bool(norms.min() > 0):
            return _householder(y)
        q = q / norms
        factor, failed = torch.linalg.cholesky_ex(q.T @ q)
        if bool(failed) or not bool(factor.diagonal().min() > 1e-2):
            return _householder(y)
        q = torch.linalg.solve_triangular(factor, q.T, upper=False).T
    return q.contiguous()


def _householder(y: Tensor) -> Tensor:
    """Orthonormalize twice: the columns of a first Q are as good as orthonormal, whatever y is."""
    norms = torch.linalg.vector_norm(y, dim=0)
    return torch.linalg.qr(y / torch.where(norms > 0, norms, 1.0))[0]


def leading_subspace(y: Tensor, k: int, start: Tensor | None = None, steps: int = 2, seed: int = 0) -> Tensor:
    """Return an orthonormal basis of the leading left singular subspace of y.

    ``span U ≈ argmax ‖Uᵀ y‖`` over orthonormal U with k columns; exact where a side of y is small, otherwise after
    ``steps`` steps of subspace iteration from ``start``.

    Args:
        y: (n, m).
        k: number of columns, at most n; columns beyond the rank of y complete the basis.
        start: (n, at least k) or None for a random start.
        steps: subspace iterations from a given start; a random start takes four more.
        seed: for the random start.
    Returns: (n, k).
    Cost: O(n m k steps), or O(n m min(n, m)) where the smaller side is small.
    Reference: Halko, Martinsson & Tropp 2011, algorithm 4.4, doi:10.1137/090771806
    """
    n, m = y.shape
    if k >= n:
        return torch.eye(n, dtype=y.dtype, device=y.device)
    if min(n, m) <= max(SMALL_SIDE // 2, 2 * k):
        return _exact_subspace(y, k)
    if start is None:
        sketch = gaussian(m, min(k + OVERSAMPLING, n), seed).to(y)
        start, steps = orthonormal(y @ sketch), steps + 4
    u = start
    for _ in range(steps):
        u = orthonormal(y @ (y.T @ u))
    return _rotate_to_leading(y, u, k) if u.shape[1] > k else u


def _exact_subspace(y: Tensor, k: int) -> Tensor:
    """Take eigenvectors of the smaller Gram matrix, in float64: its squares then lose nothing that y has."""
    n, m = y.shape
    exact = y.double()
    if n <= m:
        return torch.linalg.eigh(exact @ exact.T)[1][:, -k:].flip(1).to(y.dtype)
    vectors = torch.linalg.eigh(exact.T @ exact)[1].flip(1)[:, :k].to(y.dtype)
    basis = y @ vectors
    if k > m:
        basis = torch.cat([basis, gaussian(n, k - m, 0).to(y)], dim=1)
    return orthonormal(basis)


def _rotate_to_leading(y: Tensor, u: Tensor, k: int) -> Tensor:
    """Keep the k leading left singular directions of y within the span of u."""
    small = (y.T @ u).double()
    return u @ torch.linalg.eigh(small.T @ small)[1][:, -k:].flip(1).to(u.dtype)


def hidden_basis(stream: Stream, k: int, power_steps: int, seed: int) -> Tensor:
    """Return a basis of the leading k-dimensional subspace of the hidden mode.

    Leading eigenvectors of ``Σ_s X_sᵀ X_s``: exactly where hidden is small, otherwise by a randomized range finder with
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
        gram: Tensor | None = None
        for panel in stream.panels():
            gram = panel.gram() if gram is None else gram.add_(panel.gram())
        assert gram is not None
        return torch.linalg.eigh(gram.double())[1][:, -k:].flip(1).to(gram.dtype)
    width = min(k + OVERSAMPLING, hidden)
    v = gaussian(hidden, width, seed)
    for _ in range(power_steps + 1):
        total: Tensor | None = None
        for panel in stream.panels():
            product = panel.transposed_times(panel.times(v, fast=stream.fast), fast=stream.fast)
            total = product if total is None else total.add_(product)
        assert total is not None
        v = orthonormal(total)
    return v[:, :k]
