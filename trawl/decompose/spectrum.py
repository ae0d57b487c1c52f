"""Singular values of one matrix, exact where a side is small and from a randomized sketch where not."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trawl.decompose.range_finder import OVERSAMPLING, SMALL_SIDE, gaussian, orthonormal
from trawl.decompose.source import SliceSource
from trawl.decompose.streaming import Stream, TransposedSlices
from trawl.errors import ShapeError


@dataclass(frozen=True, eq=False)
class Spectrum:
    """What the singular values of one matrix say.

    Attributes:
        values: leading singular values, descending; all of them where ``exact``.
        energy: ‖X‖_F², the sum of all squared singular values.
        fourth: Σ σ⁴ over all singular values, an unbiased estimate where not ``exact``.
        exact: whether the values come from a full eigendecomposition.
    """

    values: Tensor
    energy: float
    fourth: float
    exact: bool

    @property
    def stable_rank(self) -> float:
        """‖X‖_F² / σ₁²."""
        return self.energy / float(self.values[0]) ** 2 if self.energy else 0.0

    @property
    def effective_rank(self) -> float:
        """Participation ratio (Σ σ²)² / Σ σ⁴: how many equal singular values would spread the energy as much."""
        return self.energy**2 / self.fourth if self.energy else 0.0

    def energy_at(self, rank: int) -> float:
        """Share of the energy in the ``rank`` leading singular values, at most 1."""
        if not self.energy:
            return 0.0
        return min(1.0, float(self.values[:rank].double().square().sum()) / self.energy)


def spectrum(source: SliceSource, count: int = 256, seed: int = 0) -> Spectrum:
    """Return the leading singular values of a stack of one slice.

    With a side of at most 1024 they are exact: square roots of the eigenvalues of the smaller Gram matrix. Otherwise
    they are those of ``X V`` with V from a randomized range finder with one power iteration, which approaches each from
    below; Σ σ⁴ = ‖XᵀX‖_F² is estimated as the mean of ‖XᵀX g‖² over the same Gaussian probes g.

    Args:
        source: a stack (1, inner, hidden).
        count: how many leading singular values to sketch.
        seed: of the probes.
    Returns: the values with the moments that the ranks need.
    Raises: ShapeError: the stack has more than one slice.
    Cost: three reads of the matrix and O(inner hidden count) time; memory for (inner + hidden) count entries.
    Reference: Halko, Martinsson & Tropp 2011, algorithm 4.4, doi:10.1137/090771806; Roy & Vetterli 2007 and
    Rudelson & Vershynin 2007, doi:10.1145/1255443.1255449, on effective and stable rank.
    """
    if source.shape[0] != 1:
        raise ShapeError(f"a spectrum is of one matrix; the stack has shape {source.shape}")
    stream = Stream(TransposedSlices(source) if source.shape[1] < source.shape[2] else source)
    if stream.empty:
        return Spectrum(torch.zeros(1), 0.0, 0.0, True)
    hidden = stream.shape[2]
    if hidden <= SMALL_SIDE:
        (gram,) = (panel.gram() for panel in stream.panels())
        squares = torch.linalg.eigvalsh(gram.double()).flip(0).clamp_(min=0) / stream.scale**2
        return Spectrum(squares.sqrt(), float(squares.sum()), float(squares.square().sum()), True)
    probes = gaussian(hidden, min(count + OVERSAMPLING, hidden), seed)
    reached = _gram_times(stream, probes)  # XᵀX g, one column per probe
    fourth = float(reached.double().square().sum()) / probes.shape[1]
    v = orthonormal(_gram_times(stream, orthonormal(reached)))
    (y,) = (panel.right(v) for panel in stream.panels())
    squares = torch.linalg.eigvalsh((y @ y.T).double()).flip(0).clamp_(min=0)[:count] / stream.scale**2
    energy = stream.norm_squared / stream.scale**2
    return Spectrum(squares.sqrt(), energy, fourth / stream.scale**4, False)


def _gram_times(stream: Stream, v: Tensor) -> Tensor:
    """Return ``XᵀX v``, (hidden, k)."""
    (product,) = (panel.left(panel.right(v).T) for panel in stream.panels())
    return product.T
