"""A sweep, read as prose: plan, search, compose, test, record."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from optuna.trial import FrozenTrial, TrialState

from trawl.errors import PlanError
from trawl.observers import Observer, silent
from trawl.sweeps.composition import Composition, candidates, compose, step_json
from trawl.sweeps.planner import Planner
from trawl.sweeps.pools import Job, LocalPool, Pool, score_all
from trawl.sweeps.records import (
    FORMAT_VERSION,
    OutcomeFiles,
    check_identity,
    flat_row,
    now,
    read_json,
    rebuild_commands,
    trawl_version,
    write_json,
    write_table,
)
from trawl.sweeps.scorer import Outcome, Scorer
from trawl.sweeps.scores import KEPT, Gain, Scores, figure_name, gain, summarize
from trawl.sweeps.setup import ORDERS, Setup
from trawl.sweeps.space import GroupLayers, Intervention, Rank, Space
from trawl.sweeps.study import TrialQueue, held, open_storage

RECORD_SECONDS = 10.0  # between two writings of results.json
WAIT_SECONDS = 1.0  # for other processes' trials
STATES = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "stopped",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}


@dataclass(frozen=True, eq=False)
class SweepResult:
    """What a sweep found.

    Attributes:
        folder: where everything lies; ``trawl report`` draws it.
        results: the content of results.json.
    """

    folder: Path
    results: Mapping[str, Any]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One flat dict a trial, for ``pandas.DataFrame(result.rows)``; trials.csv has the same."""
        return [flat_row(trial) for trial in self.results["trials"]]

    @property
    def best(self) -> dict[str, Any] | None:
        """The winner's trial; None where every trial was stopped."""
        number = self.results["best"]
        return next((trial for trial in self.results["trials"] if trial["number"] == number), None)


