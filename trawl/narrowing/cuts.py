"""Cuts: which stored tensors get smaller where units of a layer are left out, and along which axis. Headers only."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trawl.checkpoint import Checkpoint
from trawl.errors import PlanError
from trawl.families import ATTENTION, FC, FamilyMatch, Placement
from trawl.narrow_tensor import NarrowTensor
from trawl.stacking import READ_INNER, Stack
from trawl.views import View, flatten, parse

MULTIPLE = 64  # of widths that are given as a share; also what matrix units and quantizers like

Width = int | float | tuple[int, ...]


@dataclass(frozen=True)
class Cut:
    """One layer's FC or attention, and how many of its units stay.

    Attributes:
        stack: its slices. Rows of those that write the inner side are selected; the one that reads it is refitted.
        units: neurons, or key-value groups; every slice has as many rows for each unit, one after the other.
        keep: how many stay.
    """

    stack: Stack
    units: int
    keep: int

    @property
    def reader(self) -> Placement:
        """The slice whose input the units are: down, or o."""
        return next(part for part in self.stack.slices if part.role in READ_INNER)

    @property
    def rank(self) -> tuple[int, int, int]:
        """Shape of the stack that stays."""
        size, inner, hidden = self.stack.shape
        return size, inner * self.keep // self.units, hidden

    @property
    def parameters(self) -> int:
        """Entries of the matrices that stay."""
        return math.prod(self.rank)

    @property
    def flops(self) -> int:
        """Floating-point operations of choosing units and refitting, an estimate."""
        (inner, hidden), kept = self.reader.shape, self.reader.shape[0] * self.keep // self.units
        return 3 * inner**3 + 2 * (inner - kept) * inner * (inner + 2 * hidden) + kept**2 * (kept + 2 * hidden)

    @property
    def working_set(self) -> int:
        """Peak bytes of choosing units: the second moment, its inverse and a copy, the matrix and its targets."""
        inner, hidden = self.reader.shape
        return 8 * (4 * inner**2 + 5 * inner * hidden)

    def rows(self, part: Placement, kept: Tensor) -> Tensor:
        """Return the rows of a slice that belong to some units, ascending."""
        width = part.shape[0] // self.units
        return (kept[:, None] * width + torch.arange(width)).flatten()


@dataclass(frozen=True)
class Narrowed:
    """What narrowing does to a checkpoint.

    Attributes:
        cuts: by layer.
        shapes: the new shape of every stored tensor that changes, biases among them.
        config: the new config.json.
        narrow: tensors that are shorter than the config says, where widths are unequal.
    """

    cuts: tuple[Cut, ...]
    shapes: Mapping[str, tuple[int, ...]]
    config: Mapping[str, Any]
    narrow: tuple[NarrowTensor, ...] = ()


def narrow(
    checkpoint: Checkpoint,
    match: FamilyMatch,
    layers: Sequence[int],
    *,
    width: Width | None = None,
    kv_heads: int | None = None,
    plain: bool = True,
) -> Narrowed:
    """Work out what stays of which tensor.

    Args:
        checkpoint: the source.
        match: its family.
        layers: those that are narrowed.
        width: inner width of the FCs to keep: a number of neurons, a share that is rounded to a multiple of
            ``MULTIPLE``, or a number for each layer.
        kv_heads: key-value heads to keep, with their query heads.
        plain: whether only an ordinary checkpoint will do, of the same width in all layers.
    Returns: cuts, shapes and config.
    Raises: PlanError: nothing is narrowed, a size is out of range, or the config has no place for it.
    """
    if width is None and kv_heads is None:
        raise PlanError("narrow needs a width; pass --width 0.75, --width 1152, or --kv-heads N for attention")
    cuts: list[Cut] = []
    fields: dict[str, int] = {}
    if width is not None:
        widths = fc_widths(match, layers, width)
        cuts += [_fc_cut(match, layer, keep) for layer, keep in widths.items()]
        fields |= _width_field(match, widths, plain=plain)
    widest = next(iter(fields.values()), max((cut.units for cut in cuts), default=0))
    fcs = tuple(cuts)
    if kv_heads is not None:
        fields |= _head_fields(match, kv_heads)
        if len(layers) < match.layers:
            raise PlanError(
                f"key-value heads are the same in all layers, and layers select {len(layers)} of {match.layers}; leave "
                "--layers out"
            )
        cuts += [_attention_cut(checkpoint, match, layer, kv_heads) for layer in layers]
    shapes = _shapes(checkpoint, cuts)
    narrow_tensors = _narrow_tensors(checkpoint, fcs, shapes, widest)
    return Narrowed(tuple(cuts), shapes, _changed(checkpoint.config, match.section, fields), narrow_tensors)


def fc_widths(match: FamilyMatch, layers: Sequence[int], width: Width) -> dict[int, int]:
    """Return the neurons to keep, by layer.

    Raises: PlanError: a width is out of range, or there is not one for each layer.
    """
    full = {part.layer: part.shape[0] for part in match.placements if part.role == "down"}
    if not full:
        raise PlanError(f"family {match.family} has no role down, whose input would be narrowed; narrow cannot cut it")
    if bare := [layer for layer in layers if layer not in full]:
        raise PlanError(
            f"layer {bare[0]} of family {match.family} has no role down, whose input would be narrowed, but experts, "
            "which narrow leaves as they are; leave that layer out of --layers"
        )
    if len(unequal := sorted(set(full.values()))) > 1:
        raise PlanError(
            f"family {match.family} has FCs of unequal width here, {unequal[0]} to {unequal[-1]}; narrow knows one. "
            "Decompose with --method svd, cp or tucker instead"
        )
    if isinstance(width, tuple):
        if len(width) != len(layers):
            raise PlanError(
                f"width has {len(width)} numbers for {len(layers)} layers; give one for each, or one for all"
            )
        wanted = dict(zip(layers, width, strict=True))
    else:
        wanted = {layer: _rounded(width, full[layer]) for layer in layers}
    for layer, keep in wanted.items():
        if not 1 <= keep <= full[layer]:
            raise PlanError(
                f"width {keep} is outside 1..{full[layer]}, the inner width of layer {layer}; give a number of units "
                "in that range, or a share between 0 and 1"
            )
    return wanted


def _rounded(width: float, full: int) -> int:
    """Return a number as it is, and a share of ``full`` rounded to a multiple, if ``full`` is one itself."""
    if isinstance(width, int):
        return width
    if not 0 < width <= 1:
        raise PlanError(f"width {width} is not between 0 and 1; give a share of the inner width {full}, or an integer")
    step = math.gcd(MULTIPLE, full)
    return max(step, round(width * full / step) * step)


def _fc_cut(match: FamilyMatch, layer: int, keep: int) -> Cut:
    """Cut one FC."""
    slices = tuple(part for part in match.placements if part.layer == layer and part.role in FC)
    return Cut(Stack(f"fc.{layer}", slices), slices[0].shape[0], keep)


def _width_field(match: FamilyMatch, widths: Mapping[int, int], *, plain: bool) -> dict[str, int]:
    """Return the config field of the inner width, that of the widest layer where they are unequal."""
    found = {widths.get(part.layer, part.shape[0]) for part in match.placements if part.role == "down"}
    if plain and len(found) > 1:
        raise PlanError(
            f"an ordinary checkpoint has one inner width, and this one would have {len(found)}, from {min(found)} to "
            f"{max(found)}; give one --width for all layers, or pass --write factored"
        )
    if match.inner_field is None and plain:
        raise PlanError(
            f"family {match.family} names no config field of the inner width (inner_field), so that no ordinary "
            "checkpoint can be narrowed; pass --write factored, or a --family FILE.yaml that names it"
        )
    return {match.inner_field: max(found)} if match.inner_field else {}


def _narrow_tensors(
    checkpoint: Checkpoint, cuts: Iterable[Cut], shapes: Mapping[str, tuple[int, ...]], widest: int
) -> tuple[NarrowTensor, ...]:
    """Describe the tensors of FCs that are narrower than the config says."""
    found: dict[str, NarrowTensor] = {}
    for cut in cuts:
        for part in cut.stack.slices:
            axis = stored_axis(part.view)
            names = parse(part.view.stored)[axis]
            inner = parse(part.view.canonical)[0][-1]
            parts = math.prod(dict(part.view.sizes)[name] for name in names[: names.index(inner)])
            for name in (part.tensor, bias_of(checkpoint, part.tensor)):
                shape = shapes.get(name or "")
                if name and shape and cut.keep < widest:
                    at = axis if name == part.tensor else 0
                    full = (*shape[:at], parts * widest, *shape[at + 1 :])
                    found[name] = NarrowTensor(name, shape, full, parts)
    return tuple(found.values())


def _head_fields(match: FamilyMatch, kv_heads: int) -> dict[str, int]:
    """Return the config fields of fewer key-value heads, where there are such fields."""
    if not match.head_fields:
        raise PlanError(
            f"family {match.family} derives the size of a head from their number, so that its config cannot hold fewer "
            "heads of the same size, on which positions depend; leave --kv-heads out and narrow the FC by --width"
        )
    found = match.sizes
    heads, full, head_dim = found["heads"], found["kv_heads"], found["head_dim"]
    if not 1 <= kv_heads <= full:
        raise PlanError(f"kv-heads {kv_heads} is outside 1..{full}, the key-value heads of the model")
    kept = heads // full * kv_heads
    if found["hidden"] % kept:
        fitting = [n for n in range(1, full + 1) if found["hidden"] % (heads // full * n) == 0]
        raise PlanError(
            f"kv-heads {kv_heads} leaves {kept} query heads, which do not divide the hidden size {found['hidden']} as "
            f"transformers requires; give one of {', '.join(map(str, fitting))}"
        )
    return dict(zip(match.head_fields, (kept, kv_heads, head_dim), strict=True))


def _attention_cut(checkpoint: Checkpoint, match: FamilyMatch, layer: int, keep: int) -> Cut:
    """Cut one layer's attention."""
    slices = tuple(part for part in match.placements if part.layer == layer and part.role in ATTENTION)
    names = {part.tensor for part in slices}
    biases = {bias_of(checkpoint, tensor) for tensor in names}
    owner = slices[0].tensor.rpartition(".")[0].rpartition(".")[0] + "."
    wide = {part.shape[0] for part in slices}
    for info in checkpoint.tensors.values():
        if info.name.startswith(owner) and info.name not in names | biases and wide & set(info.shape):
            raise PlanError(
                f"{info.name} {info.shape} runs over all heads of layer {layer}, so that leaving some out changes the "
                "others; leave --kv-heads out"
            )
    return Cut(Stack(f"attn.{layer}", slices, joined=True), match.sizes["kv_heads"], keep)


