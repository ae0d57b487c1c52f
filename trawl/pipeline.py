"""The way of the data, read as prose: open, plan, check, decompose, write, publish."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from trawl.budget import SEARCH_RECORD, Found, Question, find, held
from trawl.calibration import (
    DEFAULT_TOKENS,
    Calibration,
    Moments,
    Specs,
    make_moments,
    open_moments,
    random_calibration,
    specs_of,
)
from trawl.checkpoint import Checkpoint
from trawl.cluster import connected, local_path
from trawl.decomposing import Spread, decompose_stacks
from trawl.errors import CheckpointError, PlanError
from trawl.factor_library import FactorLibrary, digest, versions
from trawl.hub import open_checkpoint
from trawl.narrowing import Narrowed
from trawl.observers import Observer, silent
from trawl.options import budget_out, check_anchored, check_refit, check_together, default_out, pick_device
from trawl.output import copy_side_files, factor_path, load_last_norm, load_result, write_config, write_shards
from trawl.planned import Plan
from trawl.planning import make_plan
from trawl.processor import multiplies_bfloat16
from trawl.recipe import Recipe
from trawl.records import Report, read_report, report_stack, write_json, write_records
from trawl.stacking import scan
from trawl.workspace import Workspace

LOG = logging.getLogger("trawl")


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
    notes = [*planned.notes, *([str(source)] if source else [])]
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
    check_refit(recipe, calibrate)
    question = Question(
        model=str(model),
        recipe=recipe,
        folder=Path(folder),
        revision=revision,
        calibrate=specs_of(calibrate),
        calibration_tokens=calibration_tokens,
        device=str(pick_device("cpu" if ray is not None and device.startswith("cuda") else device)),
        family_file=family_file,
    )
    with held(question.folder):
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
    run = partial(
        _compress,
        model,
        revision=revision,
        family_file=family_file,
        resume=resume,
        overwrite=overwrite,
        device=device,
        max_memory=max_memory,
        factors=factors,
        ray=ray,
        observer=observer,
    )
    if not recipe.budget:
        return run(recipe, out, calibrate=calibrate, calibration_tokens=calibration_tokens, moments=moments)
    if factors is not None:
        raise PlanError("--factors takes factors of a given rank, and a budget chooses ranks; leave one of the two out")
    checkpoint = open_checkpoint(model, revision)
    target = Workspace(Path(out) if out is not None else budget_out(checkpoint, recipe))
    finished = resume and moments is not None and (target.out / "trawl.json").is_file()  # its damages are kept too
    target.check(checkpoint.folder, resume=resume, overwrite=overwrite, needed=0, finished=finished)
    folder = target.search if moments is None else Path(moments)
    found = find_recipe(
        model,
        recipe,
        folder,
        revision=revision,
        family_file=family_file,
        device=device,
        calibrate=calibrate,
        calibration_tokens=calibration_tokens,
        ray=ray,
        observer=observer,
    )
    text = calibrate if found.recipe.refit else None
    report = run(
        found.recipe, target.out, calibrate=text, calibration_tokens=calibration_tokens, moments=folder, found=found
    )
    if moments is None:
        shutil.rmtree(folder)
    return report


def _compress(
    model: str | Path,
    recipe: Recipe,
    out: str | Path | None,
    *,
    revision: str | None,
    family_file: Path | None,
    resume: bool,
    overwrite: bool,
    device: str,
    max_memory: int,
    factors: str | Path | None,
    ray: str | None,
    observer: Observer,
    calibrate: Specs | None = None,
    calibration_tokens: int = DEFAULT_TOKENS,
    moments: str | Path | None = None,
    found: Found | None = None,
) -> Report:
    """Write a checkpoint by a recipe whose sizes are known; ``found`` is the search that they come from."""
    started = time.perf_counter()
    check_anchored(recipe, calibrate, moments, factors, ray)
    checkpoint = open_checkpoint(model, revision)
    state = checkpoint.state()
    planned = make_plan(checkpoint, recipe, family_file)
    workspace = Workspace(Path(out) if out is not None else default_out(planned))
    library = FactorLibrary.open(Path(factors)) if factors is not None else None
    where = pick_device("cpu" if ray is not None and device.startswith("cuda") else device)  # workers have their own
    kept = Path(moments) if moments is not None else None
    source = open_moments(
        checkpoint,
        planned.match,
        calibrate,
        calibration_tokens,
        folder=kept,
        device=where,
        output_weighting=recipe.output_weighting,
        compute=recipe.compute,
    )
    if source is None and planned.narrowed:
        source = random_calibration(checkpoint, planned.match, calibration_tokens, where)
        LOG.warning(
            "no calibration text: units are chosen by what the model computes on random tokens. That costs quality: "
            "SmolLM2 at width 0.75 has a perplexity of 43 on WikiText, calibrated on such text of 27. Pass --calibrate "
            "TEXT; `trawl sample` lets the model write one"
        )
    identity = run_identity(planned, library, source)
    if resume and (finished := read_report(workspace.out, identity)):
        LOG.warning("%s is complete already; nothing to resume", workspace.out)
        workspace.clear()
        return finished
    side_bytes = sum((checkpoint.folder / name).stat().st_size for name in checkpoint.side_files)
    needed = planned.output_bytes + planned.work_bytes + side_bytes
    if isinstance(source, Calibration) and kept is None and not recipe.anchored:
        needed += source.nbytes
    workspace.check(checkpoint.folder, resume=resume, overwrite=overwrite, needed=needed)
    check_together(planned, library, source, ray)
    with (
        connected(ray, device) as cluster,
        workspace.locked(identity | {"files": state}, resume=resume, overwrite=overwrite),
    ):
        absmax = check_weights(planned, observer)
        if isinstance(source, Calibration) and recipe.anchored:
            planned = replace(planned, anchor=source)
        else:
            made = make_moments(source, kept or workspace.moments, observer)
            text = source if recipe.refit and isinstance(source, Calibration) else None
            planned = replace(planned, moments=made, refit=text)
        spread = None
        if cluster:
            fingerprint = checkpoint.fingerprint
            folder = planned.moments.path.absolute() if planned.moments else None
            spread = Spread(cluster, local_path(model), revision, recipe, family_file, fingerprint, max_memory, folder)
        seconds = decompose_stacks(
            planned, workspace, absmax, where, library, spread=spread, max_memory=max_memory, observer=observer
        )
        errors = write_shards(planned, workspace, absmax, observer)
        copy_side_files(checkpoint, workspace.staged)
        write_config(planned, workspace.staged)
        results = (load_result(item, factor_path(workspace, item.stack)) for item in planned.stacks)
        reports = tuple(
            report_stack(item, result, errors, seconds[item.stack.name])
            for item, result in zip(planned.stacks, results, strict=True)
        )
        report = Report(workspace.out, reports, time.perf_counter() - started, load_last_norm(workspace)[0])
        write_records(planned, report, identity, workspace.staged)
        if found:
            write_json(workspace.staged / SEARCH_RECORD, found.to_json())
        check_unchanged(checkpoint, state, workspace)
        workspace.publish()
    return report


def check_unchanged(checkpoint: Checkpoint, state: Mapping[str, list[int]], workspace: Workspace) -> None:
    """Raise CheckpointError, and throw away what was made, if the source's files are no longer those of the start."""
    now = checkpoint.state()
    if changed := [name for name in state if now[name] != state[name]]:
        workspace.discard()
        raise CheckpointError(
            f"{checkpoint.folder / changed[0]} changed while it was being read, so that what was made of it is no one "
            "model's and was thrown away; run the command again once nothing writes there"
        )


