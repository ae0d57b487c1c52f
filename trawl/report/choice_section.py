"""What a budget chose: size and structure of every piece by layer, and the damage that was predicted and measured."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.patches import Rectangle

from trawl.budget import SEARCH_RECORD
from trawl.errors import PlanError
from trawl.report.page import Section, Table
from trawl.report.palette import INK, PAPER, SERIES, rank_colour
from trawl.report.pictures import Drawing, render

LEVELS = 8  # of the share kept
LETTERS = {"narrow": "n", "joint": "j", "single": "s", "shared": "2", "tucker": "t", "cp": "c", "dense": ""}
MEANINGS = {
    "narrow": "narrow",
    "joint": "joint",
    "single": "matrices by themselves",
    "shared": "shared by two layers",
    "tucker": "Tucker",
    "cp": "CP",
}
CELL = 0.3  # inches, its height
NARROW_LINE = 54  # characters that fit on a narrow page


@dataclass(frozen=True)
class Chosen:
    """The form of one piece.

    Attributes:
        kind: of the piece, such as ``fc`` or ``qkv``.
        layer: that it lies in.
        structure: dense, narrow, joint, single, shared, tucker or cp.
        sizes: width or ranks.
        kept: share of its parameters.
        damage: predicted, nats a token; None where there was no choice.
    """

    kind: str
    layer: int
    structure: str
    sizes: tuple[int, ...]
    kept: float
    damage: float | None

    @property
    def text(self) -> str:
        """The piece in words."""
        sizes = f" {self.size_text}" if self.sizes else ""
        return f"{self.kind} of layer {self.layer}: {self.structure}{sizes}, {self.kept:.1%} kept"

    @property
    def size_text(self) -> str:
        """Width or ranks; a rank of 0 is a matrix that stays dense."""
        return ", ".join(str(size) if size else "dense" for size in self.sizes)


def choice_section(folder: Path) -> Section | None:
    """Return the section on what a budget chose; None for an output without one.

    Raises: PlanError: the record cannot be read.
    """
    path = folder / SEARCH_RECORD
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_bytes())
        chosen = [_chosen(piece) for piece in record["pieces"]]
        real, stderr = float(record["real_damage"]), float(record["real_damage_stderr"])
        predicted = None if record["predicted_damage"] is None else float(record["predicted_damage"])
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as e:
        raise PlanError(f"{path} is not what a search writes: {type(e).__name__}: {e}") from e
    text = (
        f"Divergence of the predictions from the original model's on calibration text: {real:.4f} ± {stderr:.4f} nats "
        f"a token, measured{'.' if predicted is None else f'; {predicted:.4f} was predicted, the sum over pieces.'}"
    )
    rows = tuple(
        (one.kind, str(one.layer), one.structure, one.size_text, f"{one.kept:.1%}", _damage(one)) for one in chosen
    )
    picture = render("choice", "Share kept and structure by layer", partial(draw_choice, chosen=chosen))
    columns = ("piece", "layer", "structure", "width or ranks", "kept", "predicted damage")
    return Section("Choice for the budget", text, (picture,), Table(columns, rows, 4))


def _chosen(piece: Mapping[str, Any]) -> Chosen:
    return Chosen(
        kind=str(piece["name"]).partition(".")[0],
        layer=int(piece["layer"]),
        structure=str(piece["structure"]),
        sizes=tuple(int(size) for size in piece["sizes"]),
        kept=piece["parameters_after"] / piece["parameters_before"],
        damage=None if piece["predicted_damage"] is None else float(piece["predicted_damage"]),
    )


def _damage(one: Chosen) -> str:
    return "" if one.damage is None else f"{one.damage:.5f}"


def draw_choice(drawing: Drawing, chosen: Sequence[Chosen]) -> None:
    """Draw a cell for every piece, by kind and layer, over the damage that each layer's pieces are predicted to do."""
    kinds = list(dict.fromkeys(one.kind for one in chosen))
    layers = sorted({one.layer for one in chosen})
    bars = any(one.damage for one in chosen)
    left, top = 0.78, 0.62 if drawing.narrow else 0.42
    width, height = drawing.width - left - 0.15, CELL * len(kinds)
    drawing.resize(top + height + (2.2 if bars else 0.45))
    axes = drawing.axes(left, top, width, height)
    for one in chosen:
        level = min(int(one.kept * LEVELS), LEVELS - 1)
        place = (one.layer - 0.5, kinds.index(one.kind) - 0.5)
        cell = Rectangle(place, 1, 1, facecolor=rank_colour(level, LEVELS), edgecolor=PAPER, linewidth=0.8)
        cell.set_gid(drawing.tip(one.text))
        axes.add_patch(cell)
        colour = PAPER if level >= LEVELS // 2 else INK
        axes.text(one.layer, kinds.index(one.kind), LETTERS[one.structure], color=colour, ha="center", va="center")
    axes.set(xlim=(layers[0] - 0.5, layers[-1] + 0.5), ylim=(len(kinds) - 0.5, -0.5))
    axes.set_yticks(range(len(kinds)), kinds)
    axes.locator_params(axis="x", integer=True)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    marks = [Rectangle((0, 0), 1, 1, facecolor=rank_colour(level, LEVELS)) for level in (1, LEVELS // 2, LEVELS - 1)]
    names = [f"{(level + 1) / LEVELS:.0%} kept" for level in (1, LEVELS // 2, LEVELS - 1)]
    corner = (left / drawing.width, 1)
    drawing.figure.legend(marks, names, loc="upper left", bbox_to_anchor=corner, borderpad=0, ncols=3,
                          handlelength=1.0, columnspacing=1.2)  # fmt: skip
    found = {one.structure for one in chosen}
    letters = ", ".join(f"{LETTERS[name]} {words}" for name, words in MEANINGS.items() if name in found)
    if drawing.narrow:
        lines = textwrap.fill(letters, NARROW_LINE)
        drawing.figure.text(0.02, 1 - 0.24 / drawing.figure.get_figheight(), lines, va="top")
    else:
        drawing.figure.text(1 - 0.15 / drawing.width, 1, letters, ha="right", va="top")
    if not bars:
        axes.set_xlabel("layer")
        return
    below = drawing.axes(left, top + height + 0.62, width, 1.1)
    base = dict.fromkeys(layers, 0.0)
    for number, kind in enumerate(kinds):
        values = {one.layer: one.damage or 0.0 for one in chosen if one.kind == kind}
        shown = [layer for layer in layers if layer in values]
        below.bar(shown, [values[layer] for layer in shown], 0.8, [base[layer] for layer in shown],
                  color=SERIES[number % len(SERIES)], label=kind)  # fmt: skip
        for layer in shown:
            base[layer] += values[layer]
    below.set(xlim=(layers[0] - 0.5, layers[-1] + 0.5), xlabel="layer", ylabel="damage, nats")
    below.locator_params(axis="x", integer=True)
    below.locator_params(axis="y", nbins=4)
    below.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(kinds), borderpad=0.2, handlelength=1.0)
