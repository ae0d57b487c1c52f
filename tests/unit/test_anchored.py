"""Targets of anchored runs, and factors fitted to them, against least squares on explicit samples."""

from dataclasses import replace

import pytest
import torch

from trawl.anchoring import drift
from trawl.anchoring.drift import DriftSum, observe
from trawl.anchoring.fitting import fit, refit
from trawl.calibration.streaming import open_chain
from trawl.checkpoint import open_folder
from trawl.decompose import CP, SVD, TensorSlices, Tucker
from trawl.families import Placement
from trawl.planning import match_checkpoint
from trawl.stacking import Stack
from trawl.views import View

INNER, HIDDEN, TOKENS = 6, 5, 400
VIEW = View("inner hidden", "inner hidden")


def stack(*roles):
    return Stack("fc.0", tuple(Placement(0, role, role, VIEW, (INNER, HIDDEN)) for role in roles))


def drifted(x, now, deviation=None):
    """Return the drift of an input, or with a deviation that of the stream behind it."""
    d = x - now if deviation is None else deviation
    total = DriftSum.of_widths(d.shape[1], now.shape[1], x.device, of_output=deviation is not None)
    for rows in torch.arange(len(now)).split(150):
        total.add(now[rows], d[rows], torch.ones(len(rows), 1))
    return total.drift()


def samples(width):
    x = torch.randn(TOKENS, width) @ torch.randn(width, width)
    return x, x @ (torch.eye(width) + 0.3 * torch.randn(width, width)) + 0.2 * torch.randn(TOKENS, width)


def least_squares(now, wanted):
    return torch.linalg.lstsq(now.double(), wanted.double()).solution.float()


@pytest.fixture
def _unshrunk(monkeypatch):
    monkeypatch.setattr(drift, "SHRINKAGE", 1e-9)


@pytest.mark.usefixtures("_unshrunk")
@pytest.mark.parametrize("role", ["up", "down"])
def test_at_full_rank_a_matrix_gives_the_original_output_best(role):
    matrix = torch.randn(INNER, HIDDEN)
    across = matrix.T if role == "up" else matrix  # what multiplies rows of inputs
    x, now = samples(len(across))
    found = fit(SVD(rank=HIDDEN), stack(role), TensorSlices(matrix[None]), [drifted(x, now)]).slice(0)
    best = least_squares(now, x @ across)
    torch.testing.assert_close(found.T if role == "up" else found, best, rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("_unshrunk")
def test_what_writes_into_the_stream_repairs_it():
    matrix = torch.randn(INNER, HIDDEN)
    _, now = samples(INNER)
    lost = now @ torch.randn(INNER, HIDDEN) + torch.randn(TOKENS, HIDDEN)
    found = fit(SVD(rank=HIDDEN), stack("down"), TensorSlices(matrix[None]), [drifted(now, now, lost)]).slice(0)
    torch.testing.assert_close(found, least_squares(now, now @ matrix + lost), rtol=1e-3, atol=1e-3)


def test_few_tokens_are_not_followed_far(monkeypatch):
    x, now = samples(HIDDEN)
    gains = []
    for shrinkage in (1e-9, 1e-2, 10.0):
        monkeypatch.setattr(drift, "SHRINKAGE", shrinkage)
        gains.append(float(drifted(x[:20], now[:20]).gain.norm()))
    assert gains[0] > gains[1] > 3 * gains[2]


@pytest.mark.usefixtures("_unshrunk")
def test_both_models_are_watched_on_the_same_tokens(zoo):
    checkpoint = open_folder(zoo("llama"))
    chain = open_chain(checkpoint, match_checkpoint(checkpoint), torch.device("cpu"))
    original = chain.enter(torch.randint(3, 96, (6, 16)).split(4))
    compressed = [replace(batch, hidden=batch.hidden + 0.1 * torch.randn_like(batch.hidden)) for batch in original]
    with chain.loaded(0) as block:
        found = observe((block, original), (block, compressed), ["self_attn.q_proj.weight"], stream=False)
        behind = observe((block, original), (block, compressed), ["self_attn.q_proj.weight"], stream=True)
        norm = block.layer.input_layernorm
        x, now = (torch.cat([norm(batch.hidden).flatten(0, 1) for batch in part]) for part in (original, compressed))
        left, arrived = (
            torch.cat([block.run(batch).hidden.flatten(0, 1) for batch in part]) for part in (original, compressed)
        )
    even, by_size = torch.ones(len(now), 1), 1 / left.square().mean(1, keepdim=True)
    for drifts, missing, weight in ((found, x - now, even), (behind, left - arrived, by_size)):
        (known,) = drifts.values()
        share = weight / weight.sum()
        assert known.tokens == 6 * 16
        torch.testing.assert_close(known.seen, now.T @ (share * now), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(known.mean.float(), (share * now).sum(0), rtol=1e-4, atol=1e-5)
        ridged = known.seen.double() + 1e-9 * known.seen.diagonal().mean() * torch.eye(len(known.seen))
        missed = (missing.T @ (share * now)).double()
        torch.testing.assert_close(known.gain @ ridged, missed, rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("_unshrunk")
@pytest.mark.parametrize("method", [CP(rank=4), Tucker(rank=(3, 4, 3))])
def test_a_later_slice_is_refitted_by_its_middle_alone(method):
    source = TensorSlices(torch.randn(3, INNER, HIDDEN))
    (x, now), (a, before), (_, later) = samples(HIDDEN), samples(INNER), samples(INNER)
    one, first, known = drifted(x, now), drifted(a, before), drifted(a, later)
    whole = stack("gate", "up", "down")
    factors = fit(method, whole, source, [one, one, first])
    found = refit(factors, whole, source, [one, one, known], [2])
    assert torch.equal(found.left, factors.left)
    assert torch.equal(found.right, factors.right)
    assert torch.equal(found.core[:2], factors.core[:2])
    terms = [torch.outer(left, right) for left in found.left.T for right in found.right.T]
    if found.core.dim() == 2:
        terms = [torch.outer(*pair) for pair in zip(found.left.T, found.right.T, strict=True)]
    columns = torch.stack([(later @ term).flatten() for term in terms], dim=1)
    best = least_squares(columns, (a @ source.tensor[2]).flatten()[:, None])[:, 0]
    torch.testing.assert_close(found.core[2].flatten(), best, rtol=1e-2, atol=1e-3)
