"""``trawl densify``: factors multiplied out again."""

from __future__ import annotations

from pathlib import Path

import rich_click as click


@click.command()
@click.argument("factored", type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Output folder.")
@click.option("--overwrite", is_flag=True, help="Replace an existing output once the new one is complete.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def densify(factored: Path, out: Path, overwrite: bool, debug: bool) -> None:
    """Multiply the factors of FACTORED out again into an ordinary dense checkpoint.

    Example: trawl densify SmolLM2-135M-Instruct-tucker-r400 -o dense
    """
    from trawl.densifying import densify as run

    from .console import observing

    with observing(quiet=False) as observer:
        run(factored, out, overwrite=overwrite, observer=observer)
    click.echo(f"wrote {out}")
