"""Starting from factors at another rank: as good as from scratch, and the same whatever was made before."""

from __future__ import annotations

import itertools
import logging
import math
from dataclasses import replace

import pytest
import torch

from tests.strategies import make_stack
from tests.unit.test_decompose import error_of
from trawl.decompose import CP, SVD, TensorSlices, Tucker, decompose, nested_chain
from trawl.decompose.cp import PUSH_STEP, _sweeps
from trawl.decompose.cp_core import random_start
from trawl.decompose.streaming import Stream
from trawl.errors import PlanError, RankError, ShapeError

LADDER = (64, 1, 8, 1000)


class Unreadable:
    """A source that only tells its shape."""

    def __init__(self, shape):
        self.shape = shape

    @property
    def absmax(self):
        raise AssertionError("read")

    def slices(self):
        raise AssertionError("read")


def nested(method, x, start):
    return method.decompose(TensorSlices(x), start)


def weights(shape, seed=0):
    """A stack with spectra that fall off slowly, some of each slice shared, as trained weights have."""
    random = torch.Generator().manual_seed(seed)
    _, inner, hidden = shape
    shared = torch.randn(1, inner, hidden, generator=random)
    own = torch.randn(shape, generator=random)
    u, sigma, vt = torch.linalg.svd(own + 0.5 * shared, full_matrices=False)
    return (u * (sigma * torch.arange(1, sigma.shape[1] + 1) ** -0.3)[:, None, :]) @ vt


@pytest.fixture(autouse=True)
def _quiet_cap(monkeypatch):
    monkeypatch.setattr(logging.getLogger("trawl.decompose"), "disabled", True)


@pytest.mark.parametrize("shape", [(1, 40, 30), (1, 30, 700), (1, 600, 300)])
@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e20])
def test_a_cut_svd_is_the_svd_and_reads_nothing(shape, scale):
    x = weights(shape) * scale
    larger = decompose(x, SVD(20)).balanced()
    for method in (SVD(6), CP(6)):
        cut = method.decompose(Unreadable(shape), larger)
        assert cut.rank == (1, 6, 6)
        assert cut.relative_error == pytest.approx(error_of(x, cut), rel=1e-5)
        assert cut.relative_error <= decompose(x, SVD(6, tol=1e-6)).relative_error + 1e-3


def test_an_svd_cut_to_its_own_rank_is_itself_and_zeros_cut_to_zeros():
    x = weights((1, 20, 16))
    whole = decompose(x, SVD(16))
    assert nested(SVD(16), x, whole).relative_error == whole.relative_error < 1e-5
    zeros = torch.zeros(1, 20, 16)
    cut = nested(SVD(2), zeros, decompose(zeros, SVD(4)))
    assert cut.relative_error == 0.0
    assert not cut.dense().any()


@pytest.mark.parametrize("shape", [(3, 60, 48), (3, 48, 60), (2, 300, 280)])
@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e20])
def test_tucker_refitted_from_a_larger_one_is_as_good_as_from_scratch(shape, scale):
    x = weights(shape) * scale
    larger = decompose(x, Tucker(24)).balanced()
    for rank in (8, (2, 8, 5), 1):
        method = Tucker(rank)
        refitted, scratch = nested(method, x, larger), decompose(x, method)
        assert refitted.relative_error <= scratch.relative_error + 5e-4
        assert refitted.relative_error == pytest.approx(error_of(x, refitted), rel=1e-5)
        assert refitted.rank == scratch.rank


def test_tucker_starts_from_the_larger_one():
    x = weights((3, 60, 48))
    method = Tucker(8, n_iter_max=50, tol=1e-7)
    converged = decompose(x, method)
    assert nested(method, x, converged).iterations < converged.iterations / 2


@pytest.mark.parametrize("shape", [(3, 60, 48), (3, 48, 60), (2, 300, 280)])
@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e20])
def test_cp_extended_from_a_smaller_one_is_as_good_as_from_scratch(shape, scale):
    x = weights(shape) * scale
    smaller = decompose(x, CP(3)).balanced()
    extended, scratch = nested(CP(12), x, smaller), decompose(x, CP(12))
    assert extended.relative_error <= scratch.relative_error + 2e-3  # another local optimum
    assert extended.relative_error == pytest.approx(error_of(x, extended), rel=1e-5)
    torch.testing.assert_close(extended.left.norm(dim=0), torch.ones(12))


def test_cp_starts_from_the_smaller_one():
    x, hasty = weights((3, 60, 48)), CP(12, n_iter_max=1)
    best = decompose(x, CP(12)).relative_error
    lost = [nested(hasty, x, decompose(x, CP(rank))).relative_error - best for rank in (12, 11, 1)]
    assert lost[0] < 3e-4
    assert 1e-3 < lost[1] < lost[2]


