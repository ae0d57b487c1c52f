"""Sealing the factors of a plan's stacks: in this process, or one Ray task a stack."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from trawl.calibration import Moments
from trawl.calibration.weights import stack_weights
from trawl.cluster import ATTEMPTS, Cluster, begin_work, lost, own_errors
from trawl.errors import PlanError
from trawl.factor_library import FactorLibrary, versions
from trawl.hub import open_checkpoint
from trawl.narrowing import narrow_stack
from trawl.observers import Observer, silent, slice_counter
from trawl.output import factor_path, last_norm_path
from trawl.planned import Plan, PlannedStack
from trawl.planning import make_plan
from trawl.recipe import Recipe
from trawl.stacking import StoredSlices
from trawl.workspace import Workspace


def decompose_stacks(
    planned: Plan,
    workspace: Workspace,
    absmax: Mapping[str, float],
    where: torch.device,
    library: FactorLibrary | None,
    *,
    spread: Spread | None,
    max_memory: int,
    observer: Observer,
) -> dict[str, float]:
    """Seal the factors of every stack that has no factor file yet: those of the library, or decomposed here or on Ray.

    Returns: seconds by stack; 0 for one that was sealed before or comes from the library.
    """
    seconds = {item.stack.name: 0.0 for item in planned.stacks}
    paths = {item.stack.name: factor_path(workspace, item.stack) for item in planned.stacks}
    if planned.anchor:
        from trawl.anchoring import seal_anchored  # noqa: PLC0415 (transformers' model code: a second)

        return seal_anchored(planned, planned.anchor, paths, absmax, observer)
    later = {cut.stack.name for cut in planned.refitted}
    wanted = (item for item in planned.stacks if item.stack.name not in later)
    missing = {item: paths[item.stack.name] for item in wanted if not paths[item.stack.name].exists()}
    if spread:
        seconds |= spread.seal({item.stack.name: path for item, path in missing.items()}, absmax, observer)
    elif library:
        for item, path in missing.items():
            library.load(library.find(planned, item)).save(path, {"stack": item.to_json()})
    else:
        for item, path in missing.items():
            seconds[item.stack.name] = seal_stack(
                planned,
                item,
                path,
                absmax=absmax[item.stack.name],
                device=where,
                max_memory=max_memory,
                observer=observer,
            )
    if planned.refit and planned.refitted:
        from trawl.refitting import seal_refitted  # noqa: PLC0415 (transformers' model code: a second)

        seconds |= seal_refitted(planned, planned.refit, paths, last_norm_path(workspace), observer)
    return seconds


def seal_stack(
    planned: Plan,
    item: PlannedStack,
    path: Path,
    *,
    absmax: float,
    device: torch.device,
    max_memory: int = 0,
    observer: Observer = silent,
) -> float:
    """Decompose a stack into a factor file, and return the seconds that it took."""
    started = time.perf_counter()
    if item.method is None:
        assert planned.narrowed is not None
        cut = next(cut for cut in planned.narrowed.cuts if cut.stack.name == item.stack.name)
        moment = planned.moments.input(cut.reader) if planned.moments else None
        assert moment is not None  # no role has experts of its own, so that each reader saw every token
        outputs = planned.moments.outputs.matrix(cut.reader) if planned.moments and planned.moments.outputs else None
        found = narrow_stack(planned.checkpoint, cut, moment, device, outputs=outputs)
        found.save(path, {"stack": item.to_json()})
        return time.perf_counter() - started
    count = slice_counter(f"decomposing {item.stack.name}", observer)
    source = StoredSlices(planned.checkpoint, item.stack, absmax, device, count, max_memory)
    weights = stack_weights(planned.moments, item.stack) if planned.moments else None
    factors = item.method.decompose(source, weights=weights).to(device="cpu")
    factors.balanced().save(path, {"stack": item.to_json()})
    return time.perf_counter() - started


@dataclass(frozen=True)
class Spread:
    """Stacks of a plan as tasks of a Ray cluster; each opens the checkpoint and plans by itself.

    Attributes:
        cluster: the connection.
        model: as the user gave it, a local path made absolute.
        revision: of a hub id.
        recipe: what to decompose and how.
        family_file: the family description, if not a built-in one.
        fingerprint: of the checkpoint that this process has; a task refuses another.
        max_memory: bytes of slices that each task keeps between passes.
        moments: folder of the moments that weigh the error.
    """

    cluster: Cluster
    model: str
    revision: str | None
    recipe: Recipe
    family_file: Path | None
    fingerprint: str
    max_memory: int
    moments: Path | None = None

    def seal(
        self, paths: Mapping[str, Path], absmax: Mapping[str, float], observer: Observer = silent
    ) -> dict[str, float]:
        """Seal factor files, and return seconds by stack.

        Args:
            paths: by stack where its file is to lie, on storage that all machines share.
            absmax: by stack the largest magnitude of any entry.
            observer: told of progress, in stacks.
        Returns: the seconds of each stack's own task.
        Raises: TrawlError: what a task raised. PlanError: a task's worker died again and again, or its file is not
            to be seen from here.
        """
        import ray  # noqa: PLC0415 (an extra)

        task = ray.remote(_seal_one).options(**self.cluster.needs, max_retries=ATTEMPTS - 1)
        order = {"threads": self.cluster.threads, "cwd": self.cluster.folder, "device": self.cluster.device}
        under_way = {
            task.remote(self._order() | order | {"stack": name, "path": path.absolute(), "absmax": absmax[name]}): name
            for name, path in paths.items()
        }
        seconds: dict[str, float] = {}
        while under_way:
            observer("decomposing stacks", len(seconds), len(paths))
            (reply,), _ = ray.wait(list(under_way), num_returns=1)
            name = under_way.pop(reply)
            seconds[name] = _result(reply, name)
            if not paths[name].exists():
                raise PlanError(
                    f"the factors of stack {name} were written, but {paths[name]} is not on this machine; --ray needs "
                    "an output folder on storage that all machines share: choose another with -o"
                )
        observer("decomposing stacks", len(seconds), len(paths))
        return seconds

    def _order(self) -> dict[str, Any]:
        """Return what every task is told."""
        return {
            "model": self.model,
            "revision": self.revision,
            "recipe": self.recipe.model_dump(),
            "family_file": self.family_file,
            "max_memory": self.max_memory,
            "moments": self.moments,
            "made_of": _made_of(self.fingerprint),
        }


def _made_of(fingerprint: str) -> dict[str, str]:
    """Return what decides a factor file's bytes beside the recipe."""
    return {"weights": fingerprint, **versions()}


