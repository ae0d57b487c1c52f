"""Streaming decompositions against the reference engine, and what holds for every method."""

from __future__ import annotations

import itertools
import logging
import math
import subprocess
import sys
import warnings

import pytest
import tensorly
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.strategies import KINDS, fitting, make_stack, stacks
from trawl.decompose import CP, SVD, TensorSlices, Tucker, decompose, streaming
from trawl.decompose.cp_core import KhatriRao
from trawl.decompose.range_finder import hidden_basis, orthonormal, row_subspace
from trawl.decompose.streaming import BLOCK_ENTRIES, Stream, TransposedSlices
from trawl.errors import PlanError, RankError, ShapeError

# local optima of a random tensor differ between starts; the rest is what float32 and the stored dtype allow
SLACK = 0.015
checked = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
fewer = settings(checked, max_examples=12)
pytestmark = pytest.mark.filterwarnings("ignore:Trying to compute SVD with n_eigenvecs:UserWarning")


def error_of(x, factors):
    """Relative error, subtracted entry by entry in float64."""
    exact = x.double()
    size = torch.linalg.vector_norm(exact)
    return float(torch.linalg.vector_norm(factors.dense().double() - exact) / size) if size else 0.0


def quiet(method, x):
    """Decompose without the warning at the cap."""
    logger = logging.getLogger("trawl.decompose")
    logger.disabled = True
    try:
        return decompose(x, method)
    finally:
        logger.disabled = False


