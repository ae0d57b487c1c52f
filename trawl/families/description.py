"""Family: what one YAML file says about where the roles of a model family are stored.

    model_types: [llama]                  # config.json's model_type values that this file serves
    config_section: text_config           # optional: a nested config whose fields come before the outer ones
    prefixes: ["model.", ""]              # tried in turn in front of `layer`; the one with most tensors wins
    layer: "layers.{layer}."              # path of one layer
    layers: num_hidden_layers             # number of layers: an expression, or a list of which the first known counts
    inner_field: intermediate_size        # optional: the config field that holds the FC's inner width
    head_fields: [num_attention_heads, num_key_value_heads, head_dim]  # optional, where all three are in the config
    sizes:                                # axis sizes, in order: expressions over config fields and earlier sizes
      hidden: hidden_size
      head_dim: [head_dim, hidden // num_attention_heads]
    roles:
      k: {tensor: self_attn.qkv.weight, view: (heads part head_dim) hidden, take: {part: 1}}
      o: {tensor: self_attn.o_proj.weight, view: hidden width -> width hidden}
    outside:                              # optional: matrices outside the layers, stored (vocabulary, hidden)
      embed: embed_tokens.weight          # after the prefix, or after the first parts of it
      lm_head: lm_head.weight             # where it is absent, the head is tied to the embeddings

``view`` is ``stored -> canonical`` (no arrow: the same), and the canonical side ends in the axis ``hidden``. Axes that
``sizes`` does not name are taken from the tensor. ``take`` cuts an axis to one index or to ``[start, stop]``.
``tensor`` may be a list of names of which the first one present counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from trawl.errors import FamilyError, ShapeError, suggestion
from trawl.families.expressions import check
from trawl.views import View, parse

ATTENTION = ("q", "k", "v", "o")
FC = ("gate", "up", "down")
ROLES = ATTENTION + FC
OUTSIDE = ("embed", "lm_head")
GENERIC = "generic"


@dataclass(frozen=True)
class Role:
    """Where one role of every layer is stored.

    Attributes:
        name: one of ``ROLES``.
        tensors: names after the layer's path, of which the first one present counts.
        stored, canonical: einops patterns, see :class:`trawl.views.View`.
        take: (axis, start, stop) as expressions over the family's sizes.
    """

    name: str
    tensors: tuple[str, ...]
    stored: str
    canonical: str
    take: tuple[tuple[str, str, str], ...] = ()


@dataclass(frozen=True)
class Family:
    """One family file, validated; the module's docstring explains each key."""

    name: str
    model_types: tuple[str, ...]
    config_section: str | None
    prefixes: tuple[str, ...]
    layer: str
    layers: tuple[str, ...]
    inner_field: str | None
    head_fields: tuple[str, ...]
    sizes: tuple[tuple[str, tuple[str, ...]], ...]
    roles: tuple[Role, ...]
    outside: tuple[tuple[str, tuple[str, ...]], ...]


KEYS = (
    "model_types",
    "config_section",
    "prefixes",
    "layer",
    "layers",
    "inner_field",
    "head_fields",
    "sizes",
    "roles",
    "outside",
)
ROLE_KEYS = ("tensor", "view", "take")


