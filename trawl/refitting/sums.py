"""Weighted sums over tokens, and the least-squares problems that they make up."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from trawl.calibration.gathering import MomentSum
from trawl.narrowing.selection import Problem, make_problem


@dataclass(frozen=True, eq=False)
class TokenSums:
    """Over some tokens by their weights: Σ a aᵀ, Σ a yᵀ, Σ a, Σ y, Σ ‖y‖², Σ 1 of inputs a and outputs y, float64."""

    second: Tensor
    cross: Tensor
    inputs: Tensor
    outputs: Tensor
    energy: float
    count: float

    def __add__(self, other: TokenSums) -> TokenSums:
        return TokenSums(*(getattr(self, item.name) + getattr(other, item.name) for item in fields(self)))

    def problem(self, matrix: Tensor, ridge: float, *, centred: bool) -> Problem:
        """Return the least-squares problem of the matrix, whose ridge draws to another one."""
        second, cross, energy = self.second / self.count, self.cross / self.count, self.energy / self.count
        if not centred:
            return make_problem(matrix, second, cross, energy, ridge=ridge)
        inputs, outputs = self.inputs / self.count, self.outputs / self.count
        cross, energy = cross - torch.outer(inputs, outputs), energy - float(outputs.square().sum())
        return make_problem(matrix, second, cross, energy, inputs, ridge=ridge)


class Summing:
    """Adds up batches of tokens."""

    def __init__(self, width: int, hidden: int, device: torch.device) -> None:
        """Begin with no tokens, of inputs (tokens, width) and outputs (tokens, hidden)."""
        self._second = MomentSum.of_width(width, device)
        self._cross = torch.zeros(width, hidden, dtype=torch.float64, device=device)
        self._inputs, self._outputs = self._cross.new_zeros(width), self._cross.new_zeros(hidden)
        self._energy, self._count = self._cross.new_zeros(()), self._cross.new_zeros(())

    def add(self, inputs: Tensor, outputs: Tensor, weight: Tensor) -> None:
        """Add tokens; weight is (tokens, 1). Values are float32: sums of rounded ones would be too rough to invert."""
        root = weight.sqrt()
        some, wanted = inputs.float() * root, outputs.float() * root
        self._second.add(some)
        self._cross += (some.T @ wanted).double()
        self._inputs += (some * root).double().sum(0)
        self._outputs += (wanted * root).double().sum(0)
        self._energy += wanted.square().double().sum()
        self._count += weight.double().sum()

    def sums(self) -> TokenSums:
        """Return what was added up; nothing can be added any more."""
        tokens = self._second.tokens
        second = self._second.matrix(torch.float64, self._cross.device) * tokens
        return TokenSums(second, self._cross, self._inputs, self._outputs, float(self._energy), float(self._count))
