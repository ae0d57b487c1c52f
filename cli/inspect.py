"""``trawl inspect``: what a checkpoint is."""

from __future__ import annotations

from pathlib import Path

import rich_click as click

from .options import model_options


@click.command()
@click.argument("model")
@click.option("--spectra", "with_spectra", is_flag=True, help="Measure singular values of every matrix; reads weights.")
@click.option("--layers", default="all", show_default=True, help="Layers whose spectra are measured.")
@click.option("--roles", default="all", show_default=True, help="Roles whose spectra are measured.")
@click.option("--plot", "plot_path", type=click.Path(path_type=Path), help="PNG to draw the spectra into.")
@model_options
def inspect(
    model: str,
    with_spectra: bool,
    layers: str,
    roles: str,
    plot_path: Path | None,
    revision: str | None,
    family_file: Path | None,
    as_json: bool,
    debug: bool,
) -> None:
    """Show family, roles, shapes, parameters per role and stackable groups.

    Without --spectra no weights are read. Example:

        trawl inspect HuggingFaceTB/SmolLM2-135M-Instruct --spectra --plot spectra.png
    """
    if plot_path and not with_spectra:
        raise click.UsageError("--plot draws spectra; add --spectra")
    if plot_path and (plot_path.is_dir() or not plot_path.absolute().parent.is_dir()):
        raise click.BadParameter(f"{plot_path} is no file in a folder that is there", param_hint="--plot")
    if with_spectra:
        show_spectra(model, revision, family_file, layers, roles, plot_path, as_json)
    else:
        show_summary(model, revision, family_file, as_json)


def show_summary(model: str, revision: str | None, family_file: Path | None, as_json: bool) -> None:
    """Print what the headers tell."""
    from trawl.hub import open_checkpoint
    from trawl.planning import match_checkpoint, summarize

    from .console import human_bytes, print_json, print_table, times

    checkpoint = open_checkpoint(model, revision, weights=False)
    summary = summarize(checkpoint, match_checkpoint(checkpoint, family_file))
    if as_json:
        print_json(summary)
        return
    click.echo(
        f"{summary['model']}: family {summary['family']}, {summary['layers']} layers, "
        f"{summary['parameters']:,} parameters, {human_bytes(summary['bytes'])} in {summary['shards']} shards"
    )
    if summary["towers"]:
        click.echo("layers: " + ", ".join(f"{tower} {layers}" for tower, layers in summary["towers"].items()))
    for line in summary["assumed"]:
        click.echo(f"assumed: {line}")
    rows = [
        [
            role["role"],
            times(role["shape"]),
            role["dtype"],
            f"{role['matrices']}",
            f"{role['parameters']:,}",
            role["example"],
        ]
        for role in summary["roles"]
    ]
    print_table("roles (inner x hidden)", ("role", "shape", "dtype", "matrices", "parameters", "stored as"), rows)
    rows = [[group["name"], ",".join(group["roles"]), times(group["shape"])] for group in summary["groups"]]
    print_table("stackable groups (stack x inner x hidden)", ("group", "roles", "shape"), rows, left=2)
    click.echo(f"pass-through: {summary['other_tensors']} tensors, {summary['other_parameters']:,} parameters")


def show_spectra(
    model: str,
    revision: str | None,
    family_file: Path | None,
    layers: str,
    roles: str,
    plot_path: Path | None,
    as_json: bool,
) -> None:
    """Print stable rank, effective rank and energies of every selected matrix, and draw them where asked."""
    from trawl.hub import open_checkpoint
    from trawl.planning import match_checkpoint
    from trawl.recipe import Recipe
    from trawl.spectra import RANKS, plot, spectra

    from .console import observing, print_json, print_table, times

    checkpoint = open_checkpoint(model, revision)
    match = match_checkpoint(checkpoint, family_file)
    recipe = Recipe(rank=1, layers=layers, roles=roles)
    chosen_layers, chosen_roles = recipe.selected_layers(match.layers), recipe.selected_roles(match.roles)
    chosen = [part for part in match.placements if part.layer in chosen_layers and part.role in chosen_roles]
    with observing(quiet=as_json) as observer:
        found = spectra(checkpoint, chosen, observer=observer)
    if plot_path:
        plot(found, plot_path, Path(checkpoint.origin).name)
    if as_json:
        print_json([item.to_json() for item in found])
        return
    rows = [
        [
            f"{item.layer}",
            item.role,
            times(item.shape),
            f"{item.spectrum.stable_rank:.1f}",
            f"{item.spectrum.effective_rank:.1f}",
            *(f"{item.spectrum.energy_at(rank):.1%}" for rank in RANKS),
        ]
        for item in found
    ]
    columns = ("layer", "role", "shape", "stable rank", "effective rank", *(f"energy at {rank}" for rank in RANKS))
    print_table("spectra", columns, rows, left=2)
    if plot_path:
        click.echo(f"drew {plot_path}")
