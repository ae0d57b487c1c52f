"""Options that several commands share, and the recipe they make."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import rich_click as click

if TYPE_CHECKING:
    from trawl.recipe import Recipe

Command = TypeVar("Command", bound=Callable[..., Any])

RECIPE_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.option(
        "--method",
        metavar="cp|tucker|svd|narrow",
        help="Decomposition; svd takes each matrix alone, narrow leaves out inner units.  [default: cp]",
    ),
    click.option("--rank", metavar="INT|R0,R1,R2", help="Rank; Tucker also takes (stack,inner,hidden)."),
    click.option("--width", metavar="F|INT|LIST", help="FC width for narrow: share, units, or units of each layer."),
    click.option("--kv-heads", type=int, help="Key-value heads for narrow to keep, with their query heads."),
    click.option("--keep", type=float, metavar="F", help="Budget: share of the selected parameters to keep."),
    click.option("--size", metavar="100MB", help="Budget: bytes of all shards."),
    click.option(
        "--plain", is_flag=True, default=None, help="Meet the budget by an ordinary checkpoint that needs no trawl."
    ),
    click.option("--layers", metavar="20-30,35|all", help="Layers, counted from 0.  [default: all]"),
    click.option(
        "--roles",
        metavar="fc|attn|experts|all|LIST",
        help="Matrices; LIST of q,k,v,o,gate,up,down,embed,lm_head and others (trawl inspect).  [default: all]",
    ),
    click.option(
        "--group-layers",
        metavar="all|N",
        help="Layers in one stack; 1 is layer by layer, the paper's best for denoising.  [default: all]",
    ),
    click.option(
        "--share",
        metavar="none|input|role",
        help="One right factor for svd matrices of the same input (q,k,v; gate,up), or of one role.  [default: none]",
    ),
    click.option(
        "--anchored",
        is_flag=True,
        default=None,
        help="Block by block: targets of the original model, inputs of the compressed one; with --calibrate.",
    ),
    click.option(
        "--refit/--no-refit",
        default=None,
        help="Let the units that narrow keeps take over what was left out, on --calibrate's text.  [with --plain: yes]",
    ),
    click.option(
        "--output-weighting",
        metavar="none|fisher|kronecker",
        help="Weigh the outputs too, by the loss's gradients on the --calibrate text.  [default: none]",
    ),
    click.option("--write", metavar="dense|factored", help="Form of the output.  [default: dense]"),
    click.option(
        "--factor-dtype", metavar="float32|float16|bfloat16", help="Of stored factors.  [default: the source's]"
    ),
    click.option("--allow-larger", is_flag=True, default=None, help="Factor above the break-even rank."),
    click.option("--seed", type=int, help="Seed of every random choice.  [default: 0]"),
    click.option("--n-iter-max", type=int, help="Cap on sweeps.  [default: the method's own]"),
    click.option("--tol", type=float, help="Change of fit under which sweeps stop.  [default: the method's own]"),
    click.option(
        "--compute",
        metavar="float32|bf16",
        help="bf16 is faster where the processor has units for it: range finder, calibration; errors in float32.",
    ),
    click.option("--engine", metavar="streaming|tensorly", help="tensorly holds the stack in memory, the reference."),
    click.option(
        "--recipe", "recipe_file", type=click.Path(path_type=Path), help="YAML with these options; options given win."
    ),
)


def recipe_options(command: Command) -> Command:
    """Add the options that make a recipe."""
    for option in reversed(RECIPE_OPTIONS):
        command = option(command)
    return command


def calibration_options(command: Command) -> Command:
    """Add what weighs the error by what each layer reads."""
    for option in (
        click.option("--moments", type=click.Path(path_type=Path), help="Folder of moments to use, or to keep."),
        click.option("--calibration-tokens", type=int, help="Of each such text, at most.  [default: 131072]"),
        click.option(
            "--calibrate",
            multiple=True,
            metavar="FILE.txt|FILE.jsonl|hub:DATASET/SPLIT/FIELD",
            help="Text whose activations weigh the error: what the model computes on it is kept. May be repeated.",
        ),
    ):
        command = option(command)
    return command


def calibration_arguments(calibrate: tuple[str, ...], tokens: int | None, moments: Path | None) -> dict[str, Any]:
    """Return them as the library takes them."""
    if not calibrate and tokens is not None:
        raise click.UsageError("--calibration-tokens goes with --calibrate TEXT")
    given = {"calibrate": calibrate or None, "calibration_tokens": tokens, "moments": moments}
    return {name: value for name, value in given.items() if value is not None}


def model_options(command: Command) -> Command:
    """Add what names and opens a model, and what every command has."""
    for option in (
        click.option("--debug", is_flag=True, help="Show the traceback of an error."),
        click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables."),
        click.option(
            "--family", "family_file", type=click.Path(path_type=Path), help="YAML family description to use instead."
        ),
        click.option("--revision", help="Branch, tag or commit of a hub id."),
    ):
        command = option(command)
    return command


def build_recipe(recipe_file: Path | None, options: dict[str, Any]) -> Recipe:
    """Lay the options over the recipe file and check the result."""
    from trawl.recipe_reader import make_recipe, read_recipe

    given = {key: value for key, value in options.items() if value is not None}
    if "rank" in given:
        given["rank"] = parse_rank(given["rank"])
    if "width" in given:
        given["width"] = parse_width(given["width"])
    if "size" in given:
        given["size"] = parse_bytes(given["size"], "--size")
    if str(given.get("group_layers", "all")).lstrip("-").isdigit():
        given["group_layers"] = int(given["group_layers"])
    base = read_recipe(recipe_file) if recipe_file else {}
    origin = "options" if recipe_file is None else f"recipe {recipe_file}"
    return make_recipe(base | given, origin)


def parse_rank(text: str) -> int | tuple[int, int, int]:
    """Read ``64`` or ``3,64,64``."""
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError as e:
        raise click.BadParameter(f"{text!r} is not a rank; expected 64 or 3,64,64", param_hint="--rank") from e
    match numbers:
        case (rank,):
            return rank
        case (stack, inner, hidden):
            return stack, inner, hidden
    raise click.BadParameter(f"{text!r} has {len(numbers)} parts; expected 64 or 3,64,64", param_hint="--rank")


def parse_width(text: str) -> int | float | tuple[int, ...]:
    """Read ``0.75``, ``1152`` or ``1152,1088,1152``."""
    try:
        if "," in text:
            return tuple(int(part) for part in text.split(","))
        return int(text) if text.lstrip("-").isdigit() else float(text)
    except ValueError as e:
        raise click.BadParameter(
            f"{text!r} is not a width; expected a share such as 0.75, a number of units, or one for each layer",
            param_hint="--width",
        ) from e


def parse_bytes(text: str, option: str = "--max-memory") -> int:
    """Read ``4GB``, ``500MB`` or a plain number of bytes."""
    match = re.fullmatch(r"(\d{1,18}(?:\.\d+)?)\s*([kMGT]?)B?", text.strip(), re.IGNORECASE)
    if not match:
        raise click.BadParameter(f"{text!r} is not a size; expected 4GB or 500MB", param_hint=option)
    return int(float(match[1]) * 1000 ** " kMGT".upper().index(match[2].upper() or " "))


def set_verbosity(verbose: bool) -> None:
    """Send the library's log to the terminal: warnings always, every sweep with ``-v``."""
    from .console import log_handler

    logger = logging.getLogger("trawl")
    logger.handlers[:] = [log_handler()]
    logger.setLevel(logging.INFO if verbose else logging.WARNING)
    logger.propagate = False
