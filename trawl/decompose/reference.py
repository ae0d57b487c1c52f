"""The reference engine: tensorly's decompositions of a whole stack in memory."""

from __future__ import annotations

import contextlib
import math

import torch
from torch import Tensor

from trawl.decompose.source import SliceSource
from trawl.errors import PlanError, ShapeError
from trawl.factors import Factors


def load_stack(source: SliceSource) -> tuple[Tensor, float]:
    """Return the whole stack, upcast and divided by a power of two near its largest magnitude, and that power."""
    largest = source.absmax
    if not math.isfinite(largest):
        raise ShapeError(f"stack of shape {source.shape} holds NaN or Inf entries; expected finite numbers")
    unit = math.ldexp(1.0, math.frexp(largest)[1]) if largest else 1.0
    parts = [part if part.dtype == torch.float64 else part.float() for part in source.slices()]
    return torch.stack([part / unit for part in parts]), unit


def reference_cp(source: SliceSource, rank: int, n_iter_max: int, tol: float, seed: int) -> Factors:
    """Return tensorly's CP of a stack: the better of a random and an SVD start.

    Args: as the fields of :class:`trawl.decompose.CP`.
    Returns: as :meth:`trawl.decompose.CP.decompose`, columns not scaled.
    Raises: PlanError: both starts lead to singular normal equations.
    Cost: the stack in memory several times over, full SVDs of its unfoldings.
    Reference: Kossaifi et al. 2019, https://jmlr.org/papers/v20/18-277.html
    """
    import tensorly  # noqa: PLC0415 (half a second that `trawl plan` need not pay)
    from tensorly.decomposition import parafac  # noqa: PLC0415 (likewise)

    stack, unit = load_stack(source)
    if not stack.any():
        size, inner, hidden = stack.shape
        return Factors(
            stack.new_zeros(inner, rank), stack.new_zeros(hidden, rank), stack.new_zeros(size, rank), None, 0.0
        )
    results = []
    with tensorly.backend_context("pytorch", local_threadsafe=True):
        for init in ("random", "svd"):
            with contextlib.suppress(RuntimeError):  # a singular system (LinAlgError); the other start may do
                solution, errors = parafac(
                    stack, rank, n_iter_max=n_iter_max, tol=tol, init=init, random_state=seed, return_errors=True
                )
                results.append((_measured(stack, solution), solution, len(errors)))
    if not results:
        raise PlanError(
            f"tensorly's parafac met singular normal equations on a stack of shape {source.shape} at rank {rank}, "
            "from both of its starts; lower the rank or use engine streaming"
        )
    error, (_, (mixing, left, right)), sweeps = min(results, key=lambda result: result[0])
    return Factors(left, right, mixing * unit, None, error, sweeps, sweeps < n_iter_max)


def _measured(stack: Tensor, solution: tuple[Tensor, tuple[Tensor, Tensor, Tensor]]) -> float:
    """Relative error of a CP, subtracted entry by entry."""
    mixing, left, right = solution[1]
    return relative_error(stack, Factors(left, right, mixing))


def reference_tucker(
    source: SliceSource, ranks: tuple[int, int, int], n_iter_max: int, tol: float, seed: int
) -> Factors:
    """Return tensorly's Tucker of a stack, from its SVD start.

    Args: as the fields of :class:`trawl.decompose.Tucker`, ``ranks`` per mode.
    Returns: as :meth:`trawl.decompose.Tucker.decompose`; a kept stack mode is multiplied into the core.
    Cost: the stack in memory several times over, full SVDs of its unfoldings.
    Reference: Kossaifi et al. 2019, https://jmlr.org/papers/v20/18-277.html
    """
    import tensorly  # noqa: PLC0415 (half a second that `trawl plan` need not pay)
    from tensorly.decomposition import tucker  # noqa: PLC0415 (likewise)

    stack, unit = load_stack(source)
    if not stack.any():
        stack[0, 0, 0], unit = 1.0, 0.0
    with tensorly.backend_context("pytorch", local_threadsafe=True):
        (core, (mixing, left, right)), errors = tucker(
            stack, list(ranks), n_iter_max=n_iter_max, tol=tol, init="svd", random_state=seed, return_errors=True
        )
    kept: Tensor | None = mixing
    if ranks[0] == stack.shape[0]:
        core, kept = torch.tensordot(mixing, core, dims=1), None
    factors = Factors(left, right, core, kept)
    error = relative_error(stack, factors) if unit else 0.0
    return Factors(left, right, core * unit, kept, error, len(errors), len(errors) < n_iter_max)


def reference_svd(source: SliceSource, rank: int) -> Factors:
    """Return the truncation of an exact SVD of a stack of one slice."""
    stack, unit = load_stack(source)
    u, sigma, vt = torch.linalg.svd(stack[0], full_matrices=False)
    u, sigma, v = u[:, :rank].contiguous(), sigma[:rank], vt[:rank].T.contiguous()
    error = relative_error(stack, Factors(u, v, sigma[None]))
    return Factors(u, v, (sigma * unit)[None], None, error, 1, True)


def relative_error(stack: Tensor, factors: Factors) -> float:
    """Return ‖T − T̂‖ / ‖T‖, summed in float64; 0 where T is zero."""
    residual = sum(
        float((matrix.double() - factors.slice(s).double()).square().sum()) for s, matrix in enumerate(stack)
    )
    norm = float(sum(float(matrix.double().square().sum()) for matrix in stack))
    return math.sqrt(residual / norm) if norm else 0.0
