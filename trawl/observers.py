"""Progress: how long work tells of itself."""

from __future__ import annotations

from collections.abc import Callable

Observer = Callable[[str, int, int | None], None]
"""Called as ``observer(stage, done, total)``: bytes, or slices read (total None) while a stack is decomposed."""


def silent(stage: str, done: int, total: int | None) -> None:
    """Observe nothing."""
