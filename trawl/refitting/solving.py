"""Rows of a narrowed FC's writers, by linear least squares.

An FC computes ``y = Dᵀ φ(s₁, …)`` with ``s = V x + b`` of each writer V. To first order in changes Δ of all of them

    y(V + Δ) ≈ y(V) + Dᵀ Σ_V (h_V ∘ Δ_V x),    h_V = ∂φ/∂s_V.

With t what y(V) misses of what is wanted, G what a miss counts by, and E a mean in which each token counts by its
weight, the changes are

    argmin E‖G^½ (t − Dᵀ Σ_V (h_V ∘ Δ_V x))‖² + λ s̄ Σ_V Σ_j K_V,jj ‖Δ_V,j‖²,    K_V = (D G Dᵀ) ∘ E[h_V h_Vᵀ],

with s̄ the mean eigenvalue of E[x xᵀ], of tokens alike, found by conjugate gradients from zero, preconditioned for each
writer by ``(K_V + λ diag K_V)⁻¹ ⊗ (E[x xᵀ] + λ s̄ 1)⁻¹``: but for λ the solution itself, if there were one writer, and h
and x independent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

RIDGE = 0.03  # λ
STEPS = 4  # of conjugate gradients: more of them follow the calibration text, and no other
SAMPLED = 4  # one chunk in so many gives the correlations that precondition
CHUNK = 1 << 12  # tokens whose units are formed at once: few enough to stay in the cache
DEAD = 1e-6  # of the mean K_jj, for units that never change


@dataclass(frozen=True, eq=False)
class Tokens:
    """What an FC reads and what it is to give.

    Attributes:
        x: its inputs, (tokens, hidden), in the dtype that products are formed in.
        y: wanted outputs, bias aside, (tokens, hidden), likewise.
        weight: how much each token counts, (tokens, 1) float32.
    """

    x: Tensor
    y: Tensor
    weight: Tensor

    def __len__(self) -> int:
        return len(self.x)

    @cached_property
    def count(self) -> float:
        """Σ weights."""
        return float(self.weight.double().sum())

    @cached_property
    def energy(self) -> float:
        """E‖y‖²."""
        total = sum(float((self.weight[at] * self.y[at].float().square()).double().sum()) for at in self.chunks())
        return total / self.count

    @cached_property
    def root(self) -> Tensor:
        """Square roots of the weights, in the dtype of x."""
        return self.weight.sqrt().to(self.x.dtype)

    def chunks(self) -> Iterator[slice]:
        """Yield slices of tokens."""
        return (slice(start, start + CHUNK) for start in range(0, len(self), CHUNK))


@dataclass(eq=False)
class Linearised:
    """The least-squares problem of all writers' changes, put together a chunk of tokens at a time.

    Attributes:
        reader: D, (k, hidden), float64.
        root: of G; None counts all outputs alike.
        dtype: what products are formed in; sums over chunks are float64.
    """

    reader: Tensor
    root: Tensor | None
    dtype: torch.dtype
    _count: int = field(default=0, init=False)
    _chunks: list[tuple[Tensor, Sequence[Tensor]]] = field(default_factory=list, init=False)  # x and slopes
    _missing: Tensor = field(init=False)  # Σ (h ∘ D G t) xᵀ of each writer
    _energies: Tensor = field(init=False)  # Σ h² of each writer
    _inputs: float = field(default=0.0, init=False)  # Σ ‖x‖²

    def add(self, x: Tensor, slopes: Sequence[Tensor], missing: Tensor) -> None:
        """Add a chunk of tokens.

        Args:
            x: inputs, (tokens, hidden).
            slopes: h of each writer times the root of each token's weight, (tokens, k). They are kept, in bfloat16.
            missing: t times the root of each token's weight, (tokens, hidden).
        """
        outputs = self._through(missing if self.root is None else missing @ self.root.to(self.dtype))
        missed = torch.stack([((outputs * slope).T @ x).double() for slope in slopes])
        energies = torch.stack([slope.float().square().sum(0).double() for slope in slopes])
        self._missing = self._missing + missed if self._count else missed
        self._energies = self._energies + energies if self._count else energies
        self._inputs += float(x.float().square().sum())
        self._chunks.append((x, [slope.bfloat16() for slope in slopes]))
        self._count += len(x)

    def changes(self) -> list[Tensor]:
        """Return Δ of each writer, the best change of its rows, (k, hidden) float64.

        Cost: a step takes 2 · tokens · k · hidden multiplications for each writer and as many for all together; every
            fourth chunk's k² a token give E[h hᵀ] of each. Memory: five (k, k) for each writer.
        """
        sample = self._chunks[::SAMPLED]
        second = _mean_product([x for x, _ in sample])
        scale = self._inputs / self._count / len(second) or 1.0
        gram = self._weighted @ self._weighted.T
        ridges, across = [], []
        for at, energy in enumerate(self._energies):
            diagonal = gram.diagonal() * energy / self._count
            ridge = RIDGE * (diagonal.clamp_min(DEAD * float(diagonal.mean())) if diagonal.any() else diagonal + 1)
            ridges.append(ridge)
            across.append(_inverse(gram * _mean_product([slopes[at] for _, slopes in sample]), diagonal, ridge))
        along = _inverse(second, second.diagonal(), torch.full_like(second.diagonal(), RIDGE * scale))
        ridge = scale * torch.stack(ridges)[..., None]
        return list(self._descend(self._missing / self._count, torch.stack(across), along, ridge))

    def _descend(self, residual: Tensor, across: Tensor, along: Tensor, ridge: Tensor) -> Tensor:
        """Return what conjugate gradients come to from zero, (writers, k, hidden)."""
        found, direction, size = torch.zeros_like(residual), torch.zeros_like(residual), 0.0
        for _ in range(STEPS):
            better = across @ residual @ along
            before, size = size, float((residual * better).sum())
            if size <= 0:
                break
            direction = better + (size / before if before else 0.0) * direction
            image = ridge * direction + self._image(direction)
            step = size / float((direction * image).sum())
            found, residual = found + step * direction, residual - step * image
        return found

    def _image(self, changes: Tensor) -> Tensor:
        """Return the mean of (h ∘ D G Dᵀ Σ_V (h_V ∘ Δ_V x)) xᵀ of each writer, (writers, k, hidden)."""
        low, image = changes.mT.to(self.dtype), torch.zeros_like(changes)
        for x, slopes in self._chunks:
            moved = sum((x @ rows).mul_(slope) for rows, slope in zip(low, slopes, strict=True))
            outputs = self._through(moved @ self._down)
            for at, slope in enumerate(slopes):
                image[at] += (outputs * slope).T @ x
        return image / self._count

    def _through(self, outputs: Tensor) -> Tensor:
        """Return D G^½ of outputs that are turned by the root already, (tokens, k)."""
        return outputs @ self._down.T

    @cached_property
    def _weighted(self) -> Tensor:
        """D G^½, (k, hidden)."""
        return self.reader if self.root is None else self.reader @ self.root

    @cached_property
    def _down(self) -> Tensor:
        return self._weighted.to(self.dtype)


def _mean_product(chunks: Sequence[Tensor]) -> Tensor:
    """Return E[a aᵀ] over the rows of some chunks in float64, products formed in float32."""
    total = chunks[0].new_zeros(chunks[0].shape[1], chunks[0].shape[1], dtype=torch.float64)
    for a in map(Tensor.float, chunks):
        total += a.T @ a
    return total / sum(map(len, chunks))


def _inverse(sampled: Tensor, diagonal: Tensor, ridge: Tensor) -> Tensor:
    """Return the inverse of a moment of some tokens, with a ridge, and no entry of its diagonal below that of all."""
    regular = sampled.clone()
    regular.diagonal().copy_(torch.maximum(sampled.diagonal(), diagonal) + ridge)
    return torch.cholesky_inverse(torch.linalg.cholesky(regular))
