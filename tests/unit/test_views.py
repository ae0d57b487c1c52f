"""Views: tables of patterns, round trips that are exact to the bit, and einops itself as the reference."""

import einops
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trawl.errors import ShapeError
from trawl.views import View

BITS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}

IDENTITY = View("inner hidden")
TRANSPOSE = View("hidden inner", "inner hidden")
ROWS = View("rows hidden", take=(("rows", 4, 10),))
PART = View("(part inner) hidden", sizes=(("part", 2),), take=(("part", 1, 2),))
COLUMNS = View("hidden (part inner)", "(part inner) hidden", sizes=(("part", 3),), take=(("part", 1, 2),))
HEADS = View("(heads part dim) hidden", sizes=(("part", 3), ("dim", 2)), take=(("part", 1, 2),))
EXPERT = View("experts inner hidden", "(experts inner) hidden", take=(("experts", 1, 2),))
EXPERT_PART = View(
    "experts hidden (inner part)",
    "(experts inner part) hidden",
    sizes=(("part", 2),),
    take=(("experts", 1, 2), ("part", 0, 1)),
)
EXPERTS = View("experts hidden inner", "(experts inner) hidden", sizes=(("experts", 3),))

TABLE = [
    (IDENTITY, (12, 8), (12, 8), lambda x: x),
    (TRANSPOSE, (12, 8), (8, 12), lambda x: x.T),
    (ROWS, (12, 8), (6, 8), lambda x: x[4:10]),
    (PART, (12, 8), (6, 8), lambda x: x[6:]),
    (COLUMNS, (8, 12), (4, 8), lambda x: x[:, 4:8].T),
    (HEADS, (12, 8), (4, 8), lambda x: torch.stack([x[2], x[3], x[8], x[9]])),
    (EXPERT, (3, 4, 8), (4, 8), lambda x: x[1]),
    (EXPERT_PART, (3, 8, 6), (3, 8), lambda x: x[1, :, 0::2].T),
    (EXPERTS, (3, 8, 4), (12, 8), lambda x: torch.cat([x[0].T, x[1].T, x[2].T])),
]


def bits(tensor):
    return tensor.contiguous().view(BITS[tensor.dtype])


def label(value):
    """Name a test by its view and shapes; a function's text has its address, which every process has another of."""
    return "" if callable(value) else str(value)


def noise(shape, dtype, seed=0):
    """Random bit patterns, NaN and subnormal ones among them."""
    generator = torch.Generator().manual_seed(seed)
    kind = torch.iinfo(BITS[dtype])
    return torch.randint(kind.min, kind.max, shape, dtype=BITS[dtype], generator=generator).view(dtype)


@pytest.mark.parametrize(("view", "stored_shape", "shape", "expected"), TABLE, ids=label)
@pytest.mark.parametrize("dtype", list(BITS), ids=str)
def test_table(view, stored_shape, shape, expected, dtype):
    stored = noise(stored_shape, dtype)
    assert view.shape(stored_shape) == shape
    assert torch.equal(bits(view.apply(stored)), bits(expected(stored)))


@pytest.mark.parametrize("view", [IDENTITY, TRANSPOSE, ROWS, PART, COLUMNS, EXPERT, EXPERT_PART], ids=str)
def test_apply_shares_storage_where_strides_can_express_the_slice(view):
    stored_shape = next(row[1] for row in TABLE if row[0] is view)
    stored = torch.zeros(stored_shape)
    slice_ = view.apply(stored)
    assert slice_.untyped_storage().data_ptr() == stored.untyped_storage().data_ptr()


def test_identity_and_transpose_are_the_tensor_itself():
    stored = torch.randn(12, 8)
    assert IDENTITY.apply(stored).data_ptr() == stored.data_ptr()
    assert IDENTITY.apply(stored).stride() == stored.stride()
    assert TRANSPOSE.apply(stored).stride() == stored.T.stride()
    assert TRANSPOSE.invert(stored.T).data_ptr() == stored.data_ptr()


@pytest.mark.parametrize(
    ("view", "whole"),
    [
        (IDENTITY, True),
        (TRANSPOSE, True),
        (EXPERTS, True),
        (ROWS, False),
        (PART, False),
        (View("rows hidden", sizes=(("rows", 6),), take=(("rows", 0, 6),)), True),
        (View("rows hidden", sizes=(("rows", 6),), take=(("rows", 0, 5),)), False),
        (View("rows hidden", sizes=(("rows", 6),), take=(("rows", 1, 6),)), False),
    ],
    ids=str,
)
def test_whole(view, whole):
    assert view.whole is whole


@st.composite
def cases(draw):
    """A random view with a stored shape: any axes, grouping, order and cuts."""
    names = ["a", "b", "c", "d", "hidden"][: draw(st.integers(2, 5))]
    sizes = {name: draw(st.integers(1, 4)) for name in names}
    stored = draw(groups(names))
    order = draw(st.permutations(names))
    cut = draw(st.integers(1, len(names) - 1))
    take = []
    for name in draw(st.sets(st.sampled_from(names))):
        start = draw(st.integers(0, sizes[name] - 1))
        take.append((name, start, draw(st.integers(start + 1, sizes[name]))))
    view = View(pattern(stored), pattern([order[:cut], order[cut:]]), tuple(sizes.items()), tuple(take))
    shape = tuple(torch.Size([sizes[name] for name in group]).numel() for group in stored)
    return view, shape, draw(st.sampled_from(list(BITS))), draw(st.integers(0, 2**31))


