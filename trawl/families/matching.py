"""Matching: a checkpoint's config and tensor shapes to the roles that its layers hold. Reads no weights."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any

from trawl.errors import FamilyError, ShapeError
from trawl.families.description import EXPERTS, ROLES, Family, Role, Storage, Tower
from trawl.families.expressions import evaluate
from trawl.views import View, flatten, parse

Shapes = Mapping[str, tuple[int, ...]]

MOST_LAYERS = 10_000  # a config may say anything
MOST_PLACES = 200_000  # of roles, layers and experts; the largest model known has 70,000


@dataclass(frozen=True)
class Placement:
    """One role of one layer: the stored tensor that holds it and the view that cuts it out.

    Attributes:
        layer: 0-based, counted through all towers; -1 outside the layers.
        role: one of ``trawl.families.ROLES`` or, outside the layers, of ``trawl.families.OUTSIDE``.
        tensor: name in the checkpoint.
        view: from the stored tensor to the slice; one object is shared by all layers.
        shape: (inner, hidden) of the slice.
        tower: that the layer stands in; empty where there is one only.
        expert: 0-based; -1 for a role that every token passes.
    """

    layer: int
    role: str
    tensor: str
    view: View
    shape: tuple[int, int]
    tower: str = ""
    expert: int = -1

    @property
    def identity(self) -> list[str | int]:
        """What is cut out of which tensor, and as what, for records of what a result depends on."""
        return [self.layer, self.role, self.tensor, repr(self.view)]


@dataclass(frozen=True)
class FamilyMatch:
    """What a checkpoint was recognised as.

    Attributes:
        family: name of the family file.
        assumed: what was inferred instead of read from a family file, in words; empty for a listed model type.
        layers: number of layers, in all towers.
        placements: every role of every layer, by layer, then in the order of ``ROLES``, then by expert.
        inner_field: the config field that holds the FC's inner width, where the family names one.
        head_fields: the config fields of query heads, key-value heads and head size, where the family names them.
        section: the nested config that holds these fields, where there is one.
        sizes: axis sizes that the family works out from the config.
        outside: token embeddings and head, by role; one and the same placement where they are tied.
        towers: the layers of each tower, by its name; of several towers none has the four fields above.
    """

    family: str
    assumed: tuple[str, ...]
    layers: int
    placements: tuple[Placement, ...]
    inner_field: str | None = None
    head_fields: tuple[str, ...] = ()
    section: str | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)
    outside: Mapping[str, Placement] = field(default_factory=dict)
    towers: Mapping[str, range] = field(default_factory=dict)

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that the checkpoint has, in the order of ``ROLES``."""
        present = {placement.role for placement in self.placements}
        return tuple(role for role in ROLES if role in present)


def place_roles(
    family: Family, config: Mapping[str, Any], tensors: Shapes, assumed: tuple[str, ...] = ()
) -> FamilyMatch:
    """Place every role of a family whose description is complete.

    Args:
        family: its description.
        config: the parsed config.json.
        tensors: shape of every tensor in the checkpoint, by name.
        assumed: what the description itself rests on, in words.
    Returns: the match.
    Raises: FamilyError: a role's tensor is missing, or the layers do not agree with the config. ShapeError: a role's
        tensor has another shape than the config says.
    """
    found, expected, first = [], "", 0
    for tower in family.towers:
        fields = fields_of(tower, config)
        prefix = max(tower.prefixes, key=lambda prefix: _count(tower, prefix, fields, tensors))
        if not _count(tower, prefix, fields, tensors):
            expected = expected or _example(family, tower, prefix, fields)
            continue
        found.append(_Laid(family, tower, prefix, fields, _sizes(family, tower, fields), tensors, first))
        first += found[-1].count
    if not found:
        raise FamilyError(
            f"no tensor of family {family.name} found: expected names like {expected}; {describe_matrices(tensors)}; "
            "pass --family FILE.yaml to say where the roles are"
        )
    placements = tuple(islice((placement for laid in found for placement in laid.placements()), MOST_PLACES + 1))
    if len(placements) > MOST_PLACES:
        raise FamilyError(
            f"family {family.name} finds more than {MOST_PLACES:,} matrices by config.json's layers and experts"
        )
    towers = {laid.tower.name: range(laid.first, laid.first + laid.count) for laid in found}
    outside = _outside(family, found[0].prefix, found[0].fields, tensors)
    if len(found) > 1:
        return FamilyMatch(family.name, assumed, first, placements, outside=outside, towers=towers)
    (laid,) = found
    section = laid.tower.config_section
    return FamilyMatch(
        family.name,
        assumed,
        first,
        placements,
        laid.tower.inner_field,
        laid.tower.head_fields,
        section if isinstance(config.get(section or ""), Mapping) else None,
        laid.sizes,
        outside,
        towers,
    )


