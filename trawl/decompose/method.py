"""What every method offers, and the checks that methods share."""

from __future__ import annotations

import logging
from typing import Literal, Protocol, get_args

from trawl.decompose.source import SliceSource
from trawl.decompose.weights import Weights
from trawl.errors import PlanError, RankError, ShapeError, suggestion
from trawl.factors import Factors

logger = logging.getLogger("trawl.decompose")

Engine = Literal["streaming", "tensorly"]
Compute = Literal["float32", "bfloat16"]
Shape = tuple[int, int, int]


class Method(Protocol):
    """A decomposition with its hyper-parameters; everything but ``decompose`` is arithmetic on shapes."""

    def decompose(self, source: SliceSource, start: Factors | None = None, weights: Weights | None = None) -> Factors:
        """Stream a stack and return its factors, found from its factors at another rank where those are given.

        Weights, unless they count all entries alike, make it the weighted error that is minimized.
        """

    def ranks(self, shape: Shape) -> Shape:
        """Ranks (stack, inner, hidden) of the factors of a stack of this shape."""

    def check_rank(self, shape: Shape, where: str) -> None:
        """Raise RankError, naming ``where``, for a rank that a stack of this shape cannot have."""

    def parameters(self, shape: Shape) -> int:
        """Number of entries that a checkpoint stores, exactly ``Factors.parameters`` in interpolative form."""

    def flops(self, shape: Shape) -> int:
        """Floating-point operations of a typical run."""

    def working_set(self, shape: Shape) -> int:
        """Peak bytes beside the slices themselves."""


def check_options(engine: str, compute: str, n_iter_max: int, tol: float) -> None:
    """Raise PlanError for a hyper-parameter that no method takes."""
    for name, value, known in (("engine", engine, get_args(Engine)), ("compute", compute, get_args(Compute))):
        if value not in known:
            raise PlanError(f"unknown {name} {value!r}; expected one of {', '.join(known)}{suggestion(value, known)}")
    if n_iter_max < 1:
        raise PlanError(f"n_iter_max is {n_iter_max}; expected at least one sweep")
    if not tol >= 0:
        raise PlanError(f"tol is {tol}; expected zero or a positive change of fit")


def check_one(name: str, rank: int, largest: int, shape: Shape, where: str) -> None:
    """Raise RankError unless ``1 ≤ rank ≤ largest``."""
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise RankError(f"{where}: {name} {rank!r} is not an integer; give an integer from 1 to {largest}")
    if not 1 <= rank <= largest:
        raise RankError(
            f"{where}: {name} {rank} is outside 1..{largest} for shape {shape}; give a rank up to {largest}"
        )


def check_start(start: Factors, shape: Shape, engine: str, core_axes: int) -> None:
    """Raise unless factors to start from are of this method and of a stack of this shape, and the engine takes them."""
    if engine == "tensorly":
        raise PlanError("engine 'tensorly' takes no factors to start from; use engine 'streaming', or leave out start")
    if start.core.dim() != core_axes:
        raise ShapeError(
            f"factors to start from have a core of shape {tuple(start.core.shape)}; expected {core_axes} axes, "
            "as factors of the same method have"
        )
    if start.shape != shape:
        raise ShapeError(f"factors to start from are of shape {start.shape}; expected those of the stack, {shape}")


def weigh(weights: Weights | None, shape: Shape, engine: str, start: Factors | None = None) -> Weights | None:
    """Return checked weights, or None where they count all entries alike.

    Raises: ShapeError: they are not second moments for this shape. PlanError: the engine knows no weights, or factors
        of another rank are given to start from.
    """
    if weights is None:
        return None
    weights.check(shape)
    if weights.plain:
        return None
    if engine == "tensorly":
        raise PlanError("engine 'tensorly' knows no weights; use engine 'streaming', or leave out the weights")
    if start is not None:
        raise PlanError(
            "weighted sweeps start from plain factors of the same rank, not from weighted ones of another; leave out "
            "start"
        )
    return weights


def report_sweep(method: str, sweep: int, error: float, before: float) -> None:
    """Log the fit, 1 − relative error, after one sweep."""
    logger.info("%s sweep %d: fit %.6f (change %.1e)", method, sweep, 1.0 - error, before - error)


def report_cap(method: str, n_iter_max: int, change: float, tol: float) -> None:
    """Warn that sweeps ended at their cap."""
    logger.warning(
        "%s stopped at its cap of %d sweeps: the last changed the fit by %.1e, above tol %.1e; raise n_iter_max or tol",
        method,
        n_iter_max,
        change,
        tol,
    )