@st.composite
def groups(draw, names):
    order = draw(st.permutations(names))
    cuts = sorted(draw(st.sets(st.integers(1, len(names) - 1))))
    return [order[i:j] for i, j in zip([0, *cuts], [*cuts, len(names)], strict=True)]


def pattern(parts):
    return " ".join(part[0] if len(part) == 1 else f"({' '.join(part)})" for part in parts)


def reference(view, stored):
    """The same slice through einops.rearrange and plain indexing."""
    axes = view.stored.replace("(", "").replace(")", "")
    sizes = dict(view.sizes)
    out = einops.rearrange(stored, f"{view.stored} -> {axes}", **sizes)
    for axis, start, stop in view.take:
        out = out.index_select(axes.split().index(axis), torch.arange(start, stop))
    return einops.rearrange(out, f"{axes} -> {view.canonical}")


@settings(deadline=None, max_examples=300)
@given(cases())
def test_apply_agrees_with_einops(case):
    view, shape, dtype, seed = case
    stored = noise(shape, dtype, seed)
    expected = reference(view, stored)
    assert view.shape(shape) == tuple(expected.shape)
    assert torch.equal(bits(view.apply(stored)), bits(expected))


@settings(deadline=None, max_examples=300)
@given(cases())
def test_scatter_writes_the_part_and_nothing_else(case):
    view, shape, dtype, seed = case
    stored, slice_ = noise(shape, dtype, seed), noise(view.shape(shape), dtype, seed + 1)
    written = stored.clone()
    view.scatter(slice_, written)
    assert torch.equal(bits(view.apply(written)), bits(slice_))

    mask = torch.zeros(shape, dtype=dtype)
    view.scatter(torch.ones_like(slice_), mask)
    assert mask.sum() == slice_.numel()
    assert torch.equal(bits(written)[mask == 0], bits(stored)[mask == 0])

    view.scatter(view.apply(stored).clone(), written)
    assert torch.equal(bits(written), bits(stored))


@settings(deadline=None, max_examples=300)
@given(cases())
def test_invert_undoes_apply_of_a_whole_view(case):
    view, shape, dtype, seed = case
    stored = noise(shape, dtype, seed)
    if view.whole:
        assert torch.equal(bits(view.invert(view.apply(stored))), bits(stored))
    else:
        with pytest.raises(ShapeError, match="part of its tensor"):
            view.invert(view.apply(stored))


def test_scatter_takes_a_strided_slice_and_rounds_once():
    stored = torch.zeros(12, 8, dtype=torch.bfloat16)
    slice_ = torch.randn(12, 8, generator=torch.Generator().manual_seed(0)).T
    TRANSPOSE.scatter(slice_, stored)
    assert torch.equal(stored, slice_.T.to(torch.bfloat16))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: View("a b hidden"), "3 axes"),
        (lambda: View("a hidden", "b hidden"), "same axes"),
        (lambda: View("(a hidden", "a hidden"), "malformed"),
        (lambda: View("a a", "a a"), "malformed"),
        (lambda: View("a ..."), "name every axis"),
        (lambda: View("3 hidden"), "name every axis"),
        (lambda: View("a 1"), "name every axis"),
        (lambda: View("a hidden", sizes=(("b", 2),)), "no axis 'b'"),
        (lambda: View("a hidden", sizes=(("a", 0),)), "a=0"),
        (lambda: View("a hidden", take=(("b", 0, 1),)), "no axis 'b'"),
        (lambda: View("a hidden", take=(("a", 2, 2),)), "2:2"),
        (lambda: View("a hidden", sizes=(("a", 2),), take=(("a", 1, 3),)), "1:3 of a=2"),
        (lambda: IDENTITY.shape((3, 4, 5)), r"\(3, 4, 5\)"),
        (lambda: HEADS.shape((13, 8)), r"\(13, 8\)"),
        (lambda: View("(a b) hidden").shape((4, 8)), "a and b are both unknown"),
        (lambda: View("a hidden", sizes=(("a", 3),)).shape((4, 8)), r"is \(4, 8\); expected \(3, hidden\)"),
        (lambda: ROWS.shape((9, 8)), "rows=9"),
        (lambda: IDENTITY.shape((0, 8)), r"\(0, 8\)"),
        (lambda: IDENTITY.scatter(torch.zeros(8, 12), torch.zeros(12, 8)), r"\(8, 12\); expected \(12, 8\)"),
        (lambda: IDENTITY.scatter(torch.zeros(12, 8), torch.zeros(8, 12).T), "contiguous"),
        (lambda: PART.invert(torch.zeros(6, 8)), "part of its tensor"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ShapeError, match=message):
        make()


def test_views_hold_no_data_and_compare_by_value():
    assert View("hidden inner", "inner hidden") == TRANSPOSE
    assert hash(View("hidden inner", "inner hidden")) == hash(TRANSPOSE)
