"""Block-coordinate descent on a stack's weighted error, where slices have moments of their own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trawl.decompose.range_finder import orthonormal, sum_up
from trawl.decompose.streaming import Stream
from trawl.decompose.weights import IDENTITY, Metric, SliceWeight

TUCKER_STEPS = 3  # of conjugate gradients for a factor: more take longer, and sweeps end at the same error
CP_STEPS = 12  # with fewer of them sweeps end elsewhere, at a higher error or a lower one
CG_TOL = 1e-3  # of the squared residual at the start: sweeps come back to each factor
DEPENDENT = 1e-12  # of the largest eigenvalue of a small Gram matrix: below it, columns depend on one another


@dataclass(frozen=True, eq=False)
class MeanMoment:
    """The mean of one side's moments over a stack, in float64: identities, and ``vectors · diag(values) · vectorsᵀ``.

    Attributes:
        identity: share of slices whose moment is the identity.
        values: (n,), of the mean of all other moments; None where there are none.
        vectors: (n, n), likewise.
    """

    identity: float
    values: Tensor | None = None
    vectors: Tensor | None = None

    @classmethod
    def of(cls, metrics: Sequence[Metric], shares: Sequence[float]) -> MeanMoment:
        """Return Σ share · moment / Σ share, the identities apart."""
        weight = dict.fromkeys((IDENTITY, *metrics), 0.0)
        for metric, share in zip(metrics, shares, strict=True):
            weight[metric] += share / sum(shares)
        identity = weight.pop(IDENTITY)
        if not weight:
            return cls(identity)
        mean = sum_up(metric.dense().mul_(share / (1.0 - identity)) for metric, share in weight.items())
        values, vectors = torch.linalg.eigh(mean)
        return cls(identity, values.clamp_(min=DEPENDENT * float(values[-1])), vectors)

    def orthonormal(self, x: Tensor) -> Tensor:
        """Return a basis of the span of x (n, r) that is orthonormal in this moment."""
        q = orthonormal(x)
        if self.values is None or self.vectors is None:
            return q
        turned = self.vectors.T @ q
        mean = self.identity + (1.0 - self.identity) * self.values
        values, rotation = torch.linalg.eigh(turned.T @ (mean[:, None] * turned))
        basis: Tensor = q @ (rotation / values.sqrt())
        return basis


@dataclass(frozen=True, eq=False)
class Preconditioner:
    """The inverse of ``1 ⊗ G₀ + C̄ ⊗ G₁``: slices with the identity, and all others as if they had their mean moment.

    Exact where a side has one moment beside the identity, as in one layer's {gate, up, down}.
    """

    mean: MeanMoment
    columns: Tensor  # (r, r'), in which both Gram matrices are diagonal
    weights: Tensor  # (n or 1, r')

    @classmethod
    def of(cls, mean: MeanMoment, terms: Mapping[Metric, Tensor]) -> Preconditioner:
        """Diagonalize both Gram matrices at once."""
        total = sum_up(gram.clone() for gram in terms.values())
        other = total - terms[IDENTITY] if IDENTITY in terms else total
        values, vectors = torch.linalg.eigh(total)
        kept = values > DEPENDENT * values[-1]
        half = vectors[:, kept] / values[kept].sqrt()  # (r, r')
        part, turned = torch.linalg.eigh(half.T @ other @ half)
        part = part.clamp(0.0, 1.0)
        scale = torch.ones(1, 1).to(part) if mean.values is None else mean.values[:, None]
        return cls(mean, half @ turned, 1.0 / ((1.0 - part) + scale * part))

    def times(self, x: Tensor) -> Tensor:
        """Return its product with x (n, r)."""
        if self.mean.vectors is None:
            return ((x @ self.columns) * self.weights) @ self.columns.T
        turned = (self.mean.vectors.T @ (x @ self.columns)) * self.weights
        return self.mean.vectors @ turned @ self.columns.T


def conjugate_gradients(
    terms: Mapping[Metric, Tensor], target: Tensor, start: Tensor, precondition: Preconditioner, steps: int
) -> tuple[Tensor, float]:
    """Solve ``Σ C · X · G_C = target`` for X, approximately; no step is worse than the start.

    Args:
        terms: (r, r) Gram matrix G_C by moment C.
        target: (n, r).
        start: (n, r).
        precondition: nearly the inverse.
        steps: at most.
    Returns: X, and ``2 ⟨target, X⟩ − ⟨X, Σ C X G_C⟩``, the energy that it explains.
    Reference: Hestenes & Stiefel 1952, doi:10.6028/jres.049.044
    """

    def apply(x: Tensor) -> Tensor:
        return sum_up(metric.times(x @ gram) for metric, gram in terms.items())

    x, image = start, apply(start)
    residual = target - image
    z = precondition.times(residual)
    direction, size = z, float((residual * z).sum())
    limit = CG_TOL * max(size, 0.0)
    for _ in range(steps):
        if not size > limit:
            break
        across = apply(direction)
        curvature = float((direction * across).sum())
        if not curvature > 0.0:
            break
        step = size / curvature
        x, image, residual = x + step * direction, image + step * across, residual - step * across
        z = precondition.times(residual)
        size, before = float((residual * z).sum()), size
        direction = z + (size / before) * direction
    return x, float((2 * target - image).mul(x).sum())


def full_middle(gram: Tensor, product: Tensor, own_gram: Tensor) -> Tensor:
    """Return the M of least weighted error, (FᵀAF)⁻¹ · FᵀAWBO · (OᵀBO)⁻¹, of a Tucker decomposition."""
    return inverse(gram) @ product @ inverse(own_gram)


def diagonal_middle(gram: Tensor, product: Tensor, own_gram: Tensor) -> Tensor:
    """Return the diagonal M of least weighted error, (FᵀAF ∘ OᵀBO)⁻¹ · diag(FᵀAWBO), of a CP decomposition."""
    return torch.diag(inverse(gram * own_gram) @ product.diagonal())


def inverse(gram: Tensor) -> Tensor:
    """Return the pseudo-inverse of a Gram matrix, its diagonal scaled to 1 beforehand."""
    scale = gram.diagonal().clamp(min=torch.finfo(gram.dtype).tiny).rsqrt()
    inverted: Tensor = torch.linalg.pinv(gram * scale * scale[:, None], rtol=DEPENDENT, hermitian=True)
    return inverted * scale * scale[:, None]


@dataclass(frozen=True, eq=False)
class Problem:
    """A stack, its weights, and the form of its middles, as seen from the left factor or from the right one.

    Attributes:
        stream: the stack.
        weights: one per slice.
        inner: the mean of all inner moments.
        hidden: the mean of all hidden moments.
        energy: the stack's weighted squared norm.
        diagonal: whether middles are diagonal, as those of a CP.
    """

    stream: Stream
    weights: Sequence[SliceWeight]
    inner: MeanMoment
    hidden: MeanMoment
    energy: float
    diagonal: bool

    @classmethod
    def of(cls, stream: Stream, weights: Sequence[SliceWeight], *, diagonal: bool) -> Problem:
        """Take the means and the energy."""
        shares = [weight.share for weight in weights]
        inner = MeanMoment.of([weight.inner for weight in weights], shares)
        hidden = MeanMoment.of([weight.hidden for weight in weights], shares)
        energy = sum(weight.squared(panel.whole()) for weight, panel in zip(weights, stream.panels(), strict=True))
        return cls(stream, weights, inner, hidden, energy, diagonal)

    def sweep(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, float]:
        """Refit left to right, then right to left; return both, rescaled, and the relative weighted error."""
        left, _ = self.refit(left, right, left=True)
        left = self._rescaled(left, self.inner)
        right, explained = self.refit(right, left, left=False)
        return left, self._rescaled(right, self.hidden), math.sqrt(max(0.0, 1.0 - explained / self.energy))

    def aligned(self, last: Tensor, now: Tensor) -> Tensor:
        """Return the factor of the sweep before, its columns matched to those of this one."""
        if self.diagonal:
            return last
        matched: Tensor = last @ torch.linalg.lstsq(last, now).solution
        return matched

    def _rescaled(self, factor: Tensor, mean: MeanMoment) -> Tensor:
        """Return a factor with unit columns (CP), or orthonormal ones in the mean moment (Tucker)."""
        if not self.diagonal:
            return mean.orthonormal(factor)
        norms = torch.linalg.vector_norm(factor, dim=0)
        return factor / torch.where(norms > 0, norms, 1.0)

    def refit(self, own: Tensor, fixed: Tensor, *, left: bool) -> tuple[Tensor, float]:
        """Refit all middles, then one factor, to the other: each in turn to least weighted error.

        Args:
            own: the factor to refit, (n, r), left or right.
            fixed: the other.
            left: whether ``own`` is the left one.
        Returns: the factor, and the weighted energy that it explains together with the middles.
        """
        targets: dict[Metric, Tensor] = {}
        terms: dict[Metric, Tensor] = {}
        for weight, gram, product, middle in self._middles(own, fixed, left=left):
            along = weight.inner if left else weight.hidden
            target, term = middle.T @ product, middle.T @ gram @ middle
            targets[along] = torch.add(targets.get(along, torch.zeros_like(target)), target, alpha=weight.share)
            terms[along] = torch.add(terms.get(along, torch.zeros_like(term)), term, alpha=weight.share)
        target = sum_up(metric.times(part.T.contiguous()) for metric, part in targets.items())
        precondition = Preconditioner.of(self.inner if left else self.hidden, terms)
        steps = CP_STEPS if self.diagonal else TUCKER_STEPS
        return conjugate_gradients(terms, target, own, precondition, steps)

    def middles(self, left: Tensor, right: Tensor) -> Tensor:
        """Return every middle of least weighted error, (S, r1, r2)."""
        return torch.stack([middle for *_, middle in self._middles(right, left, left=False)])

    def _middles(
        self, own: Tensor, fixed: Tensor, *, left: bool
    ) -> Iterator[tuple[SliceWeight, Tensor, Tensor, Tensor]]:
        """Yield for each slice its weight, the Gram matrix of ``fixed``, (W B F)ᵀ or (Wᵀ A F)ᵀ, and the middle."""
        across = [weight.hidden if left else weight.inner for weight in self.weights]
        along = [weight.inner if left else weight.hidden for weight in self.weights]
        images, grams = _images(across, fixed)
        own_images, own_grams = _images(along, own)
        best = diagonal_middle if self.diagonal else full_middle
        for panel, weight, one, other in zip(self.stream.panels(), self.weights, across, along, strict=True):
            product = (panel.right(images[one]) if left else panel.left(images[one])).to(own.dtype)  # (r_fixed, n)
            middle = best(grams[one], product @ own_images[other], own_grams[other])  # (r_fixed, r_own)
            yield weight, grams[one], product, middle


def _images(metrics: Sequence[Metric], factor: Tensor) -> tuple[dict[Metric, Tensor], dict[Metric, Tensor]]:
    """Return each moment's product with a factor, and the factor's Gram matrix in it."""
    images = {metric: metric.times(factor) for metric in dict.fromkeys(metrics)}
    return images, {metric: factor.T @ image for metric, image in images.items()}
