"""Inference: which family serves a checkpoint, and what is assumed of one whose model type no file lists."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from trawl.errors import FamilyError, ShapeError, suggestion
from trawl.families.description import FC, GENERIC, Family, Tower, load_family, packaged_families
from trawl.families.matching import FamilyMatch, Shapes, describe_matrices, fields_of, first_known, place_roles

MOST_PREFIXES = 100
GROUPS = (("q", "k", "v", "o"), FC)  # taken whole or not at all
SAME_WIDTH = (("q", "o"), ("k", "v"), ("up", "down"), ("gate", "up"))


def match_family(config: Mapping[str, Any], tensors: Shapes, family_file: Path | None = None) -> FamilyMatch:
    """Find the roles of a checkpoint's layers.

    A given family file is used as it is; otherwise the packaged file that lists the config's model_type; otherwise the
    layout is inferred from names and shapes, and the match says what was assumed.

    Args:
        config: the parsed config.json.
        tensors: shape of every tensor in the checkpoint, by name.
        family_file: a user's own family file.
    Returns: the match; its placements cover every layer, with no role missing that its family requires.
    Raises: FamilyError: no family fits, a role's tensor is missing, or the layers do not agree with the config.
        ShapeError: a role's tensor has another shape than the config says.
    Cost: O(layers · roles · experts · prefixes) look-ups.
    """
    if family_file is not None:
        return place_roles(load_family(family_file), config, tensors)
    model_type = config.get("model_type")
    for family in packaged_families().values():
        if model_type in family.model_types:
            return place_roles(family, config, tensors)
    return _infer(packaged_families()[GENERIC], config, tensors)


def _infer(generic: Family, config: Mapping[str, Any], tensors: Shapes) -> FamilyMatch:
    """Match an unlisted model type whose tensors are named and shaped like those of llama."""
    (tower,) = generic.towers
    model_type, fields = config.get("model_type"), fields_of(tower, config)
    listed = [name for family in packaged_families().values() for name in family.model_types]
    unknown = f"model_type {model_type!r} is not listed"
    near = suggestion(str(model_type), listed)
    fix = f"{describe_matrices(tensors)}; pass --family FILE.yaml to say where the roles are{near}"
    candidates = dict(tower.sizes)["hidden"]
    hidden = first_known(candidates, fields)
    if hidden is None:
        raise FamilyError(f"{unknown}, and config.json has no {' or '.join(candidates)} to go by; {fix}")
    prefix, found = _best_prefix(tower, tensors, hidden)
    roles = _complete_roles(found)
    if not roles:
        raise FamilyError(
            f"{unknown}, and no layer has weights named like q_proj k_proj v_proj o_proj or up_proj down_proj "
            f"with an axis of hidden size {hidden}; {fix}"
        )
    assumed = _assumptions(unknown, tower, found, roles, hidden)
    kept = tuple(role for role in tower.roles if role.name in roles)
    family = replace(generic, towers=(replace(tower, prefixes=(prefix,), roles=kept),))
    try:
        match = place_roles(family, config, tensors, assumed)
    except (FamilyError, ShapeError) as e:
        raise FamilyError(f"{unknown}, and read as llama-like it does not fit: {e}") from e
    _check_widths(match, f"{unknown}, and read as llama-like it does not fit", fix)
    return match


def _best_prefix(tower: Tower, tensors: Shapes, hidden: int) -> tuple[str, dict[tuple[int, str], str]]:
    """Return the layer prefix with most role tensors that fit the hidden size, and those tensors."""
    known = {tensor for role in tower.roles for tensor in role.tensors}
    numbers = ((name, number) for name in tensors for number in re.finditer(r"(?<![^.])\d+\.", name))
    prefixes = Counter(name[: number.start()] for name, number in numbers if name[number.end() :] in known)
    best: tuple[str, dict[tuple[int, str], str]] = "", {}
    for prefix in sorted(dict(prefixes.most_common(MOST_PREFIXES))):  # each is compared with every name
        fitting = {
            key: name
            for key, name in _found(tower, prefix, tensors).items()
            if len(tensors[name]) == 2 and tensors[name][0 if key[1] in ("o", "down") else 1] == hidden
        }
        if len(fitting) > len(best[1]):
            best = prefix, fitting
    return best


def _found(tower: Tower, prefix: str, tensors: Iterable[str]) -> dict[tuple[int, str], str]:
    """Collect the tensors under a prefix that carry a role's name, by (layer, role); an earlier name wins."""
    pattern = re.compile(re.escape(prefix) + r"([0-9]{1,9})\.(.+)")
    rank = {(role.name, name): i for role in tower.roles for i, name in enumerate(role.tensors)}
    best: dict[tuple[int, str], tuple[int, str]] = {}
    for tensor in tensors:
        if not (match := pattern.fullmatch(tensor)):
            continue
        for role in tower.roles:
            if (i := rank.get((role.name, match[2]))) is not None:
                key = int(match[1]), role.name
                best[key] = min(best.get(key, (i, tensor)), (i, tensor))
    return {key: tensor for key, (_, tensor) in best.items()}


def _complete_roles(found: Mapping[tuple[int, str], str]) -> tuple[str, ...]:
    """Return the roles of the groups that are there as a whole; the gate alone may be absent."""
    present = {role for _, role in found}
    whole = [group for group in GROUPS if all(role in present for role in group if role != "gate")]
    return tuple(role for group in whole for role in group if role in present)


def _assumptions(
    unknown: str, tower: Tower, found: Mapping[tuple[int, str], str], roles: tuple[str, ...], hidden: int
) -> tuple[str, ...]:
    """Say in words what an inferred match rests on."""
    examples = [next(name for (_, each), name in sorted(found.items()) if each == role) for role in roles]
    absent = [role.name for role in tower.roles if role.name not in roles]
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
