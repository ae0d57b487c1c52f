"""A loaded model that scores interventions; it is never loaded again."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from trawl.evaluation.reading import Readings
from trawl.evaluation.results import TaskResult
from trawl.evaluation.runner import run_task
from trawl.evaluation.subject import Subject, open_subject
from trawl.factor_library import FactorLibrary
from trawl.models import find_layers
from trawl.observers import Observer, silent
from trawl.planned import Plan, PlannedStack
from trawl.sweeps.editing import WeightEditor
from trawl.sweeps.planner import Planner
from trawl.sweeps.prefix import PrefixCache
from trawl.sweeps.scores import Scores, gain, score_pieces
from trawl.sweeps.setup import Setup
from trawl.sweeps.space import Intervention
from trawl.sweeps.split import Piece, split_task

Part = Literal["validation", "test"]
READINGS_SHARE = 0.25  # of the memory for activations: the rest is the base model's
STOP_ERRORS = 3.0  # standard errors: a trial is stopped for what is surely worse, not for bad luck


@dataclass(frozen=True)
class Outcome:
    """What came of scoring some interventions together.

    Attributes:
        scores: on the part asked for.
        stopped: whether it was given up before all records were scored.
        stacks: per stack its name, shape, rank and relative error.
        kept: parameters of the whole model, were the stacks stored factored, by those it has.
        kept_targeted: factor parameters by those of the matrices that they replace.
        seconds: wall time.
    """

    scores: Scores
    stopped: bool = False
    stacks: tuple[dict[str, Any], ...] = ()
    kept: float = 1.0
    kept_targeted: float = 1.0
    seconds: float = 0.0


@dataclass(eq=False)
class Scorer:
    """Applies interventions to a model in memory, scores it, and puts the weights back.

    Attributes:
        setup: the sweep's.
        folder: where factor files are kept.
        observer: told of progress.
    """

    setup: Setup
    folder: Path
    observer: Observer = silent
    readings: Readings = field(default_factory=Readings, init=False, repr=False)
    _prefixes: dict[Part, tuple[PrefixCache, Scores]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        setup = self.setup
        self.planner = Planner(setup, self.folder)
        self.tasks = self.planner.tasks
        self.subject: Subject = open_subject(
            self.planner.checkpoint.folder,
            self.tasks,
            dtype=setup.dtype,
            device=setup.device,
            batch_tokens=setup.batch_tokens,
            trust_remote_code=setup.trust_remote_code,
        )
        self.subject.model.eval()
        self.editor = WeightEditor(self.subject.model)
        self.layers = find_layers(self.subject.model, self.editor.match)

    @property
    def _room(self) -> int:
        """Bytes for the prompts that a trial has read."""
        return round(READINGS_SHARE * self.setup.prefix_memory)

    @cached_property
    def parts(self) -> dict[Part, list[tuple[Piece, ...]]]:
        """Pieces of each task's two parts."""
        setup = self.setup
        split = [split_task(task, setup.fraction, setup.seed, setup.limit) for task in self.tasks]
        return {"validation": [parts.validation for parts in split], "test": [parts.test for parts in split]}

    def base(self, part: Part) -> Scores:
        """Score the model as it is, and keep its activations for the trials that follow."""
        if part not in self._prefixes:
            self._prefixes.clear()  # one part's activations at a time
            prefixes = PrefixCache(self.subject.model, self.layers, self.setup.prefix_memory - self._room)
            with prefixes.recording(), self.readings.kept(self._room):
                scores = self._score(part, None)[0]
            self._prefixes[part] = prefixes, scores
        return self._prefixes[part][1]

    def score(self, interventions: Sequence[Intervention], part: Part, *, may_stop: bool = False) -> Outcome:
        """Score the model with interventions applied together; none leaves it as it is.

        Args:
            interventions: none sharing a matrix with another.
            part: which records.
            may_stop: whether to give up once the loss is surely hopeless.
        Returns: the outcome; the model's weights are the original ones again, to the bit.
        Raises: PlanError: two interventions share a matrix. TrawlError: the weights could not be put back.
        Cost: the decompositions that no file holds yet, and one forward pass through the layers from the first changed.
        """
        began = time.perf_counter()
        base = self.base(part)
        if not interventions:
            return Outcome(base)
        with self._applied(interventions) as (stacks, first):
            with self._prefixes[part][0].replaying(first), self.readings.kept(self._room):
                scores, stopped = self._score(part, base if may_stop else None)
            details = tuple(stacks)
        before = sum(item["before"] for item in details)
        after = sum(item["after"] for item in details)
        whole = self.planner.checkpoint.parameters
        shown = tuple({key: item[key] for key in ("name", "shape", "rank", "relative_error")} for item in details)
        seconds = time.perf_counter() - began
        return Outcome(scores, stopped, shown, (whole - before + after) / whole, after / before, seconds)

    @contextmanager
    def _applied(self, interventions: Sequence[Intervention]) -> Iterator[tuple[list[dict[str, Any]], int]]:
        """Put interventions' factors in place; yield their stacks and the first layer that changes."""
        sources: dict[int, tuple[Plan, PlannedStack, FactorLibrary]] = {}
        planned: list[PlannedStack] = []
        for intervention in interventions:
            source, memory = self.planner.plan(intervention), self.editor.plan(self.planner.recipe(intervention))
            library = self.planner.library(intervention.method)
            for item, edited in zip(source.stacks, memory.stacks, strict=True):
                sources[id(edited)] = source, item, library
                planned.append(edited)

        def factors(item: PlannedStack) -> Any:
            source, own, library = sources[id(item)]
            return library.fetch(source, own)

        with self.editor.applied(planned, factors) as errors:
            details = [
                {
                    "name": item.stack.name,
                    "shape": list(item.stack.shape),
                    "rank": list(item.rank),
                    "relative_error": error,
                    "before": item.stack.parameters,
                    "after": item.parameters_after,
                }
                for item, error in zip(planned, errors, strict=True)
            ]
            yield details, min(layer for item in planned for layer in item.stack.layers)

    def _score(self, part: Part, base: Scores | None) -> tuple[Scores, bool]:
        """Score a part piece by piece; with a base, give up when what is done is hopeless."""
        pieces = self.parts[part]
        results: list[list[TaskResult]] = [[] for _ in pieces]
        rounds = max(map(len, pieces))
        for number in range(rounds):
            for own, found in zip(pieces, results, strict=True):
                if number < len(own):
                    piece = own[number]
                    found.append(run_task(self.subject, piece.task, limit=piece.limit, readings=self.readings))
            scores = Scores(tuple(score_pieces(found) for found in results))
            if base is not None and number < rounds - 1 and self._hopeless(scores, base):
                return scores, True
        return scores, False

    def _hopeless(self, scores: Scores, base: Scores) -> bool:
        """Whether the loss is worse than the base's by more than the patience, beyond doubt; NaN is."""
        if self.setup.patience is None:
            return False
        found = gain(scores, base, "log_loss", self.tasks)
        if found is None:
            return False
        return not found.gain + STOP_ERRORS * (found.gain_stderr or 0.0) > -self.setup.patience
