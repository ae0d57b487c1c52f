"""``trawl sample``: text that a model writes itself."""

from __future__ import annotations

from pathlib import Path

import rich_click as click


@click.command()
@click.argument("model")
@click.option("-o", "--out", type=click.Path(path_type=Path, dir_okay=False), required=True, help="Text file to write.")
@click.option("--tokens", type=int, default=32768, show_default=True, help="To write, over all documents.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of everything random.")
@click.option("--dtype", default="auto", show_default=True, metavar="auto|float32|bfloat16", help="To load in.")
@click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda", help="Where to compute.")
@click.option("--overwrite", is_flag=True, help="Replace an existing file once the new one is complete.")
@click.option("--revision", help="Branch, tag or commit of a hub id.")
@click.option("--trust-remote-code", is_flag=True, help="Run the code that comes with the model; read it first.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def sample(
    model: str,
    out: Path,
    tokens: int,
    seed: int,
    dtype: str,
    device: str,
    overwrite: bool,
    revision: str | None,
    trust_remote_code: bool,
    debug: bool,
) -> None:
    """Let MODEL write text to calibrate on, beside a text of one kind or for want of any.

    What is calibrated on one kind of text loses more on others; what a model writes is spread over all that it knows.

    Example: trawl sample MODEL -o own.txt, then
    trawl compress MODEL --keep 0.8 --calibrate train.txt --calibrate own.txt
    """
    import trawl

    from .console import observing

    if out.exists() and not overwrite:
        raise click.UsageError(f"{out} exists; choose another file with -o, or pass --overwrite")
    if not out.absolute().parent.is_dir():
        raise click.UsageError(f"{out.parent} is no folder; make it first, or choose another file with -o")
    with observing(quiet=False, unit="tokens") as observer:
        text = trawl.sample(
            model,
            tokens,
            seed=seed,
            revision=revision,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            observer=observer,
        )
    partial = out.with_name(out.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(out)
    click.echo(f"wrote {out}")
