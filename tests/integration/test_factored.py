"""Factored output: to the byte what was planned, the same model as dense, and dense again by densify."""

import json

import pytest
import torch
import transformers

import trawl
from tests.integration.test_compress import StopError, stop_at
from tests.zoo import SWEEPS, ZOO
from trawl.checkpoint import open_folder
from trawl.densifying import densify
from trawl.errors import LoadError, PlanError, RankError

RANKS = {"cp": 3, "tucker": (2, 5, 6), "svd": 3}


def logits(name, folder):
    model = getattr(transformers, ZOO[name].auto).from_pretrained(folder).eval()
    with torch.no_grad():
        return model(torch.arange(3, 35).reshape(2, 16)).logits


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("method", RANKS)
@pytest.mark.parametrize("name", ZOO)
def test_factored_is_dense_in_fewer_bytes(name, method, shards, zoo, tmp_path):
    source = zoo(name, shards)
    recipe = trawl.Recipe(method=method, rank=RANKS[method], layers="1-2", write="factored", n_iter_max=SWEEPS[method])
    planned = trawl.plan(source, recipe)
    report = trawl.compress(source, recipe, tmp_path / "factored")
    dense = trawl.compress(source, recipe.model_copy(update={"write": "dense"}), tmp_path / "dense")

    written = open_folder(tmp_path / "factored", factored=True)
    assert written.nbytes == planned.output_bytes < open_folder(source).nbytes
    assert written.parameters == planned.output_parameters
    on_disk = sum(path.stat().st_size for path in (tmp_path / "factored").glob("*.safetensors"))
    assert on_disk == planned.output_bytes
    changed = {tensor for stack in report.stacks for tensor in stack.tensors}
    for tensor, info in open_folder(source).tensors.items():
        kept = written.tensors[tensor]
        if tensor in changed:
            assert kept.shape == (0,)
        else:
            assert (kept.shape, kept.dtype) == (info.shape, info.dtype)
            assert torch.equal(written.read(tensor), open_folder(source).read(tensor))
    for one, other in zip(report.stacks, dense.stacks, strict=True):
        assert one.relative_error == pytest.approx(other.relative_error, rel=1e-5)

    densify(tmp_path / "factored", tmp_path / "again")
    for shard in (tmp_path / "dense").glob("*.safetensors"):
        assert (tmp_path / "again" / shard.name).read_bytes() == shard.read_bytes()
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    )
    one, other = logits(name, tmp_path / "factored"), logits(name, tmp_path / "dense")
    assert (one - other).abs().max() < 1e-4 * (other.max() - other.min())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", RANKS)
def test_rounded_factors_are_measured_as_stored(method, dtype, zoo, tmp_path):
    source = zoo("llama", 1, dtype)
    recipe = trawl.Recipe(method=method, rank=RANKS[method], write="factored", roles="fc")
    narrow = trawl.compress(source, recipe, tmp_path / "narrow")
    exact = trawl.compress(source, recipe.model_copy(update={"factor_dtype": "float32"}), tmp_path / "exact")
    before = open_folder(source)
    densify(tmp_path / "narrow", tmp_path / "dense")
    after = open_folder(tmp_path / "dense")
    for one, other in zip(narrow.stacks, exact.stacks, strict=True):
        assert other.rounding_error < 1e-6
        assert 1e-5 < one.rounding_error < 0.01
        assert abs(one.relative_error - other.relative_error) < 0.01
        reference = torch.cat([before.read(name).double().flatten() for name in one.tensors])
        rebuilt = torch.cat([after.read(name).double().flatten() for name in one.tensors])
        assert one.relative_error == pytest.approx(float((reference - rebuilt).norm() / reference.norm()), rel=2e-3)


def test_a_rank_above_break_even_is_refused(zoo, tmp_path):
    recipe = trawl.Recipe(method="svd", rank=25, roles="q", layers="1", write="factored")
    with pytest.raises(RankError, match=r"stack q\.1: .*1,032 parameters, its matrices 1,024; use a rank up to 24"):
        trawl.compress(zoo("llama"), recipe, tmp_path / "out")
    assert trawl.plan(zoo("llama"), recipe.model_copy(update={"rank": 24})).output_parameters
    larger = recipe.model_copy(update={"allow_larger": True})
    trawl.compress(zoo("llama"), larger, tmp_path / "out")


def test_a_fused_tensor_in_part_is_refused(zoo, tmp_path):
    with pytest.raises(PlanError, match="select all of the tensor's roles"):
        trawl.compress(zoo("phi3"), trawl.Recipe(rank=2, roles="gate", write="factored"), tmp_path / "out")


def test_a_factored_run_resumes(zoo, tmp_path):
    recipe = trawl.Recipe(rank=3, roles="fc", group_layers=1, write="factored")
    trawl.compress(zoo("llama", 3), recipe, tmp_path / "undisturbed")
    with pytest.raises(StopError):
        trawl.compress(zoo("llama", 3), recipe, tmp_path / "out", observer=stop_at("writing"))
    trawl.compress(zoo("llama", 3), recipe, tmp_path / "out", resume=True)
    for shard in (tmp_path / "undisturbed").glob("*.safetensors*"):
        assert (tmp_path / "out" / shard.name).read_bytes() == shard.read_bytes()


def test_densify_refuses_what_is_not_factored_and_keeps_the_records(zoo, tmp_path):
    with pytest.raises(LoadError, match="is not factored"):
        densify(zoo("llama"), tmp_path / "out")
    trawl.compress(zoo("llama"), trawl.Recipe(rank=2, write="factored"), tmp_path / "factored")
    with pytest.raises(PlanError, match="equals or lies inside"):
        densify(tmp_path / "factored", tmp_path / "factored" / "out")
    densify(tmp_path / "factored", tmp_path / "out")
    assert (tmp_path / "out" / "trawl.json").read_bytes() == (tmp_path / "factored" / "trawl.json").read_bytes()


def test_the_saved_folder_of_a_loaded_model_is_equal(zoo, tmp_path):
    import trawl.hf

    trawl.compress(zoo("llama"), trawl.Recipe(rank=3, write="factored"), tmp_path / "factored")
    model = trawl.hf.load(tmp_path / "factored")
    model.save_pretrained(tmp_path / "saved")
    one, other = (open_folder(tmp_path / name, factored=True) for name in ("factored", "saved"))
    assert one.tensors.keys() == other.tensors.keys()
    for name in one.tensors:
        assert torch.equal(one.read(name), other.read(name))
    assert one.config["quantization_config"] == other.config["quantization_config"]
    densify(tmp_path / "factored", tmp_path / "dense")
    densify(tmp_path / "saved", tmp_path / "dense2")
    assert (tmp_path / "dense" / "model.safetensors").read_bytes() == (
        tmp_path / "dense2" / "model.safetensors"
    ).read_bytes()