def test_cp_starts_alike_whatever_the_scale():
    x, hasty = weights((3, 60, 48)), CP(12, n_iter_max=1)
    smaller = decompose(x, CP(11))
    expected = nested(hasty, x, smaller).relative_error
    turned = replace(smaller, left=smaller.left * 8, core=smaller.core / 8)
    assert nested(hasty, x, turned).relative_error == pytest.approx(expected, abs=1e-6)
    tiny, small = x * 2.0**-70, replace(smaller, core=smaller.core * 2.0**-70)
    assert nested(hasty, tiny, small).relative_error == pytest.approx(expected, abs=1e-6)


def test_new_components_of_a_cp_are_what_the_old_ones_leave():
    u, v = torch.linalg.qr(torch.randn(60, 48))[0], torch.linalg.qr(torch.randn(48, 48))[0]
    sigma = torch.arange(48, 0, -1).float()
    x = torch.stack([(u[:, s::2] * sigma[s::2]) @ v[:, s::2].T for s in range(2)])  # its CP: the largest of both slices
    best = float(sigma[12:].norm() / sigma.norm())
    assert decompose(x, CP(6)).relative_error == pytest.approx(float(sigma[6:].norm() / sigma.norm()), abs=1e-4)
    assert nested(CP(12, n_iter_max=1), x, decompose(x, CP(6))).relative_error == pytest.approx(best, abs=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_no_sweep_raises_the_error(seed):
    x = make_stack("ill-conditioned", (3, 20, 16), 6, seed) + 1e-3 * torch.randn(3, 20, 16)
    sweeps = _sweeps(Stream(TensorSlices(x.double())), random_start(x.double(), 6, seed), math.inf, PUSH_STEP)
    errors = [error for _, error in itertools.islice(sweeps, 60)]
    assert all(after <= before + 1e-9 for before, after in itertools.pairwise(errors))
    plain = _sweeps(Stream(TensorSlices(x.double())), random_start(x.double(), 6, seed), math.inf, 0.0)
    assert errors[20] < [error for _, error in itertools.islice(plain, 21)][-1]


@pytest.mark.parametrize("shape", [(3, 40, 30), (4, 300, 280)])
def test_an_exact_cp_is_found_from_a_part_of_it(shape):
    x = make_stack("planted", shape, 6, 0)
    smaller = decompose(x, CP(2))
    assert error_of(x, nested(CP(6), x, smaller)) < 1e-3


def test_zeros_and_full_rank_nest():
    zeros = torch.zeros(2, 8, 6)
    for method in (CP, Tucker):
        pair = (1, 3) if method is CP else (3, 1)
        factors = nested(method(pair[1]), zeros, decompose(zeros, method(pair[0])))
        assert factors.relative_error == 0.0
        assert not factors.dense().any()
    x = weights((2, 8, 6))
    whole = Tucker((2, 8, 6))
    assert nested(whole, x, decompose(x, whole)).relative_error < 1e-5


def test_factors_that_cannot_be_started_from_are_refused():
    x = weights((3, 20, 16))
    cp, tucker = decompose(x, CP(4)), decompose(x, Tucker(4))
    with pytest.raises(RankError, match="rank 4 do not fit into rank 3"):
        nested(CP(3), x, cp)
    with pytest.raises(RankError, match="fewer than 5"):
        nested(Tucker(5), x, tucker)
    with pytest.raises(RankError, match="cannot be cut"):
        nested(SVD(5), x[:1], decompose(x[:1], SVD(4)))
    with pytest.raises(ShapeError, match="core of shape"):
        nested(CP(5), x, tucker)
    with pytest.raises(ShapeError, match="core of shape"):
        nested(Tucker(3), x, cp)
    with pytest.raises(ShapeError, match=r"\(3, 20, 16\); expected those of the stack, \(3, 16, 20\)"):
        nested(CP(5), x.transpose(1, 2), cp)
    with pytest.raises(PlanError, match="tensorly"):
        nested(CP(5, engine="tensorly"), x, cp)


@pytest.mark.parametrize(
    ("method", "shape", "ranks"),
    [
        (CP(8), (3, 100, 80), [1, 8]),
        (CP(64), (3, 100, 80), [1, 8, 64]),
        (CP(8), (1, 100, 80), [64, 8]),
        (CP(1), (3, 100, 80), [1]),
        (SVD(8), (1, 100, 80), [64, 8]),
        (SVD(64), (1, 100, 80), [64]),
        (SVD(8), (1, 100, 40), [8]),  # 64 is above this matrix's largest rank
        (Tucker(1), (3, 100, 80), [64, 1]),
        (Tucker((2, 8, 4)), (3, 100, 80), [64, (2, 8, 4)]),
        (Tucker((3, 70, 4)), (3, 100, 80), [(3, 70, 4)]),
        (CP(64, engine="tensorly"), (3, 100, 80), [64]),
    ],
)
def test_the_ladder_decides_the_chain(method, shape, ranks):
    for ladder in (LADDER, LADDER[::-1], (*LADDER, *LADDER)):
        chain = nested_chain(method, shape, ladder)
        assert [step.rank for step in chain] == ranks
        assert all(step == replace(method, rank=step.rank) for step in chain)
