"""What a run leaves in words: its report, trawl.json, and the model card."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from trawl.calibration import Calibration, Moments
from trawl.checkpoint import INDEX_NAME, read_json
from trawl.errors import CheckpointError, PlanError
from trawl.factors import Factors
from trawl.layout import ShardLayout, index_file
from trawl.narrowing import Narrowing
from trawl.planned import Plan, PlannedStack
from trawl.recipe import Recipe
from trawl.redaction import command_line, redacted
from trawl.shards import sealed
from trawl.stacking import format_layers
from trawl.untrusted import LARGEST_YAML, own_file, parse_yaml
from trawl.writing import SquaredErrors

WEAK_ENERGY = 0.5
MEANING = (
    "Relative error is ‖T − T̂‖ / ‖T‖ in the Frobenius norm, measured on the weights as written; kept energy is "
    "1 − relative error²."
)
NARROW_MEANING = (
    "Relative error is √(E‖y − ŷ‖² / E‖y‖²) of what each stack puts out, by the second moments that its units were "
    "chosen by and with the weights as written; kept energy is 1 − relative error²."
)
FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---\n?", re.DOTALL)
CARRIED_METADATA = ("license", "license_name", "license_link", "language", "library_name", "pipeline_tag", "datasets")


@dataclass(frozen=True)
class StackReport:
    """What became of one stack.

    Attributes:
        name: the stack's name in the plan.
        layers: layers that it covers.
        roles: roles that it covers.
        tensors: stored tensors that hold its slices.
        shape: (S, inner, hidden).
        rank: (stack, inner, hidden).
        relative_error: ‖T − T̂‖_F / ‖T‖_F of what was written, rounding included.
        rounding_error: how far rounding to the stored dtype moved it, relative to ‖T‖_F.
        parameters_before: entries of its matrices.
        parameters_after: entries of its factors.
        iterations: sweeps made.
        converged: whether the change of fit fell under the tolerance before the cap on sweeps.
        seconds: time of its decomposition; 0 when a sealed factor file was reused.
        weighted_error: the relative error as moments weigh it, of the factors before rounding; None without moments.
    """

    name: str
    layers: tuple[int, ...]
    roles: tuple[str, ...]
    tensors: tuple[str, ...]
    shape: tuple[int, int, int]
    rank: tuple[int, int, int]
    relative_error: float
    rounding_error: float
    parameters_before: int
    parameters_after: int
    iterations: int
    converged: bool
    seconds: float
    weighted_error: float | None = None

    @property
    def kept_energy(self) -> float:
        """Share of ‖T‖² that is left, 1 − relative_error²."""
        return 1.0 - self.relative_error**2

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON-able values."""
        return asdict(self) | {"kept_energy": self.kept_energy}


def report_stack(item: PlannedStack, result: Factors | Narrowing, errors: SquaredErrors, seconds: float) -> StackReport:
    """Put together what became of one stack.

    Args:
        item: the stack.
        result: what its sealed file holds.
        errors: of the weights as written; a narrowing has measured its outputs itself.
        seconds: time of its decomposition.
    Raises: CheckpointError: what was written is not finite, because the stored dtype is too narrow for it.
    """
    if isinstance(result, Narrowing):
        error, rounding = result.relative_error, result.rounding_error
        iterations, converged, weighted = 0, True, None
    else:
        error, rounding = errors.relative(item.stack.name), errors.relative_rounding(item.stack.name)
        iterations, converged, weighted = result.iterations, result.converged, result.weighted_error
    if not error < float("inf"):
        raise CheckpointError(
            f"stack {item.stack.name}: the approximation does not fit the stored dtype (relative error {error}); "
            "choose a larger rank, or a checkpoint stored in bfloat16 or float32"
        )
    return StackReport(
        name=item.stack.name,
        layers=item.stack.layers,
        roles=item.stack.roles,
        tensors=item.stack.tensors,
        shape=item.stack.shape,
        rank=item.rank,
        relative_error=error,
        rounding_error=rounding,
        parameters_before=item.stack.parameters,
        parameters_after=item.parameters_after,
        iterations=iterations,
        converged=converged,
        seconds=round(seconds, 3),
        weighted_error=weighted,
    )


