"""Blocked products with the slices of a stack, which stay in their stored dtype and place."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trawl.decompose.source import SliceSource
from trawl.errors import ShapeError
from trawl.processor import multiplies_bfloat16

BLOCK_ENTRIES = 1 << 20  # of a slice are upcast at a time: 4 MiB in float32, within the processor's second-level caches
PLAIN_EXPONENT = 20  # magnitudes within 2^±20 need no scaling: their squares and sums stay far from float32's limits


@dataclass(frozen=True, eq=False)
class TransposedSlices:
    """The same stack with inner and hidden exchanged."""

    source: SliceSource

    @property
    def shape(self) -> tuple[int, int, int]:
        """(S, hidden, inner) of the stack."""
        size, inner, hidden = self.source.shape
        return size, hidden, inner

    @property
    def absmax(self) -> float:
        """Largest magnitude of any entry."""
        return self.source.absmax

    def slices(self) -> Iterator[Tensor]:
        """Yield the slices' transposes."""
        for matrix in self.source.slices():
            yield matrix.T


class Stream:
    """Passes over a stack, scaled by a power of two to magnitudes near 1.

    Attributes:
        shape: (S, inner, hidden).
        scale: the power of two that entries are multiplied by.
    """

    def __init__(self, source: SliceSource, compute: str = "float32") -> None:
        self.source = source
        self.shape = source.shape
        self.fast = compute == "bfloat16"
        self.empty = source.absmax == 0.0
        if not math.isfinite(source.absmax):
            raise ShapeError(f"stack of shape {self.shape} holds NaN or Inf entries; expected finite numbers")
        exponent = 0 if self.empty else math.frexp(source.absmax)[1]
        exponent = max(-126, min(126, exponent))  # the power itself must be a normal float32
        self.scale = 1.0 if abs(exponent) <= PLAIN_EXPONENT else math.ldexp(1.0, -exponent)
        self._norm_squared: float | None = None
        self._buffer = torch.empty(0)

    @property
    def norm_squared(self) -> float:
        """‖scale · T‖², accumulated in float64; measured during the first pass."""
        if self._norm_squared is None:
            for _ in self.panels():
                pass
        assert self._norm_squared is not None
        return self._norm_squared

    def panels(self) -> Iterator[Panel]:
        """Make one pass: yield each slice, ready for products."""
        measured = 0.0
        for matrix in self.source.slices():
            dtype = torch.float64 if matrix.dtype == torch.float64 else torch.float32
            if self._buffer.dtype != dtype or self._buffer.device != matrix.device or not self._buffer.numel():
                entries = max(BLOCK_ENTRIES, *matrix.shape)
                self._buffer = torch.empty(entries, dtype=dtype, device=matrix.device)
            panel = Panel(matrix, self.scale, self._buffer)
            if self._norm_squared is None:
                measured += panel.sum_of_squares()
            yield panel
        self._norm_squared = measured if self._norm_squared is None else self._norm_squared

    def factor_kind(self) -> dict[str, Any]:
        """Return dtype and device that factors have, read from the first slice."""
        matrix = next(iter(self.source.slices()))
        return {
            "dtype": torch.float64 if matrix.dtype == torch.float64 else torch.float32,
            "device": matrix.device,
        }

    def right_products(self, v: Tensor, *, fast: bool = False) -> Tensor:
        """Return all ``(X_s v)ᵀ``, (S, k, inner); this way round the products run at the rate of square ones."""
        return torch.stack([panel.right(v, fast=fast and self.fast) for panel in self.panels()])

    def left_products(self, u: Tensor, *, fast: bool = False) -> Tensor:
        """Return all ``(X_sᵀ u)ᵀ``, (S, k, hidden)."""
        return torch.stack([panel.left(u, fast=fast and self.fast) for panel in self.panels()])

    def residual_squared(self, left: Tensor, middles: Tensor, right: Tensor) -> float:
        """Return Σ_s ‖scale · X_s − left · M_s · rightᵀ‖², subtracted entry by entry; middles are (S, r1, r2)."""
        return sum(
            panel.residual_squared(left, middle, right) for panel, middle in zip(self.panels(), middles, strict=True)
        )


