"""The errors that TRAWL raises for a user's mistake or an unusable input.

Every message is one line: what failed and where, what was expected against what was found, and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

SHOWN = 80  # characters of a wrong value that a message repeats


class TrawlError(Exception):
    """Base of every error that TRAWL raises on purpose; the command line prints it on one line and exits with 2."""


class CheckpointError(TrawlError):
    """A checkpoint is absent, incomplete, unreadable, or in a form that is not supported."""


class FamilyError(TrawlError):
    """No family description fits the checkpoint, or a family file is malformed."""


class ShapeError(TrawlError):
    """A tensor has a shape that the requested operation cannot take."""


class RankError(TrawlError):
    """A rank is zero, negative, or above what the method allows for the tensor."""


class PlanError(TrawlError):
    """The request cannot be carried out: options, layers, roles, output place, or disk space."""


class ResumeError(TrawlError):
    """A partial output does not belong to the requested run."""


class LoadError(TrawlError):
    """A factored checkpoint or a factor file does not hold what its description says."""


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest known word, or an empty string when none is close."""
    close = difflib.get_close_matches(word[:SHOWN], list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def shown(value: object) -> str:
    """Repeat a wrong value on one line, cut short."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, nesting without end
        text = f"of type {type(value).__name__} and too large to show"
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."