def reference_error(method, x):
    """Error of tensorly's solution, infinite where it fails."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return error_of(x, quiet(method, x))
    except PlanError:
        return math.inf


@checked
@given(stacks(scales=(1.0, 1e-20, 1e20)))
def test_cp_reaches_the_reference(case):
    x, rank = case
    ours = quiet(CP(rank), x)
    assert error_of(x, ours) <= reference_error(CP(rank, engine="tensorly", tol=1e-5), x) + SLACK
    assert ours.relative_error == pytest.approx(error_of(x, ours), rel=2e-3, abs=2e-6)


@checked
@given(stacks(scales=(1.0, 1e-20, 1e20)))
def test_tucker_reaches_the_reference(case):
    x, rank = case
    rank = min(rank, *x.shape[1:])
    ours = quiet(Tucker(rank), x)
    assert error_of(x, ours) <= reference_error(Tucker(rank, engine="tensorly", tol=1e-5), x) + SLACK
    assert ours.relative_error == pytest.approx(error_of(x, ours), rel=2e-3, abs=2e-6)
    for factor in (ours.left, ours.right):
        torch.testing.assert_close(factor.T @ factor, torch.eye(rank), atol=2e-5, rtol=0)


@checked
@given(stacks(scales=(1.0, 1e-20, 1e20), most=(5, 24, 18)), st.data())
def test_tucker_compresses_the_stack_mode(case, data):
    x, _ = case
    ranks = tuple(data.draw(st.integers(1, n)) for n in x.shape)
    ours = quiet(Tucker(ranks), x)
    assert error_of(x, ours) <= reference_error(Tucker(ranks, engine="tensorly", tol=1e-5), x) + SLACK
    assert (ours.stack is None) == (ranks[0] == x.shape[0])
    assert ours.rank == ranks


@checked
@given(stacks(scales=(1.0, 1e-20, 1e20), most=(1, 40, 30)))
def test_svd_and_one_slice_cp_equal_the_exact_svd(case):
    x, rank = case
    rank = min(rank, *x.shape[1:])
    expected = error_of(x, decompose(x, SVD(rank, engine="tensorly")))
    for method in (SVD(rank), CP(rank)):
        assert error_of(x, decompose(x, method)) == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("shape", [(600, 400), (300, 700)])
@pytest.mark.parametrize("decay", [0.5, 2.0, 8.0])
def test_svd_of_a_larger_matrix_is_as_good_as_exact(shape, decay):
    rank, random = 20, torch.Generator().manual_seed(1)
    u, v = (torch.linalg.qr(torch.randn(n, min(shape), generator=random))[0] for n in shape)
    sigma = torch.arange(1, min(shape) + 1).float() ** -decay
    x = (u * sigma) @ v.T
    best = float(sigma[rank:].norm() / sigma.norm())
    factors = decompose(x, SVD(rank, tol=1e-6))
    assert error_of(x[None], factors) == pytest.approx(best, rel=2e-3, abs=3e-6)
    assert 0 < factors.iterations <= 12  # 20 blocks would span the whole space, whatever they hold
    torch.testing.assert_close(factors.core[0], sigma[:rank], rtol=2e-2, atol=3e-6)


@fewer
@given(
    st.sampled_from(["planted", "deficient", "ill-conditioned"]),
    st.integers(2, 5),
    st.integers(1, 6),
    st.integers(0, 999),
)
def test_planted_stack_is_recovered(kind, size, rank, seed):
    x = make_stack(kind, (size, 24, 18), rank, seed)
    for method in (CP(rank, tol=1e-9, n_iter_max=300), Tucker(rank)):
        assert error_of(x, quiet(method, x)) < 3e-6, method


def test_tucker_of_a_larger_stack_reaches_the_reference():
    """Sizes at which subspaces come from iteration, warm-started sweep by sweep, and not from whole Gram matrices."""
    x = make_stack("random", (3, 420, 380), 5, 0)
    expected = decompose(x, Tucker(100, engine="tensorly", tol=1e-6)).relative_error
    assert decompose(x, Tucker(100, tol=1e-6)).relative_error == pytest.approx(expected, abs=1e-4)


@fewer
@given(st.integers(2, 5), st.integers(2, 5), st.integers(0, 999))
def test_tucker_finds_small_directions(size, rank, seed):
    x = make_stack("ill-conditioned", (size, 24, 18), 6, seed)
    expected = reference_error(Tucker(rank, engine="tensorly", tol=1e-8), x)
    assert error_of(x, quiet(Tucker(rank), x)) <= expected * 1.05 + 1e-6


def test_planted_stack_is_recovered_where_modes_are_compressed():
    x = make_stack("planted", (4, 300, 150), 12, 0)
    for method in (CP(12), Tucker(12)):
        assert error_of(x, decompose(x, method)) < 3e-6


@fewer
@given(stacks(kinds=("random",), dtypes=(torch.float32,)))
def test_tucker_error_does_not_rise_with_rank(case):
    x, _ = case
    errors = [
        quiet(Tucker(rank, tol=1e-7, n_iter_max=300), x).relative_error for rank in range(1, min(x.shape[1:]) + 1)
    ]
    assert all(later <= earlier + 1e-4 for earlier, later in itertools.pairwise(errors))


@fewer
@given(stacks(scales=(1.0, 1e-20, 1e20)))
def test_full_rank_tucker_gives_the_stack_back(case):
    x, _ = case
    factors = decompose(x, Tucker(tuple(x.shape)))
    torch.testing.assert_close(factors.dense(), x.float(), rtol=1e-5, atol=1e-6 * float(x.abs().max()))


@pytest.mark.parametrize("method", [CP(5), Tucker(5), Tucker((2, 4, 3)), CP(5, compute="bfloat16")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_seed_gives_the_same_bytes(method, dtype):
    x = make_stack("random", (4, 40, 30), 5, 0).to(dtype)
    first, again = decompose(x, method), decompose(x.clone(), method)
    for name, tensor in first.tensors().items():
        assert torch.equal(tensor, again.tensors()[name]), name
    assert first.relative_error == again.relative_error


@pytest.mark.parametrize("method", [CP(4), Tucker(4), SVD(4)])
def test_global_random_state_is_left_alone(method):
    x = make_stack("random", (1 if isinstance(method, SVD) else 3, 400, 300), 4, 0)
    before = torch.get_rng_state()
    decompose(x, method)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("method", [CP(6), Tucker(6)])
@pytest.mark.parametrize("kind", KINDS)
def test_layout_of_storage_does_not_matter(method, kind):
    x = make_stack(kind, (3, 60, 80), 6, 3).bfloat16()
    turned = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert decompose(turned, method).relative_error == pytest.approx(
        decompose(x, method).relative_error, rel=1e-2, abs=1e-6
    )


@pytest.mark.parametrize("method", [CP(6), Tucker(6), SVD(6)])
def test_float64_is_kept(method):
    shape = (1 if isinstance(method, SVD) else 3, 40, 30)
    x = make_stack("planted", shape, 6, 0).double()
    factors = decompose(x, method)
    assert factors.left.dtype == factors.core.dtype == torch.float64


@pytest.mark.parametrize("method", [CP(3), Tucker(3), Tucker((2, 3, 3)), SVD(3)])
@pytest.mark.parametrize("engine", ["streaming", "tensorly"])
def test_a_stack_of_zeros_has_error_zero(method, engine):
    x = torch.zeros(1 if isinstance(method, SVD) else 4, 6, 5)
    factors = decompose(x, type(method)(method.rank, engine=engine))
    assert factors.relative_error == 0.0
    assert torch.equal(factors.dense(), x)


@pytest.mark.parametrize(
    ("method", "largest"),
    [(CP, 12), (Tucker, 4), (lambda rank: Tucker((rank, 1, 1)), 3), (lambda rank: Tucker((1, 1, rank)), 5)],
)
def test_ranks_outside_the_bounds_are_refused(method, largest):
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    assert quiet(method(largest), x).shape == (3, 4, 5)
    for rank in (0, -1, largest + 1):
        with pytest.raises(RankError, match=rf"{rank} is outside 1..{largest}"):
            decompose(x, method(rank))
    with pytest.raises(RankError, match=r"stack fc\.1"):
        method(largest + 1).check_rank((3, 4, 5), "stack fc.1")


def test_max_rank_is_what_check_rank_allows():
    shape = (3, 4, 5)
    assert CP(1).max_rank(shape) == 12
    assert Tucker(1).max_rank(shape) == shape
    assert SVD(1).max_rank((1, 4, 5)) == 4


def test_unusable_tensors_and_options_are_refused():
    with pytest.raises(ShapeError, match=r"\(2, 3, 4, 5\)"):
        decompose(torch.ones(2, 3, 4, 5), CP(1))
    with pytest.raises(ShapeError, match="int64"):
        decompose(torch.ones(2, 3, 4, dtype=torch.int64), CP(1))
    with pytest.raises(ShapeError, match="one matrix"):
        decompose(torch.ones(2, 3, 4), SVD(1))
    with pytest.raises(RankError, match="2 entries"):
        decompose(torch.ones(2, 3, 4), Tucker((1, 2)))
    with pytest.raises(PlanError, match="did you mean 'streaming'"):
        CP(1, engine="stream")
    with pytest.raises(PlanError, match="n_iter_max"):
        Tucker(1, n_iter_max=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("method", [CP(2), Tucker(2), CP(2, engine="tensorly")])
def test_a_number_that_is_not_finite_is_refused(bad, method):
    x = torch.ones(3, 4, 5)
    x[1, 2, 3] = bad
    with pytest.raises(ShapeError, match="NaN or Inf"):
        decompose(x, method)


@pytest.mark.parametrize(
    ("method", "shape"),
    [(CP(7), (3, 9, 8)), (Tucker(4), (3, 9, 8)), (Tucker((2, 5, 4)), (3, 9, 8)), (SVD(5), (1, 9, 8))],
)
def test_planned_counts_equal_those_of_the_factors(method, shape):
    factors = quiet(method, make_stack("random", shape, 4, 0))
    assert method.parameters(shape) == factors.parameters
    assert method.ranks(shape) == factors.rank
    assert factors.shape == shape
    assert method.flops(shape) > 0
    assert method.working_set(shape) > 0


@pytest.mark.parametrize("method", [CP(5, n_iter_max=2, tol=0.0), Tucker(3, n_iter_max=2, tol=0.0)])
def test_reaching_the_cap_is_said(method, caplog):
    x = make_stack("random", (4, 30, 20), 5, 0)
    with caplog.at_level(logging.INFO, logger="trawl.decompose"):
        factors = decompose(x, method)
    assert not factors.converged
    assert factors.iterations == 2
    assert any(record.levelno == logging.WARNING and "cap of 2 sweeps" in record.message for record in caplog.records)
    assert any("sweep 2: fit 0." in record.message for record in caplog.records)


def test_convergence_is_recorded(caplog):
    with caplog.at_level(logging.WARNING, logger="trawl.decompose"):
        factors = decompose(make_stack("random", (4, 30, 20), 5, 0), Tucker(3, tol=1e-3))
    assert factors.converged
    assert not caplog.records


def test_bfloat16_products_only_guide_the_start(monkeypatch):
    """On any processor: one without units for them takes float32 in their place."""
    monkeypatch.setattr(streaming, "multiplies_bfloat16", lambda _: True)
    x = make_stack("random", (3, 1200, 1100), 5, 0).bfloat16()
    plain, low = (decompose(x, Tucker(4, compute=compute)) for compute in ("float32", "bfloat16"))
    assert low.relative_error == pytest.approx(error_of(x, low), rel=1e-5)
    assert low.relative_error == pytest.approx(plain.relative_error, rel=1e-4)
    monkeypatch.setattr(streaming, "multiplies_bfloat16", lambda _: False)
    assert torch.equal(decompose(x, Tucker(4, compute="bfloat16")).left, plain.left)
    assert not torch.equal(low.left, plain.left)


def test_slices_are_read_one_at_a_time():
    """A source that spoils each slice once the next is drawn still gives the right factors."""
    x = make_stack("random", (4, 30, 20), 5, 0)

    class Spoiling:
        shape = (4, 30, 20)
        absmax = float(x.abs().max())

        def slices(self):
            last = None
            for matrix in x:
                if last is not None:
                    last.fill_(float("nan"))
                last = matrix.clone()
                yield last

    for method in (CP(4), Tucker(4), Tucker((2, 4, 4))):
        assert method.decompose(Spoiling()).relative_error == pytest.approx(
            decompose(x, method).relative_error, rel=1e-6
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e20])
@pytest.mark.parametrize("turned", [False, True])
def test_blocked_products_equal_plain_ones(dtype, scale, turned):
    random = torch.Generator().manual_seed(0)
    x = (torch.randn(1, 2800, 400, generator=random) * fitting(scale, dtype)).to(dtype)
    x = x.transpose(1, 2).contiguous().transpose(1, 2) if turned else x
    assert x.numel() > BLOCK_ENTRIES  # several blocks
    stream = Stream(TensorSlices(x))
    exact = x[0].double() * stream.scale
    v, u = torch.randn(400, 3, generator=random).double(), torch.randn(2800, 3, generator=random).double()
    panel = next(iter(stream.panels()))
    tolerance = {"rtol": 1e-4, "atol": 1e-4 * float(exact.abs().max()) * 40}
    torch.testing.assert_close(panel.right(v).double(), (exact @ v).T, **tolerance)
    torch.testing.assert_close(panel.left(u).double(), (exact.T @ u).T, **tolerance)
    torch.testing.assert_close(
        panel.gram().double(), exact.T @ exact, rtol=1e-4, atol=1e-3 * float((exact.T @ exact).max())
    )
    assert stream.norm_squared == pytest.approx(float(exact.square().sum()), rel=1e-7)
    difference = exact - u @ torch.eye(3).double() @ v.T
    assert panel.residual_squared(u, torch.eye(3), v) == pytest.approx(float(difference.square().sum()), rel=1e-6)


def test_transposed_slices_exchange_inner_and_hidden():
    x = torch.arange(24.0).view(2, 3, 4)
    turned = TransposedSlices(TensorSlices(x))
    assert turned.shape == (2, 4, 3)
    assert turned.absmax == 23.0
    assert all(torch.equal(a.T, b) for a, b in zip(turned.slices(), x, strict=True))


@pytest.mark.parametrize("columns", ["independent", "close", "dependent", "zero", "graded"])
def test_orthonormal_whatever_the_columns(columns):
    y = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    cases = {
        "independent": y,
        "close": y[:, :1] + 3e-4 * y,
        "dependent": y[:, :1].expand(50, 8) + 0,
        "zero": y * 0,
        "graded": y * torch.logspace(0, -30, 8),
    }
    y = cases[columns]
    q = orthonormal(y)
    torch.testing.assert_close(q.T @ q, torch.eye(8), atol=3e-6, rtol=0)
    torch.testing.assert_close(q @ (q.T @ y), y)


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (900, 800), (4, 30)])
def test_row_subspace_captures_the_leading_energy(shape):
    k, random = 6, torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, min(shape), generator=random))[0] for n in shape)
    sigma = 0.5 ** torch.arange(min(shape)).float()
    m = (u * sigma) @ v.T
    basis = row_subspace(m, k)
    assert basis.shape == (shape[1], k)
    torch.testing.assert_close(basis.T @ basis, torch.eye(k), atol=3e-6, rtol=0)
    assert float((m @ basis).norm()) == pytest.approx(float(sigma[:k].norm()), rel=1e-5)


def test_hidden_basis_without_a_gram_matrix_is_as_good():
    """A hidden mode above the size of Gram matrices goes through the randomized range finder."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2, 1300, 40, generator=random) @ torch.randn(40, 1200, generator=random)
    basis = hidden_basis(Stream(TensorSlices(x)), 40, 1, 0)
    torch.testing.assert_close(x @ basis @ basis.T, x, atol=1e-2, rtol=0)


