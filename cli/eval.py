"""``trawl eval``: what a model can do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import rich_click as click

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trawl.evaluation import TaskResult


@click.command("eval")
@click.argument("model")
@click.option(
    "--task",
    "tasks",
    multiple=True,
    required=True,
    metavar="SPEC",
    help="ppl:FILE.txt, qa:FILE.jsonl, choice:FILE.jsonl, pairs:FILE.jsonl or lm:TASKNAME; may be given many times. "
    r"Options follow a question mark: choice:FILE?template=Question: {query}\nAnswer:, qa:FILE?tokens=10, "
    "lm:TASK?fewshot=5.",
)
@click.option("--limit", type=int, help="The most records of each task, from its beginning; windows for ppl.")
@click.option("--dtype", default="auto", show_default=True, metavar="auto|float32|bfloat16", help="To load in.")
@click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda", help="Where to evaluate.")
@click.option("--context", type=int, help="The most tokens fed at once.  [default: the model's; ppl at most 2048]")
@click.option("--stride", type=int, help="Scored tokens in each window of ppl.  [default: half the context]")
@click.option("--batch-tokens", type=int, default=4096, show_default=True, help="Padded tokens in one batch.")
@click.option("--revision", help="Branch, tag or commit of a hub id.")
@click.option("--trust-remote-code", is_flag=True, help="Run the code that comes with the model; read it first.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def evaluate(
    model: str,
    tasks: tuple[str, ...],
    limit: int | None,
    dtype: str,
    device: str,
    context: int | None,
    stride: int | None,
    batch_tokens: int,
    revision: str | None,
    trust_remote_code: bool,
    as_json: bool,
    debug: bool,
) -> None:
    """Measure perplexity, answers, choices or sentence pairs, each figure with its standard error.

    MODEL may be a base, denoised or factored checkpoint. Text is fed as it is, without a chat template.

    Example: trawl eval denoised --task ppl:wiki.txt --task qa:facts.jsonl --limit 400
    """
    import trawl

    from .console import observing, print_json

    with observing(quiet=as_json, unit="tokens") as observer:
        results = trawl.evaluate(
            model,
            tasks,
            revision=revision,
            limit=limit,
            batch_tokens=batch_tokens,
            dtype=dtype,
            device=device,
            context=context,
            stride=stride,
            trust_remote_code=trust_remote_code,
            observer=observer,
        )
    if as_json:
        print_json({"model": model, "results": [result.to_json() for result in results]})
    else:
        print_results(model, results)


def print_results(model: str, results: Sequence[TaskResult]) -> None:
    """Print every figure on a row of its own, then what the figures depend on and what they leave out."""
    from .console import print_table

    rows = [
        [
            result.task if number == 0 else "",
            figure.name,
            f"{figure.value:.4f}",
            "" if figure.stderr is None else f"± {figure.stderr:.4f}",
            f"{result.scored:,}" if number == 0 else "",
        ]
        for result in results
        for number, figure in enumerate(result.figures)
    ]
    print_table(model, ("task", "figure", "value", "std. error", "scored"), rows, left=2)
    for result in results:
        settings = ", ".join(f"{name} {value!r}" for name, value in result.settings.items() if value is not None)
        click.echo(f"{result.task}: {settings}; {result.seconds:.1f} s")
        if result.overlong:
            click.echo(
                f"warning: {result.task}: {result.overlong:,} of {result.overlong + result.scored:,} records are "
                f"longer than the context of {result.settings['context']} tokens and left out of the figures"
            )
