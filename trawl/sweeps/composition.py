"""Greedy composition: interventions added to the winner one by one, as long as they help beyond the noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trawl.evaluation.tasks import Task
from trawl.sweeps.scorer import Outcome
from trawl.sweeps.scores import Gain, Scores, gain
from trawl.sweeps.space import Intervention

ScoreTogether = Callable[[tuple[int, ...]], Outcome]


@dataclass(frozen=True)
class Step:
    """One attempt to add a trial's intervention.

    Attributes:
        trial: its number.
        kept: whether it stays.
        improvement: on the composition so far; None where the attempt was given up as hopeless.
        scores: of the composition with it.
    """

    trial: int
    kept: bool
    improvement: Gain | None
    scores: Scores


@dataclass(frozen=True)
class Composition:
    """What greedy composition came to.

    Attributes:
        trials: numbers of the interventions that stay, the winner first.
        steps: every attempt, in order.
        scores: of the whole, on the validation part.
    """

    trials: tuple[int, ...]
    steps: tuple[Step, ...]
    scores: Scores


def candidates(
    best: int,
    outcomes: Mapping[int, Gain],
    interventions: Mapping[int, Intervention],
    layers_of: Callable[[Intervention], tuple[int, ...]],
    order: str,
) -> list[int]:
    """Return the trials to add, in order: the best of every run of layers and roles, where it helps by itself.

    Args:
        best: the winner's number.
        outcomes: each complete trial's gain.
        interventions: by number.
        layers_of: layers of an intervention.
        order: ``last-first`` or ``best-first``.
    """
    leading: dict[tuple[str, str], int] = {}
    for number, found in outcomes.items():
        place = (interventions[number].layers, interventions[number].roles)
        if found.gain > 0 and (place not in leading or found.gain > outcomes[leading[place]].gain):
            leading[place] = number
    chosen = [number for number in leading.values() if number != best]
    if order == "best-first":
        return sorted(chosen, key=lambda number: (-outcomes[number].gain, number))
    return sorted(chosen, key=lambda n: (-max(layers_of(interventions[n])), -outcomes[n].gain, n))


def compose(
    best: int,
    start: Scores,
    order: Sequence[int],
    *,
    most: int,
    noise: float,
    objective: str,
    tasks: Sequence[Task],
    overlaps: Callable[[tuple[int, ...], int], bool],
    score: ScoreTogether,
) -> Composition:
    """Add interventions to the winner while the validation part improves by more than its noise.

    Args:
        best: the winner's number.
        start: its scores.
        order: trials to try, each once.
        most: how many may be added.
        noise: standard errors of the paired difference that an addition must exceed.
        objective: that decides.
        tasks: of the sweep.
        overlaps: whether a trial shares a matrix with those that stay.
        score: scores trials together on the validation part.
    Cost: one trial for each candidate tried.
    """
    members: tuple[int, ...] = (best,)
    scores, steps = start, []
    for number in order:
        if len(members) > most:
            break
        if overlaps(members, number):
            continue
        outcome = score((*members, number))
        improvement = None if outcome.stopped else gain(outcome.scores, scores, objective, tasks)
        kept = improvement is not None and improvement.exceeds(noise)
        steps.append(Step(number, kept, improvement, outcome.scores))
        if kept:
            members, scores = (*members, number), outcome.scores
    return Composition(members, tuple(steps), scores)


def step_json(step: Step, summary: Mapping[str, Any], noise: float) -> dict[str, Any]:
    """Return a step as results.json holds it."""
    found = step.improvement
    if found is None:
        reason = "given up: its loss is hopeless"
    elif step.kept:
        reason = f"improves by more than {noise:g} standard errors"
    else:
        reason = f"does not improve by more than {noise:g} standard errors"
    return {
        "trial": step.trial,
        "kept": step.kept,
        "reason": reason,
        "validation": dict(summary),
        "improvement": None if found is None else found.gain,
        "noise": None if found is None else found.gain_stderr,
    }
