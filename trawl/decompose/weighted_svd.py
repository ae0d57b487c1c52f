"""Truncated singular value decomposition of one matrix whose error is weighed by second moments."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from trawl.decompose.source import SliceSource
from trawl.decompose.streaming import Stream, TransposedSlices
from trawl.decompose.weighing import measured
from trawl.decompose.weights import IDENTITY, Metric, Weights, slice_weights, square_root
from trawl.errors import RankError
from trawl.factors import Factors


def weighted_svd(source: SliceSource, rank: int, weights: Weights, start: Factors | None = None) -> Factors:
    """Return the best approximation of one matrix of a rank, by its weighted error.

    Minimizes ‖A^{1/2} (W − Ŵ) B^{1/2}‖. With V the leading eigenvectors of ``B^{1/2} Wᵀ A W B^{1/2}``, it is
    ``Ŵ = (W B^{1/2} V) (B^{-1/2} V)ᵀ``, so that only the smaller side's moment needs a square root.

    Args:
        source: a stack (1, inner, hidden).
        rank: from 1 to min(inner, hidden).
        weights: checked for that stack.
        start: the same at a larger rank, which is cut.
    Returns: left (inner, rank) and right (hidden, rank), whose columns are orthonormal in the moments, core (1, rank),
        the weighted singular values; both errors, measured.
    Cost: O(inner hidden min + max² min + min³) with the smaller and the larger side; four matrices of float64.
    Reference: Wang et al. 2024 (SVD-LLM), arXiv:2403.07378; Yuan et al. 2023 (ASVD), arXiv:2312.05821, for diagonal B.
    """
    if start is not None:
        return _cut(source, start, rank, weights)
    if source.shape[1] < source.shape[2]:
        swapped = weighted_svd(TransposedSlices(source), rank, weights.swapped())
        return replace(swapped, left=swapped.right, right=swapped.left)
    stream = Stream(source)
    kind = stream.factor_kind()
    (weight,) = slice_weights(weights, kind["device"])
    (matrix,) = (panel.whole().double() for panel in stream.panels())
    left, sigma, right = _leading(matrix, rank, weight.inner, weight.hidden)
    found = Factors(left.to(**kind), right.to(**kind), (sigma / stream.scale).to(**kind)[None])
    return measured(source, found, weights)


def _cut(source: SliceSource, factors: Factors, rank: int, weights: Weights) -> Factors:
    """Return the leading triplets of a larger weighted SVD of the same matrix."""
    if factors.rank[2] < rank:
        raise RankError(f"an SVD of rank {rank} cannot be cut from one of rank {factors.rank[2]}; give one as large")
    left, right, core = (part[:, :rank].contiguous() for part in (factors.left, factors.right, factors.core))
    return measured(source, replace(factors, left=left, right=right, core=core), weights)


def _leading(matrix: Tensor, rank: int, inner: Metric, hidden: Metric) -> tuple[Tensor, Tensor, Tensor]:
    """Return left, weighted singular values, and right, for a matrix in float64."""
    root, inverse = (None, None) if hidden is IDENTITY else square_root(hidden)
    whitened = matrix if root is None else matrix @ root  # (inner, hidden)
    gram = whitened.T @ inner.times(whitened)
    vectors = torch.linalg.eigh((gram + gram.T) / 2)[1][:, -rank:].flip(1)
    left = whitened @ vectors  # (inner, rank)
    sigma = (left * inner.times(left)).sum(dim=0).clamp_(min=0.0).sqrt()
    return left / torch.where(sigma > 0, sigma, 1.0), sigma, vectors if inverse is None else inverse @ vectors