def _result(reply: Any, name: str) -> float:
    """Return a task's seconds; Ray has tried it again where its worker died."""
    import ray  # noqa: PLC0415 (an extra)

    try:
        with own_errors():
            seconds: float = ray.get(reply)
    except ray.exceptions.RayTaskError:
        raise
    except ray.exceptions.RayError as e:
        raise lost(f"stack {name}", e) from e
    return seconds


def _seal_one(order: Mapping[str, Any]) -> float:
    """Decompose one stack in a Ray worker."""
    begin_work(order["threads"], order["cwd"])
    checkpoint = open_checkpoint(order["model"], order["revision"])
    here, there = _made_of(checkpoint.fingerprint), order["made_of"]
    if differing := [f"{key} ({here[key]}, not {there[key]})" for key in here if here[key] != there[key]]:
        raise PlanError(
            f"machine {socket.gethostname()} would make other factors: it differs in {', '.join(differing)}; give all "
            "machines of the Ray cluster the same model and packages"
        )
    planned = make_plan(checkpoint, Recipe(**order["recipe"]), order["family_file"])
    if order["moments"]:
        planned = replace(planned, moments=Moments.open(order["moments"], checkpoint, planned.recipe.output_weighting))
    item = _named(planned.stacks, order["stack"])
    return seal_stack(
        planned,
        item,
        order["path"],
        absmax=order["absmax"],
        device=torch.device(order["device"]),
        max_memory=order["max_memory"],
    )


def _named(stacks: Sequence[PlannedStack], name: str) -> PlannedStack:
    return next(item for item in stacks if item.stack.name == name)
