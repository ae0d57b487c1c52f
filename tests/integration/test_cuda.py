"""The same code on a GPU, with the slices streamed to it, and with what is chosen and fitted found there."""

import json

import pytest
import torch

import trawl
from trawl.budget import SEARCH_RECORD

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; this machine has none"),
]

TOKENS = 2048


def both(model, text, tmp_path, **recipe):
    """Compress on the CPU and on a GPU, and return what each reports."""
    recipe = trawl.Recipe(**recipe)
    return [
        trawl.compress(model, recipe, tmp_path / device, calibrate=text, calibration_tokens=TOKENS, device=device)
        for device in ("cpu", "cuda")
    ]


@pytest.mark.parametrize("method", ["cp", "tucker", "svd"])
@pytest.mark.parametrize("max_memory", [0, 1 << 30])
def test_a_gpu_reaches_the_error_of_the_cpu(method, max_memory, zoo, tmp_path):
    recipe = trawl.Recipe(method=method, rank=6)
    on_cpu = trawl.compress(zoo("llama", 3), recipe, tmp_path / "cpu", device="cpu")
    on_gpu = trawl.compress(zoo("llama", 3), recipe, tmp_path / "gpu", device="cuda", max_memory=max_memory)
    for one, other in zip(on_cpu.stacks, on_gpu.stacks, strict=True):
        assert one.relative_error == pytest.approx(other.relative_error, rel=5e-3)


@pytest.mark.parametrize(
    "recipe",
    [
        {"method": "svd", "rank": 6, "output_weighting": "kronecker"},
        {"method": "narrow", "width": 32, "output_weighting": "kronecker"},
        {"method": "narrow", "width": 32, "refit": True},
        {"method": "svd", "rank": 6, "anchored": True},
    ],
    ids=["weighted", "narrow", "refitted", "anchored"],
)
def test_what_a_text_weighs_is_the_same_on_a_gpu(recipe, model, text, tmp_path):
    on_cpu, on_gpu = both(model, text, tmp_path, **recipe, compute="float32")
    for one, other in zip(on_cpu.stacks, on_gpu.stacks, strict=True):
        assert one.relative_error == pytest.approx(other.relative_error, rel=1e-2, abs=1e-4)
    assert on_gpu.last_norm == pytest.approx(on_cpu.last_norm, abs=2e-3)


@pytest.mark.parametrize("plain", [False, True], ids=["any", "plain"])
def test_a_budget_is_met_on_a_gpu_and_does_no_more_damage(plain, model, text, tmp_path):
    both(model, text, tmp_path, keep=0.8, plain=plain)
    on_cpu, on_gpu = (json.loads((tmp_path / name / SEARCH_RECORD).read_text()) for name in ("cpu", "cuda"))
    assert on_gpu["kept"] <= 0.8
    assert on_gpu["kept"] == pytest.approx(on_cpu["kept"], abs=0.02)
    assert on_gpu["real_damage"] == pytest.approx(on_cpu["real_damage"], rel=0.2)


def test_a_gpu_scores_as_the_cpu(model, text):
    one, other = (
        trawl.evaluate(model, f"ppl:{text}", context=32, stride=32, device=device)[0].figure("perplexity").value
        for device in ("cpu", "cuda")
    )
    assert one == pytest.approx(other, rel=1e-3)


def test_a_seed_gives_a_text_again_on_a_gpu(model):
    first, again = (trawl.sample(model, 256, seed=1, device="cuda") for _ in range(2))
    assert first == again
