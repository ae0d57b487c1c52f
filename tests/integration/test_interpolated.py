"""Ranks at which factors are stored in interpolative form, from weights to a loaded model and dense again."""

import json

import pytest
import torch
import transformers

import trawl
from tests.zoo import ZOO
from trawl.checkpoint import open_folder
from trawl.densifying import densify
from trawl.errors import LoadError
from trawl.hf.replacement import stacks_of

RECIPES = {
    "svd": {"method": "svd", "rank": 15},
    "tucker": {"method": "tucker", "rank": 15},
    "joint": {"method": "svd", "rank": 15, "share": "input"},
}


def logits(name, folder):
    model = getattr(transformers, ZOO[name].auto).from_pretrained(folder).eval()
    with torch.no_grad():
        return model(torch.arange(3, 35).reshape(2, 16)).logits


def recipe_of(kind, **options):
    return trawl.Recipe(layers="1-2", write="factored", allow_larger=True, **RECIPES[kind] | options)


@pytest.mark.parametrize("kind", RECIPES)
@pytest.mark.parametrize("name", ZOO)
def test_interpolated_factors_are_dense_in_fewer_bytes(name, kind, zoo, tmp_path):
    source, recipe = zoo(name), recipe_of(kind)
    planned = trawl.plan(source, recipe)
    assert planned.descriptor.stacks[0].interpolated
    trawl.compress(source, recipe, tmp_path / "factored")
    trawl.compress(source, recipe.model_copy(update={"write": "dense"}), tmp_path / "dense")
    written = open_folder(tmp_path / "factored", factored=True)
    assert (written.nbytes, written.parameters) == (planned.output_bytes, planned.output_parameters)
    densify(tmp_path / "factored", tmp_path / "again")
    for shard in (tmp_path / "dense").glob("*.safetensors"):
        assert (tmp_path / "again" / shard.name).read_bytes() == shard.read_bytes()
    one, other = logits(name, tmp_path / "factored"), logits(name, tmp_path / "dense")
    assert (one - other).abs().max() < 1e-4 * (other.max() - other.min())
    trawl.load(tmp_path / "factored").save_pretrained(tmp_path / "saved")
    densify(tmp_path / "saved", tmp_path / "saved-dense")
    for shard in (tmp_path / "again").glob("*.safetensors"):
        assert (tmp_path / "saved-dense" / shard.name).read_bytes() == shard.read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", RECIPES)
def test_rounding_is_small_beside_what_is_left_out(kind, dtype, zoo, tmp_path):
    report = trawl.compress(zoo("llama", 1, dtype), recipe_of(kind), tmp_path / "out")
    exact = trawl.compress(zoo("llama"), recipe_of(kind), tmp_path / "exact")
    for one, other in zip(report.stacks, exact.stacks, strict=True):
        assert one.rounding_error < 0.02
        assert other.rounding_error < 1e-6
        assert abs(one.relative_error - other.relative_error) < 0.02


def test_embeddings_and_a_tied_head_look_rows_up(zoo, tmp_path):
    recipe = trawl.Recipe(method="svd", rank=15, roles="embed,lm_head", write="factored")
    trawl.compress(zoo("gemma2"), recipe, tmp_path / "factored")
    trawl.compress(zoo("gemma2"), recipe.model_copy(update={"write": "dense"}), tmp_path / "dense")
    (stack,) = trawl.plan(zoo("gemma2"), recipe).descriptor.stacks
    assert stack.interpolated == ("right",)
    (loaded,) = stacks_of(trawl.load(tmp_path / "factored")).values()
    assert loaded.left.is_contiguous()
    one, other = logits("gemma2", tmp_path / "factored"), logits("gemma2", tmp_path / "dense")
    assert (one - other).abs().max() < 1e-4 * (other.max() - other.min())


def test_a_tampered_order_is_refused_by_every_reader(zoo, tmp_path):
    trawl.compress(zoo("llama"), recipe_of("svd"), tmp_path / "out")
    shard = tmp_path / "out" / "model.safetensors"
    content = bytearray(shard.read_bytes())
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    name = next(name for name in header if name.endswith("right_order"))
    start = 8 + size + header[name]["data_offsets"][0]
    content[start : start + 8] = (10**9).to_bytes(8, "little")
    shard.write_bytes(content)
    for read in (trawl.load, lambda folder: densify(folder, tmp_path / "dense")):
        with pytest.raises(LoadError, match=r"right_order.* is no order of 32 rows"):
            read(tmp_path / "out")
    assert not (tmp_path / "dense").exists()
