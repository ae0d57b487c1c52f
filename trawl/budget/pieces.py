"""Pieces: what of a model is chosen together, and the forms that each can be stored in. Headers only."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from trawl.decompose import CP, SVD, Tucker
from trawl.errors import PlanError
from trawl.families import FC, FamilyMatch, Placement
from trawl.narrowing import Cut
from trawl.recipe import Recipe
from trawl.stacking import READ_INNER, Stack, make_stacks

Structure = Literal["dense", "narrow", "joint", "single", "shared", "tucker", "cp"]

SMALLEST = 0.2  # of a piece's parameters, below which nothing is left of a model
WIDTH_STEPS = 96  # widths that are tried between nothing and all
RANK_STEP = 8
TRIAL_SHARES: dict[Structure, tuple[float, float]] = {"tucker": (0.3, 0.6), "cp": (0.2, 0.4)}  # that are decomposed to
LOOSE = 1e-3  # change of fit under which Tucker and CP stop while sizes are compared; more sweeps say little more


@dataclass(frozen=True)
class Form:
    """One way to store a piece.

    Attributes:
        structure: ``dense``; ``narrow``, with fewer inner units; decomposed by weighted SVD, matrices that read the
            same input ``joint``, those of two layers ``shared``, or every matrix ``single``; or the whole FC as one
            stack, by ``tucker`` or ``cp``.
        sizes: the width; the rank of each of an SVD's stacks, 0 for one that stays dense; the ranks (inner, hidden) of
            Tucker; the rank of CP; none of a form that is dense throughout.
        parameters: that it holds.
    """

    structure: Structure
    sizes: tuple[int, ...]
    parameters: int


@dataclass(frozen=True)
class Piece:
    """Matrices that are chosen together: of one layer a whole FC, or those that read one input; or both of two layers.

    Attributes:
        name: unique within a model.
        slices: the matrices.
        cut: how units can be left out, for a whole FC; its ``keep`` says nothing.
        members: names of the two pieces that this one is in place of, where it is one of two layers.
    """

    name: str
    slices: tuple[Placement, ...]
    cut: Cut | None = None
    members: tuple[str, ...] = ()

    @property
    def layer(self) -> int:
        """The layer that it lies in, the first of two."""
        return self.slices[0].layer

    @property
    def layers(self) -> tuple[int, ...]:
        """All layers that it lies in."""
        return tuple(dict.fromkeys(part.layer for part in self.slices))

    @property
    def covers(self) -> tuple[str, ...]:
        """The pieces of one layer that it stands for."""
        return self.members or (self.name,)

    @property
    def parameters(self) -> int:
        """Entries of its matrices."""
        return sum(math.prod(part.shape) for part in self.slices)

    @property
    def structures(self) -> tuple[Structure, ...]:
        """Those that it can have beside dense and its :attr:`trials`."""
        if self.members:
            return ()
        found: list[Structure] = ["narrow"] if self.cut else []
        if any(stack.joined for stack in self.stacks("joint")):
            found.append("joint")
        return tuple(found + ["single"] * self._keeps_tensors_whole("single"))

    @property
    def trials(self) -> tuple[Structure, ...]:
        """Those that are seldom the best, and are tried in a few places first."""
        if self.members:
            return ("shared",)
        return ("tucker", "cp") if self.cut and len(self.stacks("tucker")) == 1 else ()

    def _keeps_tensors_whole(self, structure: Structure) -> bool:
        """Whether all matrices of a stored tensor are in one stack: factors stand in for whole tensors."""
        found: dict[str, Stack] = {}
        stacks = self.stacks(structure)
        return all(found.setdefault(name, stack) is stack for stack in stacks for name in stack.tensors)

    def stacks(self, structure: Structure) -> list[Stack]:
        """Return what is decomposed."""
        if structure in ("tucker", "cp"):
            return make_stacks(self.slices, 1)
        if structure == "single":
            return make_stacks(self.slices, 1, single=True)
        return make_stacks(self.slices, len(self.covers), single=True, share="input")

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

    def decomposed(self, structure: Structure, sizes: Sequence[int]) -> Form:
        """Return the form with these ranks, 0 for a stack that stays dense."""
        methods = self.methods(Form(structure, tuple(sizes), 0))
        after = [method.parameters(stack.shape) if method else stack.parameters for stack, method in methods]
        return Form(structure, tuple(sizes), sum(after))

    def of_share(self, structure: Structure, share: float) -> Form:
        """Return the largest form of an FC by ``tucker`` or ``cp`` that holds at most a share of its parameters."""
        (stack,) = self.stacks(structure)
        size, inner, hidden = stack.shape

        def largest(limit: int, sizes: Callable[[int], tuple[int, ...]]) -> tuple[int, ...]:
            ranks = range(limit, 1, -1)
            fits = (rank for rank in ranks if self.decomposed(structure, sizes(rank)).parameters <= budget)
            return sizes(next(fits, 1))

        budget = share * stack.parameters
        if structure == "cp":
            return self.decomposed("cp", largest(min(inner, hidden) * size, lambda rank: (rank,)))
        equal, _ = largest(min(inner, hidden), lambda rank: (rank, rank))
        return self.decomposed("tucker", largest(inner, lambda rank: (rank, equal)))

    def methods(self, form: Form) -> list[tuple[Stack, SVD | Tucker | CP | None]]:
        """Return how each stack of a form is decomposed; None for one that stays dense."""
        stacks = self.stacks(form.structure)
        if form.structure == "tucker":
            return [(stacks[0], Tucker(rank=(len(stacks[0].slices), *form.sizes), tol=LOOSE))]  # type: ignore[arg-type]
        if form.structure == "cp":
            return [(stacks[0], CP(rank=form.sizes[0], tol=LOOSE))]
        return [(stack, SVD(rank=rank) if rank else None) for stack, rank in zip(stacks, form.sizes, strict=True)]

    def recipes(self, form: Form) -> tuple[dict[str, Any], ...]:
        """Return the parts of a mixed recipe that decompose a piece, as plain values; none of a dense form."""
        if form.structure == "dense":
            return ()
        return tuple(
            {
                "method": "svd" if isinstance(method, SVD) else form.structure,
                "rank": method.rank,
                "layers": ",".join(map(str, stack.layers)),
                "roles": ",".join(stack.roles),
                "group_layers": len(stack.layers),
            }
            | ({"share": "input"} if stack.joined else {})
            for stack, method in self.methods(form)
            if method
        )


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
    if not recipe.plain:
        _check_whole(match, chosen, recipe)
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


def _check_whole(match: FamilyMatch, chosen: Sequence[Placement], recipe: Recipe) -> None:
    """Raise PlanError where roles take a part of a stored tensor, in place of which no factors can stand."""
    tensors, taken = {part.tensor for part in chosen}, set(chosen)
    for part in match.placements:
        if part.tensor in tensors and part not in taken:
            held = [each.role for each in match.placements if each.tensor == part.tensor]
            raise PlanError(
                f"roles {recipe.roles!r} leave out {part.role}, and {part.tensor} holds {', '.join(held)} in one; a "
                "budget takes whole tensors: choose all of these roles, or none of them"
            )


def make_pairs(pieces: Sequence[Piece]) -> tuple[Piece, ...]:
    """Return the pieces of two layers: the first and second of the layers that are chosen, the third and fourth, ...

    Args:
        pieces: of one layer each, from :func:`make_pieces`.
    Returns: one for every two pieces whose matrices can have a common right factor.
    """
    layers = sorted({piece.layer for piece in pieces})
    partner = dict(zip(layers[::2], layers[1::2], strict=False))
    pairs = []
    for one in pieces:
        for other in pieces:
            alike = [part.role for part in one.slices] == [part.role for part in other.slices]
            if other.layer == partner.get(one.layer) and alike:
                name = f"{one.name}+{other.layer}"
                pair = Piece(name, one.slices + other.slices, members=(one.name, other.name))
                if any(len(stack.layers) > 1 for stack in pair.stacks("shared")):
                    pairs.append(pair)
    return tuple(pairs)


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
