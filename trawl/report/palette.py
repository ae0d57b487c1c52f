"""Colours of the page and its pictures, each with a light and a dark form.

Pictures are drawn in the light colours. On the page a colour becomes a CSS variable, so that a picture follows the
reader's light or dark scheme; no two light colours may be equal.
"""

from __future__ import annotations

DIVERGING_LEVELS = 21  # odd: the middle one means no gain
RANK_LEVELS = 8

Rgb = tuple[int, int, int]


def _mixed(stops: list[str], share: float) -> str:
    """Return the colour at a share of the way along a row of colours."""
    place = share * (len(stops) - 1)
    first = min(int(place), len(stops) - 2)
    left, right = _rgb(stops[first]), _rgb(stops[first + 1])
    mixed = (round(a + (b - a) * (place - first)) for a, b in zip(left, right, strict=True))
    return "#" + "".join(f"{value:02x}" for value in mixed)


def _rgb(colour: str) -> Rgb:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def _ramp(name: str, count: int, light: list[str], dark: list[str]) -> dict[str, tuple[str, str]]:
    """Return ``count`` named colours along a row of colours."""
    shares = [number / (count - 1) for number in range(count)]
    return {f"{name}{n}": (_mixed(light, share), _mixed(dark, share)) for n, share in enumerate(shares)}


INK, MUTED, RULE, PAPER = "#1c2228", "#66707a", "#dfe2e4", "#fdfdfc"
SERIES_COUNT = 8

PALETTE: dict[str, tuple[str, str]] = {
    "ink": (INK, "#e4e7ea"),
    "muted": (MUTED, "#98a2ac"),
    "rule": (RULE, "#333b43"),
    "paper": (PAPER, "#14181c"),
    "series0": ("#1f6f8b", "#5cb3cf"),
    "series1": ("#c2602f", "#e8935f"),
    "series2": ("#5d8534", "#97c268"),
    "series3": ("#7a58a5", "#b698de"),
    "series4": ("#b03f68", "#e383a6"),
    "series5": ("#8b7028", "#cfb264"),
    "series6": ("#3f64b0", "#8ba9ec"),
    "series7": ("#51626b", "#a3b5be"),
    **_ramp(
        "gain", DIVERGING_LEVELS, ["#c4643a", "#dea98b", "#f2f1ee", "#8cc0c8", "#2a8c9c"],
        ["#b3582f", "#6b4231", "#262c32", "#28545d", "#1f8090"],
    ),
    **_ramp("rank", RANK_LEVELS, ["#b9d6c6", "#4f93a0", "#25395c"], ["#2f5d55", "#4f9fae", "#c9dcf7"]),
}  # fmt: skip

SERIES = tuple(PALETTE[f"series{n}"][0] for n in range(SERIES_COUNT))
VARIABLES = {light: f"var(--{name})" for name, (light, _) in PALETTE.items()}


def gain_colour(gain: float, largest: float) -> str:
    """Return the diverging colour of a gain, symmetric around 0."""
    middle = DIVERGING_LEVELS // 2
    level = round(middle * max(-1.0, min(1.0, gain / largest))) if largest else 0
    return PALETTE[f"gain{middle + level}"][0]


def rank_colour(number: int, count: int) -> str:
    """Return the colour of the ``number``-th of ``count`` ordered ranks."""
    level = round((RANK_LEVELS - 1) * number / max(count - 1, 1)) if count > 1 else RANK_LEVELS // 2
    return PALETTE[f"rank{level}"][0]


def css_variables(dark: bool) -> str:
    """Return the palette as CSS declarations."""
    return " ".join(f"--{name}: {pair[dark]};" for name, pair in PALETTE.items())
