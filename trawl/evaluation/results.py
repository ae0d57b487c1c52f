"""Figures with their standard errors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Figure:
    """One number about a model.

    Attributes:
        name: what it measures, such as ``accuracy``.
        value: the estimate; shares lie between 0 and 1, losses are in nats per token unless the name says otherwise.
        stderr: its standard error; None where there are too few records to tell.
        higher_is_better: the direction of improvement; None where that is not known.
    """

    name: str
    value: float
    stderr: float | None
    higher_is_better: bool | None

    def to_json(self) -> dict[str, Any]:
        """Return the figure as JSON-able values; what is not finite becomes null."""
        return {
            "name": self.name,
            "value": _finite(self.value),
            "stderr": _finite(self.stderr),
            "higher_is_better": self.higher_is_better,
        }


@dataclass(frozen=True)
class TaskResult:
    """What a model made of one task.

    Attributes:
        task: the task's SPEC.
        kind: ``ppl``, ``qa``, ``choice``, ``pairs`` or ``lm``.
        figures: the most telling first.
        scored: records, or windows of text, that the figures are over.
        overlong: records left out of the figures because they are longer than the context.
        settings: what the figures depend on, such as context, stride and template.
        seconds: wall time.
        scores: per figure the value of each scored record, in file order, for paired comparisons of two models;
            for ``ppl`` each window's summed loss and its tokens. Not part of :meth:`to_json`.
    """

    task: str
    kind: str
    figures: tuple[Figure, ...]
    scored: int
    overlong: int
    settings: Mapping[str, Any]
    seconds: float = 0.0
    scores: Mapping[str, tuple[float, ...]] = field(default_factory=dict, repr=False)

    def figure(self, name: str) -> Figure:
        """Return the figure of that name; KeyError if there is none."""
        for figure in self.figures:
            if figure.name == name:
                return figure
        raise KeyError(f"{self.task} has no figure {name!r}; it has {', '.join(f.name for f in self.figures)}")

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON-able values."""
        return {
            "task": self.task,
            "kind": self.kind,
            "figures": [figure.to_json() for figure in self.figures],
            "scored": self.scored,
            "overlong": self.overlong,
            "settings": dict(self.settings),
            "seconds": round(self.seconds, 3),
        }


def mean(name: str, values: Sequence[float], *, higher_is_better: bool) -> Figure:
    """Return the mean of independent records with its standard error, s / sqrt(n), s with n - 1 degrees of freedom."""
    count = len(values)
    value = math.fsum(values) / count
    if count < 2:
        return Figure(name, value, None, higher_is_better)
    variance = math.fsum((x - value) ** 2 for x in values) / (count - 1)
    return Figure(name, value, math.sqrt(variance / count), higher_is_better)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
