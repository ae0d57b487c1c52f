"""Reading a descriptor from a config.json that may be damaged or hostile: every type, size and name is checked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NoReturn

from trawl.checkpoint import FLOAT_DTYPES
from trawl.descriptor import (
    FORMAT_VERSION,
    KNOWN_VERSIONS,
    METHOD,
    Core,
    DescribedSlice,
    DescribedStack,
    Descriptor,
    find_fault,
)
from trawl.errors import LoadError, ShapeError, shown
from trawl.interpolation import Side
from trawl.narrow_tensor import NarrowTensor
from trawl.views import View

TENSOR_NAME = re.compile(r"[0-9A-Za-z_]+(\.[0-9A-Za-z_]+)*")
STACK_NAME = re.compile(r"[0-9A-Za-z_]([0-9A-Za-z_.,-]*[0-9A-Za-z_])?")
PATTERN = re.compile(r"[0-9A-Za-z_() ]+")
LONGEST_NAME = 500
LARGEST_SIZE = 1 << 40


def parse_descriptor(value: object, where: str) -> Descriptor:
    """Read and check a ``quantization_config``.

    Args:
        value: the parsed JSON.
        where: what to call it in messages, such as ``out/config.json``.
    Returns: the descriptor, free of contradictions in itself; compare it with the shards by
        :meth:`Descriptor.check_tensors` before anything is allocated.
    Raises: LoadError: a field is missing, unknown or of a wrong type; a size is out of bounds; a name has path parts;
        shapes, ranks, views and slices do not fit together; the format version is unknown.
    Cost: time in the number of slices; allocates nothing in proportion to a size that it reads.
    """
    reader = _Fields(value, f"{where}: quantization_config")
    method, version = reader.take("quant_method"), reader.take("format_version")
    if method != METHOD:
        reader.fail("quant_method", method, repr(METHOD))
    if type(version) is not int or version not in KNOWN_VERSIONS:
        known = " or ".join(map(str, KNOWN_VERSIONS))
        reader.fail("format_version", version, f"{known}, which this trawl reads; install a newer trawl")
    narrow = reader.items("narrow") if "narrow" in reader.left else []
    stacks = reader.items("stacks", empty=bool(narrow))
    reader.close()
    descriptor = Descriptor(tuple(_stack(each) for each in stacks), tuple(_narrow(each) for each in narrow))
    if fault := find_fault(descriptor):
        raise LoadError(f"{where}: quantization_config contradicts itself: {fault}")
    return descriptor


def _stack(reader: _Fields) -> DescribedStack:
    """Read one stack."""
    core = reader.choice("core", ("diagonal", "full"))
    kind: Core = "diagonal" if core == "diagonal" else "full"
    stack = DescribedStack(
        name=reader.name("name", STACK_NAME),
        shape=reader.triple("shape"),
        rank=reader.triple("rank"),
        core=kind,
        stack_factor=reader.flag("stack_factor"),
        dtype=reader.choice("dtype", FLOAT_DTYPES),
        factors=reader.name("factors", TENSOR_NAME),
        slices=tuple(_slice(each) for each in reader.items("slices")),
        joined=reader.flag("joined", absent=False),
        interpolated=reader.sides("interpolated"),
    )
    reader.close()
    return stack


def _narrow(reader: _Fields) -> NarrowTensor:
    """Read one narrow tensor."""
    name, shape, full = reader.name("tensor", TENSOR_NAME), reader.sizes("shape"), reader.sizes("full")
    parts = reader.take("parts")
    if not _is_size(parts):
        reader.fail("parts", parts, f"an integer from 1 to {LARGEST_SIZE}")
    reader.close()
    return NarrowTensor(name, shape, full, parts)


def _slice(reader: _Fields) -> DescribedSlice:
    """Read one slice."""
    tensor = reader.name("tensor", TENSOR_NAME)
    shape = reader.sizes("stored_shape")
    if len(shape) != 2:
        reader.fail("stored_shape", list(shape), "two sizes")
    view = _view(reader.section("view"))
    reader.close()
    return DescribedSlice(tensor, shape, view)


def _view(reader: _Fields) -> View:
    """Read one view; ``sizes`` and ``take`` may be absent."""
    stored, canonical = reader.name("stored", PATTERN), reader.name("canonical", PATTERN)
    sizes = reader.mapping("sizes")
    take = reader.mapping("take")
    reader.close()
    for axis, size in sizes.items():
        if not _is_size(size):
            reader.fail(f"sizes.{axis}", size, f"an integer from 1 to {LARGEST_SIZE}")
    for axis, bounds in take.items():
        if not isinstance(bounds, list) or len(bounds) != 2 or not all(_is_size(n, 0) for n in bounds):
            reader.fail(f"take.{axis}", bounds, "[start, stop]")
    try:
        return View(stored, canonical, tuple(sizes.items()), tuple((axis, *bounds) for axis, bounds in take.items()))
    except ShapeError as e:
        raise LoadError(f"{reader.where}: {e}") from e


def _is_size(value: object, smallest: int = 1) -> bool:
    """Tell whether a JSON value is an integer within bounds; true and false are not."""
    return type(value) is int and smallest <= value <= LARGEST_SIZE


class _Fields:
    """The fields of one JSON object, each taken once; messages say where they stand."""

    def __init__(self, value: object, where: str) -> None:
        self.where = where
        if not isinstance(value, Mapping):
            raise LoadError(f"{where} is {shown(value)}; expected an object")
        self.left: dict[str, Any] = dict(value)

    def fail(self, field: str, value: object, expected: str) -> NoReturn:
        """Raise for a field of this object."""
        raise LoadError(f"{self.where}: {field} is {shown(value)}; expected {expected}")

    def take(self, field: str) -> Any:
        """Return a field that must be there."""
        if field not in self.left:
            raise LoadError(f"{self.where} has no {field}; config.json is damaged, fetch or write the checkpoint again")
        return self.left.pop(field)

    def close(self) -> None:
        """Require that nothing is left."""
        if self.left:
            names = shown(", ".join(str(name) for name in self.left))
            raise LoadError(
                f"{self.where} has the unknown field {names}; expected only those of format {FORMAT_VERSION}"
            )

    def name(self, field: str, pattern: re.Pattern[str]) -> str:
        """Return a string that a pattern matches whole."""
        value = self.take(field)
        if not isinstance(value, str) or len(value) > LONGEST_NAME or not pattern.fullmatch(value):
            self.fail(field, value, f"a text that matches {pattern.pattern}")
        return str(value)

    def choice(self, field: str, known: tuple[str, ...]) -> str:
        """Return one of the known strings."""
        value = self.take(field)
        if not isinstance(value, str) or value not in known:
            self.fail(field, value, f"one of {', '.join(known)}")
        return str(value)

    def flag(self, field: str, *, absent: bool | None = None) -> bool:
        """Return true or false; ``absent`` is what a field that may be left out stands for."""
        value = self.take(field) if absent is None else self.left.pop(field, absent)
        if not isinstance(value, bool):
            self.fail(field, value, "true or false")
        return value is True

    def sides(self, field: str) -> tuple[Side, ...]:
        """Return the factors that a list names, left before right; it may be absent."""
        value = self.left.pop(field, [])
        known: tuple[Side, ...] = ("left", "right")
        found = tuple(side for side in known if isinstance(value, list) and side in value)
        if value != list(found):
            self.fail(field, value, "a list of left, right, or both in this order")
        return found

    def sizes(self, field: str) -> tuple[int, ...]:
        """Return a list of sizes."""
        value = self.take(field)
        if not isinstance(value, list) or not value or len(value) > 8 or not all(_is_size(each) for each in value):
            self.fail(field, value, f"a list of integers from 1 to {LARGEST_SIZE}")
        return tuple(value)

    def triple(self, field: str) -> tuple[int, int, int]:
        """Return three sizes."""
        sizes = self.sizes(field)
        if len(sizes) != 3:
            self.fail(field, list(sizes), "three integers")
        return sizes[0], sizes[1], sizes[2]

    def items(self, field: str, *, empty: bool = False) -> list[_Fields]:
        """Return the objects of a list, which may be empty only if told so."""
        value = self.take(field)
        if not isinstance(value, list) or not (value or empty):
            self.fail(field, value, "a list of objects")
        return [_Fields(each, f"{self.where}.{field}[{number}]") for number, each in enumerate(value)]

    def section(self, field: str) -> _Fields:
        """Return an object inside this one."""
        return _Fields(self.take(field), f"{self.where}.{field}")

    def mapping(self, field: str) -> dict[str, Any]:
        """Return a mapping that may be absent."""
        value = self.left.pop(field, {})
        if not isinstance(value, dict):
            self.fail(field, value, "an object")
        return dict(value)
