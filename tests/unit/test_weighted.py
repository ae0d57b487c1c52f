"""Decompositions whose error is weighed by second moments: optimal by dense references, never worse than plain ones."""

from __future__ import annotations

import itertools
import logging
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.strategies import make_stack
from trawl.decompose import CP, SVD, TensorSlices, Tucker, Weights, decompose
from trawl.decompose.weighing import measured
from trawl.decompose.weighted_sweeps import MeanMoment, Preconditioner, conjugate_gradients
from trawl.decompose.weights import Metric, slice_weights, square_root
from trawl.errors import PlanError, RankError, ShapeError

checked = settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
fewer = settings(checked, max_examples=6)
MOMENTS = ("white", "spread", "deficient", "dead", "none")


@pytest.fixture(autouse=True)
def _quiet():
    """Leave out warnings at the cap on sweeps."""
    logging.getLogger("trawl.decompose").disabled = True
    yield
    logging.getLogger("trawl.decompose").disabled = False


def make_moment(kind, size, seed, dtype=torch.float64):
    """A second moment: of white inputs, of powers over six decades, of three directions, with dead inputs, or None."""
    if kind == "none":
        return None
    random = torch.Generator().manual_seed(seed)
    count = 3 if kind == "deficient" else 4 * size
    inputs = torch.randn(count, size, generator=random, dtype=torch.float64)
    if kind == "spread":
        inputs = inputs * torch.logspace(0, -3, size, dtype=torch.float64)
    if kind == "dead":
        inputs[:, ::2] = 0.0
    return (inputs.T @ inputs / count).to(dtype)


@st.composite
def weighted_stacks(draw, most=(4, 16, 12), kinds=MOMENTS):
    """A stack, weights for it, and a rank."""
    size, inner, hidden = (draw(st.integers(least, limit)) for least, limit in zip((1, 4, 4), most, strict=True))
    seed = draw(st.integers(0, 999))
    x = make_stack(draw(st.sampled_from(("random", "ill-conditioned"))), (size, inner, hidden), 4, seed)
    sides = []
    for number, width in enumerate((inner, hidden)):
        pool = [make_moment(draw(st.sampled_from(kinds)), width, seed + 10 * number + k) for k in range(2)]
        sides.append(tuple(draw(st.sampled_from(pool)) for _ in range(size)))
    return x, Weights(*sides), draw(st.integers(1, 4))


def weighted_error(x, factors, weights):
    """Relative weighted error, from dense square roots in float64."""
    missed = whole = 0.0
    for s, weight in enumerate(slice_weights(weights, x.device)):
        left, right = (
            torch.eye(size, dtype=torch.float64) if metric.matrix is None else square_root(metric)[0]
            for metric, size in ((weight.inner, x.shape[1]), (weight.hidden, x.shape[2]))
        )
        residual = x[s].double() - factors.slice(s).double()
        missed += weight.share * float((left @ residual @ right).square().sum())
        whole += weight.share * float((left @ x[s].double() @ right).square().sum())
    return (missed / whole) ** 0.5


@checked
@given(weighted_stacks(), st.sampled_from([CP, Tucker]))
def test_weighted_is_never_worse_than_plain(case, kind):
    x, weights, rank = case
    plain, found = decompose(x, kind(rank)), decompose(x, kind(rank), weights)
    if found.weighted_error is None:  # nothing weighs
        assert weights.plain
        return
    assert found.weighted_error == pytest.approx(weighted_error(x, found, weights), rel=1e-3, abs=1e-5)
    assert weighted_error(x, found, weights) <= weighted_error(x, plain, weights) + 1e-5
    assert found.relative_error >= plain.relative_error - 0.02  # plain factors are the best by plain error


@checked
@given(weighted_stacks(most=(1, 16, 12)))
def test_svd_equals_the_dense_reference(case):
    x, weights, rank = case
    (weight,) = slice_weights(weights, x.device)
    roots = [
        (torch.eye(size, dtype=torch.float64),) * 2 if metric.matrix is None else square_root(metric)
        for metric, size in ((weight.inner, x.shape[1]), (weight.hidden, x.shape[2]))
    ]
    sigma = torch.linalg.svdvals(roots[0][0] @ x[0].double() @ roots[1][0])
    best = float(sigma[rank:].norm() / sigma.norm())
    found = decompose(x, SVD(rank), weights)
    assert weighted_error(x, found, weights) == pytest.approx(best, rel=1e-3, abs=1e-5)
    assert weighted_error(x, decompose(x, CP(rank), weights), weights) == pytest.approx(best, rel=1e-3, abs=1e-5)
    if found.weighted_error is not None:
        assert found.core[0].tolist() == sorted(found.core[0].tolist(), reverse=True)


