"""``trawl compress``: the main job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from .options import (
    build_recipe,
    calibration_arguments,
    calibration_options,
    model_options,
    parse_bytes,
    recipe_options,
    set_verbosity,
)

if TYPE_CHECKING:
    from trawl.records import Report


@click.command()
@click.argument("model")
@recipe_options
@calibration_options
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Output folder.  [default: ./MODEL-METHOD-rRANK]")
@click.option("--resume", is_flag=True, help="Go on with an interrupted run of the same recipe.")
@click.option("--overwrite", is_flag=True, help="Replace an existing output once the new one is complete.")
@click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda", help="Where to decompose.")
@click.option(
    "--max-memory", default="0", show_default=True, metavar="4GB", help="Slices to keep in memory between passes."
)
@click.option(
    "--factors", type=click.Path(path_type=Path), help="Factor library of a sweep to take factors from, not decompose."
)
@click.option("--ray", metavar="local|HOST:PORT", help="Decompose stacks on a Ray cluster; local starts one here.")
@click.option("-v", "--verbose", is_flag=True, help="Show the fit after each sweep.")
@model_options
def compress(
    model: str,
    recipe_file: Path | None,
    out: Path | None,
    resume: bool,
    overwrite: bool,
    device: str,
    max_memory: str,
    factors: Path | None,
    calibrate: tuple[str, ...],
    calibration_tokens: int | None,
    moments: Path | None,
    ray: str | None,
    verbose: bool,
    revision: str | None,
    family_file: Path | None,
    as_json: bool,
    debug: bool,
    **options: Any,
) -> None:
    """Decompose the selected weights and write a denoised (dense) or compressed (factored) checkpoint.

    Example: trawl compress HuggingFaceTB/SmolLM2-135M-Instruct --rank 8 --layers 28 --roles fc --group-layers 1
    """
    recipe = build_recipe(recipe_file, options)
    calibration = calibration_arguments(calibrate, calibration_tokens, moments)
    import trawl

    from .console import observing, print_json

    set_verbosity(verbose)
    with observing(quiet=as_json) as observer:
        report = trawl.compress(
            model,
            recipe,
            out,
            revision=revision,
            family_file=family_file,
            resume=resume,
            overwrite=overwrite,
            device=device,
            max_memory=parse_bytes(max_memory),
            factors=factors,
            ray=ray,
            observer=observer,
            **calibration,
        )
    if as_json:
        print_json(report.to_json())
    else:
        print_report(report)


def print_report(report: Report) -> None:
    """Print the stacks as a table with totals, and say plainly what may be broken."""
    from trawl.records import weak_warning

    from .console import print_table, times

    weighted = any(stack.weighted_error is not None for stack in report.stacks)
    rows = [
        [
            stack.name,
            times(stack.shape),
            times(stack.rank),
            f"{stack.relative_error:.5f}",
            *(["" if stack.weighted_error is None else f"{stack.weighted_error:.5f}"] if weighted else []),
            f"{stack.kept_energy:.2%}",
            f"{stack.parameters_before:,}",
            f"{stack.parameters_after:,}",
            f"{stack.iterations}" + ("" if stack.converged else " (cap)"),
            f"{stack.seconds:.1f}",
        ]
        for stack in report.stacks
    ]
    before = sum(stack.parameters_before for stack in report.stacks)
    after = sum(stack.parameters_after for stack in report.stacks)
    seconds = sum(stack.seconds for stack in report.stacks)
    rows.append(["total", *[""] * (5 if weighted else 4), f"{before:,}", f"{after:,}", "", f"{seconds:.1f}"])
    errors = ("rel. error", "weighted error") if weighted else ("rel. error",)
    columns = ("stack", "shape", "rank", *errors, "kept energy", "parameters", "in factors", "sweeps", "seconds")
    print_table("stacks", columns, rows)
    print_search(report.out)
    if report.weak_stacks:
        click.echo(f"warning: {weak_warning(report)}")
    if report.last_norm != 1.0:
        click.echo(f"what the norm in front of the head gives was scaled by {report.last_norm:.4f}")
    rounding = max(stack.rounding_error for stack in report.stacks)
    if rounding:
        click.echo(f"rounding to the stored dtype moved no stack by more than {rounding:.1e} of its norm")
    click.echo(f"wrote {report.out} in {report.seconds:.1f} s")


def print_search(out: Path) -> None:
    """Say what a budget's choice does, where there was one."""
    from trawl.budget import SEARCH_RECORD

    if (out / SEARCH_RECORD).exists():
        click.echo(damage_text(json.loads((out / SEARCH_RECORD).read_bytes())))


def damage_text(found: dict[str, Any]) -> str:
    """Return what a search came to, in words."""
    predicted = found["predicted_damage"]
    return (
        f"kept {found['kept']:.4f} of the parameters that the budget is for; KL divergence from the original on "
        f"calibration text {found['real_damage']:.4f} ± {found['real_damage_stderr']:.4f} nats a token"
        + ("" if predicted is None else f", {predicted:.4f} predicted")
    )
