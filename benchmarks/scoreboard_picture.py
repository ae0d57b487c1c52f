"""The scoreboard as a picture: perplexities and mean accuracy of every row against the share that is kept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator
from scoreboard import HOPELESS, TEXTS, in_order, mean_accuracy

from trawl.report.palette import INK, PAPER, SERIES
from trawl.report.pictures import STYLE

TICKS = [factor * 10**power for power in range(5) for factor in (1, 2, 5)]  # of perplexities
RATHER = {"linewidth": 1.2, "zorder": 2.0}
OURS = {"linewidth": 2.4, "zorder": 3.0}

Line = dict[float, Mapping[str, Any]]


def draw(figures: Mapping[str, Any], path: Path) -> None:
    """Draw all rows as a PNG file.

    Rows whose perplexity is nowhere below HOPELESS are named under the picture, and not drawn.
    """
    every = _lines(figures)
    lines = {title: line for title, line in every.items() if _hopeful(line)}
    left_out = in_order(every.keys() - lines.keys())
    style: Any = STYLE
    with mpl.rc_context(style):
        figure = Figure(figsize=(11, 4.6), layout="constrained", facecolor=PAPER)
        *of_texts, of_tasks = figure.subplots(1, 3)
        for number, title in enumerate(reversed(in_order(lines))):
            look: Any = {"color": SERIES[number % len(SERIES)], **(OURS if title.startswith("trawl") else RATHER)}
            shares = sorted(lines[title])
            scored = [lines[title][share] for share in shares]
            for axes, text in zip(of_texts, TEXTS, strict=True):
                axes.plot(shares, [row[text]["value"] for row in scored], "o-", markersize=4, label=title, **look)
            means, errors = zip(*map(mean_accuracy, scored), strict=True)
            percent = ([100 * mean for mean in means], [100 * error for error in errors])
            of_tasks.errorbar(shares, *percent, fmt="o-", markersize=4, elinewidth=0.6, **look)
        for axes, text in zip(of_texts, TEXTS, strict=True):
            _scale(axes)
            _frame(axes, f"{text}: perplexity", figures["dense"][text]["value"])
        _frame(of_tasks, "mean accuracy, %", 100 * mean_accuracy(figures["dense"])[0])
        below = f"; above {HOPELESS:,}, and not drawn: {', '.join(left_out)}" if left_out else ""
        figure.supxlabel(f"share of the layers' weights that is kept{below}", fontsize="medium")
        figure.legend(*of_texts[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
        figure.savefig(path, dpi=160)


def _lines(figures: Mapping[str, Any]) -> dict[str, Line]:
    """Return the rows by title, and by share."""
    lines: dict[str, Line] = {}
    for name, row in figures.items():
        keep, colon, title = name.partition(": ")
        if colon:
            lines.setdefault(title, {})[float(keep)] = row
    return lines


def _hopeful(line: Line) -> bool:
    return any(row[text]["value"] < HOPELESS for row in line.values() for text in TEXTS)


def _scale(axes: Axes) -> None:
    """Make the vertical axis logarithmic, with numbers that are written out."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(FixedLocator(TICKS))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def _frame(axes: Axes, title: str, dense: float) -> None:
    """Give a panel its title, and the dense model's figure as a line."""
    axes.set_title(title)
    axes.axhline(dense, color=INK, linewidth=0.8, linestyle=":")
    axes.annotate("dense", (0.01, dense), xycoords=("axes fraction", "data"), va="bottom", fontsize="small")
