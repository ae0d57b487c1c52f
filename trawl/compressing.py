"""One run whose sizes are known, read as prose: open, plan, check, decompose, write, publish."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from trawl.budget import SEARCH_RECORD, Found
from trawl.calibration import (
    DEFAULT_TOKENS,
    Calibration,
    Moments,
    Specs,
    make_moments,
    open_moments,
    random_calibration,
)
from trawl.checkpoint import Checkpoint
from trawl.cluster import Cluster, connected, local_path
from trawl.decomposing import Spread, decompose_stacks
from trawl.errors import CheckpointError
from trawl.factor_library import FactorLibrary, digest, versions
from trawl.hub import open_checkpoint
from trawl.locks import held, may_write
from trawl.observers import Observer, silent
from trawl.options import check_anchored, check_moments_folder, check_together, default_out, pick_device
from trawl.output import copy_side_files, factor_path, load_last_norm, load_result, write_config, write_shards
from trawl.planned import Plan
from trawl.planning import make_plan
from trawl.recipe import Recipe
from trawl.records import Report, read_report, report_stack, write_json, write_records
from trawl.stacking import scan
from trawl.workspace import Workspace

LOG = logging.getLogger("trawl")


@dataclass(frozen=True, eq=False)
class Run:
    """What :func:`trawl.compress` is told, of a recipe whose sizes are known.

    Attributes:
        found: the search that the recipe comes from, which holds the folder of moments.
        others: as the parameters of :func:`trawl.compress`.
    """

    model: str | Path
    recipe: Recipe
    out: str | Path | None
    revision: str | None = None
    family_file: Path | None = None
    resume: bool = False
    overwrite: bool = False
    device: str = "auto"
    max_memory: int = 0
    factors: str | Path | None = None
    calibrate: Specs | None = None
    calibration_tokens: int = DEFAULT_TOKENS
    moments: str | Path | None = None
    ray: str | None = None
    observer: Observer = silent
    found: Found | None = None

    def compress(self) -> Report:
        """Write the checkpoint.

        Raises: TrawlError: as :func:`trawl.compress`.
        """
        started = time.perf_counter()
        check_anchored(self.recipe, self.calibrate, self.moments, self.factors, self.ray)
        checkpoint = open_checkpoint(self.model, self.revision)
        state = checkpoint.state()
        planned = make_plan(checkpoint, self.recipe, self.family_file)
        workspace = Workspace(Path(self.out) if self.out is not None else default_out(planned))
        check_moments_folder(self._kept, checkpoint.folder, workspace.out)
        library = FactorLibrary.open(Path(self.factors)) if self.factors is not None else None
        source = self._source(planned)
        identity = run_identity(planned, library, source)
        if self.resume and (finished := read_report(workspace.out, identity)):
            LOG.warning("%s is complete already; nothing to resume", workspace.out)
            workspace.clear()
            return finished
        needed = self._needed(planned, source)
        workspace.check(checkpoint.folder, resume=self.resume, overwrite=self.overwrite, needed=needed)
        check_together(planned, library, source, self.ray)
        with (
            connected(self.ray, self.device) as cluster,
            workspace.locked(identity | {"files": state}, resume=self.resume, overwrite=self.overwrite),
        ):
            absmax = check_weights(planned, self.observer)
            planned = self._calibrated(planned, source, workspace)
            seconds = decompose_stacks(
                planned,
                workspace,
                absmax,
                self._device,
                library,
                spread=self._spread(planned, cluster),
                max_memory=self.max_memory,
                observer=self.observer,
            )
            report = self._write(planned, workspace, absmax, seconds, started)
            write_records(planned, report, identity, workspace.staged)
            check_unchanged(checkpoint, state, workspace)
            workspace.publish(overwrite=self.overwrite)
        return report

    @cached_property
    def _device(self) -> torch.device:
        """Where this process computes."""
        return pick_device(self.device, self.ray)

    @property
    def _kept(self) -> Path | None:
        """The folder that keeps moments."""
        return Path(self.moments) if self.moments is not None else None

    def _source(self, planned: Plan) -> Calibration | Moments | None:
        """Find out where moments come from; units are chosen on random tokens where there is no text."""
        source = open_moments(
            planned.checkpoint,
            planned.match,
            self.calibrate,
            self.calibration_tokens,
            folder=self._kept,
            device=self._device,
            output_weighting=self.recipe.output_weighting,
            compute=self.recipe.compute,
        )
        if source is not None or not planned.narrowed:
            return source
        LOG.warning(
            "no calibration text: units are chosen by what the model computes on random tokens. That costs quality: "
            "SmolLM2 at width 0.75 has a perplexity of 43 on WikiText, calibrated on such text of 27. Pass --calibrate "
            "TEXT; `trawl sample` lets the model write one"
        )
        return random_calibration(planned.checkpoint, planned.match, self.calibration_tokens, self._device)

    def _needed(self, planned: Plan, source: Calibration | Moments | None) -> int:
        """Return the bytes that the run will write."""
        checkpoint = planned.checkpoint
        side_bytes = sum((checkpoint.folder / name).stat().st_size for name in checkpoint.side_files)
        needed = planned.output_bytes + planned.work_bytes + side_bytes
        makes = isinstance(source, Calibration) and self._kept is None and reads_moments(planned, source)
        return needed + source.nbytes if isinstance(source, Calibration) and makes else needed

    def _calibrated(self, planned: Plan, source: Calibration | Moments | None, workspace: Workspace) -> Plan:
        """Return the plan with its moments, made where they are not there yet, and with the text that it runs on."""
        text, kept = source if isinstance(source, Calibration) else None, self._kept
        if text and self.recipe.anchored:
            return replace(planned, anchor=text)
        planned = replace(planned, refit=text if self.recipe.refit else None)
        if text and kept is None and not reads_moments(planned, text):
            return planned
        own = text is not None and self.found is None  # a search has made them, and holds the folder
        with held(kept) if own and kept is not None and may_write(kept) else nullcontext():
            return replace(planned, moments=make_moments(source, kept or workspace.moments, self.observer))

    def _spread(self, planned: Plan, cluster: Cluster | None) -> Spread | None:
        """Return how stacks are decomposed by a cluster's workers."""
        if cluster is None:
            return None
        folder = planned.moments.path.absolute() if planned.moments else None
        fingerprint, model = planned.checkpoint.fingerprint, local_path(self.model)
        return Spread(
            cluster, model, self.revision, self.recipe, self.family_file, fingerprint, self.max_memory, folder
        )

    def _write(
        self,
        planned: Plan,
        workspace: Workspace,
        absmax: Mapping[str, float],
        seconds: Mapping[str, float],
        started: float,
    ) -> Report:
        """Write all of the output but its records, and return what was done."""
        errors = write_shards(planned, workspace, absmax, self.observer)
        copy_side_files(planned.checkpoint, workspace.staged)
        write_config(planned, workspace.staged)
        if self.found:
            write_json(workspace.staged / SEARCH_RECORD, self.found.to_json())
        results = (load_result(item, factor_path(workspace, item.stack)) for item in planned.stacks)
        reports = tuple(
            report_stack(item, result, errors, seconds[item.stack.name])
            for item, result in zip(planned.stacks, results, strict=True)
        )
        return Report(workspace.out, reports, time.perf_counter() - started, load_last_norm(workspace)[0])


def reads_moments(planned: Plan, text: Calibration) -> bool:
    """Whether a run weighs anything by moments of a text; FCs that are refitted run the model themselves."""
    recipe = planned.recipe
    if recipe.anchored:
        return False
    refitted = {cut.stack.name for cut in replace(planned, refit=text if recipe.refit else None).refitted}
    return recipe.output_weighting != "none" or any(item.stack.name not in refitted for item in planned.stacks)


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
    slices = [[part.identity for part in item.stack.slices] for item in planned.stacks]
    identity: dict[str, Any] = {
        "source": planned.checkpoint.fingerprint,
        "recipe": planned.recipe.model_dump(mode="json"),
        "stacks": [planned.stack.name for planned in planned.stacks],
        "slices": hashlib.sha256(json.dumps(slices).encode()).hexdigest(),
        "versions": versions(),
    }
    if moments:
        identity["moments"] = moments.fingerprint
        identity["versions"]["transformers"] = version("transformers")  # whose code the text is run through
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
