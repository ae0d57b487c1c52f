"""From a budget to a recipe: calibration, moments and the search, in one folder that survives an interruption."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from trawl.budget.curves import Workshop
from trawl.budget.found import Found
from trawl.budget.ledger import Ledger
from trawl.budget.pieces import Structure
from trawl.budget.searching import Searcher, check_budget
from trawl.calibration import DEFAULT_TOKENS, Calibration, Moments, open_moments, random_calibration
from trawl.calibration.moments import RECORD
from trawl.checkpoint import Checkpoint
from trawl.cluster import ATTEMPTS, Cluster, begin_work, connected, local_path, lost, own_errors
from trawl.errors import PlanError
from trawl.families import FamilyMatch
from trawl.hub import open_checkpoint
from trawl.observers import Observer, silent
from trawl.planning import match_checkpoint
from trawl.recipe import Recipe

LOG = logging.getLogger("trawl")

SEARCH_RECORD = "search.json"


@dataclass(frozen=True)
class Question:
    """What a search is about, as every process that takes part in it is told.

    Attributes:
        model: a local folder, a hub id, or a ``.gguf`` file.
        recipe: with a budget.
        folder: where moments and damages are kept; on storage that all machines share.
        revision: of a hub id.
        calibrate: the texts; without one, random tokens stand in for it.
        calibration_tokens: of each text, at most.
        device: where to compute.
        family_file: a YAML family description to use in place of the built-in ones.
        replace: whether what the folder keeps of another text may go.
        advice: what to do where it keeps such moments, and they may not.
    """

    model: str
    recipe: Recipe
    folder: Path
    revision: str | None = None
    calibrate: tuple[str, ...] = ()
    calibration_tokens: int = DEFAULT_TOKENS
    device: str = "cpu"
    family_file: Path | None = None
    replace: bool = False
    advice: str = "give the text that they are of, or another --moments folder"

    @contextmanager
    def searcher(self, observer: Observer = silent) -> Iterator[Searcher]:
        """Hold what a search works with in a ``with`` block; moments are made unless they are there.

        Raises: TrawlError: the model, the budget or the text cannot be used.
        Cost: of a calibration where there are no moments; one run of some thousand tokens.
        """
        from trawl.budget.damage import Gauge, gauge_windows  # noqa: PLC0415 (transformers' model code: a second)

        checkpoint = open_checkpoint(self.model, self.revision)
        match = match_checkpoint(checkpoint, self.family_file)
        pieces, device = check_budget(checkpoint, match, self.recipe), torch.device(self.device)
        source = self._calibration(checkpoint, match, device)
        moments = source.make(self.folder, observer)
        windows = gauge_windows(source.windows)
        with Gauge(source.chain, windows).ready() as gauge:
            yield Searcher(
                checkpoint=checkpoint,
                recipe=self.recipe,
                family_file=self.family_file,
                pieces=pieces,
                workshop=Workshop(checkpoint, moments, device),
                ledger=Ledger.of(self.folder, moments, windows),
                gauge=gauge,
                observer=observer,
            )

    def _calibration(self, checkpoint: Checkpoint, match: FamilyMatch, device: torch.device) -> Calibration:
        """Return what the model is run on."""
        if not self.calibrate:
            source = random_calibration(checkpoint, match, self.calibration_tokens, device)
            kept = None if self.replace or not (self.folder / RECORD).exists() else Moments.read(self.folder).identity
            if kept is not None and kept != source.identity:
                raise PlanError(
                    f"{self.folder} holds moments of a text, and a budget also measures damages on it; pass it with "
                    f"--calibrate, or {self.advice}"
                )
            return source
        opened = open_moments(
            checkpoint,
            match,
            self.calibrate,
            self.calibration_tokens,
            folder=None if self.replace else self.folder,
            device=device,
            output_weighting=self.recipe.output_weighting,
            compute=self.recipe.compute,
            advice=self.advice,
        )
        assert isinstance(opened, Calibration)
        return opened


def find(question: Question, ray: str | None = None, observer: Observer = silent) -> Found:
    """Calibrate a model and search for the recipe of a budget.

    Args:
        question: what is searched.
        ray: ``local``, or the address of a Ray cluster whose workers measure, each on ``OMP_NUM_THREADS`` CPUs, else 1.
        observer: told of progress.
    Raises: TrawlError: the budget or the text cannot be used.
    Cost: of a calibration; then for every block up to seven runs of some thousand tokens from there on, and in two of
        them everything that is tried.
    """
    if not question.calibrate:
        LOG.warning(
            "no calibration text: forms are chosen by what the model computes on random tokens%s. Expect a far worse "
            "model than with a text of its kind; pass --calibrate TEXT. `trawl sample` lets the model write one",
            ", and nothing is refitted" if question.recipe.refit else "",
        )
        told_nothing = {"output_weighting": "none", "refit": False}  # by a text that means nothing
        recipe = question.recipe.model_copy(update=told_nothing)
        question = replace(question, recipe=recipe)
    with question.searcher(observer) as searcher:
        if question.recipe.plain:
            return searcher.plain()
        if ray is not None:
            with connected(ray, question.device) as cluster:
                assert cluster is not None
                measure_on(cluster, question, searcher, observer)
        return searcher.mixed()


def measure_on(cluster: Cluster, question: Question, searcher: Searcher, observer: Observer) -> None:
    """Let the workers of a Ray cluster measure blocks into the ledger; one that dies is replaced, and goes on.

    Args:
        cluster: the connection.
        question: what is searched; its moments are there.
        searcher: of this process. What is tried in a few blocks it tries itself; all blocks are then dealt out to as
            many tasks as there is room for, and a task refuses another checkpoint.
        observer: told of progress, in tasks.
    Raises: TrawlError: what a task raised. PlanError: a task's worker died again and again.
    """
    import ray  # noqa: PLC0415 (an extra)

    task = ray.remote(_measure_blocks).options(**cluster.needs, max_retries=ATTEMPTS - 1)
    told = replace(
        question,
        model=local_path(question.model),
        folder=question.folder.absolute(),
        calibrate=tuple(map(local_path, question.calibrate)),
        device=cluster.device,
    )
    count, fingerprint, trials = max(cluster.room, 1), searcher.checkpoint.fingerprint, searcher.trials
    replies = [
        task.remote(told, searcher.blocks[number::count], trials, fingerprint, cluster.threads, cluster.folder)
        for number in range(count)
    ]
    waiting = list(replies)
    while waiting:
        observer("measuring damage on Ray", len(replies) - len(waiting), len(replies))
        (reply,), waiting = ray.wait(waiting, num_returns=1)
        try:
            with own_errors():
                ray.get(reply)
        except ray.exceptions.RayTaskError:
            raise
        except ray.exceptions.RayError as e:
            raise lost("measuring damage", e) from e
    observer("measuring damage on Ray", len(replies), len(replies))


def _measure_blocks(  # noqa: PLR0917 (Ray passes them by place)
    question: Question, blocks: Sequence[int], trials: frozenset[Structure], fingerprint: str, threads: int, cwd: str
) -> None:
    """Measure some blocks in a Ray worker."""
    begin_work(threads, cwd)
    with question.searcher() as searcher:
        if searcher.checkpoint.fingerprint != fingerprint:
            raise PlanError(
                f"machine {socket.gethostname()} has another model under {question.model}; give all machines of the "
                "Ray cluster the same"
            )
        for block in blocks:
            searcher.measure(block, trials)