@checked
@given(weighted_stacks())
def test_full_rank_gives_the_stack_back(case):
    x, weights, _ = case
    _, inner, hidden = x.shape
    found = decompose(x, Tucker((len(x), inner, hidden)), weights)
    torch.testing.assert_close(found.dense(), x, rtol=0, atol=2e-3 * float(x.abs().max()))
    found = decompose(x[:1], SVD(min(inner, hidden)), Weights(weights.inner[:1], weights.hidden[:1]))
    torch.testing.assert_close(found.dense(), x[:1], rtol=0, atol=2e-3 * float(x.abs().max()))


def mixed_weights(seed):
    """Weights of three slices as one layer's {gate, down, up} might have them."""
    both = make_moment("white", 11, seed + 1), make_moment("spread", 11, seed + 2)
    return Weights((None, make_moment("spread", 14, seed), None), (both[0], None, both[1]))


@pytest.mark.parametrize("seed", [0, 3, 28])  # with extrapolations that overshoot
def test_sweeps_never_raise_the_error(seed, caplog):
    x = make_stack("random", (3, 14, 11), 3, seed)
    caplog.set_level(logging.INFO, logger="trawl.decompose")
    logging.getLogger("trawl.decompose").disabled = False
    for method in (CP(3, tol=1e-7), Tucker(3, tol=1e-7)):
        caplog.clear()
        decompose(x, method, mixed_weights(seed))
        fits = [record.args[2] for record in caplog.records if "sweep" in record.msg and record.args[0] == "weighted"]
        assert len(fits) > 5
        assert all(after >= before - 1e-6 for before, after in itertools.pairwise(fits))


def test_rounding_in_sweeps_does_not_spoil_an_exact_start():
    x = make_stack("ill-conditioned", (3, 14, 11), 3, 4)
    method, weights = CP(3, tol=1e-7, n_iter_max=60), mixed_weights(4)
    plain = measured(TensorSlices(x), decompose(x, method), weights)
    assert decompose(x, method, weights).weighted_error <= plain.weighted_error


@pytest.mark.parametrize("method", [CP(3, tol=1e-9, n_iter_max=200), Tucker(3, tol=1e-10, n_iter_max=200)])
def test_the_gradient_vanishes_at_the_solution(method):
    x = make_stack("random", (3, 14, 11), 3, 0).double()
    inner, hidden = make_moment("white", 14, 1), make_moment("spread", 11, 2)
    weights = Weights((None, None, inner), (hidden, hidden, None))

    def loss(left, right, core):
        factors = replace(found, left=left, right=right, core=core)
        total = 0.0
        for s, weight in enumerate(slice_weights(weights, x.device)):
            residual = x[s] - factors.slice(s)
            total = total + weight.share * (weight.inner.times(residual) * weight.hidden.times(residual.T).T).sum()
        return total

    found = decompose(x, method, weights)
    start = decompose(x, replace(method, tol=1.0), weights)
    gradients = []
    for factors in (found, start):
        parts = [part.clone().requires_grad_() for part in (factors.left, factors.right, factors.core)]
        gradients.append([float(g.norm()) for g in torch.autograd.grad(loss(*parts), parts)])
    assert all(end < 1e-2 * max(gradients[1]) for end in gradients[0]), gradients


@fewer
@given(weighted_stacks(kinds=("white", "spread", "deficient")), st.sampled_from([1e-12, 3.0, 1e12]))
def test_a_multiple_of_the_moments_changes_nothing(case, factor):
    x, weights, rank = case
    larger = Weights(weights.inner, tuple(moment * factor for moment in weights.hidden))
    for method in (CP(rank), Tucker(rank)):
        one, other = (decompose(x, method, each).weighted_error for each in (weights, larger))
        assert one == pytest.approx(other, rel=2e-2, abs=1e-4)


