"""Progress: how long work tells of itself."""

from __future__ import annotations

from collections.abc import Callable

Observer = Callable[[str, int, int | None], None]
"""Called as ``observer(stage, done, total)``: bytes, or slices read (total None) while a stack is decomposed."""


def silent(stage: str, done: int, total: int | None) -> None:
    """Observe nothing."""


def slice_counter(stage: str, observer: Observer) -> Callable[[], None]:
    """Return a function that reports one more slice each time it is called."""
    read = 0

    def count() -> None:
        nonlocal read
        read += 1
        observer(stage, read, None)

    return count
