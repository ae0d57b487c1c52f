"""Family: what one YAML file says about where the roles of a model family are stored.

    model_types: [llama]                  # config.json's model_type values that this file serves
    config_section: text_config           # optional: a nested config whose fields come before the outer ones
    prefixes: ["model.", ""]              # tried in turn in front of `layer`; the one with most tensors wins
    layer: "layers.{layer}."              # path of one layer
    layers: num_hidden_layers             # number of layers: an expression, or a list of which the first known counts
    spare: num_nextn_predict_layers       # optional: number of layers behind those, which pass through
    experts: num_local_experts            # number of experts, likewise, and the size of an axis of that name
    inner_field: intermediate_size        # optional: the config field that holds the FC's inner width
    head_fields: [num_attention_heads, num_key_value_heads, head_dim]  # optional, where all three are in the config
    sizes:                                # axis sizes, in order: expressions over config fields and earlier sizes
      hidden: hidden_size
      head_dim: [head_dim, hidden // num_attention_heads]
    roles:
      k: {tensor: self_attn.qkv.weight, view: (heads part head_dim) hidden, take: {part: 1}}
      o: {tensor: self_attn.o_proj.weight, view: hidden width -> width hidden}
      up: {tensor: mlp.up_proj.weight, view: inner hidden, unless: router.weight}  # only in layers without a router
      gate: {tensor: mlp.wi_0.weight, view: inner hidden, optional: true}      # all layers have it, or none
      expert_up:                          # a list: ways of storing it, of which the first one present counts
        - {tensor: "experts.{expert}.w3.weight", view: inner hidden}
        - {tensor: experts.gate_up_proj, view: experts (part inner) hidden -> (experts part inner) hidden,
           take: {experts: expert, part: 1}}
    outside:                              # optional: matrices outside the layers, stored (vocabulary, hidden)
      embed: embed_tokens.weight          # after the prefix, or after the first parts of it
      lm_head: lm_head.weight             # where it is absent, the head is tied to the embeddings

``view`` is ``stored -> canonical`` (no arrow: the same), and the canonical side ends in the axis ``hidden``; that of a
role in ``BETWEEN``, in the axis that its module reads. Axes that ``sizes`` does not name are taken from the tensor.
``take`` cuts an axis to one index or to ``[start, stop]``. ``tensor`` may be a list of names of which the first one
present counts. A role of the kind ``experts`` is placed for every expert, whose number is ``expert`` in ``take`` and in
names. Any expression may stand in braces in a name or a path: ``groups.{layer // 2}.layers.{layer % 2}.``.

Layers that do not follow one another, such as an encoder's and a decoder's, stand in towers of their own:

    model_types: [bart]
    layers: num_hidden_layers
    sizes: {hidden: d_model}
    towers:
      encoder: {layer: "encoder.layers.{layer}.", layers: encoder_layers, sizes: {inner: encoder_ffn_dim}}
      decoder: {layer: "decoder.layers.{layer}.", roles: {cross_q: ...}}

What stands beside ``towers`` holds for each tower that does not say otherwise, ``sizes`` and ``roles`` name by name; a
tower that lists ``kinds`` takes roles of these only, such as ``kinds: [cross]``.
Layers are numbered through all towers in their order. A tower of which the checkpoint has no tensor is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from trawl.errors import FamilyError, ShapeError, shown, suggestion
from trawl.families.expressions import check
from trawl.untrusted import LARGEST_YAML, parse_yaml
from trawl.views import View, parse

KINDS = {
    "attn": ("q", "k", "v", "o", "q_a", "q_b", "kv_a", "kv_b", "pos_q", "pos_k"),
    "cross": ("cross_q", "cross_k", "cross_v", "cross_o"),
    "ssm": ("ssm_in", "ssm_gate", "ssm_x", "ssm_dt", "ssm_out"),
    "fc": ("gate", "up", "down"),
    "experts": ("expert_gate", "expert_up", "expert_down"),
}
"""Roles by kind; matrices of different kinds never share a stack.

