"""CP and Tucker decompositions of a stack whose error is weighed by second moments."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from trawl.decompose.method import report_cap, report_sweep
from trawl.decompose.source import SliceSource
from trawl.decompose.streaming import Stream
from trawl.decompose.weighing import measured
from trawl.decompose.weighted_sweeps import Problem
from trawl.decompose.weights import Weights, slice_weights
from trawl.factors import Factors

COARSE = 10.0  # times tol: a sweep costs more than a plain one, and the last digits of a sampled error mean little
PUSH_STEP, PUSH_MOST = 0.5, 0.9  # extrapolation grows while the error falls: fewer sweeps to the same error


def weighted_fit(source: SliceSource, plain: Factors, weights: Weights, n_iter_max: int, tol: float) -> Factors:
    """Return CP or Tucker factors of a stack by its weighted error.

    Minimizes Σ_s ‖A_s^{1/2} (W_s − left · M_s · rightᵀ) B_s^{1/2}‖² by sweeps from the plain factors, none of which
    raises it: left from ``Σ_s A_s · left · (M_s Rᵀ B_s R M_sᵀ) = Σ_s A_s W_s B_s R M_sᵀ`` by preconditioned conjugate
    gradients, right likewise, and before each of them every M_s in closed form.

    Args:
        source: the stack (S, inner, hidden).
        plain: its factors by plain error; their core says whether middles are diagonal (CP) or full (Tucker).
        weights: checked for that stack.
        n_iter_max: cap on sweeps.
        tol: ten times this is the change of weighted error between sweeps under which they stop.
    Returns: factors of the same form; both errors, measured.
    Cost: an eigendecomposition of each side's mean moment; a sweep is two passes, and for each distinct moment C
        a few products C · factor. Peak: three matrices of float64 for each side's moment.
    Reference: Kolda & Bader 2009, sections 3.4 and 4.2, doi:10.1137/07070111X
    """
    stream, start = Stream(source), measured(source, plain, weights)
    if not start.weighted_error:
        return start
    each = slice_weights(weights, plain.left.device)
    problem = Problem.of(stream, each, diagonal=plain.core.dim() == 2)
    left, right, sweeps, converged = _descend(problem, start, n_iter_max, COARSE * tol)
    core = problem.middles(left, right) / stream.scale
    found = (_cp if plain.core.dim() == 2 else _tucker)(left, core, right).to(dtype=plain.left.dtype)
    found = measured(source, replace(found, iterations=sweeps, converged=converged), weights)
    assert found.weighted_error is not None
    return found if found.weighted_error < start.weighted_error else start  # rounding may outweigh what sweeps gain


def _descend(problem: Problem, start: Factors, n_iter_max: int, tol: float) -> tuple[Tensor, Tensor, int, bool]:
    """Sweep until the change of weighted error is under ``tol``; return left, right, sweeps, and whether it was.

    Each sweep begins at a right factor moved on by ``push`` times its way from the one before; where that raises the
    error it is made again from the right factor itself.

    Reference: Mitchell, Ye & De Sterck 2020, doi:10.1002/nla.2297
    """
    assert start.weighted_error is not None
    left, right = start.left.double(), start.right.double()
    ahead, error, push, converged, sweep = right, start.weighted_error, 0.0, False, 0
    while sweep < n_iter_max and not converged:
        sweep, before, last = sweep + 1, error, right
        new_left, right, error = problem.sweep(left, ahead)
        if push and not error <= before:
            push = 0.0
            new_left, right, error = problem.sweep(left, last)
        else:
            push = min(PUSH_MOST, push + PUSH_STEP)
        left, ahead = new_left, right + push * (right - problem.aligned(last, right))
        converged = abs(before - error) < tol
        report_sweep("weighted", sweep, error, before)
    if not converged:
        report_cap("weighted sweeps", n_iter_max, before - error, tol)
    return left, right, sweep, converged


def _cp(left: Tensor, middles: Tensor, right: Tensor) -> Factors:
    """Return CP factors; left and right have unit columns."""
    return Factors(left.contiguous(), right.contiguous(), middles.diagonal(dim1=1, dim2=2).contiguous())


def _tucker(left: Tensor, middles: Tensor, right: Tensor) -> Factors:
    """Return Tucker factors with orthonormal columns."""
    (q, across), (p, down) = torch.linalg.qr(left), torch.linalg.qr(right)
    return Factors(q.contiguous(), p.contiguous(), across @ middles @ down.T)