def sweep(
    model: str | Path,
    tasks: str | Sequence[str],
    out: str | Path,
    *,
    ranks: Sequence[Rank],
    methods: Sequence[str] = ("cp",),
    roles: Sequence[str] = ("fc",),
    layers: str = "all",
    group_layers: Sequence[GroupLayers] = (1,),
    objectives: Sequence[str] = ("accuracy",),
    sampler: Literal["grid", "tpe"] = "grid",
    trials: int | None = None,
    storage: str | None = None,
    compose_most: int = 0,
    order: str = "last-first",
    noise: float = 1.0,
    patience: float | None = 0.5,
    limit: int | None = None,
    validation: float = 0.2,
    seed: int = 0,
    n_iter_max: int | None = None,
    tol: float | None = None,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    batch_tokens: int = 4096,
    prefix_memory: int = 4_000_000_000,
    ray: str | None = None,
    command: str = "",
    observer: Observer = silent,
) -> SweepResult:
    """Search for the interventions that make a model better, choose on a validation part, report on the rest.

        result = trawl.sweep("HuggingFaceTB/SmolLM2-135M", "qa:facts.jsonl", "study", ranks=(8, 64), layers="20-29")
        pandas.DataFrame(result.rows).sort_values("validation_accuracy_gain")

    Every trial decomposes the matrices of some roles in a run of layers, puts the result in place of the weights in
    memory, scores the validation part, and puts the exact weights back. The test part is scored once: for the base,
    the winner, the best trial of each layer, and the composition. Called again with the same arguments it goes on
    where it was; called by several processes at once they share the work.

    Args:
        model: a folder, a hub id or a .gguf file.
        tasks: SPECs as for :func:`trawl.evaluate`; the objective is the mean over those that have the figure.
        out: the study's folder; made if absent.
        ranks: one integer each, or for Tucker triples (stack, inner, hidden).
        methods: of ``cp``, ``tucker``, ``svd``.
        roles: role lists as in a recipe, each tried by itself.
        layers: the layers to choose from.
        group_layers: lengths of the runs that the layers are cut into, each run one stack; 1 is layer by layer.
        objectives: ``accuracy``, ``log_loss``, ``kept`` or any figure's name; the first figure decides the winner, and
            with ``kept`` the front of trials that no other beats in both is marked.
        sampler: ``grid`` tries everything, ``tpe`` what looks promising.
        trials: the most trials; by default the whole grid, or 100 with ``tpe``.
        storage: an Optuna RDB URL; by default a journal file in the folder.
        compose_most: the most interventions to add to the winner; 0 for none.
        order: ``last-first`` or ``best-first``: in which additions are tried.
        noise: standard errors of the paired difference that an addition must exceed.
        patience: nats per token by which a trial's loss may surely exceed the base's; None never stops a trial.
        limit: the most records of each task.
        validation: share of the validation part.
        seed: of the split, the decompositions and the sampler.
        n_iter_max: cap on sweeps of a decomposition.
        tol: change of fit under which they stop.
        revision: of a hub id.
        dtype: to load the model in; decompositions start from the stored weights.
        device: where to evaluate.
        batch_tokens: padded tokens in one batch.
        prefix_memory: bytes for the base model's activations.
        ray: ``local``, or the address of a Ray cluster, to spread trials over its workers.
        command: the command line, for the record.
        observer: told of progress, in trials.
    Returns: the results; ``out`` holds results.json, trials.csv, every record's scores and the factor files.
    Raises: TrawlError: PlanError for what cannot be done, ResumeError where ``out`` holds another sweep.
    Cost: a trial costs its decomposition, once for all sweeps in the folder, and one pass from the first changed layer.
    """
    space = Space(tuple(ranks), tuple(methods), tuple(roles), layers, tuple(group_layers))
    if order not in ORDERS:
        raise PlanError(f"unknown order {order!r}; expected {' or '.join(ORDERS)}")
    setup = Setup(
        model=str(model),
        space=space,
        tasks=(tasks,) if isinstance(tasks, str) else tuple(tasks),
        objectives=tuple(objectives),
        revision=revision,
        limit=limit,
        fraction=validation,
        seed=seed,
        sampler=sampler,
        trials=trials,
        patience=None if KEPT in objectives else patience,
        n_iter_max=n_iter_max,
        tol=tol,
        dtype=dtype,
        device=device,
        batch_tokens=batch_tokens,
        prefix_memory=prefix_memory,
    )
    folder = Path(out).absolute()
    planner = Planner(setup, folder)
    interventions, notes = planner.check(space.interventions(planner.layer_count))
    folder.mkdir(parents=True, exist_ok=True)
    with held(folder / "study.lock"):
        check_identity(folder, setup.identity(planner.checkpoint.fingerprint, planner.tasks))
    queue = TrialQueue(setup, folder, open_storage(folder, storage), interventions)
    run = _Run(planner, queue, folder, interventions, notes, command, observer)
    try:
        pool = _pool(setup, folder, ray)
        try:
            run.search(pool)
            with held(folder / "finish.lock"):
                run.finish(pool, most=compose_most, order=order, noise=noise)
                results = read_json(folder / "results.json")  # before another process writes it again
        finally:
            pool.close()
    finally:
        queue.close()
    return SweepResult(folder, results)


def _pool(setup: Setup, folder: Path, ray: str | None) -> Pool:
    """Open what trials are scored by."""
    if ray is None:
        return LocalPool(Scorer(setup, folder))
    from trawl.sweeps.ray_pool import RayPool  # noqa: PLC0415 (an extra)

    return RayPool.start(setup, folder, ray)


