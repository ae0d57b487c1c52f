"""Nesting between ranks: which decompositions of a stack begin at the factors of another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from trawl.decompose.cp import CP
from trawl.decompose.method import Method, Shape
from trawl.decompose.svd import SVD
from trawl.decompose.tucker import Tucker
from trawl.errors import RankError, ShapeError

Rank = int | tuple[int, int, int]


def nested_chain(method: Method, shape: Shape, ladder: Sequence[Rank]) -> tuple[Method, ...]:
    """Return the decompositions to make one after the other, each starting from the factors of the one before.

    SVD, and CP of one slice: the largest rank of the ladder, which is cut. Tucker: the largest ranks, refitted. CP is
    not nested: all smaller ranks, ascending, each extended to the next.

    Args:
        method: what is wanted, the last of the chain.
        shape: (S, inner, hidden) of the stack.
        ladder: ranks that decompositions of this stack may have; those that the method cannot have for this shape are
            left out. They alone decide the chain, so that it is the same whatever was decomposed before.
    Returns: one or more methods that differ in rank only; just ``method`` where nothing on the ladder helps, and for
        the reference engine.
    """
    if not isinstance(method, (CP, SVD, Tucker)) or method.engine == "tensorly":
        return (method,)
    others = [other for rank in ladder if _fits(other := replace(method, rank=rank), shape)]  # type: ignore[arg-type]
    if isinstance(method, CP) and shape[0] > 1:
        smaller = {other.ranks(shape): other for other in others if other.ranks(shape)[2] < method.rank}
        return (*(smaller[ranks] for ranks in sorted(smaller)), method)
    wanted = method.ranks(shape)
    larger = [other for other in others if _covers(other.ranks(shape), wanted)]
    if not larger:
        return (method,)
    return max(larger, key=lambda other: math.prod(other.ranks(shape))), method


def _covers(ranks: Shape, wanted: Shape) -> bool:
    """Whether ranks are as large in every mode, and larger in one."""
    return ranks != wanted and all(large >= small for large, small in zip(ranks, wanted, strict=True))


def _fits(method: Method, shape: Shape) -> bool:
    """Whether a stack of this shape can be decomposed at the method's rank."""
    try:
        method.check_rank(shape, "")
    except (RankError, ShapeError):
        return False
    return True
