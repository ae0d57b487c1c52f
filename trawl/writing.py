"""Output shards, streamed and measured as written: dense, multiplied out from factors, or with factors in place."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from trawl.checkpoint import DTYPES, Checkpoint, Shard
from trawl.descriptor import Descriptor
from trawl.factors import Factors
from trawl.families import Placement
from trawl.layout import ShardLayout
from trawl.shards import FileRange, copy_file, write_shard
from trawl.stacking import Place, Stack
from trawl.views import View

BLOCK_ENTRIES = 1 << 20  # entries of one block of the writing loop; its float32 buffers stay in cache

Advance = Callable[[int], None]
FactorsOf = Callable[[str], Factors]


class Sums(NamedTuple):
    """Sums of squares over some slices of a stack, in float64 and in units of the stack's largest magnitude."""

    error: float  # of what was written, ‖T − T̂‖²
    rounding: float  # of what was written against the same in full precision
    norm: float  # ‖T‖²


@dataclass
class SquaredErrors:
    """Sums of squares by stack."""

    error: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    rounding: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    norm: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, name: str, sums: Sums) -> None:
        """Add the sums of some slices of a stack."""
        self.error[name] += sums.error
        self.rounding[name] += sums.rounding
        self.norm[name] += sums.norm

    def merge(self, other: SquaredErrors) -> None:
        """Add the sums of another part of the output."""
        for name, norm in other.norm.items():
            self.add(name, Sums(other.error[name], other.rounding[name], norm))

    def relative(self, name: str) -> float:
        """Return ‖T − T̂‖_F / ‖T‖_F of a stack as written; zero for an all-zero stack."""
        return float((self.error[name] / self.norm[name]) ** 0.5) if self.norm[name] else 0.0

    def relative_rounding(self, name: str) -> float:
        """Return how far rounding moved a stack, relative to ‖T‖_F."""
        return float((self.rounding[name] / self.norm[name]) ** 0.5) if self.norm[name] else 0.0

    def to_json(self) -> dict[str, dict[str, float]]:
        """Return the sums as JSON-able values."""
        return {part.name: dict(getattr(self, part.name)) for part in fields(self)}

    @classmethod
    def from_json(cls, values: Mapping[str, Mapping[str, float]]) -> SquaredErrors:
        """Read back what :meth:`to_json` gave."""
        return cls(**{part.name: defaultdict(float, values[part.name]) for part in fields(cls)})


@dataclass(frozen=True, eq=False)
class DenseWriter:
    """Writes the shards of a denoised checkpoint.

    Attributes:
        checkpoint: the source.
        stacks: all that were decomposed.
        factors: reads the factors of a stack by its name.
        absmax: largest magnitude of each stack, which keeps squares within float32.
    """

    checkpoint: Checkpoint
    stacks: tuple[Stack, ...]
    factors: FactorsOf
    absmax: Mapping[str, float]

    def write(self, shard: Shard, path: Path, advance: Advance) -> SquaredErrors:
        """Write one shard: the source's header and bytes, with the stacks' tensors replaced.

        Args:
            shard: the source shard.
            path: the file to create; it appears whole, by rename.
            advance: called with the number of bytes done.
        Returns: squared errors of the slices in this shard.
        Raises: OSError: disk full or unreadable source.
        Cost: a shard without changed tensors is copied by the kernel. Otherwise its bytes once, one matrix product
            of the slice's size times the rank per slice, and one stored tensor plus a few blocks in memory.
        """
        source = self.checkpoint.folder / shard.name
        errors = SquaredErrors()
        slices = self._slices_by_tensor
        if not any(info.name in slices for info in shard.tensors):
            copy_file(source, path)
            advance(shard.nbytes)
            return errors

        def parts() -> Iterator[FileRange | Tensor]:
            for info in shard.tensors:
                if info.name in slices:
                    yield self.replaced(info.name, errors)
                else:
                    yield FileRange(source, info.start, info.stop)
                advance(info.nbytes)

        write_shard(path, shard.header, parts())
        return errors

    @cached_property
    def _slices_by_tensor(self) -> dict[str, list[tuple[Stack, Place, Placement]]]:
        """Return, per stored tensor, the slices that it holds, and where their factors hold them."""
        found: dict[str, list[tuple[Stack, Place, Placement]]] = defaultdict(list)
        for stack in self.stacks:
            for place, part in zip(stack.places, stack.slices, strict=True):
                found[part.tensor].append((stack, place, part))
        return found

    def replaced(self, name: str, errors: SquaredErrors) -> Tensor:
        """Return a stored tensor with its slices multiplied out; parts of it in no stack keep their bytes.

        Args:
            name: the stored tensor.
            errors: where its squared errors are added.
        """
        slices = self._slices_by_tensor[name]
        original = self.checkpoint.read(name)
        whole = len(slices) == 1 and slices[0][2].view.whole
        target = torch.empty_like(original) if whole else original.clone()
        for stack, place, part in slices:
            with slice_of(target, part.view) as written:
                canonical, scale = part.view.apply(original), self.absmax[stack.name] or 1.0
                errors.add(stack.name, multiply_out(self.factors(stack.name), place, canonical, written, scale))
        return target


