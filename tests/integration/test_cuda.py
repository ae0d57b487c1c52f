"""The same code on a GPU, with the slices streamed to it."""

import pytest
import torch

import trawl

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; this machine has none"),
]


@pytest.mark.parametrize("method", ["cp", "tucker", "svd"])
@pytest.mark.parametrize("max_memory", [0, 1 << 30])
def test_a_gpu_reaches_the_error_of_the_cpu(method, max_memory, zoo, tmp_path):
    recipe = trawl.Recipe(method=method, rank=6)
    on_cpu = trawl.compress(zoo("llama", 3), recipe, tmp_path / "cpu", device="cpu")
    on_gpu = trawl.compress(zoo("llama", 3), recipe, tmp_path / "gpu", device="cuda", max_memory=max_memory)
    for one, other in zip(on_cpu.stacks, on_gpu.stacks, strict=True):
        assert one.relative_error == pytest.approx(other.relative_error, rel=5e-3)
