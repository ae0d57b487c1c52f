"""Matching: a checkpoint's config and tensor shapes to the roles that its layers hold. Reads no weights."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trawl.errors import FamilyError, ShapeError, suggestion
from trawl.families.description import ATTENTION, FC, GENERIC, ROLES, Family, Role, load_family, packaged_families
from trawl.families.expressions import evaluate
from trawl.views import View, flatten, parse

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Placement:
    """One role of one layer: the stored tensor that holds it and the view that cuts it out.

    Attributes:
        layer: 0-based; -1 outside the layers.
        role: one of ``trawl.families.ROLES`` or, outside the layers, of ``trawl.families.OUTSIDE``.
        tensor: name in the checkpoint.
        view: from the stored tensor to the slice; one object is shared by all layers.
        shape: (inner, hidden) of the slice.
    """

    layer: int
    role: str
    tensor: str
    view: View
    shape: tuple[int, int]


@dataclass(frozen=True)
class FamilyMatch:
    """What a checkpoint was recognised as.

    Attributes:
        family: name of the family file.
        assumed: what was inferred instead of read from a family file, in words; empty for a listed model type.
        layers: number of layers.
        placements: every role of every layer, by layer and then in the order of ``ROLES``.
        inner_field: the config field that holds the FC's inner width, where the family names one.
        head_fields: the config fields of query heads, key-value heads and head size, where the family names them.
        section: the nested config that holds these fields, where there is one.
        sizes: axis sizes that the family works out from the config.
        outside: token embeddings and head, by role; one and the same placement where they are tied.
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

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that the checkpoint has, in the order of ``ROLES``."""
        present = {placement.role for placement in self.placements}
        return tuple(role for role in ROLES if role in present)


def match_family(config: Mapping[str, Any], tensors: Shapes, family_file: Path | None = None) -> FamilyMatch:
    """Find the roles of a checkpoint's layers.

    A given family file is used as it is; otherwise the packaged file that lists the config's model_type; otherwise the
    layout is inferred from names and shapes, and the match says what was assumed.

    Args:
        config: the parsed config.json.
        tensors: shape of every tensor in the checkpoint, by name.
        family_file: a user's own family file.
    Returns: the match; its placements cover every layer, with no role missing from some of them.
    Raises: FamilyError: no family fits, a role's tensor is missing, or the layers do not agree with the config.
        ShapeError: a role's tensor has another shape than the config says.
    Cost: O(tensors · prefixes) string matches.
    """
    if family_file is not None:
        return _match(load_family(family_file), config, tensors)
    model_type = config.get("model_type")
    for family in packaged_families().values():
        if model_type in family.model_types:
            return _match(family, config, tensors)
    return _infer(packaged_families()[GENERIC], config, tensors)


def _match(family: Family, config: Mapping[str, Any], tensors: Shapes, assumed: tuple[str, ...] = ()) -> FamilyMatch:
    """Place every role of a family whose description is complete."""
    fields = _fields(family, config)
    sizes = _sizes(family, fields)
    count = _first(family.layers, fields)
    if count is None or count < 1:
        fields_tried = _or(family.layers)
        raise FamilyError(
            f"config.json gives {count or 'no'} layers by {fields_tried} of family {family.name}; expected 1 or more"
        )
    found = max((_found(family, prefix, tensors) for prefix in family.prefixes), key=lambda found: len(found.names))
    if not found.names:
        example = _name(family, found.prefix, 0, family.roles[0].tensors[0])
        raise FamilyError(
            f"no tensor of family {family.name} found: expected names like {example}; {describe_matrices(tensors)}; "
            "pass --family FILE.yaml to say where the roles are"
        )
    _check_layers(family, found, count)
    views = {role.name: _view(family, role, sizes) for role in family.roles}
    placements = []
    for layer in range(count):
        for role, view in views.items():
            tensor = found.names[layer, role]
            shape = _shape(family, role, tensor, view, tensors[tensor])
            placements.append(Placement(layer, role, tensor, view, shape))
    section = family.config_section if isinstance(config.get(family.config_section or ""), Mapping) else None
    return FamilyMatch(
        family.name,
        assumed,
        count,
        tuple(placements),
        family.inner_field,
        family.head_fields,
        section,
        sizes,
        _outside(family, found.prefix, fields, tensors),
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


@dataclass(frozen=True)
class _Found:
    """The role tensors under one prefix, by (layer, role)."""

    prefix: str
    names: dict[tuple[int, str], str]


def _found(family: Family, prefix: str, tensors: Iterable[str]) -> _Found:
    """Collect the tensors under a prefix that carry a role's name; a role's earlier name wins."""
    before, after = family.layer.split("{layer}")
    pattern = re.compile(re.escape(prefix + before) + r"(\d+)" + re.escape(after) + "(.+)")
    rank = {(role.name, name): i for role in family.roles for i, name in enumerate(role.tensors)}
    best: dict[tuple[int, str], tuple[int, str]] = {}
    for tensor in tensors:
        if not (match := pattern.fullmatch(tensor)):
            continue
        for role in family.roles:
            if (i := rank.get((role.name, match[2]))) is not None:
                key = int(match[1]), role.name
                best[key] = min(best.get(key, (i, tensor)), (i, tensor))
    return _Found(prefix, {key: tensor for key, (_, tensor) in best.items()})


def _check_layers(family: Family, found: _Found, count: int) -> None:
    """Require every role in layers 0 to count - 1, and in no other."""
    source = f"config.json says {count} layers ({_or(family.layers)})"
    last, role = max(found.names)
    if last >= count:
        raise FamilyError(f"{found.names[last, role]} is in layer {last} (counted from 0), but {source}")
    for layer in range(count):
        for each in family.roles:
            if (layer, each.name) not in found.names:
                names = [_name(family, found.prefix, layer, name) for name in each.tensors]
                have = sorted({layer for layer, role in found.names if role == each.name})
                raise FamilyError(
                    f"{_or(names)} is missing: {source}, and family {family.name} has role {each.name} in each; "
                    f"found it in {len(have)} layers{f', the last being {have[-1]}' if have else ''}. "
                    "Complete the checkpoint, or pass --family FILE.yaml"
                )


def _name(family: Family, prefix: str, layer: int, tensor: str) -> str:
    """Return a tensor's full name."""
    return prefix + family.layer.replace("{layer}", str(layer)) + tensor


