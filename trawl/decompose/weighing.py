"""Errors of factors, plain and weighted, measured slice by slice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from trawl.decompose.source import SliceSource
from trawl.decompose.streaming import Stream, sum_of_squares
from trawl.decompose.weights import SliceWeight, Weights, slice_weights
from trawl.factors import Factors


def measured(source: SliceSource, factors: Factors, weights: Weights) -> Factors:
    """Return factors with their relative error and their weighted error, subtracted entry by entry.

    ``weighted_error² = Σ_s ‖A_s^{1/2} (W_s − Ŵ_s) B_s^{1/2}‖² / Σ_s ‖A_s^{1/2} W_s B_s^{1/2}‖²``

    Args:
        source: the stack.
        factors: of that stack.
        weights: checked for that stack.
    Cost: one pass, and two products of each slice with its moments.
    """
    stream = Stream(source)
    each = slice_weights(weights, stream.factor_kind()["device"])
    middles = [factors.middle(s) * stream.scale for s in range(len(each))]
    relative, weighted = errors(stream, each, factors.left, middles, factors.right)
    return replace(factors, relative_error=relative, weighted_error=weighted)


def errors(
    stream: Stream, weights: Sequence[SliceWeight], left: Tensor, middles: Sequence[Tensor], right: Tensor
) -> tuple[float, float]:
    """Return the relative and the weighted error of ``left · M_s · rightᵀ``; a middle is (r,) where it is diagonal."""
    whole, missed, weighted_whole, weighted_missed = 0.0, 0.0, 0.0, 0.0
    for panel, weight, middle in zip(stream.panels(), weights, middles, strict=True):
        matrix = panel.whole()
        whole += sum_of_squares(matrix)
        weighted_whole += weight.squared(matrix)
        across = left * middle if middle.dim() == 1 else left @ middle
        residual = matrix - across @ right.T
        missed += sum_of_squares(residual)
        weighted_missed += weight.squared(residual)
    return _root_of_ratio(missed, whole), _root_of_ratio(weighted_missed, weighted_whole)


def _root_of_ratio(part: float, whole: float) -> float:
    """Return √(part / whole), 0 where both vanish."""
    return math.sqrt(max(0.0, part) / whole) if whole > 0 else 0.0
