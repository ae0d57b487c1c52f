"""What a refit is held to: part of the text judges, ridges are tried, half of what the stream misses is repaired."""

from __future__ import annotations

from trawl.narrowing.selection import RIDGE

JUDGED = 16  # one batch in so many is not fitted to, but says whether what was fitted is better
RIDGES = (RIDGE, 0.1, 0.3, 1.0)  # of what is fitted, of which the tokens that judge choose
REPAIRED = 0.5  # share of what the stream misses that a matrix is to give on top: more of it follows noise


def judging(batches: int) -> set[int]:
    """Return the numbers of the batches that judge: of one alone, that one."""
    return set(range(JUDGED - 1, batches, JUDGED)) or {batches - 1}
