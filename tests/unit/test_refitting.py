"""Changes of the rows that write an FC's units, against the least-squares problem written out."""

import pytest
import torch

from trawl.refitting import solving
from trawl.refitting.solving import RIDGE, Linearised

TOKENS, UNITS, HIDDEN = 600, 5, 6


def tensors(writers):
    """Inputs, slopes that bfloat16 holds, what is missing, a reader and a root of G, float64."""
    x, missing = torch.randn(2, TOKENS, HIDDEN, dtype=torch.float64)
    slopes = [torch.randn(TOKENS, UNITS).bfloat16().double() for _ in range(writers)]
    reader, root = torch.randn(UNITS, HIDDEN, dtype=torch.float64), torch.randn(HIDDEN, HIDDEN, dtype=torch.float64)
    return x, slopes, missing, reader, root


def changes(x, slopes, missing, reader, root, *, chunk=100):
    problem = Linearised(reader, root, torch.float64)
    for at in range(0, TOKENS, chunk):
        rows = slice(at, at + chunk)
        problem.add(x[rows], [slope[rows] for slope in slopes], missing[rows])
    return torch.stack(problem.changes())


def written_out(x, slopes, missing, reader, root):
    """The same by a matrix of all unknowns, (writers · units · hidden)²."""
    weighted = reader @ (torch.eye(HIDDEN) if root is None else root).double()
    jacobian = torch.cat([torch.einsum("tk,ko,th->tokh", slope, weighted, x).flatten(2) for slope in slopes], dim=2)
    wanted = missing if root is None else missing @ root
    scale = float((x.T @ x / TOKENS).diagonal().mean())
    overlaps = [(weighted @ weighted.T) * (slope.T @ slope) / TOKENS for slope in slopes]
    own = torch.cat([overlap.diagonal().repeat_interleave(HIDDEN) for overlap in overlaps])
    normal = torch.einsum("tou,tov->uv", jacobian, jacobian) / TOKENS + (RIDGE * scale * own).diag()
    solution = torch.linalg.solve(normal, torch.einsum("tou,to->u", jacobian, wanted) / TOKENS)
    return solution.view(len(slopes), UNITS, HIDDEN)


@pytest.mark.parametrize("writers", [1, 2])
@pytest.mark.parametrize("weighted", [False, True])
def test_many_steps_come_to_the_least_squares_changes(monkeypatch, writers, weighted):
    monkeypatch.setattr(solving, "STEPS", 200)
    monkeypatch.setattr(solving, "SAMPLED", 1)
    *given, root = tensors(writers)
    root = root if weighted else None
    torch.testing.assert_close(changes(*given, root), written_out(*given, root), rtol=1e-4, atol=1e-5)


def test_four_steps_come_near_though_a_sample_of_the_tokens_preconditions():
    given = tensors(2)
    exact = written_out(*given)
    assert float((changes(*given) - exact).norm() / exact.norm()) < 0.1


def test_chunks_do_not_matter(monkeypatch):
    monkeypatch.setattr(solving, "SAMPLED", 1)
    given = tensors(2)
    torch.testing.assert_close(changes(*given, chunk=100), changes(*given, chunk=TOKENS), rtol=1e-5, atol=1e-6)


def test_a_unit_that_the_sample_does_not_see_is_held_by_its_ridge_all_the_same(monkeypatch):
    """The sample is chunks 0 and 4 of six."""
    monkeypatch.setattr(solving, "STEPS", 200)
    x, slopes, missing, reader, root = tensors(2)
    for start in (0, 400):
        slopes[0][start : start + 100, 2] = 0
    given = x, slopes, missing, reader, root
    torch.testing.assert_close(changes(*given), written_out(*given), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("silent", ["x", "slopes", "reader", "missing"])
def test_where_nothing_goes_in_or_comes_out_nothing_changes(silent):
    x, slopes, missing, reader, root = tensors(2)
    given = {"x": x, "slopes": torch.stack(slopes), "missing": missing, "reader": reader}
    given[silent] = torch.zeros_like(given[silent])
    assert not changes(given["x"], list(given["slopes"]), given["missing"], given["reader"], root).any()


def test_a_writer_that_nothing_depends_on_leaves_the_other_as_if_alone():
    x, slopes, missing, reader, root = tensors(2)
    both = changes(x, [torch.zeros_like(slopes[0]), slopes[1]], missing, reader, root)
    assert not both[0].any()
    torch.testing.assert_close(both[1], changes(x, slopes[1:], missing, reader, root)[0])


def test_products_in_bfloat16_stay_near():
    x, slopes, missing, reader, root = tensors(2)
    low = Linearised(reader, root, torch.bfloat16)
    low.add(x.bfloat16(), [slope.bfloat16() for slope in slopes], missing.bfloat16())
    exact = changes(x, slopes, missing, reader, root, chunk=TOKENS)
    assert float((torch.stack(low.changes()) - exact).norm() / exact.norm()) < 0.05
