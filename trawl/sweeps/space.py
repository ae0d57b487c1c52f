"""The space of a sweep: method x roles x layers x group-layers x rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from trawl.errors import PlanError
from trawl.recipe import Recipe
from trawl.recipe_reader import make_recipe
from trawl.stacking import format_layers

Rank = int | tuple[int, int, int]
GroupLayers = Literal["all"] | int


@dataclass(frozen=True)
class Intervention:
    """One thing to try: the matrices of some roles in a run of layers, decomposed together.

    Attributes:
        method: ``cp``, ``tucker`` or ``svd``.
        roles: as in a recipe, such as ``fc`` or ``up,down``.
        layers: as in a recipe, such as ``28`` or ``20-29``.
        group_layers: how many layers were asked for in a run.
        rank: one integer, or for Tucker a triple.
    """

    method: str
    roles: str
    layers: str
    group_layers: GroupLayers
    rank: Rank

    def recipe(self, seed: int, n_iter_max: int | None, tol: float | None) -> Recipe:
        """Return the recipe that does this to a checkpoint: one stack of each shape across the run."""
        return make_recipe(
            {
                "method": self.method,
                "rank": self.rank,
                "layers": self.layers,
                "roles": self.roles,
                "seed": seed,
                "n_iter_max": n_iter_max,
                "tol": tol,
            },
            f"intervention {self.label}",
        )

    @property
    def label(self) -> str:
        """What a person calls it."""
        return f"{self.method} rank {rank_text(self.rank)} of {self.roles} in layers {self.layers}"

    def to_json(self) -> dict[str, Any]:
        """Return its fields as JSON-able values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Intervention:
        """Return what :meth:`to_json` wrote."""
        rank = value["rank"]
        return cls(**value | {"rank": tuple(rank) if isinstance(rank, list) else rank})


def rank_text(rank: Rank) -> str:
    """Write a rank as the command line takes it."""
    return str(rank) if isinstance(rank, int) else ",".join(map(str, rank))


@dataclass(frozen=True)
class Space:
    """Everything that a sweep may try.

    Attributes:
        ranks: one integer each, or for Tucker triples; every method takes every integer.
        methods: of ``cp``, ``tucker``, ``svd``.
        roles: role lists, each tried by itself.
        layers: the layers to choose from.
        group_layers: lengths of the runs into which the layers are cut: 1 tries each by itself, ``all`` the whole.
    """

    ranks: tuple[Rank, ...]
    methods: tuple[str, ...] = ("cp",)
    roles: tuple[str, ...] = ("fc",)
    layers: str = "all"
    group_layers: tuple[GroupLayers, ...] = (1,)

    def __post_init__(self) -> None:
        for name in ("ranks", "methods", "roles", "group_layers"):
            if not getattr(self, name):
                raise PlanError(f"the sweep has no {name}; give at least one")
            object.__setattr__(
                self, name, tuple(dict.fromkeys(getattr(self, name)))
            )  # what is given twice is tried once
        for rank in self.ranks:
            if type(rank) is not int and not (isinstance(rank, tuple) and [type(each) for each in rank] == [int] * 3):
                raise PlanError(f"ranks hold {rank!r}; expected integers, or for tucker triples (stack, inner, hidden)")
        for size in self.group_layers:
            if size != "all" and size < 1:
                raise PlanError(f"group_layers holds {size!r}; expected 'all' or a number of layers from 1")

    def runs(self, layers: int) -> Iterator[tuple[GroupLayers, str]]:
        """Yield the runs of layers with the length asked for; a run that two lengths give comes once.

        Args:
            layers: how many the model has.
        Raises: PlanError: the layers cannot be read or are not in the model.
        """
        chosen = make_recipe({"rank": 1, "layers": self.layers}, "sweep").selected_layers(layers)
        seen = set()
        for size in self.group_layers:
            length = len(chosen) if size == "all" else size
            for first in range(0, len(chosen), length):
                run = format_layers(chosen[first : first + length])
                if run not in seen:
                    seen.add(run)
                    yield size, run

    def interventions(self, layers: int) -> tuple[Intervention, ...]:
        """Return every intervention on a model of so many layers, deepest layers last, ranks in the order given."""
        return tuple(
            Intervention(method, roles, run, size, rank)
            for size, run in self.runs(layers)
            for method in self.methods
            for roles in self.roles
            for rank in self.ranks
            if isinstance(rank, int) or method == "tucker"
        )

    def ladder(self, method: str) -> Sequence[Rank]:
        """Return the ranks that a method is tried at."""
        return tuple(rank for rank in self.ranks if isinstance(rank, int) or method == "tucker")
