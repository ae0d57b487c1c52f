"""Layout: which bytes stand where in the shards of a factored checkpoint, and of the dense one that it came from.

Headers are worked out from shapes alone, so that a plan knows the size of every file to the byte.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from trawl.checkpoint import BITS, Checkpoint, Shard
from trawl.descriptor import EMPTY, Descriptor


@dataclass(frozen=True)
class Entry:
    """One tensor of a shard to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of its data."""
        return math.prod(self.shape) * BITS[self.dtype] // 8


@dataclass(frozen=True)
class ShardLayout:
    """A shard to be written: its tensors in byte order and its header."""

    name: str
    entries: tuple[Entry, ...]
    header: bytes

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return len(self.header) + sum(entry.nbytes for entry in self.entries)


def make_layout(
    checkpoint: Checkpoint, descriptor: Descriptor, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[ShardLayout, ...]:
    """Lay out the shards of a factored or a narrow checkpoint, or one that is both.

    Replaced tensors keep their place, empty; a stack's factors stand in front of its first slice, in the same shard.

    Args:
        checkpoint: the source.
        descriptor: its stacks.
        shapes: the new shapes of tensors that get another one, by name.
    Returns: one layout per source shard, under the same names.
    """
    factors: dict[str, list[Entry]] = {}
    for stack in descriptor.stacks:
        first = factors.setdefault(stack.slices[0].tensor, [])
        first += [
            Entry(stack.factor_names[factor], stack.dtype_of(factor), shape)
            for factor, shape in stack.factor_shapes.items()
        ]

    def replace(entry: Entry) -> Iterable[Entry]:
        if entry.name not in descriptor.slices:
            return (Entry(entry.name, entry.dtype, shapes.get(entry.name, entry.shape)),)
        return (*factors.get(entry.name, ()), Entry(entry.name, entry.dtype, EMPTY))

    return tuple(_layout(shard, replace) for shard in checkpoint.shards)


def dense_layout(checkpoint: Checkpoint, descriptor: Descriptor) -> tuple[ShardLayout, ...]:
    """Lay out the dense shards that a factored checkpoint came from.

    Args:
        checkpoint: the factored checkpoint.
        descriptor: its stacks.
    Returns: one layout per shard: replaced tensors in their stored shape again, no factors.
    """
    factors = set(descriptor.factor_shapes)
    shapes = {part.tensor: part.stored_shape for stack in descriptor.stacks for part in stack.slices}
    shapes |= {part.tensor: part.full for part in descriptor.narrow}

    def restore(entry: Entry) -> Iterable[Entry]:
        if entry.name in factors:
            return ()
        return (Entry(entry.name, entry.dtype, shapes.get(entry.name, entry.shape)),)

    return tuple(_layout(shard, restore) for shard in checkpoint.shards)


def _layout(shard: Shard, change: Callable[[Entry], Iterable[Entry]]) -> ShardLayout:
    """Apply a change to every tensor of a shard; wide dtypes come first, which keeps every tensor aligned."""
    entries = [new for info in shard.tensors for new in change(Entry(info.name, info.dtype, info.shape))]
    entries.sort(key=lambda entry: -BITS[entry.dtype])
    return ShardLayout(shard.name, tuple(entries), _header(entries, shard.metadata))


def _header(entries: Iterable[Entry], metadata: Mapping[str, str]) -> bytes:
    """Return a safetensors header the way the library writes it: compact JSON, padded to eight bytes."""
    described: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for entry in entries:
        described[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.nbytes],
        }
        offset += entry.nbytes
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def index_file(layouts: tuple[ShardLayout, ...], metadata: Mapping[str, object]) -> dict[str, object]:
    """Return the shard index of newly laid out shards.

    Args:
        layouts: the shards.
        metadata: the source index's metadata; totals that it has are brought up to date.
    Returns: what ``model.safetensors.index.json`` holds.
    """
    entries = [entry for layout in layouts for entry in layout.entries]
    totals = {
        "total_size": sum(entry.nbytes for entry in entries),
        "total_parameters": sum(math.prod(entry.shape) for entry in entries),
    }
    placed = {entry.name: layout.name for layout in layouts for entry in layout.entries}
    return {"metadata": {key: totals.get(key, value) for key, value in metadata.items()}, "weight_map": placed}