def bias_of(checkpoint: Checkpoint, tensor: str) -> str | None:
    """Return the bias that stands beside a weight, if there is one."""
    name = tensor.removesuffix("weight") + "bias"
    return name if name in checkpoint.tensors else None


def stored_axis(view: View) -> int:
    """Return the stored axis that the inner side lies on."""
    inner = set(parse(view.canonical)[0])
    (axis,) = (number for number, group in enumerate(parse(view.stored)) if inner & set(group))
    return axis


def positions(view: View, stored_shape: Sequence[int]) -> Tensor:
    """Return where each row of a slice lies on its stored axis, (inner,)."""
    axis, length = stored_axis(view), stored_shape[stored_axis(view)]
    shape = [length if number == axis else 1 for number in range(len(stored_shape))]
    inner = flatten((parse(view.stored)[axis],))
    line = replace(view, sizes=tuple(size for size in view.sizes if size[0] in inner))
    return line.apply(torch.arange(length).reshape(shape))[:, 0]


def kept_positions(parts: Iterable[tuple[Cut, Placement, Tensor]], stored_shape: Sequence[int]) -> Tensor:
    """Return what stays on a stored axis: the rows of the kept units of these slices, and all that is in none.

    Args:
        parts: slices of one stored tensor, each with its cut and the units that are kept.
        stored_shape: of that tensor.
    Returns: ascending positions.
    """
    parts = list(parts)
    stays = torch.ones(stored_shape[stored_axis(parts[0][1].view)], dtype=torch.bool)
    for cut, part, kept in parts:
        where = positions(part.view, stored_shape)
        stays[where] = False
        stays[where[cut.rows(part, kept)]] = True
    return stays.nonzero()[:, 0]


def _shapes(checkpoint: Checkpoint, cuts: Iterable[Cut]) -> dict[str, tuple[int, ...]]:
    """Return the new shape of every stored tensor that changes."""
    shapes: dict[str, tuple[int, ...]] = {}
    for cut in cuts:
        for part in cut.stack.slices:
            axis = stored_axis(part.view)
            lost = part.shape[0] * (cut.units - cut.keep) // cut.units
            changed = {part.tensor: axis}
            if part.role not in READ_INNER and (bias := bias_of(checkpoint, part.tensor)):
                changed[bias] = 0
            for name, at in changed.items():
                shape = list(shapes.get(name, checkpoint.tensors[name].shape))
                shape[at] -= lost
                shapes[name] = tuple(shape)
    return shapes


def _changed(config: Mapping[str, Any], section: str | None, fields: Mapping[str, int]) -> dict[str, Any]:
    """Return a config with some fields replaced, where they stand."""
    if section is None:
        return {**config, **fields}
    return {**config, section: {**config[section], **fields}}
