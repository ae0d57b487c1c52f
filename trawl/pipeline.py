"""What a user asks for: a plan, a recipe for a budget, a compressed checkpoint."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from trawl.budget import Found, Question, find
from trawl.calibration import (
    DEFAULT_TOKENS,
    Calibration,
    Specs,
    open_moments,
    specs_of,
)
from trawl.compressing import Run, reads_moments
from trawl.errors import PlanError
from trawl.hub import open_checkpoint
from trawl.locks import PRIVATE, held
from trawl.narrowing import Narrowed
from trawl.observers import Observer, silent
from trawl.options import budget_out, check_anchored, check_moments_folder, check_refit, pick_device
from trawl.planned import Plan
from trawl.planning import make_plan
from trawl.processor import multiplies_bfloat16
from trawl.recipe import Recipe
from trawl.records import Report
from trawl.workspace import Workspace


def plan(
    model: str | Path,
    recipe: Recipe,
    *,
    revision: str | None = None,
    family_file: Path | None = None,
    calibrate: Specs | None = None,
    calibration_tokens: int = DEFAULT_TOKENS,
    moments: str | Path | None = None,
) -> Plan:
    """Work out what :func:`compress` would do, from headers alone.

    Args:
        model: a local folder, a hub id, or a ``.gguf`` file.
        recipe: what to decompose and how.
        revision: branch, tag or commit of a hub id.
        family_file: a YAML family description to use in place of the built-in ones.
        calibrate: as for :func:`compress`; the text is read, the model is not run.
        calibration_tokens: likewise.
        moments: likewise.
    Returns: stacks, ranks, parameters, bytes and estimates.
    Raises: TrawlError: the checkpoint or the recipe cannot be used; the message says why and what to do.
    Cost: reads headers; no shard of a hub checkpoint is downloaded.
    """
    check_anchored(recipe, calibrate, moments)
    check_refit(recipe, calibrate)
    if recipe.budget:
        raise PlanError("a budget's plan takes a search; call trawl.find_recipe, and plan what it finds")
    planned = make_plan(open_checkpoint(model, revision, weights=False), recipe, family_file)
    kept = Path(moments) if moments is not None else None
    source = open_moments(
        planned.checkpoint,
        planned.match,
        calibrate,
        calibration_tokens,
        folder=kept,
        output_weighting=recipe.output_weighting,
        compute=recipe.compute,
    )
    if isinstance(source, Calibration) and recipe.anchored:
        return replace(planned, notes=(*planned.notes, _anchored_note(source)))
    unread = isinstance(source, Calibration) and kept is None and not reads_moments(planned, source)
    notes = [*planned.notes, *([str(source)] if source and not unread else [])]
    if isinstance(source, Calibration) and recipe.refit and planned.narrowed:
        notes.append(_refit_note(planned.narrowed, source))
    return replace(planned, notes=tuple(notes))


def find_recipe(
    model: str | Path,
    recipe: Recipe,
    folder: str | Path,
    *,
    revision: str | None = None,
    family_file: Path | None = None,
    device: str = "auto",
    calibrate: Specs | None = None,
    calibration_tokens: int = DEFAULT_TOKENS,
    ray: str | None = None,
    observer: Observer = silent,
) -> Found:
    """Find the best structure and size of every part of a model within a budget; nothing is written but ``folder``.

    Args:
        model: as for :func:`compress`.
        recipe: with ``keep`` or ``size``.
        folder: where moments and measured damages are kept; a later call, with another budget too, uses them again.
        revision: branch, tag or commit of a hub id.
        family_file: a YAML family description to use in place of the built-in ones.
        device: where to compute.
        calibrate: as for :func:`compress`; without a text, random tokens stand in for one.
        calibration_tokens: likewise.
        ray: ``local``, or the address of a Ray cluster whose workers measure.
        observer: told of progress.
    Returns: the recipe with its parts, to pass to :func:`plan` or :func:`compress` with ``moments=folder``, and what
        each of its parts is predicted to do, and all really do.
    Raises: TrawlError: the checkpoint or the budget cannot be used.
    Cost: one calibration, and up to seven runs of some thousand tokens from each layer on.
    """
    if not recipe.budget:
        raise PlanError(f"the recipe has method {recipe.method} and no budget to search for; give it keep or size")
    check_refit(recipe, calibrate)
    check_moments_folder(Path(folder), open_checkpoint(model, revision).folder)
    question = Question(
        model=str(model),
        recipe=recipe,
        folder=Path(folder),
        revision=revision,
        calibrate=specs_of(calibrate),
        calibration_tokens=calibration_tokens,
        device=str(pick_device(device, ray)),
        family_file=family_file,
    )
    with held(question.folder, PRIVATE):
        return find(question, ray, observer)


def _anchored_note(text: Calibration) -> str:
    """Say what an anchored run will do, for a plan."""
    return (
        f"block by block, the original and the compressed model are run on up to {text.tokens:,} tokens of "
        f"{text.text.name}, up to five times: about {2 * text.memory / 1e9:.1f} GB of memory"
    )


def _refit_note(narrowed: Narrowed, text: Calibration) -> str:
    """Say what a refit will do, for a plan."""
    itemsize = 2 if text.compute == "bf16" and multiplies_bfloat16(text.device) else 4
    kept = [cut.reader.shape[0] * cut.keep // cut.units for cut in narrowed.cuts]
    slopes = max((len(cut.stack.slices) - 1) * units for cut, units in zip(narrowed.cuts, kept, strict=True))
    hidden, tokens = narrowed.cuts[0].reader.shape[1], text.most_tokens
    needed = tokens * (2 * slopes + itemsize * 4 * hidden + 4 * 4 * hidden) + 8 * 6 * max(kept) ** 2
    return (
        f"block by block, both models run on up to {tokens:,} tokens of {text.text.name}, and FCs are refitted to "
        f"what the original computes; then the norm in front of the head is scaled: about {needed / 1e9:.1f} GB of "
        "memory"
    )


def compress(
    model: str | Path,
    recipe: Recipe,
    out: str | Path | None = None,
    *,
    revision: str | None = None,
    family_file: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    device: str = "auto",
    max_memory: int = 0,
    factors: str | Path | None = None,
    calibrate: Specs | None = None,
    calibration_tokens: int = DEFAULT_TOKENS,
    moments: str | Path | None = None,
    ray: str | None = None,
    observer: Observer = silent,
) -> Report:
    """Decompose a checkpoint's stacks and write the denoised or the factored checkpoint.

    Args:
        model: a local folder, a hub id, or a ``.gguf`` file; never written to.
        recipe: what to decompose and how.
        out: the folder to make; by default named after model, method and rank, in the working directory.
        revision: branch, tag or commit of a hub id.
        family_file: a YAML family description to use in place of the built-in ones.
        resume: go on from the sealed files of an interrupted run with the same identity.
        overwrite: replace an existing OUT, which stays in place until the new one is complete.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``: where stacks are decomposed.
        max_memory: bytes of slices to keep in memory, or on the GPU, between passes, instead of reading them again.
        factors: a factor library, such as a sweep leaves, to take every stack's factors from in place of decomposing.
        calibrate: ``FILE.txt``, ``FILE.jsonl`` or ``hub:DATASET/SPLIT/FIELD``, or several of them: the error is weighed
            by the second moments of what each linear layer reads on this text.
        calibration_tokens: of each text, at most, spread evenly over it.
        moments: a folder of such moments to use, or with ``calibrate`` to keep them in for other runs.
        ray: ``local``, or the address of a Ray cluster: stacks are decomposed, and a budget's damages measured, by its
            workers, each on ``OMP_NUM_THREADS`` CPUs, else 1. OUT must lie, and a local MODEL and text too, on storage
            that all machines share.
        observer: told of progress.
    Returns: per stack shape, rank, relative error as written, parameters and seconds.
    Raises: TrawlError: before anything is written where the cause can be known before.
    Cost: reads the selected tensors once to check them, a few times to decompose them and once to write them; memory
        as the plan estimates; disk for the output and the factor files.
    """
    check_refit(recipe, calibrate)
    run = Run(
        model,
        recipe,
        out,
        revision=revision,
        family_file=family_file,
        resume=resume,
        overwrite=overwrite,
        device=device,
        max_memory=max_memory,
        factors=factors,
        calibrate=calibrate,
        calibration_tokens=calibration_tokens,
        moments=moments,
        ray=ray,
        observer=observer,
    )
    return _compress_to_budget(run) if recipe.budget else run.compress()


def _compress_to_budget(run: Run) -> Report:
    """Search for a budget's recipe and compress by it, in a folder that is held until the output is there."""
    if run.factors is not None:
        raise PlanError("--factors takes factors of a given rank, and a budget chooses ranks; leave one of the two out")
    checkpoint = open_checkpoint(run.model, run.revision)
    target = Workspace(Path(run.out) if run.out is not None else budget_out(checkpoint, run.recipe))
    folder = target.search if run.moments is None else Path(run.moments)
    check_moments_folder(folder, checkpoint.folder, target.out)
    finished = run.resume and folder.exists() and (target.out / "trawl.json").is_file()  # perhaps what this would make
    target.check(checkpoint.folder, resume=run.resume, overwrite=run.overwrite, needed=0, finished=finished)
    question = Question(
        model=str(run.model),
        recipe=run.recipe,
        folder=folder,
        revision=run.revision,
        calibrate=specs_of(run.calibrate),
        calibration_tokens=run.calibration_tokens,
        device=str(pick_device(run.device, run.ray)),
        family_file=run.family_file,
    )
    if run.moments is None:
        advice = "repeat the options of the run that stopped, or pass --overwrite to start anew"
        question = replace(question, replace=run.overwrite, advice=advice)
    with held(folder, PRIVATE):
        found = find(question, run.ray, run.observer)
        text = run.calibrate if found.recipe.refit else None
        known = replace(run, recipe=found.recipe, out=target.out, calibrate=text, moments=folder, found=found)
        report = known.compress()
        if run.moments is None:
            shutil.rmtree(folder)
    return report
