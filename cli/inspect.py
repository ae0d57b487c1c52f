"""``trawl inspect``: what a checkpoint is."""

from __future__ import annotations

from pathlib import Path

import rich_click as click

from .options import model_options


@click.command()
@click.argument("model")
@model_options
def inspect(model: str, revision: str | None, family_file: Path | None, as_json: bool, debug: bool) -> None:
    """Show family, roles, shapes, parameters per role and stackable groups; no weights are read.

    Example: trawl inspect HuggingFaceTB/SmolLM2-135M-Instruct
    """
    from trawl.hub import open_checkpoint
    from trawl.planning import describe, match_checkpoint

    from .console import human_bytes, print_json, print_table, times

    checkpoint = open_checkpoint(model, revision, weights=False)
    summary = describe(checkpoint, match_checkpoint(checkpoint, family_file))
    if as_json:
        print_json(summary)
        return
    click.echo(
        f"{summary['model']}: family {summary['family']}, {summary['layers']} layers, "
        f"{summary['parameters']:,} parameters, {human_bytes(summary['bytes'])} in {summary['shards']} shards"
    )
    for line in summary["assumed"]:
        click.echo(f"assumed: {line}")
    rows = [
        [role["role"], times(role["shape"]), role["dtype"], f"{role['matrices']}", f"{role['parameters']:,}", role["example"]]
        for role in summary["roles"]
    ]
    print_table("roles (inner x hidden)", ("role", "shape", "dtype", "matrices", "parameters", "stored as"), rows)
    rows = [[group["name"], ",".join(group["roles"]), times(group["shape"])] for group in summary["groups"]]
    print_table("stackable groups (stack x inner x hidden)", ("group", "roles", "shape"), rows, left=2)
    click.echo(f"pass-through: {summary['other_tensors']} tensors, {summary['other_parameters']:,} parameters")
