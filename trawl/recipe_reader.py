"""Recipes from plain values and from YAML files: what cannot be used is one line that says where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from trawl.errors import PlanError, shown, suggestion
from trawl.recipe import METHODS, Recipe
from trawl.untrusted import LARGEST_YAML, parse_yaml


def make_recipe(values: dict[str, Any], origin: str = "recipe") -> Recipe:
    """Build a recipe from plain values.

    Args:
        values: field names with values, as read from YAML or from options.
        origin: what to call them in a message, such as a file name.
    Raises: PlanError: an unknown key, or a value that cannot be used, with where and why.
    """
    unknown = [key for key in values if key not in Recipe.model_fields]
    if unknown:
        hint = suggestion(str(unknown[0]), Recipe.model_fields)
        raise PlanError(f"{origin}: unknown key {shown(unknown[0])}{hint} (known: {', '.join(Recipe.model_fields)})")
    method = values.get("method", "cp")
    if method not in METHODS:
        raise PlanError(
            f"{origin}: unknown method {shown(method)}{suggestion(str(method), METHODS)} (known: {', '.join(METHODS)})"
        )
    if "rank" not in values and method != "narrow" and not {"keep", "size", "parts"} & set(values):
        raise PlanError(f"{origin}: no rank given; pass --rank INT (for tucker also --rank R0,R1,R2)")
    group = values.get("group_layers", "all")
    if group != "all" and not (isinstance(group, int) and group >= 1):
        raise PlanError(f"{origin}: group_layers is {shown(group)}; expected 'all' or a number of layers from 1")
    try:
        return Recipe(**values)
    except ValidationError as e:
        first = e.errors()[0]
        key = ".".join(str(part) for part in first["loc"][:1])
        raise PlanError(f"{origin}: {key} is {shown(first['input'])}: {first['msg'][:200]}") from e


def read_recipe(path: Path) -> dict[str, Any]:
    """Read a recipe file's values; :func:`make_recipe` checks them after options have been laid over.

    Raises: PlanError: the file is missing, is not YAML, or is not a mapping.
    """
    try:
        with path.open("rb") as file:
            text = file.read(LARGEST_YAML + 1).decode("utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise PlanError(f"cannot read recipe {path}: {e}") from e
    try:
        values = parse_yaml(text)
    except ValueError as e:
        raise PlanError(f"recipe {path} is not valid YAML: {e}") from e
    if not isinstance(values, dict):
        raise PlanError(f"recipe {path} holds {type(values).__name__}; expected a mapping such as 'rank: 64'")
    return values
