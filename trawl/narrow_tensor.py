"""Tensors of unequal widths: what config.json says of a tensor from which one layer's units are left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class NarrowTensor:
    """A weight or bias that is shorter on one axis than the model's class would make it.

    Attributes:
        tensor: its name in the checkpoint.
        shape: as it is stored.
        full: as an ordinary checkpoint holds it.
        parts: equal parts that the axis is made of, such as gate and up of a fused tensor, each as much shorter.
    """

    tensor: str
    shape: tuple[int, ...]
    full: tuple[int, ...]
    parts: int = 1

    @property
    def axis(self) -> int:
        """The shorter axis."""
        return next(axis for axis, (size, full) in enumerate(zip(self.shape, self.full, strict=True)) if size != full)

    def pad(self, stored: Tensor) -> Tensor:
        """Return the tensor with units of zeros behind those of each part: the same function."""
        axis, (before, after) = self.axis, (self.shape, self.full)
        split = (*before[:axis], self.parts, before[axis] // self.parts, *before[axis + 1 :])
        padded = stored.new_zeros(*after[:axis], self.parts, after[axis] // self.parts, *after[axis + 1 :])
        padded.narrow(axis + 1, 0, split[axis + 1]).copy_(stored.reshape(split))
        return padded.reshape(after)

    def shrink(self, full: Tensor) -> Tensor:
        """Return an uninitialised tensor of the stored shape, like one of the full shape."""
        return torch.empty(self.shape, dtype=full.dtype, device=full.device)

    def to_json(self) -> dict[str, Any]:
        """Return JSON-able values."""
        return {"tensor": self.tensor, "shape": list(self.shape), "full": list(self.full), "parts": self.parts}


def find_narrow_fault(narrow: Iterable[NarrowTensor], factored: Iterable[str]) -> str | None:
    """Return in words what is wrong with described tensors, None if nothing is.

    Args:
        narrow: the tensors.
        factored: tensors that factors stand in for.
    """
    narrow = list(narrow)
    counts = Counter([*(part.tensor for part in narrow), *factored])
    for part in narrow:
        what = f"narrow tensor {part.tensor}"
        if counts[part.tensor] > 1:
            return f"{what} is described twice"
        if part.tensor.rpartition(".")[2] not in ("weight", "bias"):
            return f"{what} is neither the weight nor the bias of a module"
        differing = [sizes for sizes in zip(part.shape, part.full, strict=False) if sizes[0] != sizes[1]]
        if len(part.shape) != len(part.full) or len(part.shape) > 2 or len(differing) != 1:
            return f"{what} is {part.shape} in place of {part.full}; expected one or two axes, one of them shorter"
        size, full = differing[0]
        if size > full or size % part.parts or full % part.parts:
            return f"{what} is {part.shape} in place of {part.full}; expected {part.parts} equal parts, each shorter"
    return None
