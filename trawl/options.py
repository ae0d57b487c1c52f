"""What is asked for: which options go together, and what stands for those that are left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from trawl.calibration import Calibration, Moments
from trawl.checkpoint import Checkpoint
from trawl.errors import PlanError
from trawl.factor_library import FactorLibrary
from trawl.planned import Plan
from trawl.recipe import Recipe


def check_together(
    planned: Plan, library: FactorLibrary | None, source: Calibration | Moments | None, ray: str | None
) -> None:
    """Raise PlanError for options that exclude one another."""
    recipe = planned.recipe
    if library and ray is not None:
        raise PlanError("--ray spreads decompositions, and --factors needs none; leave one of the two out")
    if source and recipe.engine == "tensorly":
        raise PlanError("engine tensorly cannot weigh the error by moments; use the default engine, streaming")
    if source and recipe.method == "tucker" and any(item.rank[0] < item.stack.shape[0] for item in planned.stacks):
        raise PlanError("a stack mode cannot be compressed by weighted error; give --rank INT, which keeps it")
    if library and source:
        raise PlanError("--factors takes factors as they are; moments weigh new ones: leave one of the two out")


def check_anchored(recipe: Recipe, calibrate: Any, moments: Any, factors: Any = None, ray: str | None = None) -> None:
    """Raise PlanError for an anchored run without a text, or with what it has no use for."""
    if not recipe.anchored:
        return
    if not calibrate:
        raise PlanError(
            "an anchored run needs the inputs that the compressed model computes on a text, of which moments of the "
            "original alone know nothing; pass --calibrate TEXT, or leave --anchored out"
        )
    for name, given in (("moments", moments), ("factors", factors), ("ray", ray)):
        if given is not None:
            raise PlanError(
                f"--{name} does not go with --anchored: each stack depends on those before it, as they are here; leave "
                "one of the two out"
            )


def check_refit(recipe: Recipe, calibrate: Any) -> None:
    """Raise PlanError for a refit without a text.

    A found recipe that narrows nothing has nothing to refit, and a plain budget refits by itself only with a text.
    """
    narrows = any(part.method == "narrow" for part in recipe.members())
    asked = "refit" in recipe.model_fields_set if recipe.budget else narrows
    if recipe.refit and asked and not calibrate:
        raise PlanError(
            "a refit needs what the model computes on a text, of which moments alone do not tell enough; pass "
            "--calibrate TEXT, or --no-refit"
        )


def check_moments_folder(folder: Path | None, source: Path, out: Path | None = None) -> None:
    """Raise PlanError for a folder of moments that is, or lies inside, the source or the output."""
    if folder is None:
        return
    kept, origin = folder.resolve(), source.resolve()
    if kept == origin or origin in kept.parents:
        raise PlanError(f"moments {folder} equal or lie inside the source {source}, which is never written to")
    if out is not None and out.resolve() in (kept, *kept.parents):
        raise PlanError(f"moments {folder} equal or lie inside the output {out}; choose another folder for one of them")


def pick_device(device: str, ray: str | None = None) -> torch.device:
    """Resolve ``auto`` to CUDA where there is one, and CUDA to the CPU where Ray's workers have devices of their own.

    Raises: PlanError: the device is unknown, or not on this machine.
    """
    if ray is not None and device.startswith("cuda"):
        return torch.device("cpu")
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as e:
        raise PlanError(f"unknown device {device!r}; expected auto, cpu, cuda or cuda:N") from e
    if chosen.type not in ("cpu", "cuda"):
        raise PlanError(f"device {device!r} is none that this runs on; expected auto, cpu, cuda or cuda:N")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise PlanError(f"device {device!r} is not on this machine (torch {torch.__version__} sees no GPU); use cpu")
    return chosen


def default_out(planned: Plan) -> Path:
    """Name an output folder after model, method and rank."""
    recipe = planned.recipe
    if recipe.method == "narrow":
        sizes = {"w": recipe.width, "kv": recipe.kv_heads}
        text = "-".join(f"{name}{_size_text(size)}" for name, size in sizes.items() if size is not None)
    elif recipe.method == "mixed":
        text = f"{len(recipe.parts)}-parts"
    else:
        text = f"r{_size_text(recipe.rank)}"
    return Path(f"{_stem(planned.checkpoint)}-{recipe.method}-{text}")


def budget_out(checkpoint: Checkpoint, recipe: Recipe) -> Path:
    """Name an output folder after model and budget."""
    size = f"keep{recipe.keep:g}" if recipe.keep is not None else f"{recipe.size}-bytes"
    return Path(f"{_stem(checkpoint)}-{'plain-' if recipe.plain else ''}{size}")


def _stem(checkpoint: Checkpoint) -> str:
    """Return what names of outputs begin with."""
    origin = Path(checkpoint.origin)
    return origin.stem if origin.suffix == ".gguf" else origin.resolve().name


def _size_text(size: object) -> str:
    """Write a rank or a width as part of a file's name."""
    return "-".join(map(str, size)) if isinstance(size, tuple) else str(size)