@dataclass(frozen=True, eq=False)
class Panel:
    """One slice X, for products with ``scale · X``; stored values are upcast block by block into ``buffer``."""

    matrix: Tensor
    scale: float
    buffer: Tensor

    @property
    def direct(self) -> bool:
        """Whether the stored values can enter a product as they are."""
        return self.matrix.dtype == self.buffer.dtype and self.scale == 1.0

    @property
    def by_rows(self) -> bool:
        """Whether blocks of rows lie together in memory; for a transposed view it is blocks of columns."""
        return self.matrix.stride(1) == 1 or self.matrix.stride(0) != 1

    def like(self, operand: Tensor) -> Tensor:
        """Move an operand to the dtype and device of the computation."""
        return operand.to(dtype=self.buffer.dtype, device=self.buffer.device)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield (rows, upcast and scaled block) along the axis whose lines lie together in memory.

        Blocks are rows of the matrix, or of its transpose where ``by_rows`` is false; each is overwritten by the next.
        """
        matrix = self.matrix if self.by_rows else self.matrix.T
        count, width = matrix.shape
        step = max(1, BLOCK_ENTRIES // width)
        for first in range(0, count, step):
            rows = slice(first, min(first + step, count))
            stored = matrix[rows]
            if self.direct:
                yield rows, stored
                continue
            block = self.buffer[: stored.numel()].view(stored.shape)
            block.copy_(stored)
            yield rows, block.mul_(self.scale) if self.scale != 1.0 else block

    def right(self, v: Tensor, *, fast: bool = False) -> Tensor:
        """Return ``(X v)ᵀ``, (k, inner)."""
        return self._product(self.matrix.T, v, along=self.by_rows, fast=fast)

    def left(self, u: Tensor, *, fast: bool = False) -> Tensor:
        """Return ``(Xᵀ u)ᵀ``, (k, hidden)."""
        return self._product(self.matrix, u, along=not self.by_rows, fast=fast)

    def whole(self) -> Tensor:
        """Return ``scale · X``, upcast."""
        return self.matrix if self.direct else self.like(self.matrix) * self.scale

    def gram(self) -> Tensor:
        """Return ``Xᵀ X``, (hidden, hidden)."""
        if self.direct:
            return self.matrix.T @ self.matrix
        hidden = self.matrix.shape[1]
        if not self.by_rows:  # one upcast of the whole: hidden is a small side where Grams are used
            whole = self.whole()
            return whole.T @ whole
        total = self.buffer.new_zeros(hidden, hidden)
        for _, block in self.blocks():
            total.addmm_(block.T, block)
        return total

    def sum_of_squares(self) -> float:
        """Return ‖scale · X‖²."""
        return sum(sum_of_squares(block) for _, block in self.blocks())

    def residual_squared(self, left: Tensor, middle: Tensor, right: Tensor) -> float:
        """Return ‖scale · X − left · middle · rightᵀ‖²."""
        left, right = self.like(left), self.like(right)
        if not self.by_rows:
            left, middle, right = right, middle.T, left
        across = self.like(middle) @ right.T
        return sum(sum_of_squares(torch.addmm(block, left[rows], across, alpha=-1.0)) for rows, block in self.blocks())

    def _product(self, matrix: Tensor, operand: Tensor, *, along: bool, fast: bool) -> Tensor:
        """Return ``operandᵀ matrix``; blocks run ``along`` the columns of the matrix, or along its rows."""
        if fast and multiplies_bfloat16(matrix.device):
            return self._low_precision(matrix, operand)
        operand = self.like(operand)
        if self.direct:
            return operand.T @ matrix
        if along:
            product = self.buffer.new_empty(operand.shape[1], matrix.shape[1])
            for lines, block in self.blocks():
                torch.mm(operand.T, block.T, out=product[:, lines])
            return product
        product = self.buffer.new_zeros(operand.shape[1], matrix.shape[1])
        for lines, block in self.blocks():
            product.addmm_(operand[lines].T, block)
        return product

    def _low_precision(self, matrix: Tensor, operand: Tensor) -> Tensor:
        """Multiply in bfloat16."""
        low = operand.to(dtype=torch.bfloat16, device=matrix.device)
        if matrix.dtype == torch.bfloat16 and self.scale == 1.0:
            return self.like(low.T @ matrix)
        return self.like(low.T @ (self.like(matrix) * self.scale).to(torch.bfloat16))


def sum_of_squares(x: Tensor) -> float:
    """Return ‖x‖²: runs of 64 in the dtype of x, which costs no digit that counts, and their total in float64."""
    flat = x.reshape(-1)
    whole = flat.numel() - flat.numel() % 64
    runs = torch.linalg.vector_norm(flat[:whole].view(-1, 64), dim=1)
    return float(runs.double().square().sum() + flat[whole:].double().square().sum())
