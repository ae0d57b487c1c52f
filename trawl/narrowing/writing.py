"""Tensors of a narrowed checkpoint: rows selected, readers and refitted writers replaced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from trawl.checkpoint import Checkpoint
from trawl.families import Placement
from trawl.narrowing.cuts import Cut, Narrowed, bias_of, kept_positions, positions, stored_axis
from trawl.narrowing.solving import Narrowing
from trawl.stacking import READ_INNER


@dataclass(frozen=True, eq=False)
class NarrowedTensors:
    """The tensors of a narrowed checkpoint: rows selected, readers replaced.

    Attributes:
        checkpoint: the source.
        narrowed: what changes.
        narrowing: reads what a stack came to, by its name.
    """

    checkpoint: Checkpoint
    narrowed: Narrowed
    narrowing: Callable[[str], Narrowing]

    def get(self, name: str) -> Tensor | None:
        """Return a stored tensor as it will be; None for one that stays as it is."""
        return self._replaced(name) if name in self._changed else None

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

    def _replaced(self, name: str) -> Tensor:
        """Return a weight or a bias that changes."""
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
                values = result.reader if part.role in READ_INNER else result.writers.get(part.role)
                if values is not None:
                    rows = positions(part.view, shape)[cut.rows(part, result.kept)]
                    target.movedim(stored_axis(part.view), 0)[torch.searchsorted(stays, rows)] = values
        return target.contiguous()
