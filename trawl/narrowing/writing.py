"""Shards of a narrowed checkpoint, streamed: rows selected, readers replaced, every other byte as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from trawl.checkpoint import Checkpoint
from trawl.families import Placement
from trawl.layout import ShardLayout
from trawl.narrowing.cuts import Cut, Narrowed, bias_of, kept_positions, positions, stored_axis
from trawl.narrowing.solving import Narrowing
from trawl.shards import FileRange, write_shard
from trawl.stacking import READ_INNER

Advance = Callable[[int], None]


@dataclass(frozen=True, eq=False)
class NarrowWriter:
    """Writes the shards of a narrowed checkpoint.

    Attributes:
        checkpoint: the source.
        narrowed: what changes.
        narrowing: reads what a stack came to, by its name.
    """

    checkpoint: Checkpoint
    narrowed: Narrowed
    narrowing: Callable[[str], Narrowing]

    def write(self, layout: ShardLayout, path: Path, advance: Advance) -> None:
        """Write one shard.

        Args:
            layout: what the shard holds.
            path: the file to create; it appears whole, by rename.
            advance: called with the number of bytes done.
        Raises: OSError: disk full or unreadable source.
        Cost: its bytes once; memory for one stored tensor.
        """

        def parts() -> Iterator[FileRange | Tensor]:
            for entry in layout.entries:
                if entry.name in self._changed:
                    yield self.replaced(entry.name)
                else:
                    info = self.checkpoint.tensors[entry.name]
                    yield FileRange(self.checkpoint.folder / info.shard, info.start, info.stop)
                advance(entry.nbytes)

        write_shard(path, layout.header, parts())

    @cached_property
    def _changed(self) -> dict[str, tuple[str, list[tuple[Cut, Placement]]]]:
        """Per stored tensor that changes, the weight that it belongs to, itself or a bias's, and its slices."""
        slices: dict[str, list[tuple[Cut, Placement]]] = {}
        for cut in self.narrowed.cuts:
            for part in cut.stack.slices:
                slices.setdefault(part.tensor, []).append((cut, part))
        changed = {tensor: (tensor, parts) for tensor, parts in slices.items()}
        return changed | {
            bias: (tensor, parts) for tensor, parts in slices.items() if (bias := bias_of(self.checkpoint, tensor))
        }

    def replaced(self, name: str) -> Tensor:
        """Return a stored tensor as it will be, a weight or a bias."""
        weight, parts = self._changed[name]
        cut, part = parts[0]
        original = self.checkpoint.read(name)
        found = [(cut, part, self.narrowing(cut.stack.name)) for cut, part in parts]
        if name != weight and part.role in READ_INNER:
            bias = found[0][2].bias
            assert bias is not None
            return bias
        shape = self.checkpoint.tensors[weight].shape
        stays = kept_positions([(cut, part, result.kept) for cut, part, result in found], shape)
        target = original.index_select(0 if name != weight else stored_axis(part.view), stays)
        if name == weight:
            for cut, part, result in found:
                if part.role in READ_INNER:
                    rows = positions(part.view, shape)[cut.rows(part, result.kept)]
                    target.movedim(stored_axis(part.view), 0)[torch.searchsorted(stays, rows)] = result.reader
        return target.contiguous()
