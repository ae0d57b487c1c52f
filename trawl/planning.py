"""Plans: what a recipe means for a checkpoint, worked out from headers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from trawl.checkpoint import BITS, Checkpoint
from trawl.descriptor import DescribedStack, Descriptor, describe, describe_stack
from trawl.errors import PlanError, RankError
from trawl.families import KIND_OF, FamilyMatch, Placement, match_family
from trawl.narrowing import Narrowed, fc_widths, narrow
from trawl.planned import Plan, PlannedStack
from trawl.recipe import Recipe
from trawl.stacking import Stack, format_layers, make_stacks

FACTOR_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def match_checkpoint(checkpoint: Checkpoint, family_file: Path | None = None) -> FamilyMatch:
    """Find the family of a checkpoint and the place of every role in it.

    Args:
        checkpoint: opened checkpoint.
        family_file: a YAML description to use in place of the built-in ones.
    Returns: the family with its placements.
    Raises: FamilyError: no family fits.
    """
    shapes: Mapping[str, tuple[int, ...]] = {name: info.shape for name, info in checkpoint.tensors.items()}
    return match_family(checkpoint.config, shapes, family_file)


def make_plan(checkpoint: Checkpoint, recipe: Recipe, family_file: Path | None = None) -> Plan:
    """Work out what a recipe means for a checkpoint.

    Args:
        checkpoint: opened checkpoint; no weight is read.
        recipe: what the user asked for.
        family_file: a YAML family description to use in place of the built-in ones.
    Returns: stacks, ranks, parameter counts, bytes and estimates.
    Raises: FamilyError: the checkpoint's family is unknown. PlanError: the recipe selects what the model does not
        have, or a factored output cannot hold it. RankError: the rank is outside what the method allows for a stack,
        or above the break-even of a factored output.
    Cost: time and memory in the number of tensors, not in their size.
    """
    match = match_checkpoint(checkpoint, family_file)
    if recipe.budget:
        raise PlanError("a budget has no parts yet; they are found from what the model computes, on a text or without")
    if recipe.method == "narrow":
        return _narrow_plan(checkpoint, match, recipe)
    if recipe.method == "mixed":
        return _mixed_plan(checkpoint, match, recipe)
    planned = _planned_stacks(checkpoint, match, recipe)
    descriptor = describe(_described(checkpoint, recipe, planned)) if recipe.write == "factored" else None
    chosen, roles = _selected(match, recipe)
    notes = (*_notes(chosen, recipe), *_tied_notes(match, roles))
    return Plan(checkpoint, match, recipe, planned, notes, descriptor)


def _selected(match: FamilyMatch, recipe: Recipe) -> tuple[list[Placement], tuple[str, ...]]:
    """Return the slices within the layers that a recipe selects, and its roles."""
    layers = recipe.selected_layers(match.layers)
    roles = recipe.selected_roles((*match.roles, *match.outside))
    chosen = [part for part in match.placements if part.layer in layers and part.role in roles]
    if not chosen and not set(roles) & set(match.outside):
        having = format_layers({part.layer for part in match.placements if part.role in roles})
        raise PlanError(
            f"layers {recipe.layers!r} have none of the roles {recipe.roles!r}, which are in layers {having}; choose "
            "other --layers or --roles"
        )
    return chosen, roles


def _planned_stacks(checkpoint: Checkpoint, match: FamilyMatch, recipe: Recipe) -> tuple[PlannedStack, ...]:
    """Work out the stacks of one decomposition."""
    method = recipe.decomposition()
    chosen, roles = _selected(match, recipe)
    outside = dict.fromkeys(part for role, part in match.outside.items() if role in roles)
    planned = []
    for stack in (*_stacks(chosen, recipe), *_outside_stacks(tuple(outside), recipe)):
        method.check_rank(stack.shape, f"stack {stack.name}")
        planned.append(
            PlannedStack(
                stack,
                method.ranks(stack.shape),
                method.parameters(stack.shape),
                method.flops(stack.shape),
                method.working_set(stack.shape) + _joined_bytes(checkpoint, stack),
                method,
            )
        )
    return tuple(planned)


def _mixed_plan(checkpoint: Checkpoint, match: FamilyMatch, recipe: Recipe) -> Plan:
    """Work out what several decompositions, and narrowing, mean for a checkpoint."""
    planned: list[PlannedStack] = []
    described: list[DescribedStack] = []
    widths: dict[int, int] = {}
    for part in recipe.members():
        if part.method == "narrow":
            assert part.width is not None
            more = fc_widths(match, part.selected_layers(match.layers), part.width)
            if twice := sorted(widths.keys() & more.keys()):
                raise PlanError(f"parts of the mixed recipe overlap: two of them narrow layer {twice[0]}")
            widths |= more
            continue
        stacks = _planned_stacks(checkpoint, match, part)
        described += _described(checkpoint, part, stacks)
        planned += stacks
    narrowed = None
    if widths:
        layers = sorted(widths)
        narrowed = narrow(checkpoint, match, layers, width=tuple(widths[layer] for layer in layers), plain=False)
        planned += _planned_cuts(narrowed)
    seen: set[Placement] = set()
    for held in (each for item in planned for each in item.stack.slices):
        if held in seen:
            raise PlanError(
                f"parts of the mixed recipe overlap: two of them hold {held.role} of layer {held.layer}, "
                f"{held.tensor}; give each matrix to one part"
            )
        seen.add(held)
    narrow_layers = narrowed.narrow if narrowed else ()
    descriptor = replace(describe(described), narrow=narrow_layers) if described or narrow_layers else None
    return Plan(checkpoint, match, recipe, tuple(planned), (), descriptor, narrowed=narrowed)


def _narrow_plan(checkpoint: Checkpoint, match: FamilyMatch, recipe: Recipe) -> Plan:
    """Work out what leaving out units means for a checkpoint."""
    layers = recipe.selected_layers(match.layers)
    if recipe.roles != "all":
        raise PlanError(
            f"roles are {recipe.roles!r}, and method narrow cuts whole FCs (--width) and whole attentions "
            "(--kv-heads); leave --roles out"
        )
    plain = recipe.write == "dense"
    narrowed = narrow(checkpoint, match, layers, width=recipe.width, kv_heads=recipe.kv_heads, plain=plain)
    descriptor = Descriptor((), narrowed.narrow) if narrowed.narrow else None
    return Plan(checkpoint, match, recipe, _planned_cuts(narrowed), (), descriptor, narrowed=narrowed)


def _planned_cuts(narrowed: Narrowed) -> tuple[PlannedStack, ...]:
    return tuple(PlannedStack(cut.stack, cut.rank, cut.parameters, cut.flops, cut.working_set) for cut in narrowed.cuts)


def _stacks(chosen: list[Placement], recipe: Recipe) -> list[Stack]:
    """Group the selected slices the way the recipe says."""
    stacks = make_stacks(chosen, recipe.layers_per_stack, single=recipe.method == "svd", share=recipe.share)
    if recipe.share != "none" and not any(stack.joined for stack in stacks):
        raise PlanError(
            f"share {recipe.share!r} joins nothing in roles {recipe.roles!r} of layers {recipe.layers!r}: it takes two "
            f"or more of q, k, v or of gate, up{' in one layer' * (recipe.layers_per_stack == 1)}; choose other roles, "
            "or leave --share out"
        )
    if recipe.anchored and (wide := next((stack for stack in stacks if len(stack.layers) > 1), None)):
        raise PlanError(
            f"stack {wide.name} lies in {len(wide.layers)} layers, and an anchored run goes block by block; pass "
            "--group-layers 1, or leave --anchored out"
        )
    other = [part.role for part in chosen if KIND_OF[part.role] in ("cross", "ssm") or part.role in ("pos_q", "pos_k")]
    if recipe.anchored and other:
        raise PlanError(
            f"an anchored run knows attention, FC and experts, and {other[0]} in roles {recipe.roles!r} is none of "
            "them; choose other roles, or leave --anchored out"
        )
    return stacks


def _outside_stacks(parts: tuple[Placement, ...], recipe: Recipe) -> list[Stack]:
    """Make a stack of each matrix outside the layers."""
    roles = ", ".join(part.role for part in parts)
    if parts and recipe.method != "svd":
        raise PlanError(
            f"{roles} in roles {recipe.roles!r}: a matrix outside the layers stands alone, and method {recipe.method} "
            "takes stacks of several; pass --method svd, or leave it out"
        )
    if parts and recipe.anchored:
        raise PlanError(
            f"{roles} in roles {recipe.roles!r}: an anchored run goes block by block, and this lies outside of them; "
            "leave it or --anchored out"
        )
    return [Stack(part.role, (part,)) for part in parts]


def _joined_bytes(checkpoint: Checkpoint, stack: Stack) -> int:
    """Return the size of the one matrix that joined slices are copied into."""
    return stack.parameters * BITS[checkpoint.tensors[stack.tensors[0]].dtype] // 8 if stack.joined else 0


def _described(checkpoint: Checkpoint, recipe: Recipe, planned: Sequence[PlannedStack]) -> list[DescribedStack]:
    """Describe what a factored output will hold, or refuse one that would be larger than it was."""
    described = []
    for item in planned:
        stack = item.stack
        if item.parameters_after > stack.parameters and not recipe.allow_larger:
            raise RankError(
                f"stack {stack.name}: at rank {recipe.rank} its factors hold {item.parameters_after:,} parameters, its "
                f"matrices {stack.parameters:,}; {break_even(recipe, stack)}, or pass --allow-larger"
            )
        described.append(
            describe_stack(
                stack,
                item.rank,
                "full" if recipe.method == "tucker" else "diagonal",
                tensors=checkpoint.tensors,
                stack_factor=item.rank[0] < stack.shape[0],
                dtype=FACTOR_DTYPES[recipe.factor_dtype] if recipe.factor_dtype else None,
            )
        )
    return described


def break_even(recipe: Recipe, stack: Stack) -> str:
    """Say up to which rank a stack's factors are smaller than its matrices."""
    if not isinstance(recipe.rank, int):
        return "lower the ranks"
    for rank in range(recipe.rank - 1, 0, -1):  # the rank asked for is above it
        method = recipe.model_copy(update={"rank": rank}).decomposition()
        if method.parameters(stack.shape) <= stack.parameters:
            return f"use a rank up to {rank}, the break-even"
    return "no rank is below break-even"


