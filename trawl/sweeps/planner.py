"""What interventions mean for a checkpoint, from headers alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trawl.errors import PlanError, RankError
from trawl.factor_library import FactorLibrary
from trawl.hub import open_checkpoint
from trawl.planned import Plan
from trawl.planning import make_plan, match_checkpoint
from trawl.recipe import Recipe
from trawl.sweeps.setup import Setup
from trawl.sweeps.space import Intervention, Rank, rank_text

LONGEST = 120  # letters of a library's name, which lists its ranks: file systems take 255 bytes
TOKENIZER_FILES = ("tokenizer", "special_tokens", "added_tokens", "vocab", "merges", "spiece", "sentencepiece")


@dataclass(eq=False)
class Planner:
    """Plans interventions on the stored checkpoint, which ``trawl compress`` starts from too.

    Attributes:
        setup: the sweep's.
        folder: where factor files are kept.
    """

    setup: Setup
    folder: Path

    def __post_init__(self) -> None:
        self.tasks = self.setup.parsed()
        self.checkpoint = open_checkpoint(self.setup.model, self.setup.revision)
        self.match = match_checkpoint(self.checkpoint)

    @property
    def layer_count(self) -> int:
        """Layers of the model."""
        return self.match.layers

    @property
    def tokenizer(self) -> str:
        """Digest of the tokenizer's files, which decide every figure as the weights do."""
        found = hashlib.sha256()
        for name in self.checkpoint.side_files:
            if name.name.startswith(TOKENIZER_FILES):
                found.update(f"{name}\0".encode() + (self.checkpoint.folder / name).read_bytes())
        return found.hexdigest()[:16]

    def check(self, interventions: Sequence[Intervention]) -> tuple[tuple[Intervention, ...], tuple[str, ...]]:
        """Return the interventions that the model's shapes allow, and why the others are left out.

        Raises: TrawlError: a role or layer is not in the model.
        """
        kept: list[Intervention] = []
        refused: dict[tuple[str, Rank, str], list[str]] = {}  # alike but for the layers
        for intervention in interventions:
            try:
                self.plan(intervention)
            except RankError as e:
                alike = refused.setdefault((intervention.method, intervention.rank, intervention.roles), [])
                alike.append(f"{intervention.label} left out: {e}")
                continue
            kept.append(intervention)
        notes = tuple(
            f"{first} (and {len(others)} other runs of layers)" if others else first
            for first, *others in refused.values()
        )
        if not interventions:
            raise PlanError(
                "nothing to try: rank triples are for method tucker, and the methods are "
                f"{', '.join(self.setup.space.methods)}; give --ranks integers, or --method tucker"
            )
        if not kept:
            raise PlanError(f"no intervention fits the model: {notes[0]}")
        return tuple(kept), notes

    def plan(self, intervention: Intervention) -> Plan:
        """Work out an intervention's stacks on the stored checkpoint, which ``trawl compress`` starts from too."""
        return make_plan(self.checkpoint, self.recipe(intervention))

    def recipe(self, intervention: Intervention) -> Recipe:
        """Return the recipe of an intervention with the sweep's seed and limits."""
        return intervention.recipe(self.setup.seed, self.setup.n_iter_max, self.setup.tol)

    def library_folder(self, method: str) -> Path:
        """Where the factor files of a method at the sweep's ranks lie."""
        ranks = (rank_text(rank).replace(",", "x") for rank in self.setup.space.ladder(method))
        name = "-".join([method, *ranks])
        if len(name) > LONGEST:
            name = f"{method}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
        return self.folder / "factors" / name

    def library(self, method: str) -> FactorLibrary:
        """Return the factor files of a method at the sweep's ranks."""
        ladder = self.setup.space.ladder(method)
        return FactorLibrary.create(self.library_folder(method), ladder)