def _outside(family: Family, prefix: str, fields: Mapping[str, Any], tensors: Shapes) -> dict[str, Placement]:
    """Place the token embeddings and the head; a head that is not stored is the embeddings."""
    parts = prefix.split(".")[:-1]
    prefixes = ["".join(f"{part}." for part in parts[:count]) for count in range(len(parts), -1, -1)]
    found: dict[str, Placement] = {}
    for role, names in family.outside:
        stored = (start + name for name in names for start in prefixes if len(tensors.get(start + name, ())) == 2)
        if tensor := next(stored, None):
            rows, width = tensors[tensor]
            found[role] = Placement(-1, role, tensor, View("inner hidden"), (rows, width))
    if "embed" in found and "lm_head" not in found and fields.get("tie_word_embeddings", True):
        found["lm_head"] = found["embed"]
    return found


def _names(tower: Tower, prefix: str, role: Role, names: Mapping[str, Any]) -> Iterator[tuple[Storage, str]]:
    """Yield every full name that a role may be stored under, with the way of storing it, the first choice first."""
    layer = prefix + _fill(tower.layer, names)
    for way in role.ways:
        for tensor in way.tensors:
            yield way, layer + _fill(tensor, names)


def _fill(text: str, names: Mapping[str, Any]) -> str:
    """Put the values of expressions in braces in their place."""
    if "{" not in text:
        return text
    return re.sub(r"\{([^{}]*)\}", lambda match: str(evaluate(match[1], names)), text)


def _count(tower: Tower, prefix: str, fields: Mapping[str, Any], tensors: Shapes) -> int:
    """Return how many roles stand under a prefix, of the first expert; layers beyond the first gap are not counted."""
    total, layer = 0, 0
    while layer < MOST_LAYERS and (
        here := sum(
            any(name in tensors for _, name in _names(tower, prefix, role, {**fields, "layer": layer, "expert": 0}))
            for role in tower.roles
        )
    ):
        total, layer = total + here, layer + 1
    return total


def _example(family: Family, tower: Tower, prefix: str, fields: Mapping[str, Any]) -> str:
    """Return the name that a tower's first role would have."""
    _layer_count(family, tower, fields)
    names = _names(tower, prefix, tower.roles[0], {**fields, "layer": 0, "expert": 0})
    return next(name for _, name in names)


def _layer_count(family: Family, tower: Tower, fields: Mapping[str, Any]) -> int:
    """Return how many layers the config says a tower has."""
    count = first_known(tower.layers, fields)
    if count is None or not 1 <= count <= MOST_LAYERS:
        raise FamilyError(
            f"config.json gives {count or 'no'} layers by {_or(tower.layers)} of family {family.name}; "
            f"expected 1 to {MOST_LAYERS:,}"
        )
    return count


