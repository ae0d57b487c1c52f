"""Trials: structures that are seldom the best are measured in a few blocks, and elsewhere if they came close there."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from trawl.budget.choosing import Option
from trawl.budget.ledger import Measured
from trawl.budget.pieces import Form, Piece, Structure

PROBES = 2  # blocks, or pairs of them, where everything is measured
CLOSE = 1.25  # times the damage of the best other way to the same size: what a trial has to come within
DEEPEST = 0.5  # of the budget's share: what comes close only at smaller sizes is not chosen


def probe_blocks(pieces: Sequence[Piece]) -> list[int]:
    """Return the first blocks of ``PROBES`` evenly spread pieces: of pairs of layers where there are some."""
    layers = sorted({piece.layer for piece in pieces if piece.members} or {piece.layer for piece in pieces})
    return sorted({layers[(2 * number + 1) * len(layers) // (2 * PROBES)] for number in range(PROBES)})


def close_ones(tried: Measured, known: Mapping[str, Measured], keep: float) -> set[Structure]:
    """Return the trials of a piece that come close to the best of what they would be in place of.

    Args:
        tried: the piece, with the damages of its trials.
        known: by name the pieces that it covers, with their damages.
        keep: the share of all pieces' parameters that stays.
    """
    rivals = [known[name] for name in tried.piece.covers]
    menus = [_proven(one) for one in rivals]
    least = max(sum(min(option.size for option in menu) for menu in menus), DEEPEST * keep * tried.piece.parameters)
    references = [point for point in tried.references() if point.form.structure in tried.piece.trials]
    return {
        point.form.structure
        for point in references
        if point.form.parameters >= least and tried.predict(point) <= CLOSE * _best(menus, point.form)
    }


def _proven(one: Measured) -> list[Option]:
    """Return the options of a piece that are no trials."""
    options = [(form, damage) for form, damage in one.options() if form.structure not in one.piece.trials]
    return [Option(form.parameters, damage) for form, damage in options]


def _best(menus: Sequence[Sequence[Option]], form: Form) -> float:
    """Return the least damage that options do which together are no larger than a form."""
    taken = itertools.product(*menus)
    return min(
        sum(option.damage for option in options)
        for options in taken
        if sum(option.size for option in options) <= form.parameters
    )
