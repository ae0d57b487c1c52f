"""Linear modules that multiply by factors: a FactoredLinear in place of each, with parts of one or several stacks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from trawl.descriptor import EMPTY
from trawl.errors import ShapeError
from trawl.hf.factor_stack import FactorStack
from trawl.hf.sharing import SharedProduct, may_share
from trawl.interpolation import Side
from trawl.views import View, parse, solve

NEVER = 1 << 62  # a number of rows that no input has
FEW_ROWS = 64  # up to here reading the factors takes longer than multiplying, so neighbours are computed together


@dataclass(frozen=True)
class Placement:
    """Where a slice's outputs stand among those of the module.

    Attributes:
        sizes: the output axis of the slice, split into its named axes, in canonical order.
        order: permutation that brings them into stored order.
        axis: the stored one that is narrowed, 0 where none is.
        start: where the slice begins on it.
    """

    sizes: tuple[int, ...]
    order: tuple[int, ...]
    axis: int
    start: int

    @property
    def plain(self) -> bool:
        """Whether the slice's outputs are in stored order already."""
        return self.order == tuple(range(len(self.order)))


@dataclass(frozen=True, eq=False)
class Neighbours:
    """Slices of one stack whose modules read the same input in turn: q, k and v, or gate and up, of one layer.

    For a few rows their outputs are computed at once when the first of them asks, so that every factor is read from
    memory once, and with fewer calls: each costs more than its work once a large product has emptied the caches.

    Attributes:
        stack: their factors.
        first: number of the first slice.
        stop: number after the last.
        shared: the outputs that are left for the others.
    """

    stack: FactorStack
    first: int
    stop: int
    shared: SharedProduct[tuple[Tensor, ...]]

    def output(self, x: Tensor, part: Part) -> Tensor:
        """Return ``x Wᵀ`` of one of the slices, (..., inner)."""
        outputs = self.shared.get(x, part)
        if outputs is None:
            outputs = self._outputs(x)
            self.shared.put(x, part, outputs)
        return outputs[part.index - self.first]

    @cached_property
    def _widths(self) -> list[int]:
        """Inner widths of joined slices."""
        rows = (place.rows for place in self.stack.places[self.first : self.stop])
        return [each.stop - each.start for each in rows]

    def _outputs(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs of all slices, (..., inner) each."""
        if self.stack.description.joined:
            scaled = self.stack.times("right", x) * self.stack.middle(0)
            outputs = functional.linear(scaled, self.stack.left_of(self.first, self.stop))
            return torch.split(outputs, self._widths, dim=-1)
        product = self.stack.times("right", x.reshape(-1, x.shape[-1]))  # (rows, r2)
        middle = self.stack.middle(slice(self.first, self.stop))
        if middle.dim() == 2:
            product = (product[:, None] * middle).flatten(0, 1)  # (rows · slices, r)
        else:
            product = functional.linear(product, middle.flatten(0, 1)).view(-1, middle.shape[1])  # (rows · slices, r1)
        outputs = self.stack.times_transposed("left", product)
        return outputs.view(*x.shape[:-1], self.stop - self.first, outputs.shape[-1]).unbind(-2)


@dataclass(frozen=True, eq=False)
class Part:
    """One slice of a module: which factors, read from which side, and where its outputs go.

    Attributes:
        stack: the factors, which another module owns.
        index: the slice's number in the stack.
        view: from the stored tensor to the slice.
        of_hidden: whether the module's input is the residual stream (q, k, v, gate, up) or the inner axis (o, down).
        placement: where the outputs go.
        sharers: number of slices that are given the same input: their first product is computed once.
        fold_from: number of input rows from which one factor is multiplied with the core first.
        fold_last: whether that factor is the last one.
        neighbours: the slices that it is computed together with, where there are any.
    """

    stack: FactorStack
    index: int
    view: View
    of_hidden: bool
    placement: Placement
    sharers: int
    fold_from: int
    fold_last: bool
    neighbours: Neighbours | None = None

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``x · W`` for the slice in its direction, plus a bias, in the cheapest order of the factors.

        Args:
            x: (..., in).
            bias: (out,) or None.
        Returns: (..., out), in canonical order.
        Cost: x times in · r + r · r' + r' · out operations a row, of which the first product is shared.
        """
        if self.neighbours is not None and x.numel() <= FEW_ROWS * x.shape[-1] and may_share(x):
            output = self.neighbours.output(x, self)
            return output if bias is None else output + bias
        return self._multiply_alone(x, bias)

    def _multiply_alone(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``x · W`` plus a bias for this slice, sharing its first product where that is possible."""
        stack = self.stack
        middle = stack.middle(stack.places[self.index].s)
        if middle.dim() == 2 and self.of_hidden:
            middle = middle.T  # (r of the input's side, r of the output's side)
        if x.numel() >= self.fold_from * x.shape[-1]:
            first, last = (stack.right, stack.left) if self.of_hidden else (stack.left, stack.right)
            if self.fold_last:
                return functional.linear(self._first_product(x), last @ middle.T, bias)
            return functional.linear(x @ (first @ middle), last, bias)
        product = self._first_product(x)
        product = product * middle if middle.dim() == 1 else product @ middle
        if stack.description.joined:  # it reads the residual stream
            return functional.linear(product, stack.left_of(self.index, self.index + 1), bias)
        return stack.times_transposed("left" if self.of_hidden else "right", product, bias)

    def _first_product(self, x: Tensor) -> Tensor:
        """Return ``x`` times the factor of its side, shared between the slices that are given the same ``x``.

        Under torch.compile common subexpressions are found by the compiler.
        """
        side: Side = "right" if self.of_hidden else "left"
        if self.sharers == 1 or not may_share(x):
            return self.stack.times(side, x)
        shared = self.stack.of_hidden if self.of_hidden else self.stack.of_inner
        product = shared.get(x, self)
        if product is None:
            product = self.stack.times(side, x)
            shared.put(x, self, product)
        return product


def make_part(stack: FactorStack, index: int, out_axis: int) -> Part:
    """Work out how one slice is multiplied through.

    Args:
        stack: its factors, on any device.
        index: the slice's number in the stack.
        out_axis: the stored axis that is the module's output: 0 for nn.Linear, 1 for Conv1D.
    Returns: the part.
    Raises: ShapeError: the view narrows or reorders the module's input axis, through which factors cannot multiply; or
        the slice is joined with others, but reads the inner axis.
    """
    described = stack.description.slices[index]
    view, shape = described.view, described.stored_shape
    stored, canonical = parse(view.stored), parse(view.canonical)
    outputs, inputs = stored[out_axis], stored[1 - out_axis]
    of_hidden = set(canonical[0]) == set(outputs)
    if inputs != canonical[1 if of_hidden else 0] or any(axis in inputs for axis, _, _ in view.take):
        raise ShapeError(f"view '{view}' narrows or reorders the input axis ({' '.join(inputs)}) of the module")
    if stack.description.joined and not of_hidden:
        raise ShapeError(
            f"stack {stack.description.name} joins slices that read the residual stream; this one does not"
        )
    sizes = solve(stored, shape, dict(view.sizes), "tensor")
    taken = {axis: (start, stop) for axis, start, stop in view.take}
    sizes |= {axis: stop - start for axis, (start, stop) in taken.items()}
    names = canonical[0 if of_hidden else 1]
    axis = next((outputs.index(name) for name in taken), 0)
    placement = Placement(
        sizes=tuple(sizes[name] for name in names),
        order=tuple(names.index(name) for name in outputs),
        axis=axis,
        start=taken.get(outputs[axis], (0, 0))[0],
    )
    return Part(stack, index, view, of_hidden, placement, 1, *_order(stack, of_hidden=of_hidden, sharers=1))


def _order(stack: FactorStack, *, of_hidden: bool, sharers: int) -> tuple[int, bool]:
    """Return the cheapest order of the products with a slice of a stack.

    What a factor in interpolative form saves is lost with its core in it, so that none is folded there; and a diagonal
    core never is.
    """
    if stack.description.interpolated or stack.description.core == "diagonal":
        return NEVER, False
    (_, inner, hidden), (_, r1, r2) = stack.description.shape, stack.description.rank
    sizes = (hidden, r2, r1, inner) if of_hidden else (inner, r1, r2, hidden)
    return cheapest_order(*sizes, sharers=sharers)


def with_neighbours(parts: Sequence[Part]) -> tuple[Part, ...]:
    """Join the parts of one layer's attention, or of its FC, that read the same side of the same stack.

    Args:
        parts: of any modules with one parent.
    Returns: the same parts in the same order, each knowing how many share its first product, and the consecutive
        slices that read the residual stream knowing their neighbours.
    """
    groups: dict[tuple[int, bool], list[Part]] = {}
    for part in parts:
        groups.setdefault((id(part.stack), part.of_hidden), []).append(part)
    neighbours = {key: _neighbours(group) for key, group in groups.items()}
    joined = []
    for part in parts:
        key = id(part.stack), part.of_hidden
        sharers = len(groups[key])
        fold_from, fold_last = _order(part.stack, of_hidden=part.of_hidden, sharers=sharers)
        joined.append(
            replace(part, sharers=sharers, fold_from=fold_from, fold_last=fold_last, neighbours=neighbours[key])
        )
    return tuple(joined)


def _neighbours(group: Sequence[Part]) -> Neighbours | None:
    """Return what the parts of a group compute together: consecutive slices that read the residual stream."""
    first, last = min(part.index for part in group), max(part.index for part in group)
    if len(group) == 1 or last - first != len(group) - 1 or not group[0].of_hidden:
        return None
    return Neighbours(group[0].stack, first, last + 1, SharedProduct())


def cheapest_order(width_in: int, first: int, last: int, width_out: int, *, sharers: int) -> tuple[int, bool]:
    """Return from how many rows it pays to multiply the core into a factor before the input, and into which.

    Per row, input · (in, first) · (first, last) · (last, out) is multiplied left to right, the first product once for
    all slices that share it. Folding the core into a factor costs in · first · last or first · last · out once and
    saves operations in every row; into the first factor, it also gives up the shared product. A factor is folded only
    while it stays at most half as large as the dense matrix.

    Returns: the number of rows, and whether the core goes into the last factor.
    """
    shared = width_in * first // sharers
    candidates = []
    for fold_last, once, saved, allowed in (
        (True, first * last * width_out, first * last + last * width_out - first * width_out, 2 * first <= width_in),
        (False, width_in * first * last, first * last + shared - width_in * last, 2 * last <= width_out),
    ):
        if saved > 0 and allowed:
            candidates.append((math.ceil(once / saved), fold_last))
    return min(candidates, default=(NEVER, False))


class FactoredLinear(nn.Module):
    """Stands in for nn.Linear or Conv1D, its matrix given by slices of one or several stacks.

    The factors belong to FactorStack modules elsewhere in the model, so that a state dict holds each of them once.
    Under the name ``weight`` the module holds an empty parameter, as the checkpoint does, or none where it is tied to
    an embedding that does; the attribute ``weight`` is
    the matrix multiplied out, computed at every read, for code that looks at its shape, dtype, device or values.

    Attributes:
        in_features: size of the input's last axis.
        out_features: size of the output's last axis.
        parts: the slices, in the order of their outputs.
        loading: while true, ``weight`` is the empty parameter itself, as code that loads a checkpoint expects.
    """

    bias: nn.Parameter | None

    def __init__(self, parts: Sequence[Part], out_axis: int, bias: nn.Parameter | None, *, tied: bool = False) -> None:
        super().__init__()
        self.parts = tuple(sorted(parts, key=lambda part: part.placement.start))
        first = self.parts[0]
        self.out_axis = out_axis
        self.stored_shape = first.stack.description.slices[first.index].stored_shape
        self.out_features, self.in_features = self.stored_shape[out_axis], self.stored_shape[1 - out_axis]
        self.single = len(self.parts) == 1 and first.placement.plain
        self.loading = False
        like = first.stack.left
        empty = nn.Parameter(torch.empty(EMPTY, dtype=like.dtype, device=like.device))
        self._parameters["weight"] = None if tied else empty
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x Wᵀ`` (nn.Linear) or ``x W`` (Conv1D), plus the bias, without forming W."""
        if self.single:
            return self.parts[0].multiply(x, self.bias)
        joined = self._join([part.multiply(x, None) for part in self.parts])
        return joined if self.bias is None else joined + self.bias

    def _join(self, outputs: list[Tensor]) -> Tensor:
        """Bring the slices' outputs into the order of the stored tensor's."""
        batch = outputs[0].shape[:-1]
        count = len(batch)
        ordered = []
        for part, output in zip(self.parts, outputs, strict=True):
            split = output.reshape(*batch, *part.placement.sizes)
            ordered.append(split.permute(*range(count), *(count + axis for axis in part.placement.order)))
        joined = torch.cat(ordered, dim=count + self.parts[0].placement.axis)
        return joined.reshape(*batch, self.out_features)

    @property
    def weight(self) -> Tensor:
        """The matrix in its stored shape, multiplied out and detached; writing into it changes nothing."""
        if self.loading:
            return self._parameters["weight"]  # type: ignore[return-value]
        like = self.parts[0].stack.left
        out = torch.empty(self.stored_shape, dtype=like.dtype, device=like.device)
        for part in self.parts:
            part.view.scatter(part.stack.matrix(part.index), out)
        return out

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and tuple(getattr(value, "shape", ())) != EMPTY:
            raise AttributeError("the weight of a factored module is computed from its factors; change those instead")
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        """Return the sizes and the stacks."""
        stacks = ", ".join(dict.fromkeys(part.stack.description.name for part in self.parts))
        return f"in_features={self.in_features}, out_features={self.out_features}, stacks={stacks}"
