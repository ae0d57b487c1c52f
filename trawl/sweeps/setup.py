"""What a sweep is asked to do; everything here decides its results."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from trawl.errors import PlanError, suggestion
from trawl.evaluation.tasks import QATask, Task, parse_task
from trawl.sweeps.scores import WRITTEN, check_objectives, figure_name
from trawl.sweeps.space import Space
from trawl.sweeps.split import split_task

SAMPLERS = ("grid", "tpe")
ORDERS = ("last-first", "best-first")


@dataclass(frozen=True)
class Setup:
    """A sweep's model, space, tasks and rules.

    Attributes:
        model: folder, hub id or .gguf file.
        space: what may be tried.
        tasks: SPECs.
        objectives: ``accuracy``, ``log_loss``, ``kept``, or a figure's own name; the first decides the winner.
        revision: of a hub id.
        limit: the most records of each task.
        fraction: the validation part's share.
        seed: of the split, the decompositions and the sampler.
        sampler: ``grid`` tries everything, ``tpe`` what looks promising.
        trials: the most trials; None for the whole grid, or 100 with ``tpe``.
        patience: nats per token by which a trial's loss may surely exceed the base's before the trial is stopped; None
            never stops one.
        n_iter_max: cap on sweeps of a decomposition; None takes the method's own.
        tol: change of fit under which they stop; None takes the method's own.
        dtype: to load the model in.
        device: where to evaluate.
        batch_tokens: padded tokens in one batch.
        prefix_memory: bytes for the base model's activations, which trials start from, and for a trial's own.
        trust_remote_code: whether the code that comes with the model runs; every process is told anew.
    """

    model: str
    space: Space
    tasks: tuple[str, ...]
    objectives: tuple[str, ...] = ("accuracy",)
    revision: str | None = None
    limit: int | None = None
    fraction: float = 0.2
    seed: int = 0
    sampler: Literal["grid", "tpe"] = "grid"
    trials: int | None = None
    patience: float | None = 0.5
    n_iter_max: int | None = None
    tol: float | None = None
    dtype: str = "auto"
    device: str = "auto"
    batch_tokens: int = 4096
    prefix_memory: int = 4_000_000_000
    trust_remote_code: bool = False

    def parsed(self) -> tuple[Task, ...]:
        """Read the task files and check every rule that needs no model.

        Returns: the tasks; those of qa write no answers where no objective looks at them.
        Raises: PlanError: a task file is unusable or too small to split, or an objective is no figure of any task.
        """
        if not self.tasks:
            raise PlanError("no task given; pass --task, such as --task qa:facts.jsonl")
        if not 0 < self.fraction < 1:
            raise PlanError(f"the validation share is {self.fraction}; expected a number between 0 and 1")
        if self.sampler not in SAMPLERS:
            raise PlanError(f"unknown sampler {self.sampler!r}{suggestion(self.sampler, SAMPLERS)}; expected grid, tpe")
        if self.patience is not None and math.isnan(self.patience):
            raise PlanError("patience is not a number; expected nats a token, or none")
        for name, value in (("limit", self.limit), ("trials", self.trials), ("batch_tokens", self.batch_tokens)):
            if value is not None and value < 1:
                raise PlanError(f"{name} is {value}; expected at least 1")
        tasks = tuple(self._trimmed(parse_task(spec)) for spec in self.tasks)
        for task in tasks:
            split_task(task, self.fraction, self.seed, self.limit)
        check_objectives(self.objectives, tasks)
        return tasks

    def _trimmed(self, task: Task) -> Task:
        """Drop what no objective looks at."""
        needed = {figure_name(name, task) for name in self.objectives}
        return replace(task, answers=bool(needed & set(WRITTEN))) if isinstance(task, QATask) else task

    @property
    def objective(self) -> str:
        """The objective that decides the winner."""
        return next(name for name in self.objectives if name != "kept")

    def identity(self, fingerprint: str, tokenizer: str, tasks: Sequence[Task]) -> dict[str, Any]:
        """Return what a study belongs to; only the number of trials may grow later."""
        value = asdict(self)
        for name in ("trials", "device", "batch_tokens", "prefix_memory", "model"):
            del value[name]
        if not self.trust_remote_code:
            del value["trust_remote_code"]  # as in studies that are older than it
        return value | {"weights": fingerprint, "tokenizer": tokenizer, "tasks": [_digest(task) for task in tasks]}


def _digest(task: Task) -> str:
    """Return what tells a task from others: all that is asked, wherever its file lies."""
    asked = {name: value for name, value in vars(task).items() if name != "spec"}
    _, _, options = task.spec.partition("?")
    return hashlib.sha256(repr((task.kind, options, asked)).encode()).hexdigest()[:16]
