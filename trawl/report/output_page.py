"""The report of one compress output."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from functools import partial
from pathlib import PurePath
from typing import Any

from trawl.checkpoint import open_folder
from trawl.densifying import open_factored
from trawl.errors import TrawlError
from trawl.layout import dense_layout
from trawl.observers import Observer
from trawl.recipe import Recipe
from trawl.records import MEANING, NARROW_MEANING, WEAK_ENERGY
from trawl.report.choice_section import choice_section
from trawl.report.known_spectra import spectra_section
from trawl.report.page import Page, Section, Table, Tile, sections
from trawl.report.pictures import Picture, render
from trawl.report.plots import ErrorCurve, draw_errors
from trawl.report.reading import Output
from trawl.report.units import NONE, layers_in_words, method_name

FEWEST_DRAWN = 3  # stacks; fewer say it in the table
FLAGS = {"allow_larger"}


@dataclass(frozen=True)
class Size:
    """Parameters and bytes of a checkpoint."""

    parameters: int
    nbytes: int


def output_page(output: Output, observer: Observer) -> Page:
    """Put together the report of a compress output; its pictures are drawn, its spectra measured."""
    recipe, record = output.recipe, output.record
    rank = recipe["rank"]
    ranks = tuple(rank) if isinstance(rank, list) else () if rank is None else (int(rank),)
    chosen: dict[str, Any] = {"roles": str(recipe["roles"]), "layers": str(recipe["layers"]), "rank": ranks}
    source = str(record["identity"]["source"])
    spectra = spectra_section(output.model, **chosen, observer=observer, fingerprint=source) if ranks else None
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return Page(
        kind="Compress output",
        title=PurePath(output.model).name or output.model,
        headline=headline(output),
        facts=facts(output),
        tiles=tiles(output),
        notice=weak_notice(output),
        sections=sections(
            choice_section(output.folder),
            errors(output, ranks),
            spectra,
            recipe_section(output),
            Section("Rebuild it", commands=(rebuild_command(output),)),
        ),
        footer=f"{versions}; relative error is measured with the weights as written",
    )


def headline(output: Output) -> str:
    """Say what was done in one sentence."""
    recipe = output.recipe
    energies = sorted(stack.kept_energy for stack in output.stacks)
    kept = f"{energies[0]:.1%}" if len(energies) == 1 else f"between {energies[0]:.1%} and {energies[-1]:.1%}"
    stacks = "The stack keeps" if len(energies) == 1 else f"The {len(energies)} stacks keep"
    if recipe["method"] == "mixed":
        parts = f"{len(output.stacks)} stacks, each by its own method, hold"
        done = f"{parts} {output.parameters_after:,} of {output.parameters_before:,} weights"
    elif narrowed(output):
        done = f"{output.parameters_after:,} of {output.parameters_before:,} weights stay around fewer inner units"
    else:
        rank = _written(recipe["rank"])
        done = f"{method_name(recipe['method'])} rank {rank} stands in place of {output.parameters_before:,} weights"
    where = f"roles {recipe['roles']}, {layers_in_words(recipe['layers'])}"
    return f"{done}: {where}. {stacks} {kept} of the energy."


def narrowed(output: Output) -> bool:
    """Whether units were left out, and nothing was factored."""
    return bool(output.recipe["method"] == "narrow")


def facts(output: Output) -> tuple[tuple[str, str], ...]:
    """Return where the output comes from."""
    record = output.record
    source = record["source"]
    return (
        ("Source", f"{source['model']}" + (f" at {source['revision']}" if source.get("revision") else "")),
        ("Family", str(record["family"]["name"])),
        ("Fingerprint of the source", str(record["identity"]["source"])),
        ("Made in", f"{float(record['seconds']):,.1f} s, threads {record['threads']}, seed {output.recipe['seed']}"),
    )


def sizes(output: Output) -> tuple[Size, Size] | None:
    """Return what the source and the output measure, from the output's headers; None where they cannot be read."""
    try:
        try:
            checkpoint, descriptor = open_factored(output.folder)
        except TrawlError:  # dense, then
            checkpoint = open_folder(output.folder)
            return (same := Size(checkpoint.parameters, checkpoint.nbytes)), same
        dense = dense_layout(checkpoint, descriptor)
    except (TrawlError, OSError):
        return None
    before = checkpoint.parameters - output.parameters_after + output.parameters_before
    return Size(before, sum(layout.nbytes for layout in dense)), Size(checkpoint.parameters, checkpoint.nbytes)


