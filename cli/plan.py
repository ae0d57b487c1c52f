"""``trawl plan``: what compress would do."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import rich_click as click

from .options import (
    build_recipe,
    calibration_arguments,
    calibration_options,
    model_options,
    recipe_options,
)

if TYPE_CHECKING:
    from trawl.planned import Plan
    from trawl.recipe import Recipe


@click.command()
@click.argument("model")
@recipe_options
@calibration_options
@click.option("--save-recipe", is_flag=True, help="Print the recipe as YAML and stop.")
@model_options
def plan(
    model: str,
    recipe_file: Path | None,
    save_recipe: bool,
    calibrate: tuple[str, ...],
    calibration_tokens: int | None,
    moments: Path | None,
    revision: str | None,
    family_file: Path | None,
    as_json: bool,
    debug: bool,
    **options: Any,
) -> None:
    """Show stacks, ranks, parameters, bytes and memory that compress would need; no weights are read.

    With a budget (--keep, --size) the search is made, which takes a calibration; --moments keeps it for compress.
    Example: trawl plan HuggingFaceTB/SmolLM2-135M-Instruct --rank 64 --layers 20-29
    """
    recipe = build_recipe(recipe_file, options)
    calibration = calibration_arguments(calibrate, calibration_tokens, moments)
    if recipe.budget:
        plan_budget(model, recipe, revision, family_file, calibration, save_recipe=save_recipe, as_json=as_json)
        return
    if save_recipe:
        click.echo(recipe.to_yaml(), nl=False)
        return
    import trawl

    from .console import print_json

    planned = trawl.plan(model, recipe, revision=revision, family_file=family_file, **calibration)
    if as_json:
        print_json(planned.to_json())
    else:
        print_plan(planned)


def plan_budget(
    model: str,
    recipe: Recipe,
    revision: str | None,
    family_file: Path | None,
    calibration: dict[str, Any],
    *,
    save_recipe: bool,
    as_json: bool,
) -> None:
    """Search for a budget's recipe and print the choice with what it is predicted to do."""
    import trawl

    from .compress import damage_text
    from .console import observing, print_json, print_table

    with TemporaryDirectory() as scratch, observing(quiet=as_json or save_recipe) as observer:
        folder = calibration.pop("moments", Path(scratch))
        found = trawl.find_recipe(
            model, recipe, folder, revision=revision, family_file=family_file, observer=observer, **calibration
        )
    if save_recipe:
        click.echo(found.recipe.to_yaml(), nl=False)
        return
    values = found.to_json()
    if as_json:
        print_json(values | {"recipe": found.recipe.model_dump(mode="json")})
        return
    rows = [
        [
            piece["name"],
            piece["structure"],
            ", ".join(str(size) if size else "dense" for size in piece["sizes"]),
            f"{piece['parameters_before']:,}",
            f"{piece['parameters_after']:,}",
            "" if piece["predicted_damage"] is None else f"{piece['predicted_damage']:.5f}",
        ]
        for piece in values["pieces"]
    ]
    columns = ("piece", "structure", "width or ranks", "parameters", "kept", "predicted damage")
    print_table(f"{model}: choice for the budget", columns, rows, left=3)
    click.echo(damage_text(values))


def print_plan(planned: Plan) -> None:
    """Print the plan as a table with totals."""
    from trawl.planned import product_seconds
    from trawl.stacking import format_layers

    from .console import human_bytes, print_table, times

    rows = [
        [
            item.stack.name,
            format_layers(item.stack.layers),
            ",".join(item.stack.roles),
            times(item.stack.shape),
            times(item.rank),
            f"{item.stack.parameters:,}",
            f"{item.parameters_after:,}",
        ]
        for item in planned.stacks
    ]
    columns = ("stack", "layers", "roles", "shape", "rank", "parameters", "in factors")
    title = (
        f"{planned.checkpoint.origin}: {planned.match.family}, {planned.recipe.method}, write {planned.recipe.write}"
    )
    print_table(title, columns, rows, left=3)
    for note in (*planned.match.assumed, *planned.notes):
        click.echo(f"note: {note}")
    click.echo(
        f"parameters {planned.checkpoint.parameters:,} -> {planned.output_parameters:,}; "
        f"shards {planned.checkpoint.nbytes:,} -> {planned.output_bytes:,} bytes"
    )
    click.echo(
        f"output {human_bytes(planned.output_bytes)} in {len(planned.checkpoint.shards)} shards, "
        f"{len(planned.changed_tensors)} of {len(planned.checkpoint.tensors)} tensors changed; "
        f"work files {human_bytes(planned.work_bytes)}; memory about {human_bytes(planned.memory)}; "
        f"about {planned.flops / 1e9:,.0f} GFLOP, {product_seconds(planned):.0f} s on this processor, beside reading "
        "and writing"
    )