Attention on the layer's own input, its low-rank projections (deepseek's a and b) and those of relative positions;
attention on another tower's output; a state-space mixer; the FC that every token passes; routed experts.
"""
KIND_OF = {role: kind for kind, roles in KINDS.items() for role in roles}
ROLES = tuple(KIND_OF)
ATTENTION, FC, EXPERTS = KINDS["attn"], KINDS["fc"], KINDS["experts"]
BETWEEN = ("q_b", "kv_b", "ssm_x", "ssm_dt")  # neither read nor write the residual stream
OUTSIDE = ("embed", "lm_head")
GENERIC = "generic"
MOST_ITEMS = 100  # of alternatives; a name or an expression is tried for each layer


@dataclass(frozen=True)
class Storage:
    """One way in which a role is stored.

    Attributes:
        tensors: names after the layer's path, of which the first one present counts.
        stored, canonical: einops patterns, see :class:`trawl.views.View`.
        take: (axis, start, stop) as expressions over the tower's sizes and ``expert``.
    """

    tensors: tuple[str, ...]
    stored: str
    canonical: str
    take: tuple[tuple[str, str, str], ...] = ()


@dataclass(frozen=True)
class Role:
    """Where one role of every layer is stored.

    Attributes:
        name: one of ``ROLES``.
        ways: of storing it, of which the first one present counts.
        optional: whether the model may do without it, in all its layers.
        unless: name after the layer's path of a tensor beside which a layer may do without it; empty for none.
    """

    name: str
    ways: tuple[Storage, ...]
    optional: bool = False
    unless: str = ""

    @property
    def tensors(self) -> tuple[str, ...]:
        """All names that it may be stored under."""
        return tuple(name for way in self.ways for name in way.tensors)


@dataclass(frozen=True)
class Tower:
    """Layers that follow one another; the module's docstring explains each key."""

    name: str  # empty where it is the only one
    config_section: str | None
    prefixes: tuple[str, ...]
    layer: str
    layers: tuple[str, ...]
    spare: tuple[str, ...]
    experts: tuple[str, ...]
    inner_field: str | None
    head_fields: tuple[str, ...]
    sizes: tuple[tuple[str, tuple[str, ...]], ...]
    roles: tuple[Role, ...]


@dataclass(frozen=True)
class Family:
    """One family file, validated; the module's docstring explains each key."""

    name: str
    model_types: tuple[str, ...]
    towers: tuple[Tower, ...]
    outside: tuple[tuple[str, tuple[str, ...]], ...]


TOWER_KEYS = (
    "config_section",
    "prefixes",
    "layer",
    "layers",
    "spare",
    "experts",
    "inner_field",
    "head_fields",
    "sizes",
    "kinds",
    "roles",
)
KEYS = ("model_types", *TOWER_KEYS, "towers", "outside")
WAY_KEYS = ("tensor", "view", "take")
ROLE_KEYS = (*WAY_KEYS, "optional", "unless")


