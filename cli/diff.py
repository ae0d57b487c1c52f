"""``trawl diff``: two checkpoints, tensor by tensor."""

from __future__ import annotations

import rich_click as click


@click.command()
@click.argument("a")
@click.argument("b")
@click.option("--all", "show_all", is_flag=True, help="List equal tensors too.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def diff(a: str, b: str, show_all: bool, as_json: bool, debug: bool) -> None:
    """Compare checkpoints A and B: relative error and byte equality of every tensor.

    Example: trawl diff SmolLM2-135M-Instruct SmolLM2-135M-Instruct-cp-r8
    """
    from trawl.comparison import diff as compare
    from trawl.hub import open_checkpoint

    from .console import observing, print_json, print_table, times

    left, right = open_checkpoint(a), open_checkpoint(b)
    done = 0
    with observing(quiet=as_json) as observer:

        def advance(count: int) -> None:
            nonlocal done
            done += count
            observer("comparing", done, left.nbytes)

        found = compare(left, right, advance)
    if as_json:
        print_json([item.to_json() for item in found])
        return
    rows = [
        [
            item.name,
            item.change,
            times(item.shape_b or item.shape_a or ()),
            item.dtype_b or item.dtype_a or "",
            "" if item.relative_error is None else f"{item.relative_error:.5f}",
        ]
        for item in found
        if show_all or item.change != "equal"
    ]
    if rows:
        print_table(f"{a} against {b}", ("tensor", "change", "shape", "dtype", "rel. error"), rows, left=2)
    equal = sum(item.change == "equal" for item in found)
    click.echo(f"{equal} of {len(found)} tensors are byte-identical, {len(found) - equal} differ")
