"""Interpolative form: the same product from fewer entries."""

import pytest
import torch

from trawl.decompose import CP, SVD, Tucker, decompose
from trawl.errors import LoadError
from trawl.factors import Factors
from trawl.interpolation import check_order, interpolate, interpolated_sides, restored, stored_entries

SHAPE = (3, 24, 20)


def factors_of(shape, rank, *, full=True, stack=False, dtype=torch.float32):
    size, inner, hidden = shape
    mixed, r1, r2 = rank
    core = torch.randn(*rank, dtype=dtype) if full else torch.randn(mixed, r1, dtype=dtype)
    mixing = torch.randn(size, mixed, dtype=dtype) if stack else None
    return Factors(torch.randn(inner, r1, dtype=dtype), torch.randn(hidden, r2, dtype=dtype), core, mixing)


@pytest.mark.parametrize(
    ("factors", "sides"),
    [
        (factors_of(SHAPE, (3, 15, 12)), ("left", "right")),
        (factors_of(SHAPE, (3, 15, 5)), ("left",)),
        (factors_of(SHAPE, (3, 4, 12)), ("right",)),
        (factors_of(SHAPE, (3, 4, 5)), ()),
        (factors_of(SHAPE, (3, 24, 20)), ("left", "right")),
        (factors_of(SHAPE, (2, 15, 12), stack=True), ("left", "right")),
        (factors_of((1, 24, 20), (1, 12, 12), full=False), ("right",)),
        (factors_of((1, 24, 20), (1, 20, 20), full=False), ("right",)),
        (factors_of(SHAPE, (3, 12, 12), full=False), ()),
    ],
)
def test_the_product_stays_and_fewer_entries_are_stored(factors, sides):
    form = factors.interpolated()
    full = factors.core.dim() == 3
    assert interpolated_sides(factors.shape, factors.rank, full=full) == sides
    assert [form.left_order is not None, form.right_order is not None] == ["left" in sides, "right" in sides]
    torch.testing.assert_close(form.dense(), factors.dense(), rtol=1e-4, atol=1e-4)
    for side in sides:
        factor, order = getattr(form, side), getattr(form, f"{side}_order")
        rows, rank = factor.shape
        assert torch.equal(factor[order[:rank]], torch.eye(rank))
        assert form.stored()[side].shape == (rows - rank, rank)
        assert order[:rank].tolist() == sorted(order[:rank].tolist())
    saved = sum({"left": factors.rank[1] ** 2 - 24, "right": factors.rank[2] ** 2 - 20}[side] for side in sides)
    assert form.parameters == factors.parameters - saved == stored_entries(factors.shape, factors.rank, full=full)
    back = Factors(**restored(form.stored()))
    assert torch.equal(back.dense(), form.dense())


def test_entries_stay_near_one():
    """Where columns differ by ten decades, and others are zero or copies, it is their span that is written."""
    factor = torch.randn(200, 30) * torch.logspace(0, -10, 30)
    factor[:, 20:25] = 0
    factor[:, 25:] = factor[:, :5]
    whole, square, order = interpolate(factor)
    assert whole.abs().max() < 10
    assert sorted(order.tolist()) == list(range(200))
    torch.testing.assert_close((whole @ square).float(), factor, rtol=1e-4, atol=1e-9)


def test_zeros_stay_zeros():
    zeros = Factors(torch.zeros(24, 15), torch.zeros(20, 12), torch.zeros(3, 15, 12)).interpolated()
    assert torch.equal(zeros.dense(), torch.zeros(SHAPE))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_identity_survives_rounding(dtype):
    form = factors_of(SHAPE, (3, 15, 12)).interpolated().to(dtype=dtype)
    assert torch.equal(Factors(**restored(form.stored())).left, form.left)
    assert form.left_order.dtype == torch.int64


@pytest.mark.parametrize(
    ("method", "shape"),
    [
        (SVD(9), (1, 30, 20)),
        (SVD(20), (1, 20, 30)),
        (SVD(3), (1, 30, 20)),
        (Tucker(16), (3, 30, 20)),
        (Tucker((2, 16, 18)), (3, 30, 20)),
        (Tucker((3, 30, 20)), (3, 30, 20)),
        (CP(18), (3, 30, 20)),
        (CP(18), (1, 30, 20)),
    ],
)
def test_methods_count_what_is_stored(method, shape):
    factors = decompose(torch.randn(shape), method)
    assert method.parameters(shape) == factors.interpolated().parameters <= factors.parameters
    torch.testing.assert_close(factors.interpolated().dense(), factors.dense(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("order", [[0, 1, 1], [1, 2, 3], [-1, 0, 1]])
def test_an_order_with_rows_missing_is_refused(order):
    with pytest.raises(LoadError, match="left_order is no order of 3 rows"):
        check_order(torch.tensor(order), "left_order")


def test_less_is_stored_than_the_matrix_at_every_rank_but_the_last():
    sizes = [SVD(rank).parameters((1, 576, 576)) for rank in range(1, 577)]
    assert all(size < 576 * 576 for size in sizes[:540])
    assert sizes[-1] <= 576 * 576 + 2 * 576
