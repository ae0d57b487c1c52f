"""A report's page: what it says, free of where it came from, and the HTML that says it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from trawl.report.palette import css_variables
from trawl.report.pictures import Picture

TEMPLATE = "report.html.jinja"


@dataclass(frozen=True)
class Table:
    """A table of texts.

    Attributes:
        columns: their heads.
        rows: a text per column.
        left: how many columns, from the first, hold words; the others hold numbers.
        marked: rows to make stand out.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: int = 1
    marked: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Section:
    """One part of the page, in this order: text, pictures, table, commands.

    Attributes:
        title: its heading.
        text: one paragraph.
        pictures: each with its own caption.
        table: figures.
        folded: whether the table is to be opened by the reader.
        commands: lines to be run.
        note: a last paragraph.
    """

    title: str
    text: str = ""
    pictures: tuple[Picture, ...] = ()
    table: Table | None = None
    folded: bool = False
    commands: tuple[str, ...] = ()
    note: str = ""

    @property
    def anchor(self) -> str:
        """The section's id in the page."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


@dataclass(frozen=True)
class Tile:
    """One number at the head of the page."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Page:
    """A whole report.

    Attributes:
        kind: what is reported on, such as ``Sweep``.
        title: the model's name.
        headline: the result in one sentence.
        facts: (label, value) of the circumstances.
        tiles: the most telling numbers.
        notice: what a reader must know first; empty if nothing.
        progress: share of an unfinished study that is done; None for a finished one.
        sections: in reading order; those without content are left out.
        footer: what made the report.
    """

    kind: str
    title: str
    headline: str
    facts: tuple[tuple[str, str], ...]
    tiles: tuple[Tile, ...]
    sections: tuple[Section, ...]
    footer: str
    notice: str = ""
    progress: float | None = None
    pictures: tuple[Picture, ...] = field(init=False)

    def __post_init__(self) -> None:
        """Gather the pictures of all sections."""
        object.__setattr__(self, "pictures", tuple(picture for s in self.sections for picture in s.pictures))


def to_html(page: Page) -> str:
    """Return a page as one self-contained HTML document; every text in it is escaped."""
    environment = Environment(
        loader=PackageLoader("trawl.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["svg"] = Markup  # made by matplotlib, which escapes the texts in it
    light, dark = (Markup(css_variables(scheme)) for scheme in (False, True))  # noqa: S704 (our own colours)
    return environment.get_template(TEMPLATE).render(page=page, light=light, dark=dark)


def sections(*found: Section | None) -> tuple[Section, ...]:
    """Join sections, leaving out those that are None."""
    return tuple(section for section in found if section is not None)
