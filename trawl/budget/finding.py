"""From a budget to a recipe: calibration, moments and the search, in one folder that survives an interruption."""

from __future__ import annotations

import fcntl
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from trawl.budget.curves import Workshop
from trawl.budget.searching import Found, Ledger, Searcher, check_budget
from trawl.calibration import DEFAULT_TOKENS, Calibration, Moments, make_moments, open_moments, random_calibration
from trawl.checkpoint import Checkpoint
from trawl.errors import PlanError
from trawl.observers import Observer, silent
from trawl.planning import match_checkpoint
from trawl.recipe import Recipe

LOG = logging.getLogger("trawl")

SEARCH_RECORD = "search.json"


@contextmanager
def search_folder(default: Path, given: Path | str | None) -> Iterator[Path]:
    """Hold a search's folder against other searches in a ``with`` block.

    Args:
        default: where it lies if none is given; removed after the block, but kept if an error is raised.
        given: a folder that is kept.
    Raises: PlanError: another search works there now.
    """
    folder = Path(given) if given is not None else default
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (folder / "lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise PlanError(f"another search is working in {folder}; wait for it, or choose another folder") from e
        yield folder
        if given is None:
            shutil.rmtree(folder)


def find(
    checkpoint: Checkpoint,
    recipe: Recipe,
    folder: Path,
    *,
    calibrate: str | Path | None = None,
    calibration_tokens: int = DEFAULT_TOKENS,
    device: torch.device,
    family_file: Path | None = None,
    observer: Observer = silent,
) -> Found:
    """Calibrate a model and search for the recipe of a budget.

    Args:
        checkpoint: the model.
        recipe: with a budget.
        folder: where moments and damages are kept.
        calibrate: the text; without one, random tokens stand in for it.
        calibration_tokens: of the text, at most.
        device: where to compute.
        family_file: a YAML family description to use in place of the built-in ones.
        observer: told of progress.
    Raises: TrawlError: the budget or the text cannot be used.
    Cost: of a calibration; then for every block up to seven runs of some thousand tokens from there on.
    """
    match = match_checkpoint(checkpoint, family_file)
    pieces = check_budget(match, recipe)
    source: Calibration | Moments | None
    if calibrate is None:
        recipe = recipe.model_copy(update={"output_weighting": "none"})  # gradients of random tokens say nothing
        source = random_calibration(checkpoint, match, calibration_tokens, device)
        source.check(folder)
        LOG.warning(
            "no calibration text: forms are chosen by what the model computes on random tokens. Expect a far worse "
            "model than with a text of its kind; pass --calibrate TEXT"
        )
    else:
        source = open_moments(
            checkpoint,
            match,
            calibrate,
            calibration_tokens,
            folder=folder,
            device=device,
            output_weighting=recipe.output_weighting,
            compute=recipe.compute,
        )
    assert isinstance(source, Calibration)
    moments = make_moments(source, folder, observer)
    assert moments is not None
    from trawl.budget.damage import Gauge, gauge_windows  # noqa: PLC0415 (transformers' model code: a second)

    windows = gauge_windows(source.windows)
    ledger, workshop = Ledger.of(folder, moments, windows), Workshop(checkpoint, moments, device)
    with Gauge(source.chain, windows).ready() as gauge:
        searcher = Searcher(
            checkpoint=checkpoint,
            recipe=recipe,
            family_file=family_file,
            pieces=pieces,
            workshop=workshop,
            ledger=ledger,
            gauge=gauge,
            observer=observer,
        )
        return searcher.plain() if recipe.plain else searcher.mixed()
