"""Pictures: one drawing as a PNG file, and as SVG for a wide and for a narrow page."""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from trawl.report.palette import INK, MUTED, PAPER, RULE, VARIABLES

PNG_DPI = 160
WIDE, NARROW = 10.0, 3.75  # inches: 960 and 360 CSS pixels
TAG = re.compile(r"<[^<>]*>")
HEX_COLOUR = re.compile(r"#[0-9a-f]{6}\b")
NAMED = re.compile(r'(\bid="|url\(#|href="#)')
TIPPED = re.compile(r'<g id="([\w-]+)">')
STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.grid": False,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": "medium",
    "axes.titleweight": "bold",
    "axes.unicode_minus": True,
    "font.family": ["DejaVu Sans"],
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "svg.fonttype": "none",  # text stays text: to be searched, and set in the page's font
    "text.color": INK,
    "text.parse_math": False,  # a name may hold $
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "xtick.major.size": 2.5,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
    "ytick.major.size": 2.5,
}


@dataclass(frozen=True, eq=False)
class Drawing:
    """A figure in the making.

    Attributes:
        figure: matplotlib's figure.
        narrow: whether it is for a narrow page.
        tips: what hovering over an artist shows, by the artist's gid.
    """

    figure: Figure
    narrow: bool
    tips: dict[str, str] = field(default_factory=dict)

    @property
    def width(self) -> float:
        """Inches from side to side."""
        return NARROW if self.narrow else WIDE

    def resize(self, height: float) -> None:
        """Set the height in inches."""
        self.figure.set_size_inches(self.width, height)

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        """Place axes by inches from the figure's left and top edges; the height must have been set."""
        w, h = self.figure.get_size_inches()
        return self.figure.add_axes((left / w, 1 - (top + height) / h, width / w, height / h))

    def tip(self, text: str) -> str:
        """Return a new gid whose artist shows a text."""
        gid = f"tip-{len(self.tips)}"
        self.tips[gid] = text
        return gid


@dataclass(frozen=True)
class Picture:
    """One picture of the page.

    Attributes:
        name: stem of its PNG file.
        caption: its heading on the page.
        alt: what it shows, in words.
        wide: SVG for a wide page.
        narrow: SVG for a narrow page.
        png: the PNG file's bytes.
    """

    name: str
    caption: str
    alt: str
    wide: str
    narrow: str
    png: bytes


def render(name: str, alt: str, draw: Callable[[Drawing], None], caption: str = "") -> Picture:
    """Draw a picture in its forms.

    Args:
        name: stem of its PNG file.
        alt: what it shows, in words.
        draw: fills a drawing whose ``narrow`` says for which page.
        caption: its heading on the page, where it is not alone in its section.
    Returns: the picture; the same drawing gives the same bytes.
    """
    drawings = {}
    for narrow in (False, True):
        with _style(narrow):
            drawings[narrow] = Drawing(Figure(), narrow)
            draw(drawings[narrow])
    wide = drawings[False]
    png = io.BytesIO()
    with _style(False):
        wide.figure.savefig(png, format="png", dpi=PNG_DPI, facecolor=PAPER, metadata={"Software": None})
    return Picture(
        name, caption, alt, _svg(wide, name, alt), _svg(drawings[True], f"{name}-narrow", alt), png.getvalue()
    )


@contextmanager
def _style(narrow: bool, salt: str = "trawl") -> Iterator[None]:
    """Set matplotlib's parameters; a glyph that its font lacks is drawn as a box, which is no reason to warn."""
    style: Any = {**STYLE, "font.size": 8.0 if narrow else 9.0, "svg.hashsalt": salt}
    with mpl.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def _svg(drawing: Drawing, name: str, alt: str) -> str:
    """Return a drawing as an SVG element: colours as CSS variables, ids of its own, tips as titles."""
    buffer = io.StringIO()
    with _style(drawing.narrow, name):
        metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
        drawing.figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    width, height = (72 * side for side in drawing.figure.get_size_inches())
    root = f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{html.escape(alt)}">'
    text = root + text[text.index(">") + 1 :]
    text = TIPPED.sub(lambda match: match[0] + _title(drawing.tips.get(match[1])), text)
    return TAG.sub(lambda match: _themed(match[0], name), text).strip()


def _title(tip: str | None) -> str:
    return f"<title>{html.escape(tip)}</title>" if tip else ""


def _themed(tag: str, name: str) -> str:
    """Rewrite one tag: known colours become variables, ids and references to them get a prefix."""
    tag = HEX_COLOUR.sub(lambda match: VARIABLES.get(match[0], match[0]), tag)
    return NAMED.sub(lambda match: f"{match[1]}{name}-", tag)