@dataclass(frozen=True)
class Report:
    """What a run did.

    Attributes:
        out: the finished folder.
        stacks: in plan order.
        seconds: wall time of the run.
        last_norm: by what a refit scaled the norm in front of the head; 1 where that stays.
    """

    out: Path
    stacks: tuple[StackReport, ...]
    seconds: float
    last_norm: float = 1.0

    @property
    def weak_stacks(self) -> tuple[StackReport, ...]:
        """Stacks that keep less than half of their energy, enough lost to break a model."""
        return tuple(stack for stack in self.stacks if stack.kept_energy < WEAK_ENERGY)

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON-able values."""
        return {
            "out": str(self.out),
            "seconds": round(self.seconds, 3),
            "last_norm": self.last_norm,
            "stacks": [stack.to_json() for stack in self.stacks],
        }


def write_records(planned: Plan, report: Report, identity: Mapping[str, Any], staged: Path) -> None:
    """Write trawl.json and the model card into a folder.

    Args:
        planned: what was to be done.
        report: what was done.
        identity: what the output depends on.
        staged: the folder that becomes OUT.
    """
    calibrated = planned.moments or planned.anchor or planned.refit
    record = {
        "write": planned.recipe.write,
        "command": command_line(),
        "threads": torch.get_num_threads(),
        "seconds": round(report.seconds, 3),
        "source": {"model": redacted(planned.checkpoint.origin), "revision": planned.checkpoint.revision},
        "family": {"name": planned.match.family, "assumed": list(planned.match.assumed)},
        "calibration": calibrated.to_json()
        if (calibrated := planned.moments or planned.anchor or planned.refit)
        else None,
        "identity": identity,
        "last_norm": report.last_norm,
        "stacks": [stack.to_json() for stack in report.stacks],
    }
    write_json(staged / "trawl.json", record)
    with sealed(staged / "README.md") as file:
        file.write(redacted(model_card(planned, report, record)).encode())


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file the way transformers writes its configurations; it appears whole, by rename."""
    with sealed(path) as file:
        file.write((json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def write_index(source: Path, layouts: tuple[ShardLayout, ...], staged: Path) -> None:
    """Write the index of newly laid out shards, where the source folder has one."""
    if (source / INDEX_NAME).is_file():
        metadata = read_json(source / INDEX_NAME, "shard index").get("metadata") or {}
        write_json(staged / INDEX_NAME, index_file(layouts, metadata))


def read_report(out: Path, identity: Mapping[str, Any]) -> Report | None:
    """Return the report of a finished output, None if there is none or it is of another run.

    Raises: PlanError: the folder's trawl.json cannot be read.
    """
    try:
        record = json.loads((out / "trawl.json").read_bytes())
        if record["identity"] != json.loads(json.dumps(identity)):
            return None
        stacks = tuple(map(_stack_report, record["stacks"]))
        return Report(out, stacks, float(record["seconds"]), float(record.get("last_norm", 1.0)))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise PlanError(f"{out / 'trawl.json'} is not readable: {e}; pass --overwrite to replace the folder") from e


def _stack_report(values: Mapping[str, Any]) -> StackReport:
    """Read back what :meth:`StackReport.to_json` wrote."""
    fields: dict[str, Any] = {key: tuple(item) if isinstance(item, list) else item for key, item in values.items()}
    del fields["kept_energy"]
    return StackReport(**fields)


def model_card(planned: Plan, report: Report, record: Mapping[str, Any]) -> str:
    """Return the output's README.md: metadata, what was done, with what error, and how to repeat it."""
    checkpoint, recipe = planned.checkpoint, planned.recipe
    name = Path(checkpoint.origin).name
    title, done = _what_was_done(planned, report, name)
    intro = (
        f"{done} Nothing was trained. Parameters: {planned.output_parameters:,}; shards: {planned.output_bytes:,} "
        f"bytes ({checkpoint.nbytes:,} before)."
    )
    shared = "" if recipe.share == "none" else f"share {recipe.share}, "
    settings = (
        f"Method {recipe.method.upper()}, {_sizes(recipe)}, layers {recipe.layers}, roles {recipe.roles}, "
        f"group-layers {recipe.group_layers}, {shared}seed {recipe.seed}."
    )
    if planned.moments:
        settings += f" {_calibrated(planned.moments)}"
    if planned.anchor:
        settings += f" {_anchored(planned.anchor)}"
    if planned.refit and planned.refitted:
        tokens, text = planned.refit.windows.numel(), planned.refit.text.name
        settings += f" FCs were refitted on {tokens:,} tokens of {text}{_last_norm(report)}."
    meaning, after = (NARROW_MEANING, "kept") if planned.narrowed else (MEANING, "in factors")
    lines = [f"# {name}, {title} with TRAWL", "", intro, "", settings, "", *_table(report.stacks, after), "", meaning]
    if report.weak_stacks:
        lines += ["", f"**{weak_warning(report)}**"]
    others = "Every other tensor"
    if planned.narrowed:
        norm = "" if report.last_norm == 1.0 else ", and the norm in front of the head,"
        others += f", but for biases of the modules above{norm}"
    lines += ["", f"{others} is byte-identical to the source. Exact versions and hashes are in `trawl.json`."]
    if record["command"]:
        lines += ["", "```", record["command"], "```"]
    return _front_matter(planned) + "\n".join(lines) + "\n"


def _what_was_done(planned: Plan, report: Report, name: str) -> tuple[str, str]:
    """Return what the output is called, and say what stands in it and where it loads."""
    before = sum(stack.parameters_before for stack in report.stacks)
    total = planned.checkpoint.parameters
    through = "It loads through transformers once `import trawl` was run (`pip install trawl-llm`)."
    if planned.narrowed:
        after = sum(stack.parameters_after for stack in report.stacks)
        what = f"Inner units are left out, {after:,} of {before:,} weights around them stay of the {total:,} of {name}."
        where = "It is an ordinary, smaller checkpoint of the same architecture."
        return "narrowed", f"{what} {through if planned.descriptor else where}"
    what = f"Low-rank approximations stand in place of {before:,} of the {total:,} weights of {name}."
    if planned.descriptor:
        return "compressed", f"{what} {through}"
    return (
        "denoised",
        f"{what} The tensors have their old names, shapes and dtypes: it loads wherever it did before.",
    )


def _last_norm(report: Report) -> str:
    """Say by what the norm in front of the head was scaled, if it was."""
    scaled = f", and what the norm in front of the head gives was scaled by {report.last_norm:.4f}"
    return "" if report.last_norm == 1.0 else scaled


def _sizes(recipe: Recipe) -> str:
    """Say how small the stacks were made."""
    sizes = {"rank": recipe.rank, "width": recipe.width, "key-value heads": recipe.kv_heads}
    return ", ".join(f"{name} {size}" for name, size in sizes.items() if size is not None)


def _calibrated(moments: Moments) -> str:
    """Say what weighed the error."""
    outputs = f" and of the loss's gradients by what it gives ({moments.outputs.kind})" if moments.outputs else ""
    return (
        f"The error is weighed by the second moments of what each layer reads{outputs} on {moments.tokens:,} tokens of "
        f"{moments.identity.text} (fingerprint {moments.fingerprint[:12]}); weighted error is relative to that norm."
    )


def _anchored(text: Calibration) -> str:
    """Say what stacks were fitted to."""
    return (
        f"Block by block, each stack is fitted to what the original model computes on {text.windows.numel():,} tokens "
        f"of {text.text.name} (fingerprint {text.fingerprint[:12]}), from the inputs that the compressed one gives it; "
        "weighted error is relative to the second moments of these inputs."
    )


def weak_warning(report: Report) -> str:
    """Say plainly that a model may be broken."""
    worst = min(report.weak_stacks, key=lambda stack: stack.kept_energy)
    return (
        f"{len(report.weak_stacks)} of {len(report.stacks)} stacks keep under {WEAK_ENERGY:.0%} of their energy "
        f"(least: {worst.name} with {worst.kept_energy:.1%}). A model changed this much may be broken: "
        "evaluate it before any use."
    )


def _table(stacks: Sequence[StackReport], after: str) -> list[str]:
    """Return the stacks as a Markdown table; ``after`` names the parameters that there are now."""
    weighted = any(stack.weighted_error is not None for stack in stacks)
    errors = ("relative error", "weighted error") if weighted else ("relative error",)
    names = ("stack", "layers", "roles", "shape", "rank", *errors, "kept energy", "parameters", after)
    rows = [
        (
            stack.name,
            format_layers(stack.layers),
            ", ".join(stack.roles),
            _times(stack.shape),
            _times(stack.rank),
            f"{stack.relative_error:.5f}",
            *(["" if stack.weighted_error is None else f"{stack.weighted_error:.5f}"] if weighted else []),
            f"{stack.kept_energy:.2%}",
            f"{stack.parameters_before:,}",
            f"{stack.parameters_after:,}",
        )
        for stack in stacks
    ]
    return ["| " + " | ".join(row) + " |" for row in (names, ["---"] * len(names), *rows)]


def _times(sizes: Sequence[int]) -> str:
    return " × ".join(str(size) for size in sizes)


def _card(folder: Path) -> str:
    """Return the beginning of a source's model card, empty where it has none."""
    if not os.path.lexists(folder / "README.md"):
        return ""
    with own_file(folder, "README.md").open("rb") as file:
        return file.read(LARGEST_YAML).decode("utf-8", errors="replace").replace("\r\n", "\n")


def _front_matter(planned: Plan) -> str:
    """Return the card's metadata: the base model, tags, and what carries over from the source's card."""
    carried: dict[str, Any] = {}
    card = _card(planned.checkpoint.folder)
    if match := FRONT_MATTER.match(card):
        try:
            loaded = parse_yaml(match[1])
        except ValueError:
            loaded = None  # a card with broken metadata has none to carry over
        if isinstance(loaded, dict):
            carried = {key: loaded[key] for key in CARRIED_METADATA if key in loaded}
    tags = ["trawl", "pruned" if planned.narrowed else "low-rank", planned.recipe.method]
    metadata = {
        "base_model": planned.checkpoint.origin,
        "library_name": "transformers",
        **carried,
        "tags": tags,
    }
    if planned.checkpoint.revision is None:  # a local path is no model on the hub, and says too much of this machine
        metadata["base_model"] = Path(planned.checkpoint.origin).name
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---\n\n"
