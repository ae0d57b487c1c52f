"""``trawl report``: a sweep or a compress output as a page to read."""

from __future__ import annotations

from pathlib import Path

import rich_click as click


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder to write into.  [default: DIR]")
@click.option("--json", "as_json", is_flag=True, help="Print the paths as JSON.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def report(folder: Path, out: Path | None, as_json: bool, debug: bool) -> None:
    """Write report.html, one self-contained page, and report/*.png.

    DIR is the output of a sweep, finished or not, or of one compress. The page has heat maps of the gain by layer and
    rank, the Pareto front, errors of the stacks, spectra where the source is at hand, the best with confidence
    intervals, and the commands that rebuild the winner.

    Example: trawl report study
    """
    from trawl.report import write_report

    from .console import observing, print_json

    with observing(quiet=as_json) as observer:
        written = write_report(folder, out, observer=observer)
    if as_json:
        print_json(written.to_json())
        return
    click.echo(f"wrote {written.page} and {len(written.pictures)} pictures beside it")
