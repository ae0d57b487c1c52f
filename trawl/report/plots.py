"""Plots with axes: gains with their intervals, the Pareto front, errors of stacks, spectra."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from trawl.report.palette import INK, MUTED, PAPER, RULE, SERIES, SERIES_COUNT, rank_colour
from trawl.report.pictures import Drawing
from trawl.report.reading import Measure, StackError, Study, Trial
from trawl.report.units import Unit, describe, half_interval, method_name, stacked, unit_of
from trawl.spectra import MatrixSpectrum

MOST_ROWS = 36
MARKERS = "osD^vPX*"
ACCENT = SERIES[0]
KEPT_TICKS = (100, 99, 101, 98, 102, 95, 105, 90, 110, 80, 120, 60, 150, 40, 200, 20, 300, 0, 99.5, 100.5, 99.8)
KEY_HEIGHT = 0.3  # inches of one line of a legend above the axes

Rank = tuple[int, ...]


@dataclass(frozen=True)
class ErrorCurve:
    """Relative errors of the stacks of one kind, at one rank."""

    panel: str
    rank: Rank
    stacks: tuple[StackError, ...]


def draw_layers(drawing: Drawing, study: Study, objective: str) -> None:
    """Draw the gain of each layer's best trial, on both parts, with 95% intervals."""
    unit = unit_of(objective)
    rows = sorted((layer, study.trial(number)) for layer, number in study.best_of_layer.items())
    chosen = [(layer, trial) for layer, trial in rows if trial is not None]
    layers = [layer for layer, _ in chosen]
    if drawing.narrow:
        height = max(1.4, 0.2 * (max(layers) - min(layers) + 1))
        drawing.resize(height + 0.9)
        axes = drawing.axes(0.4, KEY_HEIGHT + 0.05, drawing.width - 0.55, height)
        axes.invert_yaxis()
    else:
        drawing.resize(3.4)
        axes = drawing.axes(0.78, KEY_HEIGHT, drawing.width - 0.95, 2.5)
    for part, shift, filled in (("validation", -0.14, False), ("test", 0.14, True)):
        found = [(layer + shift, trial.measure(part, objective)) for layer, trial in chosen]
        _intervals(axes, found, unit, part, filled=filled, sideways=drawing.narrow)
    step = 1 if len(layers) <= 34 else 5
    shown = [layer for layer in layers if layer % step == 0]
    gain = f"gain, {unit.gain}"
    if drawing.narrow:
        axes.set(xlabel=gain, ylabel="layer")
        axes.set_yticks(shown, list(map(str, shown)))
    else:
        axes.set(xlabel="layer", ylabel=gain, xlim=(min(layers) - 0.7, max(layers) + 0.7))
        axes.set_xticks(shown, list(map(str, shown)))
    _key(axes, columns=2)


def draw_ranges(drawing: Drawing, trials: Sequence[Trial], objective: str) -> None:
    """Draw the gains of trials over many layers, best first, with 95% intervals."""
    unit = unit_of(objective)
    height = 0.22 * len(trials) + 0.1
    left = 1.85 if drawing.narrow else 2.9
    drawing.resize(height + KEY_HEIGHT + 0.55)
    axes = drawing.axes(left, KEY_HEIGHT, drawing.width - left - 0.15, height)
    for part, shift, filled in (("validation", -0.13, False), ("test", 0.13, True)):
        found = [(row + shift, trial.measure(part, objective)) for row, trial in enumerate(trials)]
        _intervals(axes, found, unit, part, filled=filled, sideways=True)
    axes.set_yticks(range(len(trials)), [_row_name(trial, short=drawing.narrow) for trial in trials])
    axes.set(ylim=(len(trials) - 0.4, -0.6), xlabel=f"gain, {unit.gain}")
    axes.tick_params(axis="y", length=0)
    _key(axes, columns=2)


