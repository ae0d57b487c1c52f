"""Where interventions are scored: in this process, or by workers elsewhere."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from trawl.sweeps.scorer import Outcome, Part, Scorer
from trawl.sweeps.space import Intervention


@dataclass(frozen=True)
class Job:
    """Interventions to score together on one part.

    Attributes:
        key: what the asker calls it.
        interventions: applied at once; none scores the base model.
        part: which records.
        may_stop: whether a hopeless one is given up.
    """

    key: int
    interventions: tuple[Intervention, ...]
    part: Part = "validation"
    may_stop: bool = False


class Pool(Protocol):
    """Takes jobs and gives outcomes, in any order."""

    @property
    def slots(self) -> int:
        """How many jobs it takes at once; it may grow."""

    def submit(self, job: Job) -> None:
        """Take a job; at most ``slots`` are under way at once."""

    def next(self) -> tuple[Job, Outcome]:
        """Wait for an outcome."""

    def close(self) -> None:
        """Let go of the workers."""


@dataclass(eq=False)
class LocalPool:
    """Scores in this process, one job at a time."""

    scorer: Scorer
    slots: int = 1
    _jobs: deque[Job] = field(default_factory=deque)

    def submit(self, job: Job) -> None:
        """Take a job."""
        self._jobs.append(job)

    def next(self) -> tuple[Job, Outcome]:
        """Score the oldest job."""
        job = self._jobs.popleft()
        return job, self.scorer.score(job.interventions, job.part, may_stop=job.may_stop)

    def close(self) -> None:
        """Check that the model is the one that was loaded."""
        self.scorer.editor.verify()


def score_all(
    pool: Pool, jobs: Sequence[Job], keep: Callable[[Job, Outcome], None] | None = None
) -> dict[int, Outcome]:
    """Score jobs, as many at once as the pool has slots.

    Args:
        pool: where.
        jobs: with keys of their own.
        keep: told of each outcome as it comes.
    Returns: outcomes by key.
    """
    found: dict[int, Outcome] = {}
    waiting, under_way = deque(jobs), 0
    while waiting or under_way:
        while waiting and under_way < pool.slots:
            pool.submit(waiting.popleft())
            under_way += 1
        job, outcome = pool.next()
        found[job.key] = outcome
        under_way -= 1
        if keep is not None:
            keep(job, outcome)
    return found
