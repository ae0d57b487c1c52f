"""``trawl sweep``: the rank reduction that makes a model better."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import rich_click as click

from .options import parse_bytes, parse_rank, set_verbosity

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trawl.sweeps import SweepResult

SHOWN = 10  # trials in the table


@click.command()
@click.argument("model")
@click.option("--task", "tasks", multiple=True, required=True, metavar="SPEC", help="As for eval; may be given again.")
@click.option("--ranks", required=True, metavar="8,64", help="Ranks to try; Tucker triples as 3x64x64.")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Folder of the study.")
@click.option("--method", "methods", default="cp", show_default=True, metavar="cp,tucker,svd", help="Methods to try.")
@click.option(
    "--roles",
    multiple=True,
    default=("fc",),
    show_default=True,
    metavar="fc|attn|LIST",
    help="Tried by itself; again for more.",
)
@click.option("--layers", default="all", show_default=True, metavar="20-30,35|all", help="Layers to choose from.")
@click.option(
    "--group-layers",
    default="1",
    show_default=True,
    metavar="1,10,all",
    help="Lengths of the runs of layers; each run is one stack.",
)
@click.option(
    "--objective",
    "objectives",
    multiple=True,
    default=("accuracy",),
    show_default=True,
    metavar="accuracy|log_loss|kept|FIGURE",
    help="The first decides; give kept beside it for a Pareto front.",
)
@click.option(
    "--sampler", default="grid", show_default=True, metavar="grid|tpe", help="Everything, or what looks promising."
)
@click.option("--trials", type=int, help="The most trials.  [default: the whole grid; 100 with tpe]")
@click.option("--storage", metavar="URL", help="Optuna RDB URL.  [default: a journal file in the folder]")
@click.option(
    "--compose", "compose_most", type=int, default=0, metavar="K", help="Add up to K interventions to the winner."
)
@click.option("--order", default="last-first", show_default=True, metavar="last-first|best-first", help="Of additions.")
@click.option(
    "--noise", type=float, default=1.0, show_default=True, help="Standard errors that an addition must exceed."
)
@click.option(
    "--patience",
    default="0.5",
    show_default=True,
    metavar="NATS|none",
    help="Loss per token above the base's at which a trial is stopped.",
)
@click.option("--limit", type=int, help="The most records of each task, from its beginning; windows for ppl.")
@click.option("--validation", type=float, default=0.2, show_default=True, help="Share of the validation part.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the split, decompositions and sampler.")
@click.option("--n-iter-max", type=int, help="Cap on sweeps of a decomposition.  [default: the method's own]")
@click.option("--tol", type=float, help="Change of fit under which they stop.  [default: the method's own]")
@click.option("--dtype", default="auto", show_default=True, metavar="auto|float32|bfloat16", help="To load in.")
@click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda", help="Where to evaluate.")
@click.option("--batch-tokens", type=int, default=4096, show_default=True, help="Padded tokens in one batch.")
@click.option("--prefix-memory", default="4GB", show_default=True, help="For the base model's activations.")
@click.option("--ray", metavar="local|ADDRESS", help="Spread trials over a Ray cluster (extra ray).")
@click.option("--revision", help="Branch, tag or commit of a hub id.")
@click.option("--trust-remote-code", is_flag=True, help="Run the code that comes with the model; read it first.")
@click.option("-v", "--verbose", is_flag=True, help="Show the fit after each sweep of a decomposition.")
@click.option("--json", "as_json", is_flag=True, help="Print results.json instead of tables.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def sweep(
    model: str,
    ranks: str,
    methods: str,
    group_layers: str,
    patience: str,
    prefix_memory: str,
    verbose: bool,
    as_json: bool,
    debug: bool,
    **options: Any,
) -> None:
    """Search for the rank reduction that makes a model better; choose on one part of the tasks, report on the rest.

    Killed and called again it goes on where it was; called twice at once, the two share the work.

    Example: trawl sweep MODEL --method cp,tucker --ranks 8,64 --layers 20-29 --task qa:facts.jsonl -o study
    """
    import trawl
    from trawl.redaction import command_line

    from .console import observing, print_json

    set_verbosity(verbose)
    with observing(quiet=as_json, unit="trials") as observer:
        result = trawl.sweep(
            model,
            ranks=tuple(parse_rank(part.replace("x", ",")) for part in ranks.split(",")),
            methods=tuple(part.strip() for part in methods.split(",")),
            group_layers=tuple(_group(part.strip()) for part in group_layers.split(",")),
            patience=None if patience == "none" else _number(patience),
            prefix_memory=parse_bytes(prefix_memory),
            command=command_line(sys.argv[1:]) or "",
            observer=observer,
            **options,
        )
    if as_json:
        print_json(result.results)
    else:
        print_sweep(result)


def _group(text: str) -> Literal["all"] | int:
    """Read a run's length."""
    if text == "all":
        return "all"
    if not text.isdecimal():
        raise click.BadParameter(f"{text!r} is no number of layers; expected 1,10,all", param_hint="--group-layers")
    return int(text)


def _number(text: str) -> float:
    """Read a number of nats."""
    try:
        return float(text)
    except ValueError as e:
        raise click.BadParameter(f"{text!r} is no number; expected 0.5 or none", param_hint="--patience") from e


def print_sweep(result: SweepResult) -> None:
    """Print the best trials, what the test part says of the winner, and how to rebuild it."""
    from .console import print_table

    results = result.results
    name = next(objective for objective in results["objectives"] if objective != "kept")
    complete = [trial for trial in results["trials"] if trial["state"] == "complete"]
    complete.sort(key=lambda trial: -trial["validation"]["objectives"][name]["gain"])
    rows = [["base", "", "", "", "100.0%", *_cells(results["base"], name)]]
    for trial in complete[:SHOWN]:
        rank = trial["rank"] if isinstance(trial["rank"], int) else ",".join(map(str, trial["rank"]))
        rows.append(
            [trial["method"], str(rank), trial["roles"], trial["layers"], f"{trial['kept']:.1%}", *_cells(trial, name)]
        )
    if results["composition"]:
        count = len(results["composition"]["trials"])
        rows.append([f"composition of {count}", "", "", "", "", *_cells(results["composition"], name)])
    columns = ("method", "rank", "roles", "layers", "kept", f"validation {name}", "gain", f"test {name}", "gain")
    print_table(f"{results['model']}: {len(complete)} complete trials", columns, rows, left=4)
    stopped = sum(trial["state"] == "stopped" for trial in results["trials"])
    click.echo(f"{stopped} trials stopped early; gains are paired differences to the base ± one standard error")
    for note in results["left_out"]:
        click.echo(f"note: {note}")
    for task in results["tasks"]:
        if task["overlong"]:
            click.echo(f"warning: {task['task']}: {task['overlong']} records are longer than the context; left out")
    for command in results["commands"]:
        click.echo(command)
    click.echo(f"trawl report {result.folder}")


def _cells(found: Mapping[str, Any], name: str) -> list[str]:
    """Return value and gain of both parts."""
    cells = []
    for part in ("validation", "test"):
        scores = (found[part] or {"objectives": {}})["objectives"].get(name)
        if scores is None or scores["value"] is None:
            cells += ["", ""]
        else:
            error = scores["gain_stderr"]
            cells += [f"{scores['value']:.4f}", f"{scores['gain']:+.4f}" + (f" ± {error:.4f}" if error else "")]
    return cells
