"""The trials of a study, in an Optuna storage that several processes share."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import socket
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from trawl.errors import PlanError
from trawl.locks import locked
from trawl.redaction import redacted
from trawl.sweeps.scorer import Outcome
from trawl.sweeps.scores import KEPT, LOSSES, Gain
from trawl.sweeps.setup import Setup
from trawl.sweeps.space import Intervention

DEFAULT_TRIALS = 100
ATTEMPTS = 20  # of a sampler to suggest something new


class _FileLock:
    """Holds the journal by flock, which the kernel gives back when its process dies; Optuna's own would wait for it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: Any = None

    def acquire(self) -> bool:
        """Wait for the lock."""
        self.file = self.path.open("w")
        fcntl.flock(self.file, fcntl.LOCK_EX)
        return True

    def release(self) -> None:
        """Give the lock back."""
        self.file.close()


def open_storage(folder: Path, url: str | None) -> BaseStorage:
    """Open a journal in the sweep's folder, or a database.

    A journal's last line may be torn by a kill: it is cut off, since its writer is gone.

    Raises: PlanError: the storage cannot be opened, or holds something else.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        if url is not None:
            return RDBStorage(url)
        path = folder / "study.journal"
        lock: Any = _FileLock(folder / "study.journal.lock")
        lock.acquire()
        try:
            _cut_torn_line(path)
        finally:
            lock.release()
        return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))
    except Exception as e:
        raise PlanError(
            f"cannot open the study in {redacted(url or str(folder / 'study.journal'))}: "
            f"{redacted(' '.join(str(e).split()))[:300]}; repair or delete it, or choose another --storage"
        ) from e


def study_name(identity: Mapping[str, Any], url: str | None) -> str:
    """Name a sweep's study: a folder's journal holds one, a database those of any sweeps."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return "trawl" if url is None else f"trawl-{digest[:16]}"


def _cut_torn_line(path: Path) -> None:
    """Cut off what stands behind the last line end."""
    if path.exists() and (content := path.read_bytes()) and not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)


@dataclass(frozen=True)
class Claim:
    """A trial that this process works on."""

    number: int
    intervention: Intervention