def test_identities_give_the_plain_bytes():
    x = make_stack("random", (3, 9, 7), 3, 0)
    eye = 2.5 * torch.eye(7)
    nothing = (None,) * 3
    for method, part in ((CP(2), x), (Tucker(2), x), (Tucker((2, 2, 2)), x), (SVD(2), x[:1])):
        plain = decompose(part, method)
        for hidden in (nothing, (eye,) * 3, (eye, eye.clone(), eye.double())):
            found = decompose(part, method, Weights(nothing[: len(part)], hidden[: len(part)]))
            assert found.weighted_error is None
            assert all(torch.equal(found.tensors()[name], plain.tensors()[name]) for name in plain.tensors())
    unequal = decompose(x, Tucker(2), Weights(nothing, (eye, None, None)))
    assert unequal.weighted_error is not None  # the first slice counts more


def test_balanced_slices_count_alike_whatever_the_size_of_their_moments():
    x = make_stack("random", (2, 9, 7), 3, 0)
    inner, hidden = make_moment("white", 9, 0), make_moment("spread", 7, 1)
    one = Weights((inner, None), (None, hidden))
    other = Weights((inner * 1e4, None), (None, hidden * 1e-3))
    for method in (CP(2), Tucker(2)):
        expected, found = (decompose(x, method, weights.balanced()) for weights in (one, other))
        torch.testing.assert_close(found.dense(), expected.dense(), rtol=1e-3, atol=1e-3)
        assert found.weighted_error == pytest.approx(expected.weighted_error, rel=1e-4)
        unbalanced = decompose(x, method, other)
        first, second = (  # all of the rank goes to the slice of the larger outputs
            weighted_error(x[:1], replace(f, core=f.core[:1]), Weights((inner,), (None,))) for f in (unbalanced, found)
        )
        assert first < second
    assert Weights((None, None), (torch.eye(7) * 3, torch.eye(7) * 0.1)).balanced().plain
    unseen = Weights((None, None), (hidden, torch.zeros(7, 7))).balanced()
    assert slice_weights(unseen, x.device)[1].share < 1e-5


def test_a_slice_that_was_never_seen_hardly_counts():
    x = make_stack("random", (2, 9, 7), 3, 0)
    seen, unseen = make_moment("white", 7, 0), torch.zeros(7, 7)
    found = decompose(x, Tucker(2), Weights((None, None), (seen, unseen)))
    alone = decompose(x[:1], SVD(2), Weights((None,), (seen,)))
    error = (found.slice(0) - alone.slice(0)).norm() / alone.slice(0).norm()
    assert error < 1e-2
    torch.testing.assert_close(
        decompose(x[:1], SVD(2), Weights((None,), (unseen,))).dense(), decompose(x[:1], SVD(2)).dense()
    )


def test_a_larger_svd_is_cut():
    x = make_stack("random", (1, 13, 20), 3, 0)
    weights = Weights((make_moment("spread", 13, 0),), (make_moment("dead", 20, 1),))
    large, small = decompose(x, SVD(6), weights), decompose(x, SVD(3), weights)
    cut = SVD(3).decompose(TensorSlices(x), large.balanced(), weights)
    assert cut.weighted_error == pytest.approx(small.weighted_error, rel=1e-5)
    torch.testing.assert_close(cut.dense(), small.dense(), rtol=1e-4, atol=1e-4)
    with pytest.raises(RankError, match="cannot be cut"):
        SVD(7).decompose(TensorSlices(x), large, weights)


@pytest.mark.parametrize("method", [SVD(2), CP(2), Tucker(2)])
def test_a_diagonal_stands_for_the_moment_that_has_no_other_entries(method):
    x = make_stack("random", (1 if isinstance(method, SVD) else 2, 9, 7), 3, 0)
    rows = torch.rand(9, dtype=torch.float64)
    whole, short = (Weights((moment,) * len(x), (None,) * len(x)) for moment in (rows.diag(), rows))
    found = decompose(x, method, short)
    torch.testing.assert_close(found.dense(), decompose(x, method, whole).dense(), rtol=1e-4, atol=1e-5)
    assert found.weighted_error < measured(TensorSlices(x), decompose(x, method), short).weighted_error


def test_slices_of_one_moment_share_its_products():
    moment = make_moment("white", 5, 0)
    weights = slice_weights(Weights((None, None), (moment, moment)), torch.device("cpu"))
    assert weights[0].hidden is weights[1].hidden
    assert isinstance(weights[0].inner, Metric)


