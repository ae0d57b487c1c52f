"""Comparison of two checkpoints, tensor by tensor, streamed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trawl.checkpoint import FLOAT_DTYPES, Checkpoint

BLOCK_ENTRIES = 1 << 22


@dataclass(frozen=True)
class TensorDifference:
    """How one tensor of B differs from that of A.

    Attributes:
        name: tensor name.
        change: ``equal`` (same dtype, shape and bytes), ``changed``, ``reshaped`` (shape or dtype differ),
            ``only in A`` or ``only in B``.
        shape_a, shape_b: shapes, None where the tensor is absent.
        dtype_a, dtype_b: dtypes, None where the tensor is absent.
        relative_error: ‖A − B‖_F / ‖A‖_F; None unless both are float tensors of one shape.
    """

    name: str
    change: str
    shape_a: tuple[int, ...] | None
    shape_b: tuple[int, ...] | None
    dtype_a: str | None
    dtype_b: str | None
    relative_error: float | None

    def to_json(self) -> dict[str, Any]:
        """Return the difference as JSON-able values."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in vars(self).items()}


def diff(a: Checkpoint, b: Checkpoint, advance: Callable[[int], None] = lambda _: None) -> list[TensorDifference]:
    """Compare two checkpoints tensor by tensor.

    Args:
        a: the reference, such as the source.
        b: the other, such as the denoised output.
        advance: called with the number of bytes of A that were compared.
    Returns: one entry per tensor of either, in A's order and then B's.
    Raises: CheckpointError: a shard cannot be read.
    Cost: reads both once; memory for a few blocks of 4 Mi entries.
    """
    found = []
    for name in dict.fromkeys([*a.tensors, *b.tensors]):
        found.append(_compare(name, a, b))
        if name in a.tensors:
            advance(a.tensors[name].nbytes)
    return found


def _compare(name: str, a: Checkpoint, b: Checkpoint) -> TensorDifference:
    """Compare one tensor."""
    left, right = a.tensors.get(name), b.tensors.get(name)
    described = (
        left.shape if left else None,
        right.shape if right else None,
        left.dtype if left else None,
        right.dtype if right else None,
    )
    if left is None or right is None:
        return TensorDifference(name, "only in B" if left is None else "only in A", *described, None)
    comparable = left.shape == right.shape and left.dtype in FLOAT_DTYPES and right.dtype in FLOAT_DTYPES
    same_form = (left.shape, left.dtype) == (right.shape, right.dtype)
    if same_form and torch.equal(_bytes(a.read(name)), _bytes(b.read(name))):
        return TensorDifference(name, "equal", *described, 0.0 if comparable else None)
    error = relative_error(a.read(name), b.read(name)) if comparable else None
    return TensorDifference(name, "changed" if same_form else "reshaped", *described, error)


def _bytes(tensor: Tensor) -> Tensor:
    """Return a tensor's bytes; equality of bytes tells NaN payloads and signed zeros apart."""
    return tensor.reshape(-1).view(torch.uint8)


def relative_error(a: Tensor, b: Tensor) -> float:
    """Return ‖a − b‖_F / ‖a‖_F in float64, block by block; infinite where only a is zero."""
    error = norm = 0.0
    flat_a, flat_b = a.reshape(-1), b.reshape(-1)
    for first in range(0, flat_a.numel(), BLOCK_ENTRIES):
        block = slice(first, first + BLOCK_ENTRIES)
        reference = flat_a[block].double()
        norm += float(reference.square().sum())
        error += float((reference - flat_b[block].double()).square_().sum())
    if error == 0.0:
        return 0.0
    return (error / norm) ** 0.5 if norm else float("inf")
