"""Second moments that weigh a stack's error: their checks, their products, and their square roots."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from trawl.decompose.streaming import BLOCK_ENTRIES
from trawl.errors import ShapeError

RIDGE = 1e-6  # of the mean eigenvalue: inputs that were never seen count by so much
ASYMMETRY = 1e-3  # of the largest entry


@dataclass(frozen=True, eq=False)
class Weights:
    """Second moments that weigh a stack's error: Σ_s ‖A_s^{1/2} (W_s − Ŵ_s) B_s^{1/2}‖².

    With E[x xᵀ] of the inputs of a linear layer on the side that it reads, this is the mean squared error of its
    outputs. Slices that share a moment hold the same tensor, so that work on it is done once.

    Attributes:
        inner: A_s (inner, inner) per slice, symmetric and positive semi-definite, or its diagonal (inner,) where it has
            no other entries; None stands for the identity.
        hidden: B_s (hidden, hidden) per slice, likewise.
        sizes: what each slice's squared error is divided by; 1 where there are none.
    """

    inner: tuple[Tensor | None, ...]
    hidden: tuple[Tensor | None, ...]
    sizes: tuple[float, ...] | None = None

    def check(self, shape: tuple[int, int, int]) -> None:
        """Raise ShapeError unless these are second moments for a stack of this shape."""
        if self.sizes is not None and (
            len(self.sizes) != shape[0] or not all(0 < size < math.inf for size in self.sizes)
        ):
            raise ShapeError(f"weights have sizes {self.sizes}; expected {shape[0]} positive numbers, one per slice")
        for side, moments, size in (("inner", self.inner, shape[1]), ("hidden", self.hidden, shape[2])):
            if len(moments) != shape[0]:
                raise ShapeError(
                    f"weights have {len(moments)} {side} moments for a stack of shape {shape}; expected one per slice, "
                    f"{shape[0]}, None for the identity"
                )
            for moment, slices in _distinct(moments):
                _check_moment(moment, size, f"{side} moment of slice {slices[0]}")

    @property
    def plain(self) -> bool:
        """Whether every entry of the stack counts alike: all slices have the same multiple of the identity."""
        products = []
        sizes = self.sizes or (1.0,) * len(self.inner)
        for *pair, size in zip(self.inner, self.hidden, sizes, strict=True):
            factors = [1.0 if moment is None else _multiple_of_identity(moment) for moment in pair]
            products.append(math.nan if None in factors else math.prod(factor for factor in factors if factor) / size)
        return all(math.isclose(product, products[0], rel_tol=1e-12) for product in products)  # NaN is unlike itself

    def balanced(self) -> Weights:
        """Return the same moments, each slice's error relative to their mean eigenvalues, so that all count alike.

        Outputs of different layers and roles come in different sizes that say nothing of what depends on them.
        """
        pairs = zip(_means(self.inner), _means(self.hidden), strict=True)
        return Weights(self.inner, self.hidden, tuple(a * b for a, b in pairs))

    def swapped(self) -> Weights:
        """Return the weights of the stack with inner and hidden exchanged."""
        return Weights(self.hidden, self.inner, self.sizes)


@dataclass(frozen=True, eq=False)
class Metric:
    """One moment as methods use it: ``scale · matrix + ridge · 1``, of mean eigenvalue near 1; no matrix: the identity.

    The ridge is 1e-6 of the mean eigenvalue, and of the norm what rounding took from the moment's entries: an
    input that was never seen, or a direction that rounding made negative, still counts a little.
    """

    matrix: Tensor | None = None  # (n, n), or the diagonal (n,)
    scale: float = 1.0
    ridge: float = 0.0

    def times(self, x: Tensor) -> Tensor:
        """Return the moment's product with x (n, k), in the dtype of x."""
        if self.matrix is None:
            return x
        if self.matrix.dim() == 1:
            return x * self.matrix.to(x.dtype).mul(self.scale).add(self.ridge)[:, None]
        if self.matrix.dtype == x.dtype:
            return torch.addmm(x, self.matrix, x, beta=self.ridge, alpha=self.scale)
        product = x * self.ridge
        step = max(1, BLOCK_ENTRIES // len(x))
        for first in range(0, len(x), step):
            rows = slice(first, first + step)
            product[rows].addmm_(self.matrix[rows].to(x.dtype), x, alpha=self.scale)
        return product

    def dense(self) -> Tensor:
        """Return the moment itself in float64; not of the identity."""
        assert self.matrix is not None
        matrix = (self.matrix if self.matrix.dim() == 2 else self.matrix.diag()).double() * self.scale
        matrix.diagonal().add_(self.ridge)
        return matrix


IDENTITY = Metric()


@dataclass(frozen=True, eq=False)
class SliceWeight:
    """How much the error of one slice counts: ``share · ‖inner^{1/2} E hidden^{1/2}‖²``."""

    inner: Metric
    hidden: Metric
    share: float = 1.0

    def squared(self, matrix: Tensor) -> float:
        """Return the weighted squared norm of a matrix (inner, hidden), summed in float64."""
        across = self.hidden.times(matrix.T).T
        return self.share * float((self.inner.times(matrix).double() * across.double()).sum())


def slice_weights(weights: Weights, device: torch.device) -> tuple[SliceWeight, ...]:
    """Return how much each slice's error counts, relative to the slice that counts most."""
    inner, hidden = _metrics(weights.inner, device), _metrics(weights.hidden, device)
    sizes = weights.sizes or (1.0,) * len(inner)
    shares = [a_size * b_size / size for (_, a_size), (_, b_size), size in zip(inner, hidden, sizes, strict=True)]
    return tuple(
        SliceWeight(a, b, share / max(shares)) for (a, _), (b, _), share in zip(inner, hidden, shares, strict=True)
    )


def square_root(metric: Metric) -> tuple[Tensor, Tensor]:
    """Return C^{1/2} and C^{-1/2} of a moment, symmetric, in float64.

    By eigenvalues, of which none is taken for less than the ridge: this works for moments that are singular, badly
    scaled, or negative by rounding, where a Cholesky factor does not exist.

    Args:
        metric: (n, n), not the identity.
    Cost: O(n³), a full eigendecomposition; four matrices of float64.
    Reference: Wang et al. 2024 (SVD-LLM), arXiv:2403.07378, whose Cholesky factor this replaces.
    """
    values, vectors = torch.linalg.eigh(metric.dense())
    root = values.clamp_(min=metric.ridge).sqrt()
    return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T


def _metrics(moments: tuple[Tensor | None, ...], device: torch.device) -> list[tuple[Metric, float]]:
    """Return each slice's moment with the power of two that it was divided by.

    A moment of zeros, of inputs that were never seen, counts as a ridge.
    """
    found: dict[int, tuple[Metric, float]] = {id(None): (IDENTITY, 1.0)}
    unseen = []
    for moment, _ in _distinct(moments):
        mean = float(_diagonal(moment).double().mean())
        if mean == 0.0:
            unseen.append(id(moment))
            continue
        size = math.ldexp(1.0, math.frexp(mean)[1])
        norm = float(torch.linalg.vector_norm(moment / size, dtype=torch.float64))
        ridge = RIDGE * mean / size + torch.finfo(moment.dtype).eps * norm
        found[id(moment)] = Metric(moment.to(device), 1.0 / size, ridge), size
    seen = [found[id(moment)][1] for moment in moments if id(moment) in found]
    found |= dict.fromkeys(unseen, (IDENTITY, RIDGE * max(seen, default=1.0)))
    return [found[id(moment)] for moment in moments]


def _means(moments: tuple[Tensor | None, ...]) -> list[float]:
    """Return each slice's mean eigenvalue; of a moment of zeros, the largest of the others."""
    means = {id(moment): float(_diagonal(moment).double().mean()) for moment, _ in _distinct(moments)}
    each = [1.0 if moment is None else means[id(moment)] for moment in moments]
    return [mean or max(each) or 1.0 for mean in each]


def _distinct(moments: tuple[Tensor | None, ...]) -> list[tuple[Tensor, list[int]]]:
    """Return each moment once, with the slices that have it."""
    slices: dict[int, tuple[Tensor, list[int]]] = {}
    for number, moment in enumerate(moments):
        if moment is not None:
            slices.setdefault(id(moment), (moment, []))[1].append(number)
    return list(slices.values())


def _diagonal(moment: Tensor) -> Tensor:
    """Return the diagonal of a moment, which may be all that is kept of it."""
    return moment if moment.dim() == 1 else moment.diagonal()


def _check_moment(moment: Tensor, size: int, what: str) -> None:
    """Raise ShapeError unless a tensor is square, symmetric, finite, and of no negative power."""
    if moment.shape not in ((size, size), (size,)) or moment.dtype not in (torch.float32, torch.float64):
        raise ShapeError(
            f"{what} is {tuple(moment.shape)} of {moment.dtype}; expected ({size}, {size}), or its diagonal, of "
            "float32 or float64"
        )
    largest = float(moment.abs().max())
    if not math.isfinite(largest):
        raise ShapeError(f"{what} holds NaN or Inf; expected E[x xᵀ] of finite inputs: calibrate again")
    skew = 0.0 if moment.dim() == 1 else float((moment - moment.T).abs().max())
    if skew > ASYMMETRY * largest or float(_diagonal(moment).min()) < 0.0:
        raise ShapeError(f"{what} is not symmetric with a diagonal of squares; expected E[x xᵀ]")


def _multiple_of_identity(moment: Tensor) -> float | None:
    """Return c where a moment is exactly c times the identity, c > 0."""
    diagonal = _diagonal(moment)
    first = float(diagonal[0])
    if first > 0.0 and bool((diagonal == first).all()) and int(torch.count_nonzero(moment)) == len(diagonal):
        return first
    return None
