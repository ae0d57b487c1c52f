"""Spectra of the matrices that a report is about, where the source lies at hand and they cost little."""

from __future__ import annotations

import shlex
from pathlib import Path

from trawl.checkpoint import Checkpoint, open_folder
from trawl.errors import TrawlError
from trawl.observers import Observer
from trawl.planning import match_checkpoint
from trawl.recipe import Recipe
from trawl.report.page import Section
from trawl.report.pictures import render
from trawl.report.plots import draw_spectra
from trawl.report.units import layers_in_words
from trawl.spectra import spectra

MOST_ENTRIES = 1 << 28  # some tens of seconds on two cores

TITLE = "Spectra"


def spectra_section(
    model: str,
    *,
    roles: str,
    layers: str,
    rank: tuple[int, ...],
    observer: Observer,
    fingerprint: str | None = None,
) -> Section:
    """Measure and draw the spectra of the source's matrices in some roles and layers, or say why they are not known.

    Args:
        model: what the source was called; only a folder at hand is read, nothing is downloaded or converted.
        roles: as in a recipe.
        layers: as in a recipe.
        rank: marked in the picture; one integer or (stack, inner, hidden).
        observer: told of progress, in bytes.
        fingerprint: of the source; another checkpoint under its name is not read. None where it is not recorded.
    """
    command = shlex.join(["trawl", "inspect", model, "--spectra", "--layers", layers, "--roles", roles])
    if not Path(model).is_dir():
        return Section(TITLE, f"Not measured: {model} is no folder at hand. To measure them:", commands=(command,))
    try:
        checkpoint = open_folder(Path(model))
        if fingerprint is not None and checkpoint.fingerprint != fingerprint:
            return Section(TITLE, f"Not measured: what lies at {model} now is not the source of this output.")
        return _measured(checkpoint, Recipe(rank=1, roles=roles, layers=layers), rank, observer, command)
    except (TrawlError, OSError) as e:
        return Section(TITLE, f"Not measured: {' '.join(str(e).split())}")


def _measured(
    checkpoint: Checkpoint, recipe: Recipe, rank: tuple[int, ...], observer: Observer, command: str
) -> Section:
    match = match_checkpoint(checkpoint)
    layers, roles = recipe.selected_layers(match.layers), recipe.selected_roles(match.roles)
    chosen = [part for part in match.placements if part.layer in layers and part.role in roles]
    entries = sum(part.shape[0] * part.shape[1] for part in chosen)
    if entries > MOST_ENTRIES:
        text = f"Not measured: {len(chosen)} matrices of {entries:,} entries take a while. To measure them:"
        return Section(TITLE, text, commands=(command,))
    found = [item for item in spectra(checkpoint, chosen, observer=observer) if item.spectrum.energy]
    if not found:
        return Section(TITLE, "Not drawn: every matrix is zero.")
    marked = sorted({*rank} if len(rank) == 1 else {*rank[1:]})
    picture = render(
        "spectra",
        "Singular values of the source's matrices, and the energy that the leading ones hold",
        lambda drawing: draw_spectra(drawing, found, marked),
    )
    text = (
        f"Singular values of the source's matrices, each by itself: {len(found)} in {layers_in_words(recipe.layers)}, "
        f"roles {recipe.roles}. Dotted lines mark the rank used. A flat spectrum holds little energy in its leading "
        "values: what a low rank takes away is then most of the matrix."
    )
    return Section(TITLE, text, (picture,))