def load_family(path: Path) -> Family:
    """Read a family file.

    Args:
        path: a YAML file as the module's docstring describes; its stem names the family.
    Returns: the validated family.
    Raises: FamilyError: the file is unreadable, or a key in it is unknown, missing or malformed.
    """
    try:
        with path.open("rb") as file:
            text = file.read(LARGEST_YAML + 1).decode("utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise FamilyError(f"family file {path} is not readable: {e}") from e
    return parse_family(text, path.stem, str(path))


@cache
def packaged_families() -> dict[str, Family]:
    """Return the families that come with the package, by name, the generic one among them."""
    files = sorted(resources.files(__package__).iterdir(), key=lambda file: file.name)
    named = [(file.name.removesuffix(".yaml"), file) for file in files if file.name.endswith(".yaml")]
    return {name: parse_family(file.read_text(encoding="utf-8"), name, file.name) for name, file in named}


def parse_family(text: str, name: str, source: str) -> Family:
    """Parse and validate the text of a family file; ``source`` names it in errors."""
    try:
        data = parse_yaml(text)
    except ValueError as e:
        raise FamilyError(f"family file {source} is not YAML: {e}") from e
    _known_keys(data, KEYS, source)
    outside = data.get("outside") or {}
    _known_keys(outside, OUTSIDE, f"{source}: outside")
    shared = {key: data[key] for key in TOWER_KEYS if key in data}
    own = data.get("towers", {"": {}})
    _known_keys(own, None, f"{source}: towers")
    if not 0 < len(own) <= MOST_ITEMS:
        raise FamilyError(f"{source}: towers has {len(own)} entries; name 1 to {MOST_ITEMS}, or leave it out")
    where = {tower: f"{source}: towers.{tower}" if tower else source for tower in own}
    return Family(
        name=name,
        model_types=_texts(data.get("model_types", []), f"{source}: model_types"),
        towers=tuple(_tower(tower, _laid_over(shared, own[tower], where[tower]), where[tower]) for tower in own),
        outside=tuple(
            (role, _texts(outside[role], f"{source}: outside.{role}")) for role in OUTSIDE if role in outside
        ),
    )


def _laid_over(shared: Mapping[str, Any], own: Any, where: str) -> dict[str, Any]:
    """Return a tower's keys over those of all towers; sizes and roles are laid over name by name."""
    _known_keys(own, TOWER_KEYS, where)
    data = {**shared, **own}
    for key in ("sizes", "roles"):
        for values in (shared.get(key) or {}, own.get(key) or {}):
            _known_keys(values, ROLES if key == "roles" else None, f"{where}: {key}")
        data[key] = {**(shared.get(key) or {}), **(own.get(key) or {})}
    return data


def _tower(name: str, data: Mapping[str, Any], where: str) -> Tower:
    """Validate one tower's keys."""
    layer = _text(data.get("layer"), f"{where}: layer")
    if not re.search(r"\{[^{}]*\blayer\b[^{}]*\}", layer):
        raise FamilyError(f"{where}: layer is {layer!r}; expected a path with {{layer}}, as 'layers.{{layer}}.'")
    kinds = _texts(data.get("kinds", list(KINDS)), f"{where}: kinds")
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise FamilyError(f"{where}: kinds has {shown(unknown[0])}; expected some of {', '.join(KINDS)}")
    sizes, roles = data["sizes"], {role: way for role, way in data["roles"].items() if KIND_OF[role] in kinds}
    if not roles:
        raise FamilyError(f"{where}: roles is empty; expected some of {', '.join(ROLES)}")
    section, inner_field = data.get("config_section"), data.get("inner_field")
    spare, experts = data.get("spare"), data.get("experts")
    if experts is None and any(role in EXPERTS for role in roles):
        raise FamilyError(f"{where}: roles has experts; expected their number under experts")
    return Tower(
        name=name,
        config_section=None if section is None else _text(section, f"{where}: config_section"),
        prefixes=_texts(data.get("prefixes", ""), f"{where}: prefixes") or ("",),
        layer=_path(layer, f"{where}: layer"),
        layers=_expressions(data.get("layers"), f"{where}: layers"),
        spare=() if spare is None else _expressions(spare, f"{where}: spare"),
        experts=() if experts is None else _expressions(experts, f"{where}: experts"),
        inner_field=None if inner_field is None else _text(inner_field, f"{where}: inner_field"),
        head_fields=_head_fields(data.get("head_fields", []), where),
        sizes=tuple((axis, _expressions(size, f"{where}: sizes.{axis}")) for axis, size in sizes.items()),
        roles=tuple(_role(role, roles[role], f"{where}: roles.{role}") for role in ROLES if role in roles),
    )


def _head_fields(data: Any, source: str) -> tuple[str, ...]:
    """Return the fields of query heads, key-value heads and head size, or none of them."""
    fields = _texts(data, f"{source}: head_fields")
    if len(fields) not in (0, 3):
        raise FamilyError(
            f"{source}: head_fields is {shown(data)}; expected the fields of heads, key-value heads, head size"
        )
    return fields


def _role(name: str, data: Any, where: str) -> Role:
    """Validate one entry of ``roles``: a mapping, or a list of them, the first of which holds for all of the role."""
    ways = data if isinstance(data, list) else [data]
    if not ways:
        raise FamilyError(f"{where} is empty; expected one way of storing it or several")
    for number, way in enumerate(ways):
        _known_keys(way, WAY_KEYS if number else ROLE_KEYS, where)
    optional, unless = ways[0].get("optional", False), ways[0].get("unless", "")
    if not isinstance(optional, bool):
        raise FamilyError(f"{where}.optional is {optional!r}; expected true or false")
    if not isinstance(unless, str):
        raise FamilyError(f"{where}.unless is {shown(unless)}; expected the name of a tensor")
    return Role(name, tuple(_way(name, way, where) for way in ways), optional, _path(unless, f"{where}.unless"))


def _way(role: str, data: Mapping[str, Any], where: str) -> Storage:
    """Validate one way of storing a role."""
    tensors = _texts(data.get("tensor"), f"{where}.tensor")
    if not tensors:
        raise FamilyError(f"{where}.tensor is empty; expected a name after the layer's path")
    stored, arrow, canonical = _text(data.get("view"), f"{where}.view").partition("->")
    stored = " ".join(stored.split())
    canonical = " ".join(canonical.split()) if arrow else stored
    take = data.get("take") or {}
    _known_keys(take, None, f"{where}.take")
    try:
        View(stored, canonical)
        axes = parse(stored), parse(canonical)
    except ShapeError as e:
        raise FamilyError(f"{where}.view: {e}") from e
    if axes[1][-1] != ("hidden",) and role not in BETWEEN:
        raise FamilyError(f"{where}.view ends in {canonical!r}; the last canonical axis is called hidden")
    if unknown := [axis for axis in take if all(axis not in group for group in axes[0])]:
        raise FamilyError(f"{where}.take has no axis {unknown[0]!r} in view {stored!r}")
    return Storage(
        tensors=tuple(_path(tensor, f"{where}.tensor") for tensor in tensors),
        stored=stored,
        canonical=canonical,
        take=tuple((axis, *_range(cut, f"{where}.take.{axis}")) for axis, cut in take.items()),
    )


def _path(text: str, where: str) -> str:
    """Return a name after checking the expressions in its braces."""
    for expression in re.findall(r"\{([^{}]*)\}", text):
        _expressions(expression, where)
    return text


def _range(data: Any, where: str) -> tuple[str, str]:
    """Return (start, stop) expressions of a ``take`` entry: one index, or a pair."""
    bounds = _expressions(data, where)
    if isinstance(data, list) and len(bounds) != 2:
        raise FamilyError(f"{where} is {shown(data)}; expected an index or [start, stop]")
    return (bounds[0], bounds[1]) if isinstance(data, list) else (bounds[0], f"({bounds[0]}) + 1")


def _expressions(data: Any, where: str) -> tuple[str, ...]:
    """Return one expression or a list of them as checked strings."""
    items = data if isinstance(data, list) else [data]
    if not 0 < len(items) <= MOST_ITEMS or not all(
        isinstance(item, str | int) and not isinstance(item, bool) for item in items
    ):
        raise FamilyError(f"{where} is {shown(data)}; expected an integer, an expression, or a list of them")
    for item in items:
        try:
            check(str(item))
        except FamilyError as e:
            raise FamilyError(f"{where}: {e}") from e
    return tuple(str(item) for item in items)


def _known_keys(data: Any, known: Iterable[str] | None, where: str) -> None:
    """Refuse anything but a mapping from strings, and unknown keys in it."""
    if not isinstance(data, Mapping) or not all(isinstance(key, str) for key in data):
        raise FamilyError(f"{where} is {shown(data)}; expected a mapping of names")
    if known is not None and (unknown := [key for key in data if key not in known]):
        raise FamilyError(f"{where}: unknown key {shown(unknown[0])}{suggestion(unknown[0], known)}")


def _text(data: Any, where: str) -> str:
    """Return a string that must be there."""
    if not isinstance(data, str) or not data:
        raise FamilyError(f"{where} is {shown(data)}; expected a string")
    return data


def _texts(data: Any, where: str) -> tuple[str, ...]:
    """Return one string or a list of strings."""
    items = data if isinstance(data, list) else [data]
    if len(items) > MOST_ITEMS or not all(isinstance(item, str) for item in items):
        raise FamilyError(f"{where} is {shown(data)}; expected a string or a list of strings")
    return tuple(items)