def ranges_of(study: Study, objective: str) -> list[Trial]:
    """Return the scored trials over many layers, best first on validation."""

    def gain(trial: Trial) -> float | None:
        return trial.measure("validation", objective).gain

    found = [
        (gained, trial) for trial in study.trials if trial.one_layer is None and (gained := gain(trial)) is not None
    ]
    return [trial for _, trial in sorted(found, key=lambda item: (-item[0], item[1].number))]


def _row_name(trial: Trial, *, short: bool) -> str:
    layers = trial.layers if trial.layers != "all" else "all layers"
    many = f" by {trial.group_layers}" if short else f", {stacked(trial.group_layers)}"
    many = "" if trial.group_layers == "all" else many
    return f"{method_name(trial.method)} {trial.rank_text} of {trial.roles}, {layers}{many}"


def _intervals(
    axes: Axes, found: Sequence[tuple[float, Measure]], unit: Unit, part: str, *, filled: bool, sideways: bool
) -> None:
    """Draw gains with their 95% intervals at given places, along either axis, over a line at 0."""
    known = [(place, m.gain * unit.factor, half_interval(m) * unit.factor) for place, m in found if m.gain is not None]
    (axes.axvline if sideways else axes.axhline)(0, color=MUTED, lw=0.8, zorder=1)
    axes.grid(visible=True, axis="x" if sideways else "y")
    if not known:
        return
    places, gains, halves = (list(column) for column in zip(*known, strict=True))
    colour = ACCENT if filled else MUTED
    style: dict[str, Any] = {
        "fmt": "o", "ms": 4.2 if filled else 3.6, "color": colour, "elinewidth": 1.1 if filled else 0.9,
        "markerfacecolor": colour if filled else PAPER, "markeredgewidth": 1.0, "label": f"{part} part", "zorder": 3,
    }  # fmt: skip
    if sideways:
        axes.errorbar(gains, places, xerr=halves, **style)
    else:
        axes.errorbar(places, gains, yerr=halves, **style)


def _key(axes: Axes, columns: int) -> None:
    """Put the legend above the axes, from its left edge."""
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        axes.legend(handles, labels, loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.2,
                    borderpad=0, handletextpad=0.4, columnspacing=1.4)  # fmt: skip