def _shape(family: Family, role: str, tensor: str, view: View, shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the slice's shape; an error names the tensor."""
    try:
        return view.shape(shape)
    except ShapeError as e:
        raise ShapeError(
            f"{tensor} (role {role} of family {family.name}): {e}, from config.json. "
            "Weights and config.json do not belong together, or the layout is another: pass --family FILE.yaml"
        ) from e


def _view(family: Family, role: Role, sizes: Mapping[str, int]) -> View:
    """Build the view of a role, with the sizes of its own axes."""
    axes = flatten(parse(role.stored))
    take = []
    for axis, *bounds in role.take:
        start, stop = (evaluate(bound, sizes) for bound in bounds)
        if start is None or stop is None:
            raise FamilyError(f"family {family.name}: take of role {role.name} uses a name not under sizes: {bounds}")
        take.append((axis, start, stop))
    known = tuple((axis, sizes[axis]) for axis in axes if axis in sizes)
    try:
        return View(role.stored, role.canonical, known, tuple(take))
    except ShapeError as e:
        raise FamilyError(f"family {family.name}, role {role.name}: {e}; check the sizes and take in its file") from e


def _fields(family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config's fields, those of the family's nested section first."""
    section = config.get(family.config_section) if family.config_section else None
    return {**config, **section} if isinstance(section, Mapping) else dict(config)


def _sizes(family: Family, fields: Mapping[str, Any]) -> dict[str, int]:
    """Evaluate a family's sizes in order; later ones may use earlier ones."""
    sizes: dict[str, int] = {}
    for axis, expressions in family.sizes:
        value = _first(expressions, {**fields, **sizes})
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


def _first(expressions: Iterable[str], names: Mapping[str, Any]) -> int | None:
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


SAME_WIDTH = (("q", "o"), ("k", "v"), ("up", "down"), ("gate", "up"))


def _infer(generic: Family, config: Mapping[str, Any], tensors: Shapes) -> FamilyMatch:
    """Match an unlisted model type whose tensors are named and shaped like those of llama."""
    model_type, fields = config.get("model_type"), _fields(generic, config)
    listed = [name for family in packaged_families().values() for name in family.model_types]
    unknown = f"model_type {model_type!r} is not listed"
    near = suggestion(str(model_type), listed)
    fix = f"{describe_matrices(tensors)}; pass --family FILE.yaml to say where the roles are{near}"
    hidden = _first(dict(generic.sizes)["hidden"], fields)
    if hidden is None:
        raise FamilyError(f"{unknown}, and config.json has no {_or(dict(generic.sizes)['hidden'])} to go by; {fix}")
    prefix, found = _best_prefix(generic, tensors, hidden)
    roles = _complete_roles(found)
    if not roles:
        raise FamilyError(
            f"{unknown}, and no layer has weights named like q_proj k_proj v_proj o_proj or up_proj down_proj "
            f"with an axis of hidden size {hidden}; {fix}"
        )
    assumed = _assumptions(unknown, found, roles, hidden)
    kept = tuple(role for role in generic.roles if role.name in roles)
    family = replace(generic, prefixes=(prefix,), roles=kept)
    try:
        match = _match(family, config, tensors, assumed)
    except (FamilyError, ShapeError) as e:
        raise FamilyError(f"{unknown}, and read as llama-like it does not fit: {e}") from e
    _check_widths(match, f"{unknown}, and read as llama-like it does not fit", fix)
    return match


def _best_prefix(generic: Family, tensors: Shapes, hidden: int) -> tuple[str, dict[tuple[int, str], str]]:
    """Return the layer prefix with most role tensors that fit the hidden size, and those tensors."""
    known = {tensor for role in generic.roles for tensor in role.tensors}
    numbers = ((name, number) for name in tensors for number in re.finditer(r"(?<![^.])\d+\.", name))
    prefixes = {name[: number.start()] for name, number in numbers if name[number.end() :] in known}
    best: tuple[str, dict[tuple[int, str], str]] = "", {}
    for prefix in sorted(prefixes):
        fitting = {
            key: name
            for key, name in _found(generic, prefix, tensors).names.items()
            if len(tensors[name]) == 2 and tensors[name][0 if key[1] in ("o", "down") else 1] == hidden
        }
        if len(fitting) > len(best[1]):
            best = prefix, fitting
    return best


def _complete_roles(found: Mapping[tuple[int, str], str]) -> tuple[str, ...]:
    """Return the roles of the groups that are there as a whole; the gate alone may be absent."""
    present = {role for _, role in found}
    whole = [group for group in (ATTENTION, FC) if all(role in present for role in group if role != "gate")]
    return tuple(role for group in whole for role in group if role in present)


def _assumptions(
    unknown: str, found: Mapping[tuple[int, str], str], roles: tuple[str, ...], hidden: int
) -> tuple[str, ...]:
    """Say in words what an inferred match rests on."""
    examples = [next(name for (_, each), name in sorted(found.items()) if each == role) for role in roles]
    absent = [role for role in ROLES if role not in roles]
    return (
        f"{unknown}: read as llama-like from its tensors' names and shapes",
        *(f"role {role} is {name}" for role, name in zip(roles, examples, strict=True)),
        f"weights are stored (out, in) as nn.Linear does; the residual stream has hidden size {hidden}",
        *([f"roles {', '.join(absent)} were not found and pass through"] if absent else []),
    )


def _check_widths(match: FamilyMatch, what: str, fix: str) -> None:
    """Require the inferred inner widths of one layer's roles to agree."""
    placed = {(each.layer, each.role): each for each in match.placements}
    for layer in range(match.layers):
        for one, other in SAME_WIDTH:
            a, b = placed.get((layer, one)), placed.get((layer, other))
            if a and b and a.shape[0] != b.shape[0]:
                raise FamilyError(
                    f"{what}: {a.tensor} has inner width {a.shape[0]} and {b.tensor} {b.shape[0]}; expected one; {fix}"
                )