@dataclass(eq=False)
class _Laid:
    """One tower laid over a checkpoint's tensors; its layers are counted from ``first``."""

    family: Family
    tower: Tower
    prefix: str
    fields: Mapping[str, Any]
    sizes: dict[str, int]
    tensors: Shapes
    first: int
    views: dict[tuple[str, Storage, int], View] = field(default_factory=dict)

    @cached_property
    def count(self) -> int:
        """Number of layers."""
        return _layer_count(self.family, self.tower, self.fields)

    def placements(self) -> Iterator[Placement]:
        """Yield every role of every layer, after checking that none is missing or left over."""
        self._check_end()
        absent = {role.name for role in self.tower.roles if role.optional and not self._anywhere(role)}
        for layer in range(self.count):
            for role in self.tower.roles:
                stored = None if role.name in absent else self._find(role, layer, 0)
                if stored is None:
                    self._check_absent(role, layer, absent)
                    continue
                yield self._place(role, layer, stored, -1 if role.name not in EXPERTS else 0)
                if role.name in EXPERTS:
                    yield from self._other_experts(role, layer, stored)

    def _other_experts(self, role: Role, layer: int, first: tuple[Storage, str]) -> Iterator[Placement]:
        """Yield a role of a layer for every expert but the first."""
        experts = self.sizes["experts"]
        for expert in range(1, experts):
            stored = self._find(role, layer, expert)
            if stored is None or stored[0] != first[0]:
                raise self._missing(role, layer, expert)
            yield self._place(role, layer, stored, expert)
        last = self._find(role, layer, experts)
        if last is not None and last[1] != first[1]:
            raise FamilyError(
                f"{last[1]} is expert {experts} (counted from 0), but config.json says {experts} experts "
                f"({_or(self.tower.experts)})"
            )

    def _find(self, role: Role, layer: int, expert: int) -> tuple[Storage, str] | None:
        """Return how and where a role of a layer is stored; None where it is not."""
        names = {**self.fields, **self.sizes, "layer": layer, "expert": expert}
        return next((found for found in _names(self.tower, self.prefix, role, names) if found[1] in self.tensors), None)

    def _anywhere(self, role: Role) -> bool:
        """Whether a role is stored in any layer that the checkpoint can have."""
        return any(self._find(role, layer, 0) for layer in range(min(self.count, len(self.tensors))))

    def _check_end(self) -> None:
        """Require that no role is stored in a layer behind the last."""
        end = self.count + (first_known(self.tower.spare, self.fields) or 0)
        for role in self.tower.roles:
            if stored := self._find(role, end, 0):
                raise FamilyError(f"{stored[1]} is in layer {end} (counted from 0), but {self._source}")

    def _check_absent(self, role: Role, layer: int, absent: Iterable[str]) -> None:
        """Require that a layer may lack a role."""
        if role.name in absent:
            return
        names = {**self.fields, **self.sizes, "layer": layer}
        if not role.unless or self.prefix + _fill(self.tower.layer + role.unless, names) not in self.tensors:
            raise self._missing(role, layer, 0)

    @property
    def _source(self) -> str:
        """Say how many layers there are, and where that stands."""
        return f"config.json says {self.count} layers ({_or(self.tower.layers)})"

    def _missing(self, role: Role, layer: int, expert: int) -> FamilyError:
        """Describe a tensor that is not there."""
        names = {**self.fields, **self.sizes, "layer": layer, "expert": expert}
        wanted = [name for _, name in _names(self.tower, self.prefix, role, names)]
        have = [n for n in range(min(self.count, len(self.tensors))) if self._find(role, n, 0)]
        instead = f" without {role.unless}" if role.unless else ""
        return FamilyError(
            f"{_or(wanted)} is missing: {self._source}, and family {self.family.name} has role {role.name} in "
            f"each{instead}; found it in {len(have)} layers{f', the last being {have[-1]}' if have else ''}. "
            "Complete the checkpoint, or pass --family FILE.yaml"
        )

    def _place(self, role: Role, layer: int, stored: tuple[Storage, str], expert: int) -> Placement:
        """Return one placement; an error names the tensor."""
        way, tensor = stored
        view = self._view(role, way, expert)
        try:
            slice_shape = view.shape(self.tensors[tensor])
        except ShapeError as e:
            raise ShapeError(
                f"{tensor} (role {role.name} of family {self.family.name}): {e}, from config.json. "
                "Weights and config.json do not belong together, or the layout is another: pass --family FILE.yaml"
            ) from e
        return Placement(self.first + layer, role.name, tensor, view, slice_shape, self.tower.name, expert)

    def _view(self, role: Role, way: Storage, expert: int) -> View:
        """Return the view of a role, with the sizes of its own axes; one object for all layers."""
        key = role.name, way, expert if any("expert" in bound for _, *bounds in way.take for bound in bounds) else -1
        if key not in self.views:
            self.views[key] = self._make_view(role, way, expert)
        return self.views[key]

    def _make_view(self, role: Role, way: Storage, expert: int) -> View:
        """Build a view from its description."""
        take = []
        for axis, *bounds in way.take:
            start, stop = (evaluate(bound, {**self.sizes, "expert": expert}) for bound in bounds)
            if start is None or stop is None:
                raise FamilyError(
                    f"family {self.family.name}: take of role {role.name} uses a name not under sizes: {bounds}"
                )
            take.append((axis, start, stop))
        known = tuple((axis, self.sizes[axis]) for axis in flatten(parse(way.stored)) if axis in self.sizes)
        try:
            return View(way.stored, way.canonical, known, tuple(take))
        except ShapeError as e:
            raise FamilyError(
                f"family {self.family.name}, role {role.name}: {e}; check the sizes and take in its file"
            ) from e


def fields_of(tower: Tower, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config's fields, those of the tower's nested section first."""
    section = config.get(tower.config_section) if tower.config_section else None
    return {**config, **section} if isinstance(section, Mapping) else dict(config)


def _sizes(family: Family, tower: Tower, fields: Mapping[str, Any]) -> dict[str, int]:
    """Evaluate a tower's sizes in order; later ones may use earlier ones."""
    sizes: dict[str, int] = {}
    experts = (("experts", tower.experts),) if tower.experts else ()
    for axis, expressions in (*experts, *tower.sizes):
        value = first_known(expressions, {**fields, **sizes})
        if value is None:
            raise FamilyError(
                f"config.json has no {_or(expressions)}, which family {family.name} needs for the size of axis {axis}"
            )
        if value < 1:
            raise FamilyError(
                f"config.json gives {axis}={value} by {_or(expressions)} of family {family.name}; expected 1 or more"
            )
        sizes[axis] = value
    return sizes


def first_known(expressions: Iterable[str], names: Mapping[str, Any]) -> int | None:
    """Return the value of the first expression whose names are all known."""
    return next((value for each in expressions if (value := evaluate(each, names)) is not None), None)


def _or(words: Iterable[str]) -> str:
    """Join alternatives for a message."""
    return " or ".join(words)


def describe_matrices(tensors: Shapes, limit: int = 12) -> str:
    """List the 2-D tensors on one line, numbered layers folded to ``*``, at most ``limit`` names."""
    folded: dict[str, tuple[int, ...]] = {}
    for name, shape in tensors.items():
        if len(shape) == 2:
            folded.setdefault(re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name), shape)
    if not folded:
        return "the checkpoint has no 2-D tensors"
    shown = [f"{name} {shape}" for name, shape in sorted(folded.items())[:limit]]
    more = f", and {len(folded) - limit} more names" if len(folded) > limit else ""
    return f"2-D tensors seen: {', '.join(shown)}{more}"
