"""Fitting one stack to its targets: what the original model computes, read off what the compressed one feeds it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from trawl.anchoring.drift import Drift
from trawl.decompose import Method, SliceSource, TensorSlices, Weights
from trawl.decompose.streaming import Stream
from trawl.decompose.weighing import measured
from trawl.decompose.weighted_sweeps import Problem
from trawl.decompose.weights import slice_weights
from trawl.factors import Factors
from trawl.stacking import READ_INNER, Stack


def fit(method: Method, stack: Stack, source: SliceSource, drifts: Sequence[Drift | None]) -> Factors:
    """Return the factors that a method finds for a stack's targets.

    Args:
        method: any that takes weights.
        stack: of one layer.
        source: its matrices as stored.
        drifts: one a slice; None for an expert that saw no token.
    Returns: factors, their errors measured against the stored matrices.
    """
    targets, weights = _targets(stack, source, drifts)
    return measured(source, method.decompose(TensorSlices(targets), weights=weights), weights)


def refit(
    factors: Factors, stack: Stack, source: SliceSource, drifts: Sequence[Drift | None], chosen: Sequence[int]
) -> Factors:
    """Return factors whose middles of some slices fit these slices' targets; what all slices share stays.

    ``M_s = (Lᵀ A L)⁻¹ Lᵀ A W̃_s B R (Rᵀ B R)⁻¹`` with the slice's moments A and B, for a CP its diagonal counterpart.

    Args:
        factors: of the stack, with a middle of its own for every slice.
        stack: of one layer.
        source: its matrices as stored.
        drifts: one a slice, the chosen ones as they are by now.
        chosen: slices to refit.
    """
    targets, weights = _targets(stack, source, drifts)
    some = Weights(tuple(weights.inner[s] for s in chosen), tuple(weights.hidden[s] for s in chosen))
    stream = Stream(TensorSlices(targets[list(chosen)]))
    problem = Problem.of(stream, slice_weights(some, targets.device), diagonal=factors.core.dim() == 2)
    middles = problem.middles(factors.left.double(), factors.right.double()) / stream.scale
    core = factors.core.clone()
    core[list(chosen)] = (middles.diagonal(dim1=1, dim2=2) if core.dim() == 2 else middles).to(core.dtype)
    return measured(source, replace(factors, core=core), weights)


def _targets(stack: Stack, source: SliceSource, drifts: Sequence[Drift | None]) -> tuple[Tensor, Weights]:
    """Return W̃ of every matrix, (S, inner, hidden), and what weighs its error."""
    if stack.joined:  # all of one input
        drifts = drifts[:1]
    inner = [part.role in READ_INNER for part in stack.slices[: len(drifts)]]
    targets = [
        make_target(matrix, drift, reads_inner=reads_inner)
        for matrix, drift, reads_inner in zip(source.slices(), drifts, inner, strict=True)
    ]
    seen = [None if drift is None else drift.seen for drift in drifts]
    weights = Weights(
        tuple(matrix if reads_inner else None for matrix, reads_inner in zip(seen, inner, strict=True)),
        tuple(None if reads_inner else matrix for matrix, reads_inner in zip(seen, inner, strict=True)),
    )
    return torch.stack(targets), weights.balanced()


def make_target(matrix: Tensor, drift: Drift | None, *, reads_inner: bool) -> Tensor:
    """Return W̃ of one matrix (inner, hidden): W x + d, as far as x' tells of it."""
    stored = matrix.double()
    if drift is not None:
        gain = drift.gain.to(stored.device)
        if not reads_inner:
            stored = stored + stored @ gain
        elif drift.of_output:
            stored = stored + gain.T
        else:
            stored = stored + gain.T @ stored
    return stored if matrix.dtype == torch.float64 else stored.float()
