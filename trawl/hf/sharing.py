"""The product of an input with factors, kept for the modules that are given the same input."""

from __future__ import annotations

import weakref
from typing import Generic, TypeVar

import torch
from torch import Tensor

Product = TypeVar("Product")


def version_of(x: Tensor) -> int:
    """Return a number that every change of a tensor in place raises."""
    return x._version  # noqa: SLF001 (torch has no public name for it)


def may_share(x: Tensor) -> bool:
    """Tell whether products of an input may be kept for other slices.

    They are not where gradients are recorded, because that would keep the graph alive; for inference tensors, whose
    changes cannot be seen; and under torch.compile, which does not trace weak references.
    """
    return not (torch.compiler.is_compiling() or torch.is_grad_enabled() or x.is_inference())


class SharedProduct(Generic[Product]):
    """The last product of an input with factors, for the other slices that are given the same input.

    It is found by the identity and version of the input, which it does not keep alive, and is handed to each reader
    once: a reader that asks again is in a new pass, in which factors may have changed. Copies and pickles are empty.
    """

    __slots__ = ("_last",)

    def __init__(self) -> None:
        self._last: tuple[weakref.ref[Tensor], int, Product, set[object]] | None = None

    def get(self, x: Tensor, reader: object) -> Product | None:
        """Return the product of ``x`` that another reader has left."""
        last = self._last  # one read: another thread may replace it at any time
        if last is None or last[0]() is not x or last[1] != version_of(x) or reader in last[3]:
            return None
        last[3].add(reader)
        return last[2]

    def put(self, x: Tensor, reader: object, product: Product) -> None:
        """Leave the product of ``x`` for other readers; it goes when ``x`` does."""
        self._last = weakref.ref(x, self._forget), version_of(x), product, {reader}

    def _forget(self, reference: weakref.ref[Tensor]) -> None:
        """Drop the product of an input that is gone."""
        if (last := self._last) is not None and last[0] is reference:
            self._last = None

    def __reduce__(self) -> tuple[type[SharedProduct[Product]], tuple[()]]:
        return SharedProduct, ()