@dataclass(eq=False)
class TrialQueue:
    """Interventions to be tried, each by one process.

    A process holds a lock file as long as it lives; a trial whose process is gone goes back to those that wait.

    Attributes:
        setup: the sweep's.
        folder: the sweep's; processes that share the study share it too.
        storage: where the study lies.
        name: of the study there.
        interventions: that fit the model; the whole grid.
    """

    setup: Setup
    folder: Path
    storage: BaseStorage
    name: str
    interventions: Sequence[Intervention]
    worker: str = field(init=False)
    _alive: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        workers = self.folder / "workers"
        workers.mkdir(parents=True, exist_ok=True)
        self.worker = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        self._alive = (workers / self.worker).open("w")
        fcntl.flock(self._alive, fcntl.LOCK_EX)
        sampler: optuna.samplers.BaseSampler = optuna.samplers.RandomSampler(seed=self.setup.seed)
        if self.setup.sampler == "tpe":
            sampler = optuna.samplers.TPESampler(seed=self.setup.seed, constant_liar=True)
        directions = [
            StudyDirection.MINIMIZE if name in LOSSES else StudyDirection.MAXIMIZE for name in self.setup.objectives
        ]
        with locked(self.folder / "study.lock"):
            try:
                self.study = optuna.create_study(
                    storage=self.storage,
                    study_name=self.name,
                    sampler=sampler,
                    directions=directions,
                    load_if_exists=True,
                )
                if self.setup.sampler == "grid":
                    self._enqueue_grid()
            except Exception as e:
                raise PlanError(
                    f"the study's storage cannot be used: {type(e).__name__}: {' '.join(str(e).split())[:300]}"
                ) from e

    def _enqueue_grid(self) -> None:
        """Put what is not yet known of the grid among the trials that wait."""
        trials = self.study.get_trials(deepcopy=False)  # of those given back, the copies that wait
        known = {self.intervention(trial) for trial in trials if trial.state != TrialState.FAIL}
        for intervention in self.interventions[: self.setup.trials]:
            if intervention not in known:
                self.study.enqueue_trial(self._parameters(intervention))

    def _parameters(self, intervention: Intervention) -> dict[str, str]:
        """Return a trial's parameters."""
        value = intervention.to_json()
        return {name: _text(value[name]) for name in ("method", "roles", "layers", "rank")}

    def intervention(self, trial: FrozenTrial) -> Intervention | None:
        """Return what a trial tries."""
        chosen = trial.system_attrs.get("fixed_params") or trial.params
        return self._by_parameters.get(tuple(chosen.get(name) for name in ("method", "roles", "layers", "rank")))

    @cached_property
    def _by_parameters(self) -> dict[tuple[Any, ...], Intervention]:
        return {tuple(self._parameters(item).values()): item for item in self.interventions}

    @cached_property
    def _choices(self) -> dict[str, list[str]]:
        """Return the values that each parameter takes."""
        all_parameters = [self._parameters(item) for item in self.interventions]
        return {name: list(dict.fromkeys(one[name] for one in all_parameters)) for name in all_parameters[0]}

    def claim(self) -> Claim | None:
        """Return a trial for this process, or None where no other waits."""
        with locked(self.folder / "study.lock"):
            self._take_back()
            while waiting := self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
                identifier = waiting[0]._trial_id  # noqa: SLF001
                self.storage.set_trial_state_values(identifier, TrialState.RUNNING)
                with suppress(LookupError):
                    return self._begin(optuna.Trial(self.study, identifier))
            return self._suggest() if self.setup.sampler == "tpe" else None

    def _begin(self, trial: optuna.Trial) -> Claim:
        """Sign a trial, and fix its parameters."""
        trial.set_user_attr("worker", self.worker)
        chosen = {name: trial.suggest_categorical(name, choices) for name, choices in self._choices.items()}
        intervention = self._by_parameters.get(tuple(chosen.values()))
        if intervention is None:  # a combination that the model's shapes do not allow
            self.study.tell(trial.number, state=TrialState.FAIL)
            raise LookupError(trial.number)
        trial.set_user_attr("intervention", intervention.to_json())
        return Claim(trial.number, intervention)

    def _suggest(self) -> Claim | None:
        """Ask the sampler for what has not been tried; None once there are trials enough."""
        target = min(self.setup.trials or DEFAULT_TRIALS, len(self.interventions))
        for _ in range(ATTEMPTS):
            tried = {self.intervention(t) for t in self.trials() if t.state != TrialState.FAIL} - {None}
            if len(tried) >= target:
                return None
            try:
                claim = self._begin(self.study.ask())
            except LookupError:
                continue
            if claim.intervention not in tried:
                return claim
            self.study.tell(claim.number, state=TrialState.FAIL)  # a repetition, known already
        rest = next(item for item in self.interventions if item not in tried)
        self.study.enqueue_trial(self._parameters(rest))
        return self._begin(self.study.ask())

    def finish(self, number: int, outcome: Outcome, gains: dict[str, Gain | None]) -> None:
        """Record a trial's outcome."""
        values = [outcome.kept if name == KEPT else getattr(gains[name], "value", None) for name in self.objectives]
        stopped = outcome.stopped or any(value is None or value != value for value in values)  # noqa: PLR0124 (NaN)
        if stopped:
            self.study.tell(number, state=TrialState.PRUNED)
        else:
            self.study.tell(number, [float(value) for value in values if value is not None])

    @property
    def objectives(self) -> tuple[str, ...]:
        """The objectives, in the order of the study's directions."""
        return self.setup.objectives

    def retry(self, number: int) -> None:
        """Put a trial whose worker is gone back among those that wait."""
        trial = self.study.trials[number]
        intervention = self.intervention(trial)
        with suppress(UpdateFinishedTrialError):
            self.storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)  # noqa: SLF001
            if intervention is not None:
                self.study.enqueue_trial(self._parameters(intervention))

    def _take_back(self) -> None:
        """Put trials of processes that are gone back among those that wait; the study's lock is held."""
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            worker = trial.user_attrs.get("worker")  # absent where a process died between claiming and signing
            if worker is None or (worker != self.worker and not self._lives(worker)):
                self.retry(trial.number)

    def _lives(self, worker: str) -> bool:
        """Whether a process still holds its lock file."""
        try:
            with (self.folder / "workers" / worker).open("r+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except FileNotFoundError:
            return False
        return False

    def trials(self) -> list[FrozenTrial]:
        """Return all trials, by number."""
        return self.study.get_trials(deepcopy=False)

    def running_elsewhere(self) -> bool:
        """Whether another process works on a trial."""
        return any(
            trial.user_attrs.get("worker") != self.worker
            for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        )

    def close(self) -> None:
        """Let go of this process's lock file."""
        (self.folder / "workers" / self.worker).unlink(missing_ok=True)
        self._alive.close()


def _text(value: Any) -> str:
    """Write a parameter as text, which every storage keeps."""
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
