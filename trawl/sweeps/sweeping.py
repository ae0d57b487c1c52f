"""A sweep, read as prose: plan, search, compose, test, record."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from optuna.trial import TrialState

from trawl.errors import PlanError
from trawl.evaluation.subject import check_loadable
from trawl.locks import locked
from trawl.observers import Observer, silent
from trawl.options import pick_device
from trawl.sweeps.composition import candidates, compose
from trawl.sweeps.findings import Composed, Findings
from trawl.sweeps.planner import Planner
from trawl.sweeps.pools import Job, LocalPool, Pool, score_all
from trawl.sweeps.records import check_identity, flat_row, read_json, write_json, write_table
from trawl.sweeps.scorer import Outcome, Scorer
from trawl.sweeps.scores import KEPT, Gain, Scores, gain
from trawl.sweeps.setup import ORDERS, Setup
from trawl.sweeps.space import GroupLayers, Rank, Space
from trawl.sweeps.study import TrialQueue, open_storage, study_name

RECORD_SECONDS = 10.0  # between two writings of results.json
WAIT_SECONDS = 1.0  # for other processes' trials


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
    trust_remote_code: bool = False,
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
        prefix_memory: bytes for the base model's activations, and a trial's.
        ray: ``local``, or the address of a Ray cluster, to spread trials over its workers.
        trust_remote_code: run the code that comes with the model, with all the rights of this process and of the
            workers. To go on with a sweep takes it again: what a folder records never runs code.
        command: the command line, for the record.
        observer: told of progress, in trials.
    Returns: the results; ``out`` holds results.json, trials.csv, every record's scores and the factor files.
    Raises: TrawlError: PlanError for what cannot be done, ResumeError where ``out`` holds another sweep.
    Cost: a trial costs its decomposition, once for all sweeps in the folder, and one pass from the first changed layer.
    """
    space = Space(tuple(ranks), tuple(methods), tuple(roles), layers, tuple(group_layers))
    if compose_most < 0 or not noise >= 0:
        name, value = ("noise", noise) if compose_most >= 0 else ("compose", compose_most)
        raise PlanError(f"{name} is {value}; expected a number from 0")
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
        trust_remote_code=trust_remote_code,
    )
    folder = Path(out).absolute()
    planner = Planner(setup, folder)
    interventions, notes = planner.check(space.interventions(planner.layer_count))
    check_loadable(planner.checkpoint.folder, planner.tasks, dtype=dtype, trust_remote_code=trust_remote_code)
    identity = setup.identity(planner.checkpoint.fingerprint, planner.tokenizer, planner.tasks)
    if ray is None:
        pick_device(device)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise PlanError(f"cannot make the folder {folder}: {e.strerror}; choose another with -o") from e
    with locked(folder / "study.lock"):
        check_identity(folder, identity)
        kept = open_storage(folder, storage)
    queue = TrialQueue(setup, folder, kept, study_name(identity, storage), interventions)
    run = _Run(planner, queue, Findings(planner, queue, notes, command), observer)
    try:
        pool = _pool(setup, folder, ray)
        try:
            run.search(pool)
            with locked(folder / "finish.lock"):
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
    known: Findings
    observer: Observer
    recorded: float = 0.0
    composed: Composed | None = None

    def outcome(self, pool: Pool, job: Job, name: str) -> Outcome:
        """Return an outcome that is known, or score it and keep it."""
        known = self.known.files.read(name, job.part)
        if known is None:
            known = score_all(pool, [job])[job.key]
            self.known.files.write(name, job.part, known)
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
                job = Job(trial.number, (self.known.tried()[trial.number],), may_stop=trial.state == TrialState.PRUNED)
                self.outcome(pool, job, str(trial.number))

    def _finish_trial(self, job: Job, outcome: Outcome, base: Scores) -> None:
        """Keep a trial's outcome, then tell the study."""
        self.known.files.write(str(job.key), "validation", outcome)
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

    def finish(self, pool: Pool, *, most: int, order: str, noise: float) -> None:
        """Compose, then score the test part of what was chosen."""
        self.record("searching", force=True)
        gains = self.known.gains()
        best = self.known.best(gains)
        if best is not None and most:
            self._compose(pool, best, gains, most=most, order=order, noise=noise)
        self.record("testing", force=True)
        jobs = {"base": Job(-1, (), "test")}
        for number in dict.fromkeys([*([] if best is None else [best]), *self.known.best_of_layer(gains).values()]):
            jobs[str(number)] = Job(number, (self.known.tried()[number],), "test")
        if self.composed is not None:
            trials = self.composed.composition.trials
            jobs["-".join(map(str, trials))] = Job(-2, tuple(self.known.tried()[n] for n in trials), "test")
        self._test(pool, jobs)
        self.record("complete", force=True)

    def _test(self, pool: Pool, jobs: Mapping[str, Job]) -> None:
        """Score what is not known yet, as many at once as the pool takes."""
        names = {job.key: name for name, job in jobs.items() if self.known.files.read(name, job.part) is None}
        done = len(jobs) - len(names)

        def keep(job: Job, outcome: Outcome) -> None:
            nonlocal done
            self.known.files.write(names[job.key], job.part, outcome)
            done += 1
            self.observer("test part", done, len(jobs))

        self.observer("test part", done, len(jobs))
        score_all(pool, [jobs[name] for name in names.values()], keep)

    def _compose(
        self, pool: Pool, best: int, gains: Mapping[int, Gain], *, most: int, order: str, noise: float
    ) -> None:
        """Build on the winner."""
        tried = self.known.tried()
        start = self.known.files.read(str(best), "validation")
        assert start is not None
        ranked = candidates(best, gains, tried, self.known.layers, order)

        def score(numbers: tuple[int, ...]) -> Outcome:
            self.observer("composing", ranked.index(numbers[-1]), len(ranked))
            job = Job(-2, tuple(tried[n] for n in numbers), may_stop=True)
            return self.outcome(pool, job, "-".join(map(str, numbers)))

        self.composed = Composed(
            order,
            noise,
            compose(
                best,
                start.scores,
                ranked,
                most=most,
                noise=noise,
                objective=self.known.objective,
                tasks=self.planner.tasks,
                overlaps=lambda members, number: any(
                    self.known.slices(tried[number]) & self.known.slices(tried[other]) for other in members
                ),
                score=score,
            ),
        )

    def record(self, state: str, *, force: bool = False) -> None:
        """Write results.json and trials.csv, now and then or at once."""
        if not force and time.monotonic() - self.recorded < RECORD_SECONDS:
            return
        self.recorded = time.monotonic()
        results = self.known.document(state, self.composed)
        write_json(self.planner.folder / "results.json", results)
        write_table(self.planner.folder / "trials.csv", [flat_row(trial) for trial in results["trials"]])
