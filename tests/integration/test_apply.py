"""A model in memory becomes what its compressed checkpoint loads as."""

import pytest
import torch

import trawl
from tests.zoo import ZOO, build_zoo
from trawl.errors import PlanError
from trawl.hf.replacement import stacks_of

TOKENS = torch.arange(3, 35).reshape(2, 16)


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("write", ["dense", "factored"])
@pytest.mark.parametrize("name", ZOO)
def test_apply_gives_what_compress_and_load_give(name, write, zoo, tmp_path):
    recipe = trawl.Recipe(method="tucker", rank=5, layers="0-1", write=write)
    report = trawl.compress(zoo(name), recipe, tmp_path / "out")
    loaded = trawl.load(tmp_path / "out")
    model = build_zoo(name)
    before = logits(model)
    stacks = trawl.apply(model, recipe)
    for one, other in zip(stacks_of(model).values(), stacks_of(loaded).values(), strict=True):
        assert (one.left.stride(), one.right.stride()) == (other.left.stride(), other.right.stride())
    assert (logits(model) - logits(loaded)).abs().max() < 1e-4 * logits(loaded).abs().max()
    assert (logits(model) - before).abs().max() > 1e-3
    for one, other in zip(stacks, report.stacks, strict=True):
        assert one.relative_error == pytest.approx(other.relative_error, rel=1e-4)
        assert one.shape == other.shape

    model.save_pretrained(tmp_path / "saved")
    again = trawl.load(tmp_path / "saved")
    torch.testing.assert_close(logits(again), logits(model))


def test_a_mistake_leaves_the_model_alone():
    model = build_zoo("llama")
    before = logits(model)
    with pytest.raises(PlanError):
        trawl.apply(model, trawl.Recipe(rank=4, layers="7"))
    with pytest.raises(PlanError, match="factor_dtype goes with a checkpoint on disk"):
        trawl.apply(model, trawl.Recipe(rank=4, write="factored", factor_dtype="bfloat16"))
    model.model.layers[2].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(trawl.TrawlError, match=r"layers\.2\.mlp\.up_proj\.weight .* NaN"):
        trawl.apply(model, trawl.Recipe(rank=4))
    model.model.layers[2].mlp.up_proj.weight.data[0, 0] = build_zoo("llama").model.layers[2].mlp.up_proj.weight[0, 0]
    assert torch.equal(logits(model), before)