def run_identity(
    planned: Plan, library: FactorLibrary | None, moments: Calibration | Moments | None = None
) -> dict[str, Any]:
    """Return what an output depends on; two runs with equal identities may share sealed files.

    Raises: PlanError: the library has no factors of a stack. LoadError: a file there is damaged.
    """
    identity: dict[str, Any] = {
        "source": planned.checkpoint.fingerprint,
        "recipe": planned.recipe.model_dump(mode="json"),
        "stacks": [planned.stack.name for planned in planned.stacks],
        "versions": versions(),
    }
    if moments:
        identity["moments"] = moments.fingerprint
    if library:
        identity["factors"] = {
            item.stack.name: digest(library.load(library.find(planned, item))) for item in planned.stacks
        }
    return identity


def check_weights(planned: Plan, observer: Observer) -> dict[str, float]:
    """Read every selected tensor once, so that a NaN is found before anything is written.

    Returns: largest magnitude of each stack.
    Raises: CheckpointError: a tensor holds NaN or Inf, or is stored in a dtype that cannot be decomposed.
    """
    tensors = planned.checkpoint.tensors
    total = sum(tensors[name].nbytes for name in planned.changed_tensors)
    largest: dict[str, float] = {}
    done = 0
    observer("checking weights", 0, total)
    for name in planned.changed_tensors:
        largest[name] = scan(planned.checkpoint, name)
        done += tensors[name].nbytes
        observer("checking weights", done, total)
    return {item.stack.name: max(largest[name] for name in item.stack.tensors) for item in planned.stacks}