def test_tensorly_is_imported_when_it_is_used_and_its_backend_left_alone():
    code = (
        "import sys, torch, trawl; assert not {'tensorly', 'scipy'} & set(sys.modules); "
        "trawl.decompose(torch.randn(3, 6, 5), trawl.CP(2)); "
        "import tensorly; assert (tensorly.get_backend(), tensorly.tenalg.get_backend()) == ('numpy', 'core')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("shape", [(1, 4, 7), (3, 6, 5), (9, 2, 3)])
def test_an_unfolding_meets_the_khatri_rao_product_without_forming_it(shape):
    core, weights = torch.randn(shape, dtype=torch.float64), torch.rand(4, dtype=torch.float64)
    factors = [torch.randn(size, 4, dtype=torch.float64) for size in shape]
    product = KhatriRao()
    for mode in (0, 1, 2, 0, 1, 2):
        with tensorly.backend_context("pytorch", local_threadsafe=True):
            expected = tensorly.tenalg.unfolding_dot_khatri_rao(core, (weights, factors), mode)
        torch.testing.assert_close(product(core, (weights, factors), mode), expected)
        factors[mode] = torch.randn_like(factors[mode])


def test_the_iterations_on_a_core_form_no_khatri_rao_product(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("formed")

    x = make_stack("random", (3, 20, 16), 3, 0)
    expected = decompose(x, CP(3))
    monkeypatch.setattr("tensorly.tenalg.core_tenalg.mttkrp.khatri_rao", refuse)
    assert decompose(x, CP(3)).relative_error == expected.relative_error
    with pytest.raises(AssertionError, match="formed"):
        decompose(x, CP(3, engine="tensorly"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("method", [CP(5), Tucker(5), Tucker((2, 4, 3))])
def test_a_gpu_gives_the_same_error(method):
    x = make_stack("random", (4, 60, 40), 5, 0)
    assert decompose(x.cuda(), method).relative_error == pytest.approx(decompose(x, method).relative_error, rel=1e-3)
