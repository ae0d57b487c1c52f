"""Stacks: which stored matrices are decomposed together, and streaming access to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trawl.checkpoint import FLOAT_DTYPES, Checkpoint
from trawl.errors import CheckpointError
from trawl.families import ATTENTION, FC, Placement


@dataclass(frozen=True)
class Stack:
    """Slices of one shape, decomposed together: an order-3 tensor (S, inner, hidden) that is never held whole.

    Attributes:
        name: unique within a plan, and the name of its factor file.
        slices: in the order of the stack mode: by layer, then by role.
    """

    name: str
    slices: tuple[Placement, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(S, inner, hidden)."""
        return len(self.slices), *self.slices[0].shape

    @property
    def parameters(self) -> int:
        """Entries of all slices."""
        size, inner, hidden = self.shape
        return size * inner * hidden

    @property
    def roles(self) -> tuple[str, ...]:
        """Roles that occur, in order of first appearance."""
        return tuple(dict.fromkeys(part.role for part in self.slices))

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers that occur, ascending."""
        return tuple(sorted({part.layer for part in self.slices}))

    @property
    def tensors(self) -> tuple[str, ...]:
        """Stored tensors that hold the slices; a fused tensor is named once."""
        return tuple(dict.fromkeys(part.tensor for part in self.slices))


def make_stacks(placements: Sequence[Placement], group_layers: int | None, *, single: bool = False) -> list[Stack]:
    """Group slices into stacks: by run of layers, by kind (attention or FC), then by shape.

    Args:
        placements: the selected slices.
        group_layers: layers in one stack; None puts all of them into one.
        single: whether every slice is a stack of its own (methods for one matrix).
    Returns: stacks in order of layer; slices of unequal shape (grouped-query K and V beside Q and O) never share one.
    """
    layers = sorted({part.layer for part in placements})
    size = group_layers or max(len(layers), 1)
    stacks = []
    for first in range(0, len(layers), size):
        group = layers[first : first + size]
        members = [part for part in placements if part.layer in group]
        if single:
            stacks += [Stack(f"{part.role}.{part.layer}", (part,)) for part in members]
        else:
            stacks += _stacks_of_group(members, format_layers(group))
    return stacks


def _stacks_of_group(members: Sequence[Placement], layers: str) -> list[Stack]:
    """Split one run of layers by kind and shape; a kind with several shapes is named by its roles."""
    stacks = []
    for kind, roles in (("attn", ATTENTION), ("fc", FC)):
        of_kind = [part for part in members if part.role in roles]
        for shape in dict.fromkeys(part.shape for part in of_kind):
            slices = tuple(part for part in of_kind if part.shape == shape)
            label = kind
            if len(slices) < len(of_kind):
                label = f"{kind}-{''.join(dict.fromkeys(part.role for part in slices))}"
            stacks.append(Stack(f"{label}.{layers}", slices))
    return stacks


def format_layers(layers: Sequence[int]) -> str:
    """Write layers the way the command line takes them: ``20-30,35``."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def scan(checkpoint: Checkpoint, name: str) -> float:
    """Read one stored tensor once and return its largest magnitude.

    Args:
        checkpoint: where it is stored.
        name: the stored tensor.
    Returns: max |x|, finite.
    Raises: CheckpointError: the tensor is not of a float dtype that can be decomposed, or holds NaN or Inf.
    Cost: one read of the tensor, at memory speed where it is cached; nothing is kept.
    """
    info = checkpoint.tensors[name]
    where = f"{checkpoint.folder / info.shard}: tensor {name} {info.shape}"
    if info.dtype not in FLOAT_DTYPES:
        raise CheckpointError(f"{where} is stored as {info.dtype}; expected one of {', '.join(FLOAT_DTYPES)}")
    low, high = torch.aminmax(checkpoint.read(name))
    largest = max(abs(float(low)), abs(float(high)))
    if not largest < float("inf"):  # NaN compares false
        tensor = checkpoint.read(name)
        count = int((~torch.isfinite(tensor)).sum())
        raise CheckpointError(
            f"{where} holds {count} NaN or Inf entries; expected finite weights. Repair the checkpoint"
        )
    return largest


@dataclass(frozen=True, eq=False)
class StoredSlices:
    """The slices of a stack, streamed from its checkpoint (a :class:`trawl.decompose.SliceSource`).

    Slices are memory-mapped in their stored dtype, so that a pass adds nothing to the process's own memory; while one
    is computed on, the kernel is already reading the next.

    Attributes:
        checkpoint: where they are stored.
        stack: which they are.
        absmax: largest magnitude of any entry, as :func:`scan` found it.
        device: where the computation runs; slices are copied to it one at a time.
        on_slice: called after each slice is handed out, to show progress.
        max_memory: bytes of slices that are kept on the device after the first pass, for sources that are slow to read
            again and for devices that are slow to copy to. The results are the same to the last bit.
    """

    checkpoint: Checkpoint
    stack: Stack
    absmax: float
    device: torch.device
    on_slice: Callable[[], object] = bool
    max_memory: int = 0
    _kept: dict[int, Tensor] = field(default_factory=dict, repr=False)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(S, inner, hidden)."""
        return self.stack.shape

    def slices(self) -> Iterator[Tensor]:
        """Make one pass over the stack."""
        room = self.max_memory - sum(tensor.nbytes for tensor in self._kept.values())
        for number, part in enumerate(self.stack.slices):
            following = number + 1
            if following < len(self.stack.slices) and following not in self._kept:
                self.checkpoint.prefetch(self.stack.slices[following].tensor)
            tensor = self._kept.get(number)
            if tensor is None:
                stored = part.view.apply(self.checkpoint.read(part.tensor))
                tensor = stored.to(self.device)
                if tensor.nbytes <= room:
                    self._kept[number] = tensor = stored.clone() if tensor is stored else tensor
                    room -= tensor.nbytes
            yield tensor
            self.on_slice()
