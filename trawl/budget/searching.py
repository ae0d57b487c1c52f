"""The search: damages measured block by block, a choice among all forms, and a check of what it really does.

What is measured lies in a folder, sealed block by block, so that a search that was interrupted, or another budget of
the same model and text, goes on from there.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from trawl.budget.choosing import Option, choose
from trawl.budget.curves import Workshop
from trawl.budget.found import Found
from trawl.budget.ledger import DENSE, NOISE, Ledger, Measured
from trawl.budget.pieces import SMALLEST, Form, Piece, Structure, make_pairs, make_pieces, mixed_recipe
from trawl.budget.trials import close_ones, probe_blocks
from trawl.checkpoint import BITS, Checkpoint
from trawl.errors import PlanError
from trawl.families import FamilyMatch
from trawl.observers import Observer
from trawl.planned import Plan
from trawl.planning import make_plan
from trawl.recipe import Recipe

if TYPE_CHECKING:
    from trawl.budget.damage import Gauge

LOG = logging.getLogger("trawl")

MISSED = 0.25  # share of the predicted damage by which the real one may be off before it is measured again


def check_budget(checkpoint: Checkpoint, match: FamilyMatch, recipe: Recipe) -> tuple[Piece, ...]:
    """Return the pieces of a budget, from headers alone.

    Raises: PlanError: no budget knows what the recipe selects, the budget is out of reach, or it is none.
    """
    pieces = make_pieces(match, recipe)
    if recipe.plain:
        _check_plain(match, recipe, pieces)
    least = sum(_smallest(piece, plain=recipe.plain) for piece in pieces)
    if _budget(checkpoint, recipe, pieces) < least:
        raise _out_of_reach(checkpoint, recipe, pieces, least)
    return pieces


def _budget(checkpoint: Checkpoint, recipe: Recipe, pieces: Sequence[Piece]) -> int:
    """Return how many of the pieces' parameters stay; of a budget of bytes about so many.

    Raises: PlanError: the model is no larger than the bytes of the budget.
    """
    if recipe.keep is not None:
        return int(recipe.keep * sum(piece.parameters for piece in pieces))
    assert recipe.size is not None
    if recipe.size >= checkpoint.nbytes:
        raise PlanError(
            f"size {recipe.size:,} is no less than the {checkpoint.nbytes:,} bytes of the shards; there is nothing to "
            "compress"
        )
    held, entry = _stored(checkpoint, pieces)
    return math.floor((recipe.size - (checkpoint.nbytes - held)) / entry)


def _stored(checkpoint: Checkpoint, pieces: Sequence[Piece]) -> tuple[int, float]:
    """Return the bytes of the pieces as they are stored, and those of one parameter."""
    infos = [checkpoint.tensors[name] for name in {part.tensor for piece in pieces for part in piece.slices}]
    held = sum(info.nbytes for info in infos)
    return held, held / sum(info.parameters for info in infos)


def _smallest(piece: Piece, *, plain: bool) -> int:
    """Return how few parameters a piece can have."""
    if plain:
        return piece.narrow(1).parameters if piece.cut else piece.parameters
    return math.ceil(SMALLEST * piece.parameters)


def _out_of_reach(checkpoint: Checkpoint, recipe: Recipe, pieces: Sequence[Piece], least: int) -> PlanError:
    """Say what the smallest budget is, where so many parameters of the pieces stay at least."""
    ways = "FCs of one smaller width" if recipe.plain else "narrow FCs and matrices of low rank"
    total = sum(piece.parameters for piece in pieces)
    held, entry = _stored(checkpoint, pieces)
    if recipe.size is None:
        reach = f"keep {recipe.keep} is out of reach: of"
        stays = f"at least {least:,} ({least / total:.3f}) stay"
    else:
        smallest = math.ceil(checkpoint.nbytes - held + least * entry)
        reach = f"size {recipe.size:,} is out of reach: of the {checkpoint.nbytes:,} bytes of the shards, with"
        stays = f"at least about {smallest:,} stay"
    return PlanError(
        f"{reach} {total:,} parameters in roles {recipe.roles!r} and layers {recipe.layers!r}, {stays}, by {ways}; "
        "give a larger budget, or more roles and layers"
    )


def _check_plain(match: FamilyMatch, recipe: Recipe, pieces: Sequence[Piece]) -> None:
    """Raise PlanError for a plain budget over some of the layers, or no FC: an ordinary checkpoint has one width."""
    if len(recipe.selected_layers(match.layers)) < match.layers or match.inner_field is None:
        raise PlanError(
            "an ordinary checkpoint has one FC width in all its layers, named in its config: leave --layers out, or "
            "leave --plain out"
        )
    if not any(piece.cut for piece in pieces):
        raise PlanError(
            f"an ordinary checkpoint can be smaller by the width of its FCs alone, and roles {recipe.roles!r} are not "
            "all of an FC; leave --roles out, or leave --plain out"
        )


@dataclass(frozen=True, eq=False)
class Searcher:
    """One search under way.

    Attributes:
        checkpoint: the model.
        recipe: with a budget.
        family_file: as for a plan.
        pieces: what is chosen for.
        workshop: makes forms of them.
        ledger: of what is measured.
        gauge: that measures it.
        observer: told of progress.
    """

    checkpoint: Checkpoint
    recipe: Recipe
    family_file: Path | None
    pieces: tuple[Piece, ...]
    workshop: Workshop
    ledger: Ledger
    gauge: Gauge
    observer: Observer

    def mixed(self) -> Found:
        """Measure, choose, check, and where the prediction was off measure what was chosen and choose again."""
        known = self._measured()
        found = self._checked(self._choose(known))
        assert found.predicted is not None
        if abs(found.real - found.predicted) <= MISSED * max(found.predicted, NOISE):
            return found
        LOG.info("the damage is %.4f nats, %.4f were predicted; measuring what was chosen", found.real, found.predicted)
        self._refine(known, found)
        again = self._checked(self._choose(known))
        return min(found, again, key=lambda one: one.real)

    def plain(self) -> Found:
        """Choose the one width that an ordinary checkpoint can have."""
        units = next(piece.cut.units for piece in self.pieces if piece.cut)
        step = next(step for step in (8, 4, 2, 1) if units % step == 0)
        common = self.recipe.model_dump() | {"method": "narrow", "keep": None, "size": None, "plain": False}
        widths = range(units - step, 0, -step)
        recipes = (Recipe(**common | {"width": width, "roles": "all"}) for width in widths)
        recipe = next((recipe for recipe in recipes if self._fits(recipe)), None)
        if recipe is None:
            raise PlanError(
                f"no FC width meets the budget, down to {step} of {units} units: the rest of the model is larger; give "
                "a larger budget, or leave --plain out"
            )
        width = recipe.width
        assert isinstance(width, int)
        forms = (piece.narrow(width) if piece.cut else Form(DENSE, (), piece.parameters) for piece in self.pieces)
        chosen = tuple((piece, form, None) for piece, form in zip(self.pieces, forms, strict=True))
        return self._checked(Found(recipe, chosen))

    def _fits(self, recipe: Recipe) -> bool:
        """Whether an output is within the budget."""
        return self._excess(make_plan(self.checkpoint, recipe, self.family_file)) <= 0

    def _excess(self, planned: Plan) -> int:
        """Return how many parameters an output has above the budget, as it lands on disk.

        In a share that is kept, an integer of an order of rows counts as much as its bytes hold of the factors' dtype.
        """
        if self.recipe.size is not None:
            return math.ceil((planned.output_bytes - self.recipe.size) / _stored(self.checkpoint, self.pieces)[1])
        stacks = planned.descriptor.stacks if planned.descriptor else ()
        orders = sum(stack.nbytes * 8 // BITS[stack.dtype] - stack.parameters for stack in stacks)
        lost = self.checkpoint.parameters - planned.output_parameters
        kept = sum(piece.parameters for piece in self.pieces) - lost + orders
        return kept - _budget(self.checkpoint, self.recipe, self.pieces)

    def _choose(self, known: Mapping[str, Measured]) -> Found:
        """Solve for the budget, and again for what headers and orders of rows take on disk."""
        offered = [piece for piece in (*self.pieces, *self.pairs) if piece.name in known]
        menus = [known[piece.name].options() for piece in offered]
        options = [[Option(form.parameters, damage) for form, damage in menu] for menu in menus]
        least = sum(min(option.size for option in menu) for menu in options[: len(self.pieces)])
        budget = _budget(self.checkpoint, self.recipe, self.pieces)
        while True:
            if budget < least:
                raise _out_of_reach(self.checkpoint, self.recipe, self.pieces, least)
            taken = choose(options, budget, [piece.covers for piece in offered])
            indexed = zip(offered, menus, taken, strict=True)
            chosen = tuple((piece, *menu[index]) for piece, menu, index in indexed if index is not None)
            recipe = mixed_recipe(self.recipe, ((piece, form) for piece, form, _ in chosen))
            planned = make_plan(self.checkpoint, recipe, self.family_file)  # which also says whether it can be written
            excess = self._excess(planned)
            if excess <= 0:
                return Found(recipe, chosen)
            budget -= excess

    def _measured(self) -> dict[str, Measured]:
        """Measure every reference form that is not in the ledger yet, from the last block to the first."""
        known: dict[str, Measured] = {}
        trials = self.trials
        for done, block in enumerate(self.blocks):
            self.observer("measuring damage", done, len(self.blocks))
            known |= {one.piece.name: one for one in self.measure(block, trials)}
        self.observer("measuring damage", len(self.blocks), len(self.blocks))
        return known

    @property
    def blocks(self) -> list[int]:
        """Blocks that have pieces, the last and cheapest to measure first."""
        return sorted({piece.layer for piece in self.pieces}, reverse=True)

    @cached_property
    def pairs(self) -> tuple[Piece, ...]:
        """Pieces of two layers."""
        return make_pairs(self.pieces)

    @cached_property
    def trials(self) -> frozenset[Structure]:
        """Structures that came close to the best where they were tried, and are measured everywhere.

        Cost: at its first use, of everything in a few blocks.
        """
        everything = (*self.pieces, *self.pairs)
        blocks = probe_blocks(everything)
        every = frozenset(structure for piece in everything for structure in piece.trials)
        total = sum(piece.parameters for piece in self.pieces)
        keep = _budget(self.checkpoint, self.recipe, self.pieces) / total
        close: set[Structure] = set()
        for done, block in enumerate(blocks):
            self.observer("trying structures", done, len(blocks))
            partners = {layer for pair in self.pairs if pair.layer == block for layer in pair.layers} - {block}
            tried = self.measure(block, every)
            known = {one.piece.name: one for other in partners for one in self.measure(other, frozenset())}
            known |= {one.piece.name: one for one in tried}
            close |= {structure for one in tried for structure in close_ones(one, known, keep)}
        self.observer("trying structures", len(blocks), len(blocks))
        if left_out := sorted(every - close):
            LOG.info("%s came close nowhere in blocks %s: left out", ", ".join(left_out), blocks)
        return frozenset(close)

    def measure(self, block: int, trials: frozenset[Structure]) -> list[Measured]:
        """Return what is known of one block's pieces, measuring the reference forms that are not in the ledger yet.

        Args:
            block: that the pieces begin in.
            trials: which of those structures to measure that are seldom the best.
        """
        pieces = [piece for piece in (*self.pieces, *self.pairs) if piece.layer == block]
        members = [self._curves(piece, trials) for piece in pieces if piece.structures or trials & {*piece.trials}]
        asked = [trials.union(one.piece.structures) for one in members]
        wanted = [one.only(structures).references() for one, structures in zip(members, asked, strict=True)]
        self._measure(block, [(one, p.form) for one, points in zip(members, wanted, strict=True) for p in points])
        return [one.only(structures) for one, structures in zip(members, asked, strict=True)]

    def _curves(self, piece: Piece, trials: frozenset[Structure]) -> Measured:
        """Return all that the ledger knows of a piece, at least what each of its forms loses."""
        known = self.ledger.load(piece) or Measured(piece, [])
        wanted = [*piece.structures, *(structure for structure in piece.trials if structure in trials)]
        missing = [each for each in wanted if each not in {point.form.structure for point in known.points}]
        if not missing:
            return known
        elimination = self.ledger.elimination(piece, self.workshop)
        known.points.extend(point for each in missing for point in self.workshop.curve(piece, each, elimination))
        self.ledger.save(known)
        return known

    def _measure(self, block: int, forms: Sequence[tuple[Measured, Form]]) -> None:
        """Measure forms of pieces of one block, and seal what comes out."""
        missing = [(one, form) for one, form in forms if (form.structure, form.sizes) not in one.damages]
        if not missing:
            return
        changes = [
            self.workshop.tensors(one.piece, form, self.ledger.elimination(one.piece, self.workshop))
            for one, form in missing
        ]
        for (one, form), damage in zip(missing, self.gauge.measure(block, changes), strict=True):
            one.damages[form.structure, form.sizes] = (damage.mean, damage.stderr)
        for one in {id(one): one for one, _ in missing}.values():
            self.ledger.save(one)

    def _refine(self, known: Mapping[str, Measured], found: Found) -> None:
        """Measure the forms that were chosen, each by itself, and add their damages to what is known."""
        for done, block in enumerate(self.blocks):
            self.observer("measuring what was chosen", done, len(self.blocks))
            forms = [
                (self._curves(piece, frozenset()), form)
                for piece, form, _ in found.chosen
                if piece.layer == block and form.structure != DENSE
            ]
            self._measure(block, forms)
            for one, form in forms:
                known[one.piece.name].damages[form.structure, form.sizes] = one.damages[form.structure, form.sizes]
        self.observer("measuring what was chosen", len(self.blocks), len(self.blocks))

    def _checked(self, found: Found) -> Found:
        """Measure what all chosen forms do together."""
        changed: dict[str, torch.Tensor] = {}
        for piece, form, _ in found.chosen:
            changed |= self.workshop.tensors(piece, form, self.ledger.elimination(piece, self.workshop))
        damage = self.gauge.measure_all(changed)
        return replace(found, real=damage.mean, stderr=damage.stderr)
