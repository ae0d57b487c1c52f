"""Scoring by Ray workers, each with the model in memory; one that dies is replaced, and machines may join."""

from __future__ import annotations

import logging
import socket
import time
from collections import Counter, deque
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trawl.cluster import ATTEMPTS, Cluster, begin_work, local_path, lost, own_errors
from trawl.errors import PlanError
from trawl.sweeps.pools import Job
from trawl.sweeps.scorer import Outcome, Scorer
from trawl.sweeps.setup import Setup

LOG = logging.getLogger("trawl")
LOOK_SECONDS = 1.0  # between two looks at the machines
PATIENCE_SECONDS = 60.0  # without any worker before saying so


class ScoringWorker:
    """One Ray actor: a process that loads the model once."""

    def __init__(self, setup: Setup, folder: str, threads: int, cwd: str) -> None:
        begin_work(threads, cwd)
        self.setup, self.folder = setup, folder

    def load(self) -> tuple[str, str]:
        """Load the model and score the base; return the machine and what weights it has."""
        self.scorer = Scorer(self.setup, Path(self.folder))
        self.scorer.base("validation")
        return socket.gethostname(), self.scorer.planner.checkpoint.fingerprint

    def score(self, job: Job) -> Outcome:
        """Score a job."""
        return self.scorer.score(job.interventions, job.part, may_stop=job.may_stop)

    def verify(self) -> None:
        """Check that the model is the one that was loaded."""
        self.scorer.editor.verify()


@dataclass(eq=False)
class RayPool:
    """Gives jobs to workers on a Ray cluster.

    Attributes:
        cluster: the connection.
        setup: the sweep's, with the device as a worker calls it.
        folder: where factor files are kept; on storage that all machines share.
    """

    cluster: Cluster
    setup: Setup
    folder: Path
    _waiting: deque[Job] = field(default_factory=deque)
    _attempts: Counter[int] = field(default_factory=Counter)  # of jobs under way, by identity
    _loading: dict[Any, Any] = field(default_factory=dict)  # reply to come: worker
    _idle: list[Any] = field(default_factory=list)
    _scoring: dict[Any, tuple[Any, Job]] = field(default_factory=dict)
    _deaths: int = 0  # in a row, while loading
    _fingerprint: str = ""

    @classmethod
    def start(cls, setup: Setup, folder: Path, address: str) -> RayPool:
        """Connect, and let as many workers load the model as there is room for.

        Args:
            setup: the sweep's.
            folder: its folder.
            address: ``local``, ``auto`` or HOST:PORT.
        Raises: PlanError: Ray is not installed, or there is no cluster at the address.
        """
        cluster = Cluster.connect(address, setup.device)
        own = replace(setup, model=local_path(setup.model), device=cluster.device)
        pool = cls(cluster, own, folder.absolute())
        pool._grow()
        return pool

    @property
    def slots(self) -> int:
        """How many jobs are taken at once: one more than workers have room, so that none waits for its next job."""
        return self._workers + 1

    @property
    def _workers(self) -> int:
        """How many workers there is room for now; at least one, for a machine that may come."""
        return max(self.cluster.room, 1)

    def submit(self, job: Job) -> None:
        """Take a job."""
        self._waiting.append(job)
        self._assign()

    def next(self) -> tuple[Job, Outcome]:
        """Wait for an outcome; work whose worker died is done by another."""
        import ray  # noqa: PLC0415 (an extra)

        began, told = time.monotonic(), False
        while True:
            self._grow()
            self._assign()
            replies, _ = ray.wait([*self._loading, *self._scoring], num_returns=1, timeout=LOOK_SECONDS)
            for reply in replies:
                if reply in self._loading:
                    self._take_in(reply)
                elif (found := self._take_out(reply)) is not None:
                    return found
            if not (told or self._idle or self._scoring) and time.monotonic() - began > PATIENCE_SECONDS:
                told = True
                LOG.warning("no Ray worker is ready after %.0f s: the cluster may be busy", PATIENCE_SECONDS)

    def close(self) -> None:
        """Check the workers' models where nothing is under way, and let the workers go."""
        import ray  # noqa: PLC0415 (an extra)

        try:
            if not self._scoring:
                with own_errors():
                    ray.get([worker.verify.remote() for worker in self._idle])
        except ray.exceptions.RayActorError:
            LOG.warning("a Ray worker was gone before its model could be checked")
        finally:
            for worker in [*self._idle, *self._loading.values(), *(worker for worker, _ in self._scoring.values())]:
                ray.kill(worker)
            self.cluster.close()

    def _grow(self) -> None:
        """Start workers where there is room for more."""
        import ray  # noqa: PLC0415 (an extra)

        missing = self._workers - len(self._loading) - len(self._idle) - len(self._scoring)
        actor = ray.remote(ScoringWorker).options(**self.cluster.needs, max_restarts=0)
        for _ in range(missing):
            worker = actor.remote(self.setup, str(self.folder), self.cluster.threads, self.cluster.folder)
            self._loading[worker.load.remote()] = worker

    def _assign(self) -> None:
        """Give jobs that wait to idle workers, first to the one that was at work last: it has the part in memory."""
        while self._waiting and self._idle:
            worker, job = self._idle.pop(), self._waiting.popleft()
            self._attempts[id(job)] += 1
            self._scoring[worker.score.remote(job)] = worker, job

    def _take_in(self, reply: Any) -> None:
        """Count a worker that has loaded the model among the idle."""
        import ray  # noqa: PLC0415 (an extra)

        worker = self._loading.pop(reply)
        try:
            with own_errors():
                machine, fingerprint = ray.get(reply)
        except ray.exceptions.RayActorError as e:
            self._deaths += 1
            if self._deaths >= ATTEMPTS:
                raise lost("loading the model", e) from e
            LOG.warning("a Ray worker died while it loaded the model; another takes its place")
            return
        self._deaths = 0
        self._fingerprint = self._fingerprint or fingerprint
        if fingerprint != self._fingerprint:
            raise PlanError(
                f"{machine} has other weights of {self.setup.model} than the other machines; give a folder on shared "
                "storage, or a --revision"
            )
        self._idle.append(worker)

    def _take_out(self, reply: Any) -> tuple[Job, Outcome] | None:
        """Return a job with its outcome; None where its worker died, and the job waits again."""
        import ray  # noqa: PLC0415 (an extra)

        worker, job = self._scoring.pop(reply)
        try:
            with own_errors():
                outcome: Outcome = ray.get(reply)
        except ray.exceptions.RayActorError as e:
            ray.kill(worker)  # it may be out of reach only
            what = " and ".join(item.label for item in job.interventions) or "the base model"
            if self._attempts[id(job)] >= ATTEMPTS:
                raise lost(f"scoring {what}", e) from e
            LOG.warning("a Ray worker died while it scored %s; that is done again", what)
            self._waiting.appendleft(job)
            return None
        self._idle.append(worker)
        self._assign()  # before the asker has dealt with the outcome
        del self._attempts[id(job)]
        return job, outcome
