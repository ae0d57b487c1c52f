"""Scores of an intervention, and how far they lie from the base model's, record by record."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trawl.errors import PlanError, suggestion
from trawl.evaluation.results import TaskResult
from trawl.evaluation.tasks import Task

KEPT = "kept"
FIGURES = {
    "accuracy": {"qa": "correct", "choice": "accuracy", "pairs": "spearman"},
    "log_loss": {"qa": "log_loss", "choice": "log_loss", "ppl": "loss"},
}
OWN_FIGURES = {
    "qa": ("correct", "f1", "log_loss", "exact"),
    "choice": ("accuracy", "accuracy_norm", "log_loss"),
    "ppl": ("loss",),
    "pairs": ("spearman",),
}
WRITTEN = ("correct", "f1")  # figures that need greedy answers
LOSSES = ("log_loss", "loss", KEPT)


def figure_name(objective: str, task: Task) -> str | None:
    """Return the figure of a task that an objective means; None if the task has none.

    ``accuracy`` is a qa task's ``correct``, a choice task's ``accuracy``, a pairs task's ``spearman``; ``log_loss`` is
    the loss per token. Any figure's own name is an objective too.
    """
    if objective in FIGURES:
        return FIGURES[objective].get(task.kind)
    return objective if objective in OWN_FIGURES.get(task.kind, ()) else None


def check_objectives(objectives: Sequence[str], tasks: Sequence[Task]) -> None:
    """Raise PlanError for an objective that no task can measure."""
    if not [name for name in objectives if name != KEPT]:
        raise PlanError("objectives name no figure of a task; give accuracy or log_loss beside kept")
    for objective in objectives:
        if objective != KEPT and not any(figure_name(objective, task) for task in tasks):
            names = dict.fromkeys([*FIGURES, *(name for own in OWN_FIGURES.values() for name in own)])
            known = [*(name for name in names if any(figure_name(name, task) for task in tasks)), KEPT]
            kinds = ", ".join(dict.fromkeys(task.kind for task in tasks))
            raise PlanError(
                f"objective {objective!r} is no figure of {kinds} tasks{suggestion(objective, known)}; expected "
                f"{', '.join(known)}"
            )


@dataclass(frozen=True)
class TaskScores:
    """What a model made of some records of one task.

    Attributes:
        task: the SPEC.
        kind: of the task.
        values: per figure the value of each record; for ``ppl`` each window's loss per token.
        weights: of the records; a window's tokens, else 1.
        whole: figures that no single record has, such as a rank correlation.
        overlong: records left out because they are longer than the context.
    """

    task: str
    kind: str
    values: Mapping[str, tuple[float, ...]]
    weights: tuple[float, ...]
    whole: Mapping[str, tuple[float, float | None]] = field(default_factory=dict)
    overlong: int = 0

    def figures(self) -> dict[str, tuple[float, float | None]]:
        """Return each figure's value and standard error."""
        return {name: estimate(values, self.weights) for name, values in self.values.items()} | dict(self.whole)

    def gains(self, base: TaskScores) -> dict[str, tuple[float, float | None]]:
        """Return each figure's improvement on a base model over the same records, with the paired standard error."""
        found: dict[str, tuple[float, float | None]] = {}
        for name, values in self.values.items():
            sign = -1.0 if name in LOSSES else 1.0
            pairs = zip(values, base.values[name], strict=False)  # a stopped trial has the first records only
            found[name] = estimate([sign * (own - other) for own, other in pairs], self.weights)
        for name, (value, error) in self.whole.items():
            other, other_error = base.whole[name]
            both = None if error is None or other_error is None else math.hypot(error, other_error)
            found[name] = (value - other, both)
        return found


def estimate(values: Sequence[float], weights: Sequence[float]) -> tuple[float, float | None]:
    """Return the weighted mean and its standard error.

    With weights w and mean m = Σ w v / Σ w the error is sqrt(n / (n − 1) · Σ w² (v − m)²) / Σ w, which for equal
    weights is that of a plain mean (Cochran 1977, section 6.4). None for a single value. Weights beyond the last value
    are those of records that a stopped trial has not scored.
    """
    weights = weights[: len(values)]
    count, total = len(values), math.fsum(weights)
    if not all(map(math.isfinite, values)):
        return math.nan, None
    mean = math.fsum(w * v for v, w in zip(values, weights, strict=True)) / total
    if count < 2:
        return mean, None
    squares = math.fsum((w * (v - mean)) ** 2 for v, w in zip(values, weights, strict=True))
    return mean, math.sqrt(count / (count - 1) * squares) / total


