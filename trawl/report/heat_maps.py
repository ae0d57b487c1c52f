"""Heat maps: gain by layer and rank, one panel per method and roles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median

from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.patches import Rectangle

from trawl.report.palette import DIVERGING_LEVELS, INK, MUTED, PALETTE, RULE, gain_colour
from trawl.report.pictures import Drawing
from trawl.report.reading import Study, Trial
from trawl.report.units import Unit, describe, method_name, stacked, unit_of

Rank = tuple[int, ...]

GAP = 0.06  # of a cell's side, left free around it
NUMBER_WIDTH = 0.265  # inches that a number in a cell needs
MOST_TICKS = 34
NARROW_COLUMNS = 12
ROW, NARROW_ROW = 0.27, 0.175  # inches
LEVELS = ListedColormap([PALETTE[f"gain{n}"][0] for n in range(DIVERGING_LEVELS)])


@dataclass(frozen=True)
class Panel:
    """Trials of single layers that share method, roles and stacking."""

    title: str
    ranks: tuple[Rank, ...]
    cells: dict[tuple[int, Rank], Trial]


@dataclass(frozen=True)
class HeatMap:
    """The gain of one objective on one part, for every trial of a single layer.

    Attributes:
        panels: method by method, roles by roles.
        layers: columns, without a gap between the first and the last tried.
        part: ``validation`` or ``test``.
        objective: which gain.
        unit: how it is written.
        best: the study's best trial, outlined.
    """

    panels: tuple[Panel, ...]
    layers: tuple[int, ...]
    part: str
    objective: str
    unit: Unit
    best: int | None

    @cached_property
    def gains(self) -> list[float]:
        """All gains that are drawn."""
        measures = [trial.measure(self.part, self.objective) for p in self.panels for trial in p.cells.values()]
        return [measure.gain for measure in measures if measure.gain is not None]

    @cached_property
    def noise(self) -> float | None:
        """The typical standard error of a gain, the median over the cells."""
        measures = [trial.measure(self.part, self.objective) for p in self.panels for trial in p.cells.values()]
        errors = [m.gain_stderr for m in measures if m.gain is not None and m.gain_stderr is not None]
        return median(errors) if errors else None

    @cached_property
    def limit(self) -> float:
        """The gain with the strongest colour: the largest one, or four standard errors; a loss may exceed it."""
        return max([*self.gains, 4 * (self.noise or 0.0)]) or max(map(abs, self.gains), default=0.0) or 1.0


def heat_map(study: Study, part: str, objective: str) -> HeatMap | None:
    """Gather the trials of single layers into panels; None where no gain is known."""
    single = [trial for trial in study.trials if trial.one_layer is not None]
    groups = {(trial.method, trial.roles): set[str]() for trial in single}
    for trial in single:
        groups[trial.method, trial.roles].add(trial.group_layers)
    panels = []
    for method, roles, group in dict.fromkeys(trial.settings for trial in single):
        chosen = [trial for trial in single if trial.settings == (method, roles, group)]
        cells = {(int(trial.layers), trial.rank): trial for trial in chosen}
        suffix = f", {stacked(group)}" if len(groups[method, roles]) > 1 else ""
        ranks = sorted({trial.rank for trial in chosen}, key=lambda rank: (len(rank), rank))
        panels.append(Panel(f"{method_name(method)} of {roles}{suffix}", tuple(ranks), cells))
    if not panels:
        return None
    tried = [layer for panel in panels for layer, _ in panel.cells]
    found = HeatMap(
        tuple(panels), tuple(range(min(tried), max(tried) + 1)), part, objective, unit_of(objective), study.best
    )
    return found if found.gains else None


def draw_heat_map(drawing: Drawing, found: HeatMap) -> None:
    """Draw all panels and the colour bar; ranks run along the columns on a narrow page."""
    bottom = _draw_narrow(drawing, found) if drawing.narrow else _draw_wide(drawing, found)
    _draw_bar(drawing, found, bottom)


def _draw_wide(drawing: Drawing, found: HeatMap) -> float:
    left, right, title, between = 0.78, 0.12, 0.27, 0.14
    heights = [len(panel.ranks) * ROW for panel in found.panels]
    bottom = sum(heights) + len(heights) * (title + between) + 0.42
    drawing.resize(bottom + 0.72)
    top, width = 0.0, drawing.width - left - right
    cell = width / len(found.layers)
    width = min(cell, 0.6) * len(found.layers)
    for number, (panel, height) in enumerate(zip(found.panels, heights, strict=True)):
        axes = drawing.axes(left, top + title, width, height)
        for (layer, rank), trial in panel.cells.items():
            place = (layer - found.layers[0], len(panel.ranks) - 1 - panel.ranks.index(rank))
            _draw_cell(drawing, axes, found, trial, place, numbers=min(cell, 0.6) >= NUMBER_WIDTH)
        _frame(axes, len(found.layers), len(panel.ranks))
        axes.set_title(panel.title, pad=4)
        axes.set_yticks([n + 0.5 for n in range(len(panel.ranks))], [",".join(map(str, r)) for r in panel.ranks[::-1]])
        axes.set_ylabel("rank", color=MUTED)
        last = number == len(found.panels) - 1
        _ticks(axes, found.layers, "x", labels=last)
        if last:
            axes.set_xlabel("layer", color=MUTED)
        top += title + height + between
    return bottom


def _draw_narrow(drawing: Drawing, found: HeatMap) -> float:
    lines = _wrapped(found.panels)
    left, title, ranks = 0.36, 0.42, 0.24
    height = NARROW_ROW * len(found.layers)
    bottom = len(lines) * (title + ranks + height + 0.1) + 0.12
    drawing.resize(bottom + 0.95)
    for line, panels in enumerate(lines):
        columns = sum(len(panel.ranks) for panel in panels)
        cell = min(0.46, (drawing.width - left - 0.05 - 0.12 * (len(panels) - 1)) / columns)
        start, top = left, line * (title + ranks + height + 0.1) + title + ranks
        for number, panel in enumerate(panels):
            axes = drawing.axes(start, top, cell * len(panel.ranks), height)
            for (layer, rank), trial in panel.cells.items():
                place = (panel.ranks.index(rank), found.layers[-1] - layer)
                _draw_cell(drawing, axes, found, trial, place, numbers=cell >= NUMBER_WIDTH)
            _frame(axes, len(panel.ranks), len(found.layers))
            axes.xaxis.tick_top()
            labels = [",".join(map(str, rank)) for rank in panel.ranks]
            axes.set_xticks([n + 0.5 for n in range(len(panel.ranks))], labels, fontsize=7)
            axes.text(0, 1 + (ranks - 0.02) / height, _folded(panel.title), transform=axes.transAxes, weight="bold")
            _ticks(axes, found.layers[::-1], "y", labels=number == 0)
            start += cell * len(panel.ranks) + 0.12
    return bottom


def _wrapped(panels: Sequence[Panel]) -> list[list[Panel]]:
    """Put panels into lines of at most NARROW_COLUMNS columns."""
    lines: list[list[Panel]] = []
    for panel in panels:
        if lines and sum(len(p.ranks) for p in lines[-1]) + len(panel.ranks) <= NARROW_COLUMNS:
            lines[-1].append(panel)
        else:
            lines.append([panel])
    return lines


def _folded(title: str) -> str:
    """Break ``CP of fc`` in two, for a narrow panel."""
    return title.replace(" of ", "\n", 1)


def _frame(axes: Axes, columns: int, rows: int) -> None:
    axes.set(xlim=(0, columns), ylim=(0, rows))
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, pad=2)


def _ticks(axes: Axes, layers: Sequence[int], axis: str, *, labels: bool) -> None:
    """Label layers on an axis: each, or every fifth where there are many; ``y`` runs from the bottom."""
    step = 1 if len(layers) <= MOST_TICKS else 5
    shown = [(n + 0.5, str(layer)) for n, layer in enumerate(layers) if layer % step == 0] if labels else []
    places, texts = [place for place, _ in shown], [text for _, text in shown]
    if axis == "x":
        axes.set_xticks(places, texts)
    else:
        axes.set_yticks(places, texts, fontsize=7)


def _draw_cell(
    drawing: Drawing, axes: Axes, found: HeatMap, trial: Trial, place: tuple[int, int], *, numbers: bool
) -> None:
    """Draw one trial: its gain as a colour, its number where it exceeds the noise, hatched where it was stopped."""
    measure = trial.measure(found.part, found.objective)
    corner, side = (place[0] + GAP / 2, place[1] + GAP / 2), 1 - GAP
    if measure.gain is None:
        stopped = trial.state == "stopped" and found.part == "validation"
        face, hatch = ("none", "//////") if stopped else ("none", None)
        words = trial.state if found.part == "validation" else "not scored on the test part"
        if stopped and trial.validation:
            words = f"stopped after {trial.validation.records} of {trial.validation.of} records"
        tip = drawing.tip(f"{describe(trial)}: {words} (trial {trial.number})")
        axes.add_artist(
            Rectangle(
                corner,
                side,
                side,
                facecolor=face,
                edgecolor=MUTED if stopped else RULE,
                hatch=hatch,
                lw=0.5 if not stopped else 0,
                gid=tip,
            )
        )
        return
    colour = gain_colour(measure.gain, found.limit)
    text = f"{found.unit.gained(measure)} {found.unit.gain}"
    tip = drawing.tip(f"{describe(trial)}: {text} on the {found.part} part (trial {trial.number})")
    axes.add_artist(Rectangle(corner, side, side, facecolor=colour, edgecolor="none", gid=tip))
    if trial.number == found.best:
        axes.add_artist(Rectangle(corner, side, side, facecolor="none", edgecolor=INK, lw=1.4, zorder=3, clip_on=False))
    if measure.stands_out:
        middle = (place[0] + 0.5, place[1] + 0.47)
        weight = "bold" if measure.gain > 0 else "normal"
        mark = found.unit.short(measure.gain) if numbers else "•"
        axes.text(*middle, mark, ha="center", va="center", fontsize=6.3, weight=weight, gid=drawing.tip(text))


def _draw_bar(drawing: Drawing, found: HeatMap, top: float) -> None:
    """Draw the colour bar with the noise marked on it."""
    limit, noise, unit = found.limit, found.noise, found.unit
    left = 0.36 if drawing.narrow else 0.78
    width = drawing.width - left - 0.3 if drawing.narrow else 3.6
    axes = drawing.axes(left, top + 0.12, width, 0.13)
    ends = limit * unit.factor
    bar = drawing.figure.colorbar(
        ScalarMappable(Normalize(-ends, ends), LEVELS), cax=axes, orientation="horizontal", drawedges=False
    )
    bar.outline.set_visible(False)
    axes.tick_params(length=2, labelsize=7.5)
    clipped = min(found.gains) < -limit
    beyond = "; larger losses have the last colour" if clipped else ""
    label = f"gain in {unit.name} on the {found.part} part, {unit.gain}"
    if noise:
        for sign in (-2, 2):
            axes.axvline(sign * noise * unit.factor, color=INK, lw=1.0)
    words = (
        f"typical standard error {noise * unit.factor:.{unit.digits}f}; lines: ± 2 of it" if noise else "noise unknown"
    )
    if drawing.narrow:
        lines = f"{words}{beyond}".replace("; ", "\n")
        axes.set_xlabel(f"{label}\n{lines}", fontsize=7, color=MUTED)
    else:
        axes.set_xlabel(label, color=MUTED)
        axes.text(1.06, 0.5, f"{words}{beyond}.\nNumbered cells exceed 2 of their own.", transform=axes.transAxes,
                  va="center", color=MUTED, fontsize=8)  # fmt: skip
