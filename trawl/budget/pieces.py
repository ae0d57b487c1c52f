"""Pieces: what of a model is chosen together, and the forms that each can be stored in. Headers only."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from trawl.errors import PlanError
from trawl.families import FC, FamilyMatch, Placement
from trawl.narrowing import Cut
from trawl.recipe import Recipe
from trawl.stacking import READ_INNER, Stack, make_stacks

Structure = Literal["dense", "narrow", "joint", "single"]

SMALLEST = 0.2  # of a piece's parameters, below which nothing is left of a model
WIDTH_STEPS = 96  # widths that are tried between nothing and all
RANK_STEP = 8


@dataclass(frozen=True)
class Form:
    """One way to store a piece.

    Attributes:
        structure: ``dense``; ``narrow``, with fewer inner units; or decomposed by weighted SVD, matrices that read the
            same input ``joint`` or every matrix ``single``.
        sizes: the width, or the rank of each of the structure's stacks, 0 for one that stays dense; none of a form
            that is dense throughout.
        parameters: that it holds.
    """

    structure: Structure
    sizes: tuple[int, ...]
    parameters: int


@dataclass(frozen=True)
class Piece:
    """Matrices of one layer that are chosen together: a whole FC, or those that read one input.

    Attributes:
        name: unique within a model.
        slices: the matrices.
        cut: how units can be left out, for a whole FC; its ``keep`` says nothing.
    """

    name: str
    slices: tuple[Placement, ...]
    cut: Cut | None = None

    @property
    def layer(self) -> int:
        """The layer that it lies in."""
        return self.slices[0].layer

    @property
    def parameters(self) -> int:
        """Entries of its matrices."""
        return sum(math.prod(part.shape) for part in self.slices)

    @property
    def structures(self) -> tuple[Structure, ...]:
        """Those that it can have beside dense."""
        joint = any(stack.joined for stack in self.stacks("joint"))
        return (*(("narrow",) if self.cut else ()), *(("joint",) if joint else ()), "single")

    def stacks(self, structure: Structure) -> list[Stack]:
        """Return what an SVD decomposes."""
        return make_stacks(self.slices, 1, single=True, share="input" if structure == "joint" else "none")

    def narrow(self, width: int) -> Form:
        """Return the form with fewer units."""
        assert self.cut is not None
        return Form("narrow", (width,), Cut(self.cut.stack, self.cut.units, width).parameters)

    def widths(self) -> list[int]:
        """Return the widths that are tried, ascending."""
        assert self.cut is not None
        units = self.cut.units
        step = max(1, units // WIDTH_STEPS)
        return list(range(max(step, math.ceil(SMALLEST * units / step) * step), units, step))

    def decomposed(self, structure: Structure, ranks: Sequence[int]) -> Form:
        """Return the form with these ranks of its stacks, 0 for a dense one."""
        sizes = [
            rank * side_of(stack) or stack.parameters for rank, stack in zip(ranks, self.stacks(structure), strict=True)
        ]
        return Form(structure, tuple(ranks), sum(sizes))

    def recipes(self, form: Form) -> tuple[dict[str, Any], ...]:
        """Return the parts of a mixed recipe that decompose a piece, as plain values; none of a dense form."""
        if form.structure == "dense":
            return ()
        return tuple(
            {"method": "svd", "rank": rank, "layers": str(self.layer), "roles": ",".join(stack.roles)}
            | ({"share": "input"} if stack.joined else {"group_layers": 1})
            for stack, rank in zip(self.stacks(form.structure), form.sizes, strict=True)
            if rank
        )


def side_of(stack: Stack) -> int:
    """Return the parameters that one rank of a stack's SVD takes."""
    return sum(stack.shape[1:]) + 1  # + 1: the core


def make_pieces(match: FamilyMatch, recipe: Recipe) -> tuple[Piece, ...]:
    """Return the pieces that a budget chooses for.

    Args:
        match: the model.
        recipe: its roles and layers.
    Raises: PlanError: it selects what no budget knows.
    """
    roles = recipe.selected_roles((*match.roles, *match.outside) if recipe.roles != "all" else match.roles)
    layers = recipe.selected_layers(match.layers)
    chosen = [part for part in match.placements if part.layer in layers and part.role in roles]
    if strange := [part.role for part in chosen if part.expert >= 0 or part.tower] or set(roles) & set(match.outside):
        raise PlanError(
            f"roles {recipe.roles!r} select {next(iter(strange))}, and a budget chooses among the attention and FC "
            "matrices of a chain of layers; choose other --roles, or give a --rank for these"
        )
    pieces: list[Piece] = []
    for layer in dict.fromkeys(part.layer for part in chosen):
        members = [part for part in chosen if part.layer == layer]
        whole = [part for part in match.placements if part.layer == layer and part.role in FC]
        if whole and set(whole) <= set(members) and any(part.role in READ_INNER for part in whole):
            units = whole[0].shape[0]
            cut = Cut(Stack(f"fc.{layer}", tuple(whole)), units, units)
            pieces.append(Piece(f"fc.{layer}", tuple(whole), cut))
            members = [part for part in members if part not in whole]
        pieces += [Piece(stack.name, stack.slices) for stack in make_stacks(members, 1, single=True, share="input")]
    return tuple(pieces)


def mixed_recipe(recipe: Recipe, chosen: Iterable[tuple[Piece, Form]]) -> Recipe:
    """Return a budget's recipe with its parts in place of the budget."""
    narrow: dict[int, int] = {}
    parts: list[dict[str, Any]] = []
    for piece, form in chosen:
        if form.structure == "narrow":
            narrow[piece.layer] = form.sizes[0]
        else:
            parts += piece.recipes(form)
    if narrow:
        layers = sorted(narrow)
        widths = tuple(narrow[layer] for layer in layers)
        parts.insert(0, {"method": "narrow", "width": widths, "layers": ",".join(map(str, layers))})
    values = recipe.model_dump() | {"keep": None, "size": None, "plain": False, "layers": "all", "roles": "all"}
    return Recipe(**values | {"parts": tuple(Recipe(**part) for part in parts)})