def test_products_are_in_the_dtype_of_the_operand():
    x = torch.randn(5, 3)
    (weight,) = slice_weights(Weights((make_moment("spread", 5, 0),), (None,)), torch.device("cpu"))
    torch.testing.assert_close(weight.inner.times(x), weight.inner.times(x.double()).float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weight.inner.dense() @ x.double(), weight.inner.times(x.double()))


def test_conjugate_gradients_need_one_step_for_one_moment_beside_identities():
    moment = make_moment("spread", 12, 0)
    each = slice_weights(Weights((moment, None, None), (None,) * 3), torch.device("cpu"))
    random = torch.Generator().manual_seed(0)
    grams = [torch.randn(9, 4, generator=random, dtype=torch.float64) for _ in range(2)]
    terms = {weight.inner: gram.T @ gram for weight, gram in zip(each, grams, strict=False)}
    mean = MeanMoment.of([weight.inner for weight in each], [weight.share for weight in each])
    expected = torch.randn(12, 4, generator=random, dtype=torch.float64)
    target = sum(metric.times(expected @ gram) for metric, gram in terms.items())
    preconditioned = Preconditioner.of(mean, terms).times(target)
    torch.testing.assert_close(preconditioned, expected, rtol=1e-5, atol=1e-6)
    found, energy = conjugate_gradients(terms, target, torch.zeros_like(expected), Preconditioner.of(mean, terms), 1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert energy == pytest.approx(float((target * expected).sum()))


def test_conjugate_gradients_solve_for_several_moments():
    moments = [make_moment("spread", 12, seed) for seed in range(3)]
    moments[1] = moments[1].flip(0, 1)  # of its own: powerful where the others are weak
    each = slice_weights(Weights(tuple(moments), (None,) * 3), torch.device("cpu"))
    terms = {weight.inner: (s + 1.0) * torch.eye(4, dtype=torch.float64) for s, weight in enumerate(each)}
    mean = MeanMoment.of([weight.inner for weight in each], [weight.share for weight in each])
    expected = torch.randn(12, 4, dtype=torch.float64)
    target = sum(metric.times(expected @ gram) for metric, gram in terms.items())
    _, energy = conjugate_gradients(terms, target, torch.zeros_like(expected), Preconditioner.of(mean, terms), 12)
    assert energy == pytest.approx(float((target * expected).sum()), rel=5e-3)


@pytest.mark.parametrize(
    ("hidden", "message"),
    [
        ((torch.eye(4), None), "expected one per slice, 3"),
        ((torch.eye(5), None, None), r"hidden moment of slice 0 is \(5, 5\).*expected \(4, 4\)"),
        ((None, torch.eye(4).half(), None), "of torch.float16; expected"),
        ((None, torch.eye(4) / 0, None), "slice 1 holds NaN or Inf"),
        ((None, None, torch.ones(4, 4).triu()), "slice 2 is not symmetric"),
        ((-torch.eye(4), None, None), "diagonal of squares"),
    ],
)
def test_what_is_no_second_moment_is_refused(hidden, message):
    with pytest.raises(ShapeError, match=message):
        decompose(torch.ones(3, 6, 4), CP(1), Weights((None,) * 3, hidden))


def test_sizes_that_are_none_are_refused():
    for sizes in ((1.0, 1.0), (1.0, 0.0, 1.0)):
        with pytest.raises(ShapeError, match="expected 3 positive numbers"):
            decompose(torch.ones(3, 6, 4), CP(1), Weights((None,) * 3, (None,) * 3, sizes))


def test_what_weights_do_not_combine_with_is_refused():
    x = make_stack("random", (2, 6, 4), 2, 0)
    weights = Weights((None, None), (make_moment("white", 4, 0), None))
    for method in (CP(2, engine="tensorly"), Tucker(2, engine="tensorly")):
        with pytest.raises(PlanError, match="knows no weights"):
            decompose(x, method, weights)
    with pytest.raises(RankError, match="keeps the stack mode; give rank 2 for it, not 1"):
        decompose(x, Tucker((1, 2, 2)), weights)
    for method in (CP(2), Tucker(2)):
        with pytest.raises(PlanError, match="leave out start"):
            method.decompose(TensorSlices(x), decompose(x, method), weights)
