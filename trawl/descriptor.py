"""Descriptor: what config.json says about the factors of a factored checkpoint. Arithmetic on shapes; holds no data.

A factored checkpoint is its source's layout in which every stack's factors stand once, as ordinary tensors of the
transformer block that the stack's first slice lies in, or beside a module outside the blocks, and every replaced tensor
is kept under its name, empty:

    model.layers.20.trawl.fc_20_29.left          (1536, 64)
    model.layers.20.mlp.gate_proj.weight         (0,)

The empty tensors make transformers without trawl fail on their shape instead of starting from random weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise
from typing import Any, Literal

from trawl.checkpoint import BITS, TensorInfo
from trawl.errors import LoadError, PlanError, ShapeError
from trawl.interpolation import ORDER, Side, interpolated_sides, stored_shapes
from trawl.narrow_tensor import NarrowTensor, find_narrow_fault
from trawl.stacking import Place, Stack, make_places
from trawl.views import View, parse, solve

METHOD = "trawl"
FORMAT_VERSION = 2
KNOWN_VERSIONS = (1, 2)  # the first has no factors in interpolative form
EMPTY = (0,)  # shape of the tensor that keeps a replaced tensor's name

Core = Literal["diagonal", "full"]


@dataclass(frozen=True)
class DescribedSlice:
    """One slice of a stack, as the factored checkpoint stands in for it.

    Attributes:
        tensor: the replaced tensor's name in the checkpoint.
        stored_shape: its shape in the source.
        view: from that tensor to the slice.
    """

    tensor: str
    stored_shape: tuple[int, ...]
    view: View

    def to_json(self) -> dict[str, Any]:
        """Return the slice as JSON-able values."""
        view: dict[str, Any] = {"stored": self.view.stored, "canonical": self.view.canonical}
        if self.view.sizes:
            view["sizes"] = dict(self.view.sizes)
        if self.view.take:
            view["take"] = {axis: [start, stop] for axis, start, stop in self.view.take}
        return {"tensor": self.tensor, "stored_shape": list(self.stored_shape), "view": view}


@dataclass(frozen=True)
class DescribedStack:
    """One stack: the shapes and names of its factors, and what they replace.

    Attributes:
        name: the stack's name in the plan.
        shape: (S, inner, hidden), of a joined stack (1, Σ inner, hidden).
        rank: (A, r1, r2); A = S unless ``stack_factor``.
        core: ``diagonal`` (CP, SVD; core is (A, r)) or ``full`` (Tucker; core is (A, r1, r2)).
        stack_factor: whether the stack mode is compressed by a factor (S, A).
        dtype: safetensors' name of the factors' dtype.
        factors: what the names of the factor tensors begin with.
        slices: in the order of the stack mode, or of the rows of the joined matrix.
        joined: whether the slices are one matrix, each a range of rows of the left factor.
        interpolated: the factors in interpolative form, of which some rows are not stored.
    """

    name: str
    shape: tuple[int, int, int]
    rank: tuple[int, int, int]
    core: Core
    stack_factor: bool
    dtype: str
    factors: str
    slices: tuple[DescribedSlice, ...]
    joined: bool = False
    interpolated: tuple[Side, ...] = ()

    @cached_property
    def places(self) -> tuple[Place, ...]:
        """Where the factors hold each slice."""
        return make_places([part.view.shape(part.stored_shape)[0] for part in self.slices], joined=self.joined)

    @property
    def factor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each factor: left, right, core, stack where that mode is compressed, and the orders of rows."""
        return stored_shapes(self.shape, self.rank, full=self.core == "full", sides=self.interpolated)

    def dtype_of(self, factor: str) -> str:
        """Return safetensors' name of the dtype that a factor is stored in; orders of rows are integers."""
        return "I64" if factor.endswith(ORDER) else self.dtype

    @property
    def factor_names(self) -> dict[str, str]:
        """Name in the checkpoint of each factor."""
        return {factor: f"{self.factors}.{factor}" for factor in self.factor_shapes}

    @property
    def parameters(self) -> int:
        """Entries of all factors."""
        return sum(math.prod(shape) for shape in self.factor_shapes.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all factors."""
        shapes = self.factor_shapes
        return sum(math.prod(shape) * BITS[self.dtype_of(factor)] // 8 for factor, shape in shapes.items())

    def to_json(self) -> dict[str, Any]:
        """Return the stack as JSON-able values."""
        return {
            "name": self.name,
            "shape": list(self.shape),
            "rank": list(self.rank),
            "core": self.core,
            "stack_factor": self.stack_factor,
            "dtype": self.dtype,
            "factors": self.factors,
            "slices": [part.to_json() for part in self.slices],
            **({"joined": True} if self.joined else {}),
            **({"interpolated": list(self.interpolated)} if self.interpolated else {}),
        }


@dataclass(frozen=True)
class Descriptor:
    """All that is unlike an ordinary checkpoint: the ``quantization_config`` of its config.json.

    Attributes:
        stacks: what factors stand in for.
        narrow: tensors that are shorter than in an ordinary checkpoint.
    """

    stacks: tuple[DescribedStack, ...]
    narrow: tuple[NarrowTensor, ...] = ()

    @cached_property
    def slices(self) -> dict[str, tuple[tuple[DescribedStack, int], ...]]:
        """Per replaced tensor the (stack, index in its stack mode) that stand in for it."""
        found: dict[str, list[tuple[DescribedStack, int]]] = {}
        for stack in self.stacks:
            for index, part in enumerate(stack.slices):
                found.setdefault(part.tensor, []).append((stack, index))
        return {tensor: tuple(parts) for tensor, parts in found.items()}

    @property
    def factor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every factor tensor, by its name in the checkpoint."""
        return {
            stack.factor_names[factor]: shape for stack in self.stacks for factor, shape in stack.factor_shapes.items()
        }

    def to_json(self) -> dict[str, Any]:
        """Return the ``quantization_config`` as JSON-able values; :func:`parse_descriptor` reads it back."""
        return {
            "quant_method": METHOD,
            "format_version": FORMAT_VERSION,
            "stacks": [stack.to_json() for stack in self.stacks],
            **({"narrow": [part.to_json() for part in self.narrow]} if self.narrow else {}),
        }

    def check_tensors(self, tensors: Mapping[str, TensorInfo], where: str) -> None:
        """Compare the descriptor with what the shards hold, from their headers.

        Args:
            tensors: every stored tensor by name.
            where: what to call the checkpoint in messages.
        Raises: LoadError: a factor is missing, or has another shape or dtype than described; a replaced tensor's name
            is missing, or its tensor is not empty; a tensor looks like a factor but belongs to no stack.
        Cost: time in the number of tensors.
        """
        for stack in self.stacks:
            for factor, shape in stack.factor_shapes.items():
                name = stack.factor_names[factor]
                info = _stored(tensors, name, f"{where}: factor {factor} of stack {stack.name}")
                dtype = stack.dtype_of(factor)
                if info.shape != shape or info.dtype != dtype:
                    raise LoadError(
                        f"{where}: tensor {name} in {info.shard} is {info.shape} {info.dtype}; config.json describes "
                        f"{shape} {dtype} for stack {stack.name}. Config and shards do not belong together"
                    )
        for name in self.slices:
            info = _stored(tensors, name, f"{where}: the empty stand-in of a factored tensor")
            if info.shape != EMPTY:
                raise LoadError(
                    f"{where}: tensor {name} in {info.shard} is {info.shape}; config.json says that it is factored, "
                    f"so that {EMPTY} is expected. Config and shards do not belong together"
                )
        for part in self.narrow:
            info = _stored(tensors, part.tensor, f"{where}: a narrow tensor")
            if info.shape != part.shape:
                raise LoadError(
                    f"{where}: tensor {part.tensor} in {info.shard} is {info.shape}; config.json describes it as "
                    f"{part.shape}. Config and shards do not belong together"
                )
        described = self.factor_shapes
        for name, info in tensors.items():
            if looks_like_factor(name) and name not in described:
                raise LoadError(
                    f"{where}: tensor {name} in {info.shard} belongs to no stack that config.json describes"
                )


def _stored(tensors: Mapping[str, TensorInfo], name: str, what: str) -> TensorInfo:
    """Return a tensor's place, or say that it is missing."""
    if name not in tensors:
        raise LoadError(f"{what}, tensor {name}, is in none of the shards; fetch or write the checkpoint again")
    return tensors[name]


def looks_like_factor(name: str) -> bool:
    """Whether a tensor has the name of a factor."""
    return f".{METHOD}." in f".{name}"


def stack_id(name: str) -> str:
    """Return a stack's name with every character that a module name cannot have replaced by ``_``."""
    return re.sub(r"[^0-9A-Za-z_]", "_", name)


def factors_prefix(name: str, tensor: str) -> str | None:
    """Return what a stack's factor names begin with: the block of its first slice's tensor, up to its number.

    Outside the blocks it is where the module lies that holds the tensor; None for a tensor that no module holds.
    """
    block = re.match(r"(?:[^.]+\.)*?\d+(?=\.)", tensor)
    place = block[0].split(".") if block else tensor.split(".")[:-2]
    return ".".join([*place, METHOD, stack_id(name)]) if "." in tensor else None


def describe_stack(
    stack: Stack,
    rank: tuple[int, int, int],
    core: Core,
    *,
    tensors: Mapping[str, TensorInfo],
    stack_factor: bool = False,
    dtype: str | None = None,
) -> DescribedStack:
    """Describe one planned stack of a factored checkpoint.

    Args:
        stack: its slices.
        rank: (A, r1, r2) of its factors.
        core: whether the core is kept diagonal or full.
        tensors: the source's stored tensors.
        stack_factor: whether the stack mode is compressed.
        dtype: safetensors' name of the dtype to store factors in; the first slice's by default.
    Returns: shapes and names of the factors.
    Raises: PlanError: a slice lies in no numbered block, or in a tensor that no linear module holds.
    """
    first = stack.slices[0].tensor
    prefix = factors_prefix(stack.name, first)
    if prefix is None:
        raise PlanError(f"stack {stack.name}: {first} lies in no module to keep its factors; use --write dense")
    slices = []
    for part in stack.slices:
        shape = tensors[part.tensor].shape
        if len(shape) != 2 or ".experts." in part.tensor:
            raise PlanError(
                f"stack {stack.name}: {part.tensor} {shape} holds experts, which transformers keeps fused in one "
                "tensor and not in linear modules, so that factors cannot stand in for it; use --write dense"
            )
        slices.append(DescribedSlice(part.tensor, shape, part.view))
    stored = dtype or tensors[first].dtype
    sides = interpolated_sides(stack.shape, rank, full=core == "full")
    return DescribedStack(
        stack.name, stack.shape, rank, core, stack_factor, stored, prefix, tuple(slices), stack.joined, sides
    )


def describe(stacks: Sequence[DescribedStack]) -> Descriptor:
    """Put the stacks of a planned factored checkpoint together.

    Raises: PlanError: some parts of a fused tensor are in stacks and some are not, two stacks' factors would have the
        same names, or a view cannot be multiplied through; the message says which.
    """
    descriptor = Descriptor(tuple(stacks))
    if fault := find_fault(descriptor):
        raise PlanError(f"{fault}; use --write dense, or select all of the tensor's roles")
    return descriptor


def find_fault(descriptor: Descriptor) -> str | None:
    """Return in words what contradicts itself in a descriptor whose types are right, None if nothing does."""
    checks = chain(  # lazily: later ones rest on the earlier ones
        (_stack_fault(stack) for stack in descriptor.stacks),
        (_interpolation_fault(stack) for stack in descriptor.stacks),
        (_name_fault(stacks) for stacks in (descriptor.stacks,)),
        (_cover_fault(tensor, parts) for tensor, parts in descriptor.slices.items()),
        (find_narrow_fault(narrow, descriptor.slices) for narrow in (descriptor.narrow,)),
    )
    return next((fault for fault in checks if fault), None)


def _stack_fault(stack: DescribedStack) -> str | None:
    """Check one stack: sizes, ranks, names, and that the slices' views give its shape."""
    if fault := _rank_fault(stack):
        return fault
    what = f"stack {stack.name}"
    if (prefix := factors_prefix(stack.name, stack.slices[0].tensor)) != stack.factors:
        return f"{what} has its factors at {stack.factors}; expected {prefix}, the block of its first slice"
    inner, hidden = None if stack.joined else stack.shape[1], stack.shape[2]
    for part in stack.slices:
        if fault := _slice_fault(part, inner, hidden):
            return f"{what}, tensor {part.tensor}: {fault}"
    if stack.joined and stack.places[-1].rows.stop != stack.shape[1]:
        return f"{what} has shape {stack.shape} but its joined slices have {stack.places[-1].rows.stop} rows together"
    return None


def _rank_fault(stack: DescribedStack) -> str | None:
    """Check one stack's sizes and ranks."""
    (size, inner, hidden), (mixed, r1, r2) = stack.shape, stack.rank
    what = f"stack {stack.name}"
    if stack.joined and (size != 1 or stack.core != "diagonal" or stack.stack_factor):
        return f"{what} of shape {stack.shape} is joined; expected a size of 1, a diagonal core and no stack factor"
    if not stack.joined and size != len(stack.slices):
        return f"{what} has shape {stack.shape} but {len(stack.slices)} slices"
    if mixed > size or (mixed < size and not stack.stack_factor):
        return f"{what} has stack rank {mixed} for {size} slices and {'a' if stack.stack_factor else 'no'} stack factor"
    if stack.core == "diagonal" and (r1 != r2 or r1 > min(inner, hidden) * size):
        return f"{what} of shape {stack.shape} has a diagonal core and ranks {r1} and {r2}"
    if stack.core == "full" and (r1 > inner or r2 > hidden):
        return f"{what} of shape {stack.shape} has the ranks {stack.rank}, above its sizes"
    return None


def _interpolation_fault(stack: DescribedStack) -> str | None:
    """Check which factors are in interpolative form: those that the sizes say, or none, as in the first version."""
    sides = interpolated_sides(stack.shape, stack.rank, full=stack.core == "full")
    if stack.interpolated in ((), sides):
        return None
    return (
        f"stack {stack.name} of shape {stack.shape} and ranks {stack.rank} has factors in interpolative form: "
        f"{', '.join(stack.interpolated)}; expected {', '.join(sides) or 'none'}"
    )


def _slice_fault(part: DescribedSlice, inner: int | None, hidden: int) -> str | None:
    """Check that a view gives these sizes, any inner one for None, and maps each stored axis to one canonical axis."""
    try:
        found = part.view.shape(part.stored_shape)
    except ShapeError as e:
        return str(e)
    expected = found[0] if inner is None else inner, hidden
    if found != expected:
        return f"view '{part.view}' of {part.stored_shape} is {found}; expected {expected}"
    stored, canonical = parse(part.view.stored), parse(part.view.canonical)
    if {frozenset(group) for group in stored} != {frozenset(group) for group in canonical}:
        return f"view '{part.view}' mixes input and output axes, which factors cannot be multiplied through"
    return None


def _name_fault(stacks: Iterable[DescribedStack]) -> str | None:
    """Check that no two stacks share a name or a place for their factors."""
    seen: dict[str, str] = {}
    for stack in stacks:
        for key in (stack.name, stack.factors):
            if key in seen:
                return f"stacks {seen[key]} and {stack.name} have the same name or the same factors, {stack.factors}"
        seen |= {stack.name: stack.name, stack.factors: stack.name}
    return None


def _cover_fault(tensor: str, parts: Sequence[tuple[DescribedStack, int]]) -> str | None:
    """Check that the slices of one tensor cover every element of it exactly once."""
    slices = [stack.slices[index] for stack, index in parts]
    first = slices[0]
    if any((part.stored_shape, part.view.stored) != (first.stored_shape, first.view.stored) for part in slices):
        return f"tensor {tensor} is described with several shapes or patterns"
    if len({axis for part in slices for axis, _, _ in part.view.take}) > 1:
        return f"tensor {tensor} is cut along several axes at once, which factors cannot stand in for"
    grids = [solve(parse(part.view.stored), part.stored_shape, dict(part.view.sizes), "tensor") for part in slices]
    if any(grid != grids[0] for grid in grids):
        return f"tensor {tensor} is described with several sizes of the same axes"
    length = next((grids[0][axis] for part in slices for axis, _, _ in part.view.take), 1)  # of the one that is cut
    cuts = sorted(part.view.take[0][1:] if part.view.take else (0, length) for part in slices)
    if any(start < stop for (_, stop), (start, _) in pairwise(cuts)):
        return f"tensor {tensor} is in stacks twice ({', '.join(stack.name for stack, _ in parts)})"
    if sum(stop - start for start, stop in cuts) != length:
        names = ", ".join(str(part.view) for part in slices)
        return f"tensor {tensor} {first.stored_shape} is in stacks only in part ({names})"
    return None