def _notes(chosen: list[Placement], recipe: Recipe) -> list[str]:
    """Say which attention roles stack apart, and why."""
    by_shape: dict[tuple[int, int], list[str]] = {}
    for part in chosen:
        first = part.tower == chosen[0].tower and part.role in ("q", "k", "v", "o")
        if first and part.role not in by_shape.setdefault(part.shape, []):
            by_shape[part.shape].append(part.role)
    if len(by_shape) < 2 or "k" not in {part.role for part in chosen} or recipe.share != "none":
        return []
    parts = " and ".join(f"{','.join(roles)} {shape}" for shape, roles in by_shape.items())
    return [f"attention roles of unequal shape stack apart (grouped-query attention): {parts}"]


def _tied_notes(match: FamilyMatch, roles: tuple[str, ...]) -> list[str]:
    """Say that the head is the embeddings, where either is selected."""
    embed, head = (match.outside.get(role) for role in ("embed", "lm_head"))
    if embed is None or embed != head or not {"embed", "lm_head"} & set(roles):
        return []
    return [f"embed and lm_head are tied: {embed.tensor} stands for both, and stays so"]


def summarize(checkpoint: Checkpoint, match: FamilyMatch) -> dict[str, Any]:
    """Summarise a checkpoint as JSON-able values: family, roles, shapes, parameters, stackable groups.

    Args:
        checkpoint: opened checkpoint; no weight is read.
        match: its family.
    Returns: what ``trawl inspect --json`` prints.
    """
    used = {part.tensor for part in match.placements}
    others = [info for name, info in checkpoint.tensors.items() if name not in used]
    return {
        "model": checkpoint.origin,
        "family": match.family,
        "assumed": list(match.assumed),
        "layers": match.layers,
        "towers": {tower: format_layers(layers) for tower, layers in match.towers.items() if tower},
        "parameters": checkpoint.parameters,
        "bytes": checkpoint.nbytes,
        "shards": len(checkpoint.shards),
        "roles": [_describe_role(checkpoint, match, role) for role in match.roles],
        "groups": [
            {"name": stack.name, "roles": list(stack.roles), "shape": list(stack.shape), "layers": list(stack.layers)}
            for stack in make_stacks(match.placements, None)
        ],
        "other_tensors": len(others),
        "other_parameters": sum(info.parameters for info in others),
    }


def _describe_role(checkpoint: Checkpoint, match: FamilyMatch, role: str) -> dict[str, Any]:
    """Summarise one role."""
    parts = [part for part in match.placements if part.role == role]
    return {
        "role": role,
        "shape": list(parts[0].shape),
        "dtype": checkpoint.tensors[parts[0].tensor].dtype,
        "matrices": len(parts),
        "parameters": sum(part.shape[0] * part.shape[1] for part in parts),
        "example": parts[0].tensor,
    }
