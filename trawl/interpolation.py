"""Interpolative form: a factor r of whose rows are those of the identity, so that they need not be stored.

The columns of a factor F (n, r) can be combined freely, if what stands beside it takes the inverse. Taken so that r
well-chosen rows, the skeleton, become the identity,

    F = P [1; X] F_S,

F_S (r, r) goes into the core, and only X (n - r, r) and the order of the rows are left to store: r² entries fewer, and
as many multiplications fewer a token. The product stays what it was. Where a stack is one matrix, its other factor then
holds r rows or columns of the approximation themselves.

Reference: Cheng, Gimbutas, Martinsson & Rokhlin 2005, doi:10.1137/030602678; of low-rank layers of language models
Zhao et al. 2025, arXiv:2501.19090.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from trawl.errors import LoadError

Side = Literal["left", "right"]
Shape = tuple[int, int, int]

ORDER = "_order"  # ends the name of an order, which begins with its side
PAYS = 4  # r² entries are saved and n numbers of eight bytes spent: below r² = 4 n a factor of bfloat16 gains nothing


def interpolated_sides(shape: Shape, rank: Shape, *, full: bool) -> tuple[Side, ...]:
    """Return the factors that are stored in interpolative form.

    Both where the core is full; where it is diagonal, the right one of a single matrix, since what the skeleton leaves
    goes into left; none of several slices that have a diagonal each, which would not stay so.

    Args:
        shape: (S, inner, hidden) of the stack.
        rank: (A, r1, r2) of its factors.
        full: whether the core is.
    """
    sides: tuple[Side, ...] = ("left", "right") if full else ("right",) if rank[0] == 1 else ()
    size = {"left": (shape[1], rank[1]), "right": (shape[2], rank[2])}
    return tuple(side for side in sides if size[side][1] ** 2 > PAYS * size[side][0])


def stored_shapes(shape: Shape, rank: Shape, *, full: bool, sides: tuple[Side, ...]) -> dict[str, tuple[int, ...]]:
    """Return the shape of everything that is stored of some factors, by name.

    Args:
        shape: (S, inner, hidden) of the stack.
        rank: (A, r1, r2) of its factors.
        full: whether the core is.
        sides: the factors in interpolative form.
    Returns: left, right and core, ``stack`` where A < S, and ``left_order`` and ``right_order`` of the sides.
    """
    (size, inner, hidden), (mixed, r1, r2) = shape, rank
    shapes: dict[str, tuple[int, ...]] = {
        "left": (inner - r1 if "left" in sides else inner, r1),
        "right": (hidden - r2 if "right" in sides else hidden, r2),
        "core": (mixed, r1, r2) if full else (mixed, r1),
    }
    if mixed < size:
        shapes["stack"] = (size, mixed)
    return shapes | {side + ORDER: ({"left": inner, "right": hidden}[side],) for side in sides}


def stored_entries(shape: Shape, rank: Shape, *, full: bool) -> int:
    """Return the number of everything that is stored of some factors, orders of rows among them."""
    sides = interpolated_sides(shape, rank, full=full)
    return sum(math.prod(each) for each in stored_shapes(shape, rank, full=full, sides=sides).values())


def interpolate(factor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Write a factor F as ``P [1; X] F_S``.

    The skeleton S are the pivots of an LU decomposition, with partial pivoting, of an orthonormal basis of F's columns:
    entries of X stay near one, also where F itself has columns of zeros.

    Args:
        factor: (n, r) with r ≤ n.
    Returns: ``P [1; X]`` (n, r) and F_S (r, r), both float64; and the order of rows (n,), int64: the skeleton
        ascending, then the others ascending.
    Cost: O(n r²) operations; a few copies of the factor in float64.
    """
    exact = factor.double()
    rows, rank = exact.shape
    decomposed, swaps = torch.linalg.lu_factor(torch.linalg.qr(exact).Q)
    order = list(range(rows))
    for place, other in enumerate(swaps.tolist()):  # counted from 1
        order[place], order[other - 1] = order[other - 1], order[place]
    turned = torch.linalg.solve_triangular(
        decomposed[:rank], decomposed[rank:], upper=False, left=False, unitriangular=True
    )  # X, in the order of the pivots
    pivots = torch.tensor(order, device=factor.device)
    skeleton, columns = pivots[:rank].sort()
    others, lines = pivots[rank:].sort()
    found = torch.cat([skeleton, others])
    return restore(turned[lines][:, columns], found), exact[skeleton], found


def restore(rows: Tensor, order: Tensor) -> Tensor:
    """Return a whole factor (n, r) from what is stored of it.

    Args:
        rows: X, (n - r, r).
        order: (n,), a permutation.
    """
    rank = rows.shape[1]
    whole = rows.new_zeros(len(order), rank)
    whole[order[:rank]] = torch.eye(rank, dtype=rows.dtype, device=rows.device)
    whole[order[rank:]] = rows
    return whole


def check_order(order: Tensor, where: str) -> None:
    """Require that an order of rows is one.

    Raises: LoadError: some row is missing from it.
    """
    if not torch.equal(order.cpu().sort().values, torch.arange(len(order))):
        raise LoadError(f"{where} is no order of {len(order)} rows; fetch or write the checkpoint again")


def restored(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return whole factors, and the orders of those in interpolative form, from what is stored under their names."""
    whole = dict(stored)
    for side in ("left", "right"):
        if (order := stored.get(side + ORDER)) is not None:
            whole[side] = restore(stored[side], order)
    return whole