@dataclass(frozen=True, eq=False)
class FactoredWriter:
    """Writes the shards of a factored checkpoint.

    Attributes:
        checkpoint: the source.
        descriptor: what the output holds.
        stacks: all that were decomposed.
        factors: reads the factors of a stack by its name.
        absmax: largest magnitude of each stack.
        replaced: gives a tensor that is no factor and changes, None for any other.
    """

    checkpoint: Checkpoint
    descriptor: Descriptor
    stacks: tuple[Stack, ...]
    factors: FactorsOf
    absmax: Mapping[str, float]
    replaced: Callable[[str], Tensor | None]

    def write(self, layout: ShardLayout, path: Path, advance: Advance) -> SquaredErrors:
        """Write one shard: factors, empty stand-ins, and every other tensor's bytes as they are.

        Args:
            layout: what the shard holds.
            path: the file to create; it appears whole, by rename.
            advance: called with the number of bytes done.
        Returns: squared errors of the stacks whose factors are in this shard.
        Raises: OSError: disk full or unreadable source.
        Cost: its bytes once, and one read of every slice of its stacks with two matrix products of the slice's size
            times the rank; memory for a few blocks.
        """
        errors = SquaredErrors()
        stored: dict[str, Tensor] = {}
        for stack, described in zip(self.stacks, self.descriptor.stacks, strict=True):
            if described.factor_names["left"] not in {entry.name for entry in layout.entries}:
                continue
            exact = self.factors(stack.name)
            rounded = exact.to(dtype=DTYPES[described.dtype])
            measure_stack(self.checkpoint, stack, rounded, exact, self.absmax[stack.name], errors=errors)
            tensors = rounded.stored()
            stored |= {name: tensors[factor] for factor, name in described.factor_names.items()}

        def parts() -> Iterator[FileRange | Tensor]:
            for entry in layout.entries:
                if entry.name in stored:
                    yield stored[entry.name].contiguous()
                elif (tensor := self.replaced(entry.name)) is not None:
                    yield tensor
                elif entry.name not in self.descriptor.slices:
                    info = self.checkpoint.tensors[entry.name]
                    yield FileRange(self.checkpoint.folder / info.shard, info.start, info.stop)
                advance(entry.nbytes)

        write_shard(path, layout.header, parts())
        return errors


@contextmanager
def slice_of(target: Tensor, view: View) -> Iterator[Tensor]:
    """Yield a slice of a stored tensor to be filled: in place where strides express it, else a copy put back after."""
    written = view.apply(target)
    in_place = written.untyped_storage().data_ptr() == target.untyped_storage().data_ptr()
    yield written
    if not in_place:
        view.scatter(written, target)


