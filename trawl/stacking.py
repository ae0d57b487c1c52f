"""Stacks: which stored matrices are decomposed together, and streaming access to them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from trawl.checkpoint import FLOAT_DTYPES, Checkpoint
from trawl.errors import CheckpointError
from trawl.families import KIND_OF, Placement

LARGEST = 1e100  # magnitude of an entry whose square, and the sum of such squares, float64 holds
READ_INNER = ("o", "cross_o", "ssm_out", "down", "expert_down", "embed")  # every other role reads the hidden side
READ_ALIKE = {
    role: source
    for source, roles in {
        "attn": ("q", "k", "v", "q_a", "kv_a"),
        "cross": ("cross_k", "cross_v"),
        "ssm": ("ssm_in", "ssm_gate"),
        "fc": ("gate", "up"),
        "experts": ("expert_gate", "expert_up"),
    }.items()
    for role in roles
}
"""What a role reads, where others of its layer read the same; of experts, those of the same expert."""

Share = Literal["none", "input", "role"]


class Place(NamedTuple):
    """Where the factors of a stack hold one of its slices.

    Attributes:
        s: index in the stack mode of the factors.
        rows: of the left factor.
    """

    s: int
    rows: slice = slice(None)


def make_places(widths: Sequence[int], *, joined: bool) -> tuple[Place, ...]:
    """Return where factors hold slices of these inner widths: one after the other, or joined, one below the other."""
    if not joined:
        return tuple(Place(s) for s in range(len(widths)))
    return tuple(Place(0, slice(start, stop)) for start, stop in pairwise(accumulate(widths, initial=0)))


@dataclass(frozen=True)
class Stack:
    """Slices of one shape, decomposed together: an order-3 tensor (S, inner, hidden) that is never held whole.

    Joined slices stand one below the other in one matrix, [W_1; W_2; …], and may differ in their inner width: its
    factors have one right factor for all of them, and each has a range of rows of the left one.

    Attributes:
        name: unique within a plan, and the name of its factor file.
        slices: in the order of the stack mode, or of the rows of the joined matrix: by layer, then by role.
        joined: whether the slices are one matrix.
    """

    name: str
    slices: tuple[Placement, ...]
    joined: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """(S, inner, hidden), of a joined stack (1, Σ inner, hidden)."""
        inner, hidden = self.slices[0].shape
        if self.joined:
            return 1, sum(part.shape[0] for part in self.slices), hidden
        return len(self.slices), inner, hidden

    @property
    def places(self) -> tuple[Place, ...]:
        """Where the factors hold each slice."""
        return make_places([part.shape[0] for part in self.slices], joined=self.joined)

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
        """Layers that occur, ascending; none of a matrix outside the layers."""
        return tuple(sorted({part.layer for part in self.slices if part.layer >= 0}))

    @property
    def tensors(self) -> tuple[str, ...]:
        """Stored tensors that hold the slices; a fused tensor is named once."""
        return tuple(dict.fromkeys(part.tensor for part in self.slices))


def make_stacks(
    placements: Sequence[Placement], group_layers: int | None, *, single: bool = False, share: Share = "none"
) -> list[Stack]:
    """Group slices into stacks: by tower, by run of layers, by kind (such as attention or FC), then by shape.

    Experts stack layer by layer, whatever the runs: those of one layer are alike, and many.

    Args:
        placements: the selected slices.
        group_layers: layers in one stack; None puts all of them into one.
        single: whether every stack is one matrix (methods for one matrix).
        share: which slices are joined into that one matrix: those of a run of layers that read the same kind of input
            (q, k and v; gate and up; of one expert), or those of one role. The others, o and down among them, stay
            apart.
    Returns: stacks in order of layer; slices of unequal shape (grouped-query K and V beside Q and O) never share one.
    """
    layers = sorted({part.layer for part in placements})
    size = group_layers or max(len(layers), 1)
    stacks = []
    for first in range(0, len(layers), size):
        group = layers[first : first + size]
        members = [part for part in placements if part.layer in group]
        if single:
            stacks += _matrices_of_group(members, share)
        else:
            stacks += _stacks_of_group(members)
    return stacks


def _matrices_of_group(members: Sequence[Placement], share: Share) -> list[Stack]:
    """Split one run of layers into single and joined matrices, named by their roles."""
    joined: dict[str, list[Placement]] = {}
    for part in members:
        joined.setdefault(_sharers(part, share), []).append(part)
    return [Stack(_matrix_name(parts), tuple(parts), len(parts) > 1) for parts in joined.values()]


def _matrix_name(parts: Sequence[Placement]) -> str:
    """Name a single or joined matrix by its roles, its layers and, where there is one, its expert."""
    experts = {part.expert for part in parts}
    ending = f".{min(experts)}" if len(experts) == 1 and min(experts) >= 0 else ""
    return f"{_roles(parts)}.{format_layers({part.layer for part in parts})}{ending}"


def _sharers(part: Placement, share: Share) -> str:
    """Name the slices that share a right factor with this one."""
    if share == "none" or part.role not in READ_ALIKE:
        return f"{part.role}.{part.layer}.{part.expert}"
    if KIND_OF[part.role] == "experts":
        return f"{part.role}.{part.layer}" if share == "role" else f"experts.{part.layer}.{part.expert}"
    return f"{part.tower}.{part.role if share == 'role' else READ_ALIKE[part.role]}"


def _roles(parts: Sequence[Placement]) -> str:
    """Write roles without a gap, or with one where their names have several words, in order of first appearance."""
    roles = dict.fromkeys(part.role for part in parts)
    return ("-" if any("_" in role for role in roles) else "").join(roles)


def _stacks_of_group(members: Sequence[Placement]) -> list[Stack]:
    """Split one run of layers by tower, kind and shape; a kind with several shapes is named by its roles."""
    sets: dict[tuple[str, str, int], list[Placement]] = {}
    for part in members:
        kind = KIND_OF[part.role]
        sets.setdefault((part.tower, kind, part.layer if kind == "experts" else -1), []).append(part)
    stacks = []
    for (_, kind, _), alike in sets.items():
        for shape in dict.fromkeys(part.shape for part in alike):
            slices = tuple(part for part in alike if part.shape == shape)
            label = kind if len(slices) == len(alike) else f"{kind}-{_roles(slices)}"
            stacks.append(Stack(f"{label}.{format_layers({part.layer for part in slices})}", slices))
    return stacks


def format_layers(layers: Iterable[int]) -> str:
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
    Raises: CheckpointError: the tensor is not of a float dtype that can be decomposed, or holds NaN, Inf,
        or what only float64 can.
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
    if largest > LARGEST:
        raise CheckpointError(
            f"{where} holds an entry of {largest:.0e}, whose square overflows; expected up to {LARGEST:.0e}. "
            "Repair the checkpoint"
        )
    return largest


@dataclass(frozen=True, eq=False)
class StoredSlices:
    """The slices of a stack, streamed from its checkpoint (a :class:`trawl.decompose.SliceSource`).

    Slices are memory-mapped in their stored dtype, so that a pass adds nothing to the process's own memory; while one
    is computed on, the kernel is already reading the next. Joined slices are copied into one matrix, which is kept.

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
        if self.stack.joined:
            yield self._joined()
            self.on_slice()
            return
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

    def _joined(self) -> Tensor:
        """Return the one matrix of a joined stack, (Σ inner, hidden)."""
        if 0 not in self._kept:
            parts = [part.view.apply(self.checkpoint.read(part.tensor)) for part in self.stack.slices]
            self._kept[0] = torch.cat(parts).to(self.device)
        return self._kept[0]
