"""What is known of a study: its trials, their outcomes, and the document that tells of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from trawl.sweeps.composition import Composition, step_json
from trawl.sweeps.planner import Planner
from trawl.sweeps.records import FORMAT_VERSION, OutcomeFiles, now, rebuild_commands, trawl_version
from trawl.sweeps.scorer import Outcome
from trawl.sweeps.scores import Gain, figure_name, gain, summarize
from trawl.sweeps.space import Intervention
from trawl.sweeps.study import TrialQueue

STATES = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "stopped",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}


@dataclass(frozen=True)
class Composed:
    """A composition, with the order in which additions were tried and the noise that they had to exceed."""

    order: str
    noise: float
    composition: Composition


@dataclass(eq=False)
class Findings:
    """What the storage and the files of a sweep's folder tell.

    Attributes:
        planner: the sweep's, whose folder holds the files.
        queue: its trials.
        notes: why interventions are left out.
        command: the command line.
        started: when this process began.
    """

    planner: Planner
    queue: TrialQueue
    notes: tuple[str, ...]
    command: str
    started: str = field(default_factory=now)
    _summaries: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def files(self) -> OutcomeFiles:
        """Outcomes that are known."""
        return OutcomeFiles(self.planner.folder)

    @property
    def objective(self) -> str:
        """The objective that decides."""
        return self.planner.setup.objective

    def gains(self) -> dict[int, Gain]:
        """Return the gain of every complete trial in the objective that decides."""
        base = self.files.read("base", "validation")
        assert base is not None
        found = {}
        for trial in self.queue.trials():
            if trial.state == TrialState.COMPLETE:
                outcome = self.files.read(str(trial.number), "validation")
                assert outcome is not None
                own = gain(outcome.scores, base.scores, self.objective, self.planner.tasks)
                assert own is not None
                found[trial.number] = own
        return found

    @staticmethod
    def best(gains: Mapping[int, Gain]) -> int | None:
        """Return the trial of the highest gain, the first of equals."""
        return max(gains, key=lambda number: (gains[number].gain, -number), default=None)

    def tried(self) -> dict[int, Intervention]:
        """Return what each trial tries."""
        return {
            trial.number: Intervention.from_json(trial.user_attrs["intervention"])
            for trial in self.queue.trials()
            if "intervention" in trial.user_attrs
        }

    def layers(self, intervention: Intervention) -> tuple[int, ...]:
        """Return the layers that an intervention changes."""
        plan = self.planner.plan(intervention)
        return tuple(sorted({layer for item in plan.stacks for layer in item.stack.layers}))

    def slices(self, intervention: Intervention) -> set[tuple[int, str]]:
        """Return the matrices that an intervention changes."""
        plan = self.planner.plan(intervention)
        return {(part.layer, part.role) for item in plan.stacks for part in item.stack.slices}

    def best_of_layer(self, gains: Mapping[int, Gain]) -> dict[str, int]:
        """Return the best trial of every single layer."""
        tried = self.tried()
        best: dict[str, int] = {}
        for number, found in gains.items():
            layer = tried[number].layers
            if layer.isdigit() and (layer not in best or found.gain > gains[best[layer]].gain):
                best[layer] = number
        return dict(sorted(best.items(), key=lambda item: int(item[0])))

    def document(self, state: str, composed: Composed | None) -> dict[str, Any]:
        """Return everything that is known, as results.json holds it."""
        setup, tasks = self.planner.setup, self.planner.tasks
        base = {part: self.files.read("base", part) for part in ("validation", "test")}
        summaries = {part: self._summarizer(found) for part, found in base.items()}
        trials = [
            self._trial(trial, summaries)
            for trial in self.queue.trials()
            if "intervention" in trial.user_attrs or trial.state in (TrialState.WAITING, TrialState.RUNNING)
        ]
        trials = [trial for trial in trials if trial is not None]
        gains = self.gains()
        best = self.best(gains)
        winner = [] if best is None else [best]
        if composed is not None:
            winner = list(composed.composition.trials)
        options = {
            "libraries": {method: self.planner.library_folder(method) for method in setup.space.methods},
            "seed": setup.seed,
            "n_iter_max": setup.n_iter_max,
            "tol": setup.tol,
            "revision": setup.revision,
        }
        tried = self.tried()
        scored = base["validation"].scores.tasks if base["validation"] else ()
        tested = base["test"].scores.tasks if base["test"] else (None,) * len(tasks)
        return {
            "format_version": FORMAT_VERSION,
            "trawl": trawl_version(),
            "model": setup.model,
            "source": self.planner.checkpoint.fingerprint,
            "family": self.planner.match.family,
            "layers": self.planner.match.layers,
            "parameters": self.planner.checkpoint.parameters,
            "command": self.command,
            "seed": setup.seed,
            "started": self.started,
            "updated": now(),
            "state": state,
            "sampler": setup.sampler,
            "objectives": list(setup.objectives),
            "left_out": list(self.notes),
            "tasks": [
                {
                    "task": task.spec,
                    "kind": task.kind,
                    "accuracy": figure_name("accuracy", task),
                    "log_loss": figure_name("log_loss", task),
                    "validation": len(own.weights),
                    "test": None if other is None else len(other.weights),
                    "overlong": own.overlong,
                }
                for task, own, other in zip(tasks, scored, tested, strict=True)
            ],
            "base": {part: summaries[part]("base", part) for part in ("validation", "test")},
            "trials": trials,
            "best": best,
            "best_of_layer": self.best_of_layer(gains),
            "front": self.front(),
            "composition": None if composed is None else self._composition(composed, summaries),
            "commands": rebuild_commands(setup.model, [tried[n] for n in winner], self.planner.folder, options),
        }

    def _summarizer(self, base: Outcome | None) -> Callable[[str, Any], dict[str, Any] | None]:
        """Return a function that summarizes an outcome by name, against a base."""

        def summary(name: str, part: Any) -> dict[str, Any] | None:
            found = self.files.read(name, part)
            if base is None or found is None:
                return None
            if (name, part) not in self._summaries:
                self._summaries[name, part] = summarize(
                    found.scores, base.scores, self.planner.setup.objectives, self.planner.tasks
                )
            return self._summaries[name, part]

        return summary

    def _trial(self, trial: FrozenTrial, summaries: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return one trial as results.json holds it."""
        value = trial.user_attrs.get("intervention")
        if value is None:
            waiting = self.queue.intervention(trial)
            if waiting is None:
                return None
            value = waiting.to_json()
        known = self.files.read(str(trial.number), "validation") if trial.state.is_finished() else None
        if trial.state == TrialState.FAIL and "error" not in trial.user_attrs:
            return None  # given back, or a repetition
        return {
            "number": trial.number,
            **value,
            "state": STATES[trial.state],
            "error": trial.user_attrs.get("error"),
            "stacks": [] if known is None else list(known.stacks),
            "kept": None if known is None else known.kept,
            "kept_targeted": None if known is None else known.kept_targeted,
            "seconds": None if known is None else round(known.seconds, 3),
            "validation": None if known is None else summaries["validation"](str(trial.number), "validation"),
            "test": summaries["test"](str(trial.number), "test"),
        }

    def front(self) -> list[int]:
        """Return the complete trials that no other beats in gain and in kept parameters."""
        gains = self.gains()
        points = []
        for number, found in gains.items():
            outcome = self.files.read(str(number), "validation")
            assert outcome is not None
            points.append((outcome.kept, -found.gain, number))
        front, least = [], float("inf")
        for _, loss, number in sorted(points):
            if loss < least:
                least = loss
                front.append(number)
        return front

    def _composition(self, composed: Composed, summaries: Mapping[str, Any]) -> dict[str, Any]:
        """Return the composition as results.json holds it."""
        found = composed.composition
        name = "-".join(map(str, found.trials))
        members, steps = found.trials[:1], []
        for step in found.steps:
            tried = (*members, step.trial)
            steps.append(
                step_json(step, summaries["validation"]("-".join(map(str, tried)), "validation"), composed.noise)
            )
            members = tried if step.kept else members
        return {
            "order": composed.order,
            "steps": steps,
            "trials": list(found.trials),
            "validation": summaries["validation"](name, "validation"),
            "test": summaries["test"](name, "test"),
        }
