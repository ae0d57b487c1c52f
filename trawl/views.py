"""View: how one stored tensor maps to one canonical (inner, hidden) slice, and back.

A view is a pair of einops patterns over the same axes, with some axes narrowed on the way. ``hidden`` is the
residual-stream axis and ``inner`` the head or FC axis, so an output projection is transposed and a fused tensor is cut:

    >>> down = View("hidden inner", "inner hidden")
    >>> key = View("(heads part dim) hidden", sizes=(("part", 3), ("dim", 64)), take=(("part", 1, 2),))
    >>> key.shape((1536, 512))
    (512, 512)

Patterns are parsed once and hold no data; applying them is reshape, narrow and permute, which copy only where no
strides can express the slice.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from keyword import iskeyword

from einops import EinopsError
from einops.parsing import ParsedExpression
from torch import Tensor

from trawl.errors import ShapeError, shown

LONGEST_PATTERN = 200  # characters, with at most half as many axes

Groups = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class View:
    """An invertible map between a stored tensor, or a part of one, and a canonical (inner, hidden) matrix.

    Attributes:
        stored: einops pattern of the stored axes, e.g. ``"(heads part dim) hidden"``.
        canonical: einops pattern of exactly two axes (inner, hidden) over the same names; empty for the same as stored.
        sizes: (name, size) of axes; a stored axis that groups several names may leave one of them out.
        take: (name, start, stop) of axes that are narrowed; they stay in ``canonical`` with their narrowed size.
    """

    stored: str
    canonical: str = ""
    sizes: tuple[tuple[str, int], ...] = ()
    take: tuple[tuple[str, int, int], ...] = ()

    def __post_init__(self) -> None:
        if not self.canonical:
            object.__setattr__(self, "canonical", self.stored)
        before, after = parse(self.stored), parse(self.canonical)
        if len(after) != 2:
            raise ShapeError(f"view {self.canonical!r} has {len(after)} axes; a slice has two, (inner, hidden)")
        if sorted(flatten(before)) != sorted(flatten(after)):
            raise ShapeError(f"view '{self.stored} -> {self.canonical}' does not name the same axes on both sides")
        axes, sizes = flatten(before), dict(self.sizes)
        if unknown := [name for name in (*sizes, *(axis for axis, _, _ in self.take)) if name not in axes]:
            raise ShapeError(f"view {self.stored!r} has no axis {unknown[0]!r}; its axes are {', '.join(axes)}")
        if empty := [name for name, size in self.sizes if size < 1]:
            raise ShapeError(f"view {self.stored!r} has {empty[0]}={sizes[empty[0]]}; an axis has at least one element")
        for axis, start, stop in self.take:
            if not 0 <= start < stop <= sizes.get(axis, stop):
                raise ShapeError(f"view {self.stored!r} cannot take {start}:{stop} of {axis}={sizes.get(axis)}")

    @property
    def whole(self) -> bool:
        """Whether the slice covers every element of the stored tensor."""
        sizes = dict(self.sizes)
        return all(start == 0 and sizes.get(axis) == stop for axis, start, stop in self.take)

    def shape(self, stored_shape: Sequence[int]) -> tuple[int, int]:
        """Return the slice's (inner, hidden) for a stored shape, from arithmetic alone.

        Args:
            stored_shape: shape of the stored tensor.
        Returns: (inner, hidden).
        Raises: ShapeError: the stored shape has the wrong number of axes or does not divide into the pattern's sizes.
        """
        return _layout(self, tuple(stored_shape)).shape

    def apply(self, stored: Tensor) -> Tensor:
        """Return the slice of a stored tensor.

        Args:
            stored: the tensor as the checkpoint holds it.
        Returns: (inner, hidden), sharing storage with ``stored`` wherever strides can express it: the whole tensor, its
            transpose, a range of rows, a half or third of a fused axis, one expert. Do not write into it.
        Raises: ShapeError: ``stored`` does not fit the pattern.
        Cost: no copy in those cases, otherwise one copy of the slice.
        """
        layout = _layout(self, tuple(stored.shape))
        return self._part(stored.reshape(layout.expanded), layout).reshape(layout.shape)

    def scatter(self, slice_: Tensor, stored: Tensor) -> None:
        """Write a slice into its part of a stored tensor, in place; elements outside the part are not touched.

        Args:
            slice_: (inner, hidden); rounded once where its dtype differs from that of ``stored``.
            stored: contiguous tensor as the checkpoint holds it.
        Raises: ShapeError: either shape does not fit the pattern, or ``stored`` is not contiguous.
        Cost: one pass over the slice.
        """
        layout = _layout(self, tuple(stored.shape))
        if not stored.is_contiguous():
            raise ShapeError(f"a slice is written into a contiguous tensor; strides are {stored.stride()}")
        if tuple(slice_.shape) != layout.shape:
            raise ShapeError(f"slice is {tuple(slice_.shape)}; expected {layout.shape} for '{self}'")
        part = self._part(stored.view(layout.expanded), layout)
        part.copy_(slice_.reshape(part.shape))

    def invert(self, slice_: Tensor) -> Tensor:
        """Return the stored tensor that a whole view's slice comes from.

        Args:
            slice_: (inner, hidden).
        Returns: the tensor in stored order, sharing storage with ``slice_`` wherever strides can express it.
        Raises: ShapeError: the view covers a part only, or the slice does not fit the pattern.
        Cost: no copy for a plain transpose or the identity, otherwise one copy of the slice.
        """
        if not self.whole:
            raise ShapeError(f"view '{self}' covers a part of its tensor only; write it with scatter")
        before, after = parse(self.stored), parse(self.canonical)
        sizes = solve(after, tuple(slice_.shape), dict(self.sizes), "slice")
        names = flatten(after)
        expanded = slice_.reshape([sizes[name] for name in names])
        ordered = expanded.permute([names.index(name) for name in flatten(before)])
        return ordered.reshape([math.prod(sizes[name] for name in group) for group in before])

    def _part(self, expanded: Tensor, layout: _Layout) -> Tensor:
        """Narrow and permute a tensor that has one axis per name; never copies."""
        for axis, start, length in layout.narrow:
            expanded = expanded.narrow(axis, start, length)
        return expanded.permute(layout.order)

    def __str__(self) -> str:
        """Return the pattern as one einops-like line."""
        cut = "".join(f" [{axis} {start}:{stop}]" for axis, start, stop in self.take)
        return f"{self.stored} -> {self.canonical}{cut}"


@dataclass(frozen=True)
class _Layout:
    """A view worked out for one stored shape."""

    expanded: tuple[int, ...]  # one size per axis name, in stored order
    narrow: tuple[tuple[int, int, int], ...]  # (axis, start, length)
    order: tuple[int, ...]  # stored position of each canonical axis
    shape: tuple[int, int]  # (inner, hidden)


@lru_cache(maxsize=1024)
def _layout(view: View, stored_shape: tuple[int, ...]) -> _Layout:
    """Work out every size of a view for one stored shape."""
    before, after = parse(view.stored), parse(view.canonical)
    sizes = solve(before, stored_shape, dict(view.sizes), "tensor")
    names = flatten(before)
    expanded = tuple(sizes[name] for name in names)
    for axis, start, stop in view.take:
        if stop > sizes[axis]:
            raise ShapeError(f"tensor {stored_shape} has {axis}={sizes[axis]}; '{view}' needs at least {stop}")
        sizes[axis] = stop - start
    inner, hidden = (math.prod(sizes[name] for name in group) for group in after)
    return _Layout(
        expanded=expanded,
        narrow=tuple((names.index(axis), start, stop - start) for axis, start, stop in view.take),
        order=tuple(names.index(name) for name in flatten(after)),
        shape=(inner, hidden),
    )


@lru_cache(maxsize=256)
def parse(pattern: str) -> Groups:
    """Return the axis names of an einops pattern, grouped by tensor axis.

    Raises: ShapeError: the pattern is malformed, or uses an ellipsis or a number.
    """
    if len(pattern) > LONGEST_PATTERN:
        raise ShapeError(
            f"view pattern {shown(pattern)} has {len(pattern)} characters; expected at most {LONGEST_PATTERN}"
        )
    if reserved := [word for word in re.findall(r"\w+", pattern) if iskeyword(word)]:
        raise ShapeError(
            f"view pattern {pattern!r} calls an axis {reserved[0]!r}, a word of Python; choose another name"
        )
    try:
        parsed = ParsedExpression(pattern)
    except EinopsError as e:
        raise ShapeError(f"view pattern {pattern!r} is malformed: {e}; write it as '(heads dim) hidden'") from e
    groups = tuple(tuple(group) for group in parsed.composition)
    if parsed.has_ellipsis or parsed.has_non_unitary_anonymous_axes or not all(groups):
        raise ShapeError(f"view pattern {pattern!r} must name every axis; write it as '(heads dim) hidden'")
    return groups


def flatten(groups: Groups) -> tuple[str, ...]:
    """Return the axis names in order, without their grouping."""
    return tuple(name for group in groups for name in group)


def solve(groups: Groups, shape: tuple[int, ...], sizes: Mapping[str, int], what: str) -> dict[str, int]:
    """Return the size of every named axis, given those known and the shape of the grouped tensor.

    Raises: ShapeError: wrong number of axes, a size that does not divide or agree, or two unknown sizes in one group.
    """
    pattern = " ".join(group[0] if len(group) == 1 else f"({' '.join(group)})" for group in groups)
    wanted = ", ".join(str(_product(group, sizes) or " ".join(group)) for group in groups)
    known = ", ".join(f"{name}={size}" for name, size in sizes.items())
    expected = f"expected ({wanted}), which is {pattern}" + (f" with {known}" if known else "")
    if len(shape) != len(groups):
        raise ShapeError(f"{what} has {len(shape)} axes {shape}; {expected}")
    solved = dict(sizes)
    for group, length in zip(groups, shape, strict=True):
        unknown = [name for name in group if name not in sizes]
        product = math.prod(sizes[name] for name in group if name in sizes)
        if len(unknown) > 1:
            raise ShapeError(f"{what} {shape}: sizes of {' and '.join(unknown)} are both unknown; {expected}")
        if (length % product if unknown else length != product) or length < 1:
            raise ShapeError(f"{what} is {shape}; {expected}")
        solved.update(dict.fromkeys(unknown, length // product))
    return solved


def _product(group: tuple[str, ...], sizes: Mapping[str, int]) -> int | None:
    """Return the length of one tensor axis, or None where a size in its group is unknown."""
    return math.prod(sizes[name] for name in group) if all(name in sizes for name in group) else None