def draw_front(drawing: Drawing, study: Study, objective: str) -> None:
    """Draw gain on validation against kept parameters, with the Pareto front and its 95% intervals."""
    unit = unit_of(objective)
    scored = [(t.kept, t.measure("validation", objective).gain, t) for t in study.trials]
    points = [
        (100 * kept, gain * unit.factor, trial) for kept, gain, trial in scored if kept is not None and gain is not None
    ]
    groups = list(dict.fromkeys((trial.method, trial.roles) for *_, trial in points))
    columns = 2 if drawing.narrow else 6
    top = KEY_HEIGHT + 0.17 * ((len(groups) + columns) // columns)
    height = 2.9 if drawing.narrow else 3.6
    drawing.resize(top + height + 0.55)
    left = 0.55 if drawing.narrow else 0.78
    axes = drawing.axes(left, top, drawing.width - left - 0.2, height)
    axes.axhline(0, color=MUTED, lw=0.8, zorder=1)
    axes.grid(axis="both")
    for number, group in enumerate(groups):
        chosen = [(kept, gain) for kept, gain, trial in points if (trial.method, trial.roles) == group]
        kept, gains = (list(column) for column in zip(*chosen, strict=True))
        style: dict[str, Any] = {"marker": MARKERS[number % len(MARKERS)], "color": SERIES[number % SERIES_COUNT]}
        label = f"{method_name(group[0])} of {group[1]}"
        axes.plot(kept, gains, ls="none", ms=3.9, markeredgewidth=0, alpha=0.75, label=label, **style)
    _draw_front_line(drawing, axes, [point for point in points if point[2].number in study.front], objective)
    axes.set(xlabel="kept parameters, % of all", ylabel=f"gain on the validation part, {unit.gain}")
    axes.set_xscale("function", functions=(_spread, _gathered))
    axes.set_xticks(*_kept_ticks(axes.get_xlim(), 0.12 if drawing.narrow else 0.06), minor=False)
    _key(axes, columns)


def _spread(kept: Any) -> Any:
    """Spread what lies near 100 %: linear within half a percent, logarithmic beyond, on either side."""
    return np.arcsinh((np.asarray(kept, dtype=float) - 100) / 0.5)


def _gathered(place: Any) -> Any:
    """Undo :func:`_spread`."""
    return 100 + 0.5 * np.sinh(np.asarray(place, dtype=float))


def _kept_ticks(limits: tuple[float, float], apart: float) -> tuple[list[float], list[str]]:
    """Return round shares within the limits, those nearest to 100 first, none closer than a share of the axis."""
    low, high = _spread(limits)
    chosen: list[float] = []
    for tick in KEPT_TICKS:
        place = _spread(tick)
        if low <= place <= high and all(abs(place - _spread(other)) >= apart * (high - low) for other in chosen):
            chosen.append(tick)
    return chosen, [f"{tick:g}" for tick in chosen]


def _draw_front_line(drawing: Drawing, axes: Axes, front: list[tuple[float, float, Trial]], objective: str) -> None:
    """Join the points of the front by the steps of what can be had, and number their trials."""
    if not front:
        return
    unit = unit_of(objective)
    front = sorted(front, key=lambda point: point[:2])
    kept, gains = [point[0] for point in front], [point[1] for point in front]
    halves = [half_interval(trial.measure("validation", objective)) * unit.factor for *_, trial in front]
    axes.plot(kept, gains, drawstyle="steps-post", color=INK, lw=1.1, zorder=2)
    axes.errorbar(kept, gains, yerr=halves, fmt="o", ms=6, color=INK, elinewidth=0.9, markerfacecolor="none",
                  markeredgewidth=1.1, zorder=4, label="Pareto front")  # fmt: skip
    best = max(front, key=lambda point: point[1])
    axes.annotate(f"trial {best[2].number}", best[:2], xytext=(-8, 6), textcoords="offset points", ha="right",
                  fontsize=7.5, gid=drawing.tip(describe(best[2])))  # fmt: skip


def error_curves(study: Study) -> list[ErrorCurve]:
    """Return the errors of every stack that a study decomposed, once each, by method, kind and rank."""
    found: dict[tuple[str, Rank], dict[str, StackError]] = {}
    for trial in study.trials:
        for stack in trial.stacks:
            if stack.layers:
                panel = f"{method_name(trial.method)} of {stack.kind}"
                found.setdefault((panel, trial.rank), {})[stack.name] = stack
    keys = sorted(found, key=lambda key: (key[0], len(key[1]), key[1]))
    return [ErrorCurve(panel, rank, tuple(found[panel, rank].values())) for panel, rank in keys]


def draw_errors(drawing: Drawing, curves: Sequence[ErrorCurve]) -> None:
    """Draw relative error by layer; a stack of many layers is a bar across them."""
    panels = list(dict.fromkeys(curve.panel for curve in curves))
    ranks = sorted({curve.rank for curve in curves}, key=lambda rank: (len(rank), rank))
    across = 1 if drawing.narrow else min(2, len(panels))
    lines = -(-len(panels) // across)
    key = KEY_HEIGHT + 0.17 * ((len(ranks) - 1) // (4 if drawing.narrow else 10))
    each, high = (drawing.width - 0.1) / across, 2.0
    drawing.resize(key + lines * (high + 0.62) + 0.12)
    lowest = min(stack.relative_error for curve in curves for stack in curve.stacks)
    layers = [layer for curve in curves for stack in curve.stacks for layer in stack.layers]
    for number, panel in enumerate(panels):
        line, column = divmod(number, across)
        axes = drawing.axes(column * each + 0.78, key + line * (high + 0.62) + 0.22, each - 0.96, high)
        for curve in (curve for curve in curves if curve.panel == panel):
            _draw_curve(axes, curve, rank_colour(ranks.index(curve.rank), len(ranks)))
        axes.set_title(panel, pad=5)
        axes.grid(axis="y")
        room = max(1 - lowest, 1e-3) * 0.06
        axes.set(xlim=(min(layers) - 0.7, max(layers) + 0.7), ylim=(max(0.0, lowest - room), 1 + room))
        axes.locator_params(axis="x", integer=True)
        if line == lines - 1 or number + across >= len(panels):
            axes.set_xlabel("layer")
        if column == 0:
            axes.set_ylabel("relative error")
    marks = [axes.plot([], [], color=rank_colour(n, len(ranks)), lw=2.2)[0] for n in range(len(ranks))]
    names = [f"rank {','.join(map(str, rank))}" for rank in ranks]
    drawing.figure.legend(marks, names, loc="upper left", bbox_to_anchor=(0.78 / drawing.width, 1), borderpad=0,
                          ncols=4 if drawing.narrow else 10, handlelength=1.2, columnspacing=1.3)  # fmt: skip


def _draw_curve(axes: Axes, curve: ErrorCurve, colour: str) -> None:
    """Draw stacks of one layer as joined points, the others as bars."""
    single = sorted((stack.layers[0], stack.relative_error) for stack in curve.stacks if len(stack.layers) == 1)
    if single:
        axes.plot(*zip(*single, strict=True), "-o", color=colour, ms=2.8, lw=1.0, markeredgewidth=0)
    for stack in (stack for stack in curve.stacks if len(stack.layers) > 1):
        ends = (stack.layers[0] - 0.4, stack.layers[-1] + 0.4)
        axes.plot(ends, [stack.relative_error] * 2, color=colour, lw=2.4, solid_capstyle="butt", alpha=0.9)


def draw_spectra(drawing: Drawing, found: Sequence[MatrixSpectrum], ranks: Sequence[int]) -> None:
    """Draw how singular values fall, and the energy that the leading ones hold; ranks in use are dotted lines."""
    roles = list(dict.fromkeys(item.role for item in found))
    high = 2.3 if drawing.narrow else 2.8
    below = high + 0.65 if drawing.narrow else 0.0
    across = drawing.width if drawing.narrow else drawing.width / 2
    key = KEY_HEIGHT + 0.17 * ((len(roles) - 1) // (4 if drawing.narrow else 10))
    drawing.resize(key + below + high + 0.55)
    aside = 0.0 if drawing.narrow else across
    decay = drawing.axes(0.78, key, across - 0.96, high)
    share = drawing.axes(aside + 0.78, key + below, across - 0.96, high)
    thin = len(found) > 2 * len(roles)
    for item in found:
        values = item.spectrum.values
        style: dict[str, Any] = {"lw": 0.7, "alpha": 0.6} if thin else {"lw": 1.3}
        style["color"] = SERIES[roles.index(item.role) % SERIES_COUNT]
        places = range(1, len(values) + 1)
        decay.plot(places, values / values[0], **style)
        energy = values.double().square().cumsum(0) / (item.spectrum.energy or 1.0)
        share.plot(places, 100 * energy.clamp(max=1), **style)
    for axes in (decay, share):
        for rank in ranks:
            axes.axvline(rank, color=MUTED, lw=1.0, ls=":")
        axes.set(xscale="log", xlabel="index of the singular value")
        axes.grid(color=RULE)
    decay.set(yscale="log", ylabel="singular value / largest", ylim=(max(decay.get_ylim()[0], 1e-3), 1.3))
    for axis in (decay.xaxis, share.xaxis, decay.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_minor_formatter(lambda _value, _: "")
    share.set(ylabel="energy up to it, %", ylim=(0, 103))
    marks = [decay.plot([], [], color=SERIES[n % SERIES_COUNT], lw=2.2)[0] for n in range(len(roles))]
    drawing.figure.legend(marks, roles, loc="upper left", bbox_to_anchor=(0.78 / drawing.width, 1), borderpad=0,
                          ncols=4 if drawing.narrow else 10, handlelength=1.2, columnspacing=1.3)  # fmt: skip
