"""Choosing: one option from every menu, within a budget, at the least damage."""

from __future__ import annotations

import ctypes
import itertools
import math
import os
import sys
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from trawl.errors import PlanError

NODES = 500  # of the branch and bound; by then a large instance is within a hundred-thousandth of the least damage
GAP = 1e-6  # of the damage, under which the search ends


@dataclass(frozen=True)
class Option:
    """One way to store a piece of a model.

    Attributes:
        size: what it costs, such as parameters or bytes.
        damage: what it does to the model, in any unit that adds up over pieces; finite, and not negative.
    """

    size: int
    damage: float


def choose(
    menus: Sequence[Sequence[Option]], budget: int, covers: Sequence[Sequence[Hashable]] | None = None
) -> tuple[int | None, ...]:
    """Return which option of each menu to take.

    Minimizes ``Σ damage`` subject to ``Σ size ≤ budget``, one option for every place: the multiple-choice knapsack,
    where some menus may be in place of several others.

    Args:
        menus: at least one option each.
        budget: largest sum of sizes; it is never exceeded.
        covers: the places of each menu; of menus that cover a place together one is used. Every place has a menu for
            itself alone. By default each menu has a place of its own.
    Returns: one index per menu, None for one that is not used; of equal optima the one found first, always the same.
    Raises: PlanError: even the smallest options exceed the budget.
    Cost: branch and bound over the options that no other undercuts in size and damage, and that do no more damage than
        a greedy choice does in all; its relaxation is fractional in one menu only, so that few branches are needed:
        seconds for five thousand options. The search ends after ``NODES`` branches, which only large instances reach.
    Reference: Kellerer, Pferschy & Pisinger 2004, chapter 11, doi:10.1007/978-3-540-24777-7; HiGHS: Huangfu & Hall
        2018, doi:10.1007/s12532-017-0130-5
    """
    fronts = [_front(menu) for menu in menus]
    covers = covers or [(place,) for place in range(len(menus))]
    alone = [front if len(places) == 1 else [] for front, places in zip(fronts, covers, strict=True)]
    least = _total(menus, [front[0] if front else None for front in alone])
    if least > budget:
        raise PlanError(f"a budget of {budget:,} is out of reach: the smallest options take {least:,}")
    greedy = _greedy(menus, alone, budget)
    bound = sum(menu[index].damage for menu, index in zip(menus, greedy, strict=True) if index is not None)
    fronts = [[at for at in front if menu[at].damage <= bound] for menu, front in zip(menus, fronts, strict=True)]
    allowed = budget
    while allowed >= _total(menus, greedy):
        taken = _solve(menus, fronts, covers, allowed, bound)
        excess = _total(menus, taken) - budget
        if excess <= 0:
            return taken
        allowed -= excess  # the solver's tolerance, in floating point
    return greedy


def _total(menus: Sequence[Sequence[Option]], taken: Sequence[int | None]) -> int:
    """Return the sum of the sizes of what is taken."""
    return sum(menu[index].size for menu, index in zip(menus, taken, strict=True) if index is not None)


@contextmanager
def _silent() -> Iterator[None]:
    """Keep a ``with`` block's C code off standard output: HiGHS prints there whatever it is told."""
    libc = ctypes.CDLL(None)
    sys.stdout.flush()
    libc.fflush(None)
    output, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        libc.fflush(None)
        os.dup2(output, 1)
        os.close(output)
        os.close(nowhere)


def _front(menu: Sequence[Option]) -> list[int]:
    """Return the options that no other undercuts in size and damage, by size."""
    front: list[int] = []
    least = math.inf
    for index in sorted(range(len(menu)), key=lambda index: (menu[index].size, menu[index].damage)):
        if menu[index].damage < least:
            front.append(index)
            least = menu[index].damage
    return front


def _greedy(menus: Sequence[Sequence[Option]], fronts: Sequence[Sequence[int]], budget: int) -> tuple[int | None, ...]:
    """Return a choice within a budget that takes the smallest options, and then what spares most damage for its size.

    Args:
        menus: as for :func:`choose`.
        fronts: of each menu the options that are taken from, by size; none for one that is not used.
        budget: no less than the smallest of all.
    """
    taken = [front[0] if front else None for front in fronts]
    spare = budget - _total(menus, taken)
    steps = []
    for number, (menu, front) in enumerate(zip(menus, fronts, strict=True)):
        hull: list[int] = []
        for index in front:
            while len(hull) > 1 and _rate(menu[hull[-2]], menu[hull[-1]]) <= _rate(menu[hull[-1]], menu[index]):
                hull.pop()
            hull.append(index)
        steps += [(_rate(menu[one], menu[other]), number, one, other) for one, other in itertools.pairwise(hull)]
    for _, number, one, other in sorted(steps, key=lambda step: -step[0]):
        size = menus[number][other].size - menus[number][one].size
        if taken[number] == one and size <= spare:
            taken[number], spare = other, spare - size
    return tuple(taken)


def _rate(one: Option, other: Option) -> float:
    """Return how much damage a larger option spares, for its size."""
    return (one.damage - other.damage) / (other.size - one.size)


def _solve(
    menus: Sequence[Sequence[Option]],
    fronts: Sequence[Sequence[int]],
    covers: Sequence[Sequence[Hashable]],
    budget: int,
    scale: float,
) -> tuple[int | None, ...]:
    """Solve the knapsack within the solver's tolerances; of damage in units of ``scale``, since some are absolute."""
    from scipy.optimize import Bounds, LinearConstraint, milp  # noqa: PLC0415 (half a second that others need not pay)
    from scipy.sparse import csr_array  # noqa: PLC0415 (likewise)

    numbered = [(menu, index) for menu, front in enumerate(fronts) for index in front]
    if not numbered:
        return ()
    damage = np.array([menus[menu][index].damage for menu, index in numbered])
    size = np.array([menus[menu][index].size for menu, index in numbered], dtype=float)
    rows = {place: row for row, place in enumerate(dict.fromkeys(place for places in covers for place in places))}
    marks = [(rows[place], column) for column, (menu, _) in enumerate(numbered) for place in covers[menu]]
    one_each = csr_array((np.ones(len(marks)), tuple(zip(*marks, strict=True))), (len(rows), len(numbered)))
    with _silent():
        found = milp(
            damage / (scale or 1.0),
            integrality=np.ones(len(numbered)),
            bounds=Bounds(0, 1),
            constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(size / max(budget, 1), -np.inf, 1)],
            options={"mip_rel_gap": GAP, "node_limit": NODES},
        )
    if found.x is None:
        raise PlanError(f"no choice within {budget:,} was found: {found.message}")
    taken = {menu: index for (menu, index), share in zip(numbered, found.x, strict=True) if share > 0.5}
    return tuple(taken.get(menu) for menu in range(len(menus)))
