"""What a method decomposes: a source of slices, read in passes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor


class SliceSource(Protocol):
    """A stack (S, inner, hidden) whose slices are read one at a time, in order, as often as a method needs.

    Slices come in the stored dtype, on the device the computation runs on, possibly as a transposed view of a
    memory-mapped file. A slice may be released as soon as the next one is drawn, so a method must not keep it.
    """

    @property
    def shape(self) -> tuple[int, int, int]:
        """(S, inner, hidden)."""

    @property
    def absmax(self) -> float:
        """Largest magnitude of any entry; finite. Methods divide by it so that no square over- or underflows."""

    def slices(self) -> Iterator[Tensor]:
        """Make one pass: yield S tensors (inner, hidden)."""


@dataclass(frozen=True, eq=False)
class TensorSlices:
    """A stack that is already in memory as one tensor (S, inner, hidden)."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """(S, inner, hidden)."""
        size, inner, hidden = self.tensor.shape
        return size, inner, hidden

    @cached_property
    def absmax(self) -> float:
        """Largest magnitude of any entry."""
        low, high = torch.aminmax(self.tensor)
        return max(abs(float(low)), abs(float(high)))

    def slices(self) -> Iterator[Tensor]:
        """Yield the S slices as views."""
        yield from self.tensor