def load_family(path: Path) -> Family:
    """Read a family file.

    Args:
        path: a YAML file as the module's docstring describes; its stem names the family.
    Returns: the validated family.
    Raises: FamilyError: the file is unreadable, or a key in it is unknown, missing or malformed.
    """
    try:
        text = path.read_text(encoding="utf-8")
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
        data = yaml.safe_load(text)
    except yaml.YAMLError as e:
        raise FamilyError(f"family file {source} is not YAML: {' '.join(str(e).split())}") from e
    _known_keys(data, KEYS, source)
    layer = _text(data.get("layer"), f"{source}: layer")
    if layer.count("{layer}") != 1:
        raise FamilyError(f"{source}: layer is {layer!r}; expected a path with one {{layer}}, as 'layers.{{layer}}.'")
    sizes, roles, outside = (data.get(key) or {} for key in ("sizes", "roles", "outside"))
    _known_keys(sizes, None, f"{source}: sizes")
    _known_keys(roles, ROLES, f"{source}: roles")
    _known_keys(outside, OUTSIDE, f"{source}: outside")
    if not roles:
        raise FamilyError(f"{source}: roles is empty; expected some of {', '.join(ROLES)}")
    section, inner_field = data.get("config_section"), data.get("inner_field")
    return Family(
        name=name,
        model_types=_texts(data.get("model_types", []), f"{source}: model_types"),
        config_section=None if section is None else _text(section, f"{source}: config_section"),
        prefixes=_texts(data.get("prefixes", ""), f"{source}: prefixes") or ("",),
        layer=layer,
        layers=_expressions(data.get("layers"), f"{source}: layers"),
        inner_field=None if inner_field is None else _text(inner_field, f"{source}: inner_field"),
        head_fields=_head_fields(data.get("head_fields", []), source),
        sizes=tuple((axis, _expressions(size, f"{source}: sizes.{axis}")) for axis, size in sizes.items()),
        roles=tuple(_role(role, roles[role], f"{source}: roles.{role}") for role in ROLES if role in roles),
        outside=tuple(
            (role, _texts(outside[role], f"{source}: outside.{role}")) for role in OUTSIDE if role in outside
        ),
    )


def _head_fields(data: Any, source: str) -> tuple[str, ...]:
    """Return the fields of query heads, key-value heads and head size, or none of them."""
    fields = _texts(data, f"{source}: head_fields")
    if len(fields) not in (0, 3):
        raise FamilyError(
            f"{source}: head_fields is {data!r}; expected the fields of heads, key-value heads, head size"
        )
    return fields


def _role(name: str, data: Any, where: str) -> Role:
    """Validate one entry of ``roles``."""
    _known_keys(data, ROLE_KEYS, where)
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
    if axes[1][-1] != ("hidden",):
        raise FamilyError(f"{where}.view ends in {canonical!r}; the last canonical axis is called hidden")
    if unknown := [axis for axis in take if all(axis not in group for group in axes[0])]:
        raise FamilyError(f"{where}.take has no axis {unknown[0]!r} in view {stored!r}")
    return Role(
        name=name,
        tensors=tensors,
        stored=stored,
        canonical=canonical,
        take=tuple((axis, *_range(cut, f"{where}.take.{axis}")) for axis, cut in take.items()),
    )


def _range(data: Any, where: str) -> tuple[str, str]:
    """Return (start, stop) expressions of a ``take`` entry: one index, or a pair."""
    bounds = _expressions(data, where)
    if isinstance(data, list) and len(bounds) != 2:
        raise FamilyError(f"{where} is {data!r}; expected an index or [start, stop]")
    return (bounds[0], bounds[1]) if isinstance(data, list) else (bounds[0], f"({bounds[0]}) + 1")


def _expressions(data: Any, where: str) -> tuple[str, ...]:
    """Return one expression or a list of them as checked strings."""
    items = data if isinstance(data, list) else [data]
    if not items or not all(isinstance(item, str | int) and not isinstance(item, bool) for item in items):
        raise FamilyError(f"{where} is {data!r}; expected an integer, an expression, or a list of them")
    for item in items:
        try:
            check(str(item))
        except FamilyError as e:
            raise FamilyError(f"{where}: {e}") from e
    return tuple(str(item) for item in items)


def _known_keys(data: Any, known: Iterable[str] | None, where: str) -> None:
    """Refuse anything but a mapping from strings, and unknown keys in it."""
    if not isinstance(data, Mapping) or not all(isinstance(key, str) for key in data):
        raise FamilyError(f"{where} is {data!r:.60}; expected a mapping of names")
    if known is not None and (unknown := [key for key in data if key not in known]):
        raise FamilyError(f"{where}: unknown key {unknown[0]!r}{suggestion(unknown[0], known)}")


def _text(data: Any, where: str) -> str:
    """Return a string that must be there."""
    if not isinstance(data, str) or not data:
        raise FamilyError(f"{where} is {data!r}; expected a string")
    return data


def _texts(data: Any, where: str) -> tuple[str, ...]:
    """Return one string or a list of strings."""
    items = data if isinstance(data, list) else [data]
    if not all(isinstance(item, str) for item in items):
        raise FamilyError(f"{where} is {data!r}; expected a string or a list of strings")
    return tuple(items)