class _Product:
    """One slice of some factors, multiplied out in blocks of rows."""

    def __init__(self, factors: Factors, place: Place) -> None:
        middle = factors.middle(place.s)
        self.left = factors.left[place.rows]
        self.right = (factors.right * middle if middle.dim() == 1 else factors.right @ middle.T).T  # (r1, hidden)

    def rows(self, block: slice, *, transposed: bool) -> Tensor:
        """Return some rows, (rows, hidden); ``transposed`` lays them out as columns of (hidden, rows)."""
        return (self.right.T @ self.left[block].T).T if transposed else self.left[block] @ self.right


def blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Yield runs of rows of about ``BLOCK_ENTRIES`` entries."""
    rows = max(1, BLOCK_ENTRIES // shape[1])
    for first in range(0, shape[0], rows):
        yield slice(first, first + rows)


def fill(factors: Factors, place: Place, out: Tensor) -> None:
    """Write one slice of the factors into ``out`` (inner, hidden), bit for bit as :func:`multiply_out` does."""
    product = _Product(factors, place)
    transposed = _stored_transposed(out)
    for block in blocks(out.shape):
        out[block] = product.rows(block, transposed=transposed)


def _stored_transposed(out: Tensor) -> bool:
    """Whether a slice is stored as (hidden, inner), so that its blocks are best formed in that order."""
    return out.stride(0) < out.stride(1)


def multiply_out(factors: Factors, place: Place, original: Tensor, out: Tensor, scale: float) -> Sums:
    """Write one slice of the factors into ``out``, block by block, and measure it against the original.

    Args:
        factors: in the dtype to compute in, float32 or float64.
        place: where they hold the slice.
        original: (inner, hidden) as stored.
        out: (inner, hidden) to fill; rounded once to its dtype.
        scale: a magnitude that the entries are divided by before they are squared.
    Returns: sums of squares, divided by scale².
    Cost: O(inner · hidden · rank) operations; memory for a few blocks of ``BLOCK_ENTRIES`` entries.
    """
    product = _Product(factors, place)
    transposed = _stored_transposed(out)
    total = Sums(0.0, 0.0, 0.0)
    for block in blocks(original.shape):
        exact = product.rows(block, transposed=transposed)
        out[block] = exact
        total = _added(total, original[block], out[block], exact, scale)
    return total


def measure(rounded: Factors, exact: Factors, place: Place, original: Tensor, scale: float) -> Sums:
    """Measure one slice of rounded factors against the original and against the factors before rounding.

    Args:
        rounded: the factors as stored.
        exact: the same before they were rounded, float32 or float64.
        place: where they hold the slice.
        original: (inner, hidden) as stored.
        scale: a magnitude that the entries are divided by before they are squared.
    Returns: sums of squares, divided by scale².
    Cost: that of :func:`multiply_out`, twice.
    """
    dtype = exact.left.dtype
    stored, precise = _Product(rounded.to(dtype=dtype), place), _Product(exact, place)
    total = Sums(0.0, 0.0, 0.0)
    for block in blocks(original.shape):
        written = stored.rows(block, transposed=False)
        total = _added(total, original[block], written, precise.rows(block, transposed=False), scale)
    return total


def measure_stack(
    checkpoint: Checkpoint, stack: Stack, rounded: Factors, exact: Factors, absmax: float, *, errors: SquaredErrors
) -> None:
    """Add the squared errors of all slices of rounded factors."""
    for place, part in zip(stack.places, stack.slices, strict=True):
        original = part.view.apply(checkpoint.read(part.tensor))
        errors.add(stack.name, measure(rounded, exact, place, original, absmax or 1.0))


def _added(total: Sums, original: Tensor, written: Tensor, exact: Tensor, scale: float) -> Sums:
    """Add one block's squares."""
    before = original.to(exact.dtype)
    return Sums(
        total.error + squared_norm((written - before).div_(scale)),
        total.rounding + squared_norm((written - exact).div_(scale)),
        total.norm + squared_norm(before / scale),
    )


def squared_norm(block: Tensor) -> float:
    """Return ‖block‖² with its partial sums added in float64."""
    rows = block if block.stride(-1) == 1 else block.T
    return float(torch.linalg.vector_norm(rows, dim=1).double().square().sum())