@dataclass(eq=False)
class _Run:
    """One process's share of a study."""

    planner: Planner
    queue: TrialQueue
    folder: Path
    interventions: Sequence[Intervention]
    notes: tuple[str, ...]
    command: str
    observer: Observer
    started: str = field(default_factory=now)
    recorded: float = 0.0
    composition: tuple[str, float, Composition] | None = None
    summaries: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)

    @cached_property
    def files(self) -> OutcomeFiles:
        """Outcomes that are known."""
        return OutcomeFiles(self.folder)

    @property
    def objective(self) -> str:
        """The objective that decides."""
        return self.planner.setup.objective

    def outcome(self, pool: Pool, job: Job, name: str) -> Outcome:
        """Return an outcome that is known, or score it and keep it."""
        known = self.files.read(name, job.part)
        if known is None:
            known = score_all(pool, [job])[job.key]
            self.files.write(name, job.part, known)
        return known

    def search(self, pool: Pool) -> None:
        """Work on trials until none waits and no other process may give one back."""
        base = self.outcome(pool, Job(-1, ()), "base").scores
        self._check_base(base)
        self._restore(pool)
        under_way = 0
        while True:
            while under_way < pool.slots and (claim := self.queue.claim()):
                pool.submit(Job(claim.number, (claim.intervention,), may_stop=True))
                under_way += 1
            if under_way:
                job, outcome = pool.next()
                under_way -= 1
                self._finish_trial(job, outcome, base)
            elif self.queue.running_elsewhere():
                time.sleep(WAIT_SECONDS)
            else:
                break

    def _check_base(self, base: Scores) -> None:
        """Refuse a base model that nothing can be compared with."""
        for name in self.planner.setup.objectives:
            found = None if name == KEPT else gain(base, base, name, self.planner.tasks)
            if found is not None and not math.isfinite(found.value):
                raise PlanError(
                    f"the base model's {name} is not a number, so nothing can be compared with it; its weights may "
                    "hold NaN, or overflow: try --dtype float32"
                )

    def _restore(self, pool: Pool) -> None:
        """Score finished trials again whose outcome is lost."""
        for trial in self.queue.trials():
            if trial.state in (TrialState.COMPLETE, TrialState.PRUNED):
                job = Job(trial.number, (self._tried()[trial.number],), may_stop=trial.state == TrialState.PRUNED)
                self.outcome(pool, job, str(trial.number))

    def _finish_trial(self, job: Job, outcome: Outcome, base: Scores) -> None:
        """Keep a trial's outcome, then tell the study."""
        self.files.write(str(job.key), "validation", outcome)
        setup = self.planner.setup
        gains = {
            name: gain(outcome.scores, base, name, self.planner.tasks) for name in setup.objectives if name != KEPT
        }
        self.queue.finish(job.key, outcome, gains)
        self._tell()
        self.record("searching")

    def _tell(self) -> None:
        """Tell the observer how far the study is."""
        trials = self.queue.trials()
        wanted = [trial for trial in trials if trial.state != TrialState.FAIL]
        total = len(wanted) if self.planner.setup.sampler == "grid" else self.planner.setup.trials
        self.observer("trials", sum(trial.state.is_finished() for trial in wanted), total)

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

    def finish(self, pool: Pool, *, most: int, order: str, noise: float) -> None:
        """Compose, then score the test part of what was chosen."""
        self.record("searching", force=True)
        gains = self.gains()
        best = max(gains, key=lambda number: (gains[number].gain, -number), default=None)
        if best is not None and most:
            self._compose(pool, best, gains, most=most, order=order, noise=noise)
        self.record("testing", force=True)
        jobs = {"base": Job(-1, (), "test")}
        for number in dict.fromkeys([*([] if best is None else [best]), *self._best_of_layer(gains).values()]):
            jobs[str(number)] = Job(number, (self._tried()[number],), "test")
        if self.composition is not None:
            trials = self.composition[2].trials
            jobs["-".join(map(str, trials))] = Job(-2, tuple(self._tried()[n] for n in trials), "test")
        self._test(pool, jobs)
        self.record("complete", force=True)

    def _test(self, pool: Pool, jobs: Mapping[str, Job]) -> None:
        """Score what is not known yet, as many at once as the pool takes."""
        names = {job.key: name for name, job in jobs.items() if self.files.read(name, job.part) is None}
        done = len(jobs) - len(names)

        def keep(job: Job, outcome: Outcome) -> None:
            nonlocal done
            self.files.write(names[job.key], job.part, outcome)
            done += 1
            self.observer("test part", done, len(jobs))

        self.observer("test part", done, len(jobs))
        score_all(pool, [jobs[name] for name in names.values()], keep)

    def _compose(
        self, pool: Pool, best: int, gains: Mapping[int, Gain], *, most: int, order: str, noise: float
    ) -> None:
        """Build on the winner."""
        tried = self._tried()
        start = self.files.read(str(best), "validation")
        assert start is not None
        ranked = candidates(best, gains, tried, self._layers, order)

        def score(numbers: tuple[int, ...]) -> Outcome:
            self.observer("composing", ranked.index(numbers[-1]), len(ranked))
            job = Job(-2, tuple(tried[n] for n in numbers), may_stop=True)
            return self.outcome(pool, job, "-".join(map(str, numbers)))

        self.composition = (
            order,
            noise,
            compose(
                best,
                start.scores,
                ranked,
                most=most,
                noise=noise,
                objective=self.objective,
                tasks=self.planner.tasks,
                overlaps=lambda members, number: any(
                    self._slices(tried[number]) & self._slices(tried[other]) for other in members
                ),
                score=score,
            ),
        )

    def _tried(self) -> dict[int, Intervention]:
        """Return what each trial tries."""
        return {
            trial.number: Intervention.from_json(trial.user_attrs["intervention"])
            for trial in self.queue.trials()
            if "intervention" in trial.user_attrs
        }

    def _layers(self, intervention: Intervention) -> tuple[int, ...]:
        plan = self.planner.plan(intervention)
        return tuple(sorted({layer for item in plan.stacks for layer in item.stack.layers}))

    def _slices(self, intervention: Intervention) -> set[tuple[int, str]]:
        """Return the matrices that an intervention changes."""
        plan = self.planner.plan(intervention)
        return {(part.layer, part.role) for item in plan.stacks for part in item.stack.slices}

    def _best_of_layer(self, gains: Mapping[int, Gain]) -> dict[str, int]:
        """Return the best trial of every single layer."""
        tried = self._tried()
        best: dict[str, int] = {}
        for number, found in gains.items():
            layer = tried[number].layers
            if layer.isdigit() and (layer not in best or found.gain > gains[best[layer]].gain):
                best[layer] = number
        return dict(sorted(best.items(), key=lambda item: int(item[0])))

    def record(self, state: str, *, force: bool = False) -> None:
        """Write results.json and trials.csv, now and then or at once."""
        if not force and time.monotonic() - self.recorded < RECORD_SECONDS:
            return
        self.recorded = time.monotonic()
        results = self._results(state)
        write_json(self.folder / "results.json", results)
        write_table(self.folder / "trials.csv", [flat_row(trial) for trial in results["trials"]])

    def _results(self, state: str) -> dict[str, Any]:
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
        best = max(gains, key=lambda number: (gains[number].gain, -number), default=None)
        winner = [] if best is None else [best]
        if self.composition is not None:
            winner = list(self.composition[2].trials)
        options = {
            "libraries": {method: self.planner.library_folder(method) for method in setup.space.methods},
            "seed": setup.seed,
            "n_iter_max": setup.n_iter_max,
            "tol": setup.tol,
        }
        tried = self._tried()
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
            "best_of_layer": self._best_of_layer(gains),
            "front": self._front(),
            "composition": self._composition(summaries),
            "commands": rebuild_commands(setup.model, [tried[n] for n in winner], self.folder, options),
        }

    def _summarizer(self, base: Outcome | None) -> Callable[[str, Any], dict[str, Any] | None]:
        """Return a function that summarizes an outcome by name, against a base."""

        def summary(name: str, part: Any) -> dict[str, Any] | None:
            found = self.files.read(name, part)
            if base is None or found is None:
                return None
            if (name, part) not in self.summaries:
                self.summaries[name, part] = summarize(
                    found.scores, base.scores, self.planner.setup.objectives, self.planner.tasks
                )
            return self.summaries[name, part]

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

    def _front(self) -> list[int]:
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

    def _composition(self, summaries: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the composition as results.json holds it."""
        if self.composition is None:
            return None
        order, noise, found = self.composition
        name = "-".join(map(str, found.trials))
        members, steps = found.trials[:1], []
        for step in found.steps:
            tried = (*members, step.trial)
            steps.append(step_json(step, summaries["validation"]("-".join(map(str, tried)), "validation"), noise))
            members = tried if step.kept else members
        return {
            "order": order,
            "steps": steps,
            "trials": list(found.trials),
            "validation": summaries["validation"](name, "validation"),
            "test": summaries["test"](name, "test"),
        }