def tiles(output: Output) -> tuple[Tile, ...]:
    """Return parameters and bytes before and after, and the weakest stack."""
    found = sizes(output)
    least = min(output.stacks, key=lambda stack: stack.kept_energy)
    kept = Tile("Least kept energy", f"{least.kept_energy:.1%}", f"of stack {least.name}")
    ratio = output.parameters_after / output.parameters_before
    stacks = Tile("Stacks, kept" if narrowed(output) else "Stacks, in factors", f"{ratio:.1%}",
                  f"{output.parameters_after:,} of {output.parameters_before:,} parameters")  # fmt: skip
    if found is None:
        return (Tile("Parameters", NONE, "the folder's weights cannot be read"), stacks, kept)
    before, after = found
    alike = "an ordinary checkpoint with fewer units" if narrowed(output) else "as before: the output is dense"
    return (
        Tile("Parameters", f"{after.parameters:,}", _before(before.parameters, after.parameters, "", alike)),
        Tile("Shards", _human(after.nbytes), _before(before.nbytes, after.nbytes, " bytes", alike)),
        stacks,
        kept,
    )


def _before(before: int, after: int, unit: str, alike: str) -> str:
    """Write what a count was, and the share that is left, or what an ordinary output is."""
    return alike if before == after else f"{after / before:.1%} of {before:,}{unit}"


def _human(count: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB" if count < 1000 else f"{count / 1000:.3g} TB"


def weak_notice(output: Output) -> str:
    """Say plainly that a model may be broken."""
    weak = [stack for stack in output.stacks if stack.kept_energy < WEAK_ENERGY]
    if not weak:
        return ""
    return (
        f"{len(weak)} of {len(output.stacks)} stacks keep under {WEAK_ENERGY:.0%} of their energy. "
        "A model changed this much may be broken: evaluate it before any use."
    )


def errors(output: Output, rank: tuple[int, ...]) -> Section:
    """Return error and kept energy of every stack."""
    rows = tuple(
        (
            str(stack["name"]),
            ", ".join(stack["roles"]),
            " × ".join(map(str, stack["shape"])),
            " × ".join(map(str, stack["rank"])),
            f"{stack['relative_error']:.5f}",
            f"{1 - stack['relative_error'] ** 2:.2%}",
            f"{stack['parameters_before']:,}",
            f"{stack['parameters_after']:,}",
            f"{stack['iterations']}" + ("" if stack["converged"] else " (cap)"),
            f"{stack['seconds']:.1f}",
        )
        for stack in output.record["stacks"]
    )
    columns = (
        "stack",
        "roles",
        "shape",
        "rank",
        "relative error",
        "kept energy",
        "parameters",
        "kept" if narrowed(output) else "in factors",
        "sweeps",
        "s",
    )
    pictures: tuple[Picture, ...] = ()
    if len(output.stacks) >= FEWEST_DRAWN:
        method = method_name(output.recipe["method"])
        kinds = dict.fromkeys(stack.kind for stack in output.stacks)
        curves = [
            ErrorCurve(f"{method} of {kind}", rank, tuple(stack for stack in output.stacks if stack.kind == kind))
            for kind in kinds
        ]
        alt = "Relative error of every stack by layer"
        pictures = (render("errors", alt, partial(draw_errors, curves=curves)),)
    text = NARROW_MEANING if narrowed(output) else MEANING
    return Section("Error per stack", text, pictures, Table(columns, rows, 4))


def recipe_section(output: Output) -> Section:
    """Return the recipe as it was."""
    settings = {**output.recipe, "parts": len(output.recipe.get("parts") or ()) or None}  # the table of stacks has them
    rows = tuple((name, _written(value)) for name, value in settings.items() if value is not None)
    return Section("Recipe", table=Table(("setting", "value"), rows, 2))


def _written(value: object) -> str:
    """Write a recipe's value the way the command line takes it."""
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def rebuild_command(output: Output) -> str:
    """Return the recorded command, or one made of the recipe."""
    if command := output.record["command"]:
        return str(command)
    if output.recipe.get("parts"):
        recipe = f"json.load(open({str(output.folder / 'trawl.json')!r}))['identity']['recipe']"
        return f"trawl.compress({output.model!r}, trawl.Recipe(**{recipe}), 'out')"
    words = ["trawl", "compress", output.model]
    if revision := output.record["source"].get("revision"):
        words += ["--revision", str(revision)]
    for name, value in output.recipe.items():
        field = Recipe.model_fields.get(name)
        if value is None or (field and value == field.default) or name == "parts":
            continue
        words += [f"--{name.replace('_', '-')}", *([] if name in FLAGS else [_written(value)])]
    return shlex.join(words)
