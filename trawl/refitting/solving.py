"""Rows of one writer of a narrowed FC, by linear least squares.

An FC computes ``y = Dᵀ φ(s₁, …)`` with ``s = V x + b`` of each writer V. To first order in a change Δ of one V

    y(V + Δ) ≈ y(V) + Dᵀ (h ∘ Δ x),    h = ∂φ/∂s,

and exactly so for ``up`` of a gated FC. With t what y(V) misses of what is wanted, G what a miss counts by, and E a
mean in which each token counts by its weight, Δ is

    argmin E‖G^½ (t − Dᵀ (h ∘ Δ x))‖² + λ s̄ Σ_j K_jj ‖Δ_j‖²,    K = (D G Dᵀ) ∘ E[h hᵀ],  s̄ = mean eigenvalue of E[x xᵀ],

found by conjugate gradients from zero, preconditioned by ``(K + λ diag K)⁻¹ ⊗ (E[x xᵀ] + λ s̄ 1)⁻¹``: the solution
itself, if h and x were independent.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

RIDGE = 0.03  # λ
STEPS = 4  # of conjugate gradients: more of them follow the calibration text, and no other
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


def find_change(tokens: Tokens, slope: Tensor, missing: Tensor, reader: Tensor, root: Tensor | None) -> Tensor:
    """Return Δ, the best change of a writer's rows.

    Args:
        tokens: x of them.
        slope: h times the root of each token's weight, (tokens, k), in the dtype of x.
        missing: t times the root of each token's weight, (tokens, hidden), likewise.
        reader: D, (k, hidden), float64.
        root: of G; None counts all outputs alike.
    Returns: (k, hidden), float64.
    Cost: 4 · tokens · k · hidden multiplications a step and twice that once; tokens · k for E[h hᵀ]. Products of a
        chunk are formed in the dtype of x, sums over chunks in float64.
    """
    x, count = tokens.x, len(tokens)
    weighted = reader if root is None else reader @ root
    down = weighted.to(x.dtype)  # (k, hidden)
    overlap = weighted @ weighted.T * _mean_product(slope, slope, tokens)  # K
    second = _mean_product(x, x, tokens)
    scale = float(second.diagonal().mean())
    own = RIDGE * overlap.diagonal().clamp_min(DEAD * float(overlap.diagonal().mean()))
    if not scale * float(own.min()) > 0:
        return torch.zeros_like(reader)  # nothing goes in, or nothing comes out
    across = torch.linalg.inv(overlap + own.diag())
    along = torch.linalg.inv(second + RIDGE * scale * torch.eye(len(second), dtype=second.dtype, device=second.device))
    ridge = scale * own[:, None]

    def gather(outputs: Tensor, at: slice) -> Tensor:  # Σ (h ∘ D outputs) xᵀ of a chunk
        return ((outputs @ down.T).mul_(slope[at]).T @ x[at]).double() / count

    def apply(change: Tensor) -> Tensor:
        low = change.T.to(x.dtype)
        return ridge * change + sum(gather((x[at] @ low).mul_(slope[at]) @ down, at) for at in tokens.chunks())

    turn = None if root is None else root.to(x.dtype)
    residual = sum(gather(missing[at] if turn is None else missing[at] @ turn, at) for at in tokens.chunks())
    assert isinstance(residual, Tensor)
    found, direction, size = torch.zeros_like(residual), torch.zeros_like(residual), 0.0
    for _ in range(STEPS):
        better = across @ residual @ along
        before, size = size, float((residual * better).sum())
        if size <= 0:
            break
        direction = better + (size / before if before else 0.0) * direction
        image = apply(direction)
        step = size / float((direction * image).sum())
        found, residual = found + step * direction, residual - step * image
    return found


def _mean_product(a: Tensor, b: Tensor, tokens: Tokens) -> Tensor:
    """Return E[a bᵀ], (columns of a, columns of b), float64."""
    total = a.new_zeros(a.shape[1], b.shape[1], dtype=torch.float64)
    for at in tokens.chunks():
        total += (a[at].T @ b[at]).double()
    return total / len(tokens)