def score_pieces(results: Sequence[TaskResult]) -> TaskScores:
    """Join the results of a task's pieces."""
    first = results[0]
    scored_by = list(first.scores)[:1]
    overlong = sum(result.overlong for result in results if not scored_by or scored_by[0] in result.scores)
    names = dict.fromkeys(name for result in results for name in result.scores)
    joined = {name: tuple(v for result in results for v in result.scores.get(name, ())) for name in names}
    if first.kind == "ppl":
        losses = tuple(loss / n for loss, n in zip(joined["loss_sum"], joined["tokens"], strict=True))
        return TaskScores(first.task, first.kind, {"loss": losses}, joined["tokens"], overlong=overlong)
    if first.kind == "pairs":
        whole = {figure.name: (figure.value, figure.stderr) for figure in first.figures}
        return TaskScores(first.task, first.kind, {}, (1.0,) * first.scored, whole, overlong)
    count = max(map(len, joined.values()))
    return TaskScores(first.task, first.kind, joined, (1.0,) * count, overlong=overlong)


@dataclass(frozen=True)
class Scores:
    """Scores on one part of all tasks.

    Attributes:
        tasks: in the order of the sweep's.
    """

    tasks: tuple[TaskScores, ...]

    @property
    def records(self) -> int:
        """Records scored."""
        return sum(len(task.weights) for task in self.tasks)

    def to_json(self) -> dict[str, Any]:
        """Return every record's values as JSON-able ones."""
        return {
            "tasks": [
                {
                    "task": task.task,
                    "kind": task.kind,
                    "values": {name: list(values) for name, values in task.values.items()},
                    "weights": list(task.weights),
                    "whole": {name: list(pair) for name, pair in task.whole.items()},
                    "overlong": task.overlong,
                }
                for task in self.tasks
            ],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Scores:
        """Return what :meth:`to_json` wrote."""
        return cls(
            tuple(
                TaskScores(
                    task["task"],
                    task["kind"],
                    {name: tuple(values) for name, values in task["values"].items()},
                    tuple(task["weights"]),
                    {name: (pair[0], pair[1]) for name, pair in task["whole"].items()},
                    task["overlong"],
                )
                for task in value["tasks"]
            )
        )


@dataclass(frozen=True)
class Gain:
    """An objective's value and its improvement on another model's, both with standard errors.

    Attributes:
        value: the mean over the tasks that have the figure.
        stderr: of the value.
        gain: the mean improvement over the same records; positive is better, whatever the figure's direction.
        gain_stderr: paired, record by record, so far smaller than the difference of two means would have.
    """

    value: float
    stderr: float | None
    gain: float
    gain_stderr: float | None

    def exceeds(self, noise: float) -> bool:
        """Whether the gain is more than ``noise`` standard errors."""
        return self.gain > noise * (self.gain_stderr or 0.0)


def gain(scores: Scores, base: Scores, objective: str, tasks: Sequence[Task]) -> Gain | None:
    """Compare two models' scores in one objective, over the records that both have.

    Returns: None where no task has the figure, or a trial was stopped before it was measured.
    """
    values, gains = [], []
    for task, own, other in zip(tasks, scores.tasks, base.tasks, strict=True):
        name = figure_name(objective, task)
        if name is not None:
            if name not in own.values and name not in own.whole:
                return None
            values.append(own.figures()[name])
            gains.append(own.gains(other)[name])
    if not values:
        return None
    value, stderr = _mean(values)
    improvement, noise = _mean(gains)
    return Gain(value, stderr, improvement, noise)


def _mean(estimates: Sequence[tuple[float, float | None]]) -> tuple[float, float | None]:
    """Return the mean of independent estimates and its standard error."""
    value = math.fsum(v for v, _ in estimates) / len(estimates)
    errors = [error for _, error in estimates if error is not None]
    if len(errors) < len(estimates):
        return value, None
    return value, math.hypot(*errors) / len(errors)


def summarize(scores: Scores, base: Scores, objectives: Sequence[str], tasks: Sequence[Task]) -> dict[str, Any]:
    """Return figures and gains as results.json holds them; what is not finite becomes null."""
    rows = []
    for own, other in zip(scores.tasks, base.tasks, strict=True):
        gains = own.gains(other)
        rows.append(
            {
                "task": own.task,
                "overlong": own.overlong,
                "figures": [
                    {
                        "name": name,
                        "value": _finite(value),
                        "stderr": _finite(error),
                        "higher_is_better": name not in LOSSES,
                        "gain": _finite(gains[name][0]),
                        "gain_stderr": _finite(gains[name][1]),
                    }
                    for name, (value, error) in own.figures().items()
                ],
            }
        )
    compared = {name: gain(scores, base, name, tasks) for name in objectives if name != KEPT}
    return {
        "records": scores.records,
        "of": base.records,
        "objectives": {
            name: {
                "value": _finite(found.value),
                "stderr": _finite(found.stderr),
                "gain": _finite(found.gain),
                "gain_stderr": _finite(found.gain_stderr),
            }
            for name, found in compared.items()
            if found is not None
        },
        "tasks": rows,
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
