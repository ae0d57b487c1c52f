"""Token embeddings and head: planned, written dense and factored, kept tied, loaded, saved, made dense again."""

import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import trawl
from tests.integration.test_calibrate import text  # noqa: F401 (a fixture)
from tests.integration.test_eval import make_tokenizer
from tests.unit.test_calibration import calibrated, windows
from tests.zoo import HIDDEN, VOCABULARY, ZOO, build_zoo
from trawl.calibration.weights import stack_weights
from trawl.checkpoint import open_folder
from trawl.errors import PlanError
from trawl.hf.embedding import FactoredEmbedding
from trawl.hf.linear import FactoredLinear
from trawl.planning import make_plan, match_checkpoint
from trawl.stacking import Stack

NAMES = [name for name, entry in ZOO.items() if entry.auto == "AutoModelForCausalLM"]
IDS = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))
RECIPE = {"method": "svd", "rank": 8, "roles": "embed,lm_head"}


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def tied(model):
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


@pytest.mark.parametrize("name", NAMES)
def test_full_rank_gives_the_model_back_and_factors_what_dense_gives(zoo, tmp_path, name):
    folder, model = zoo(name), build_zoo(name)
    rank = min(open_folder(folder).tensors[match_checkpoint(open_folder(folder)).outside["embed"].tensor].shape)
    for write in ("dense", "factored"):
        full = trawl.Recipe(method="svd", rank=rank, roles="embed,lm_head", write=write, allow_larger=True)
        trawl.compress(folder, full, tmp_path / f"full-{write}")
        found = trawl.load(tmp_path / f"full-{write}")
        torch.testing.assert_close(logits(found), logits(model), rtol=1e-3, atol=1e-3)
        trawl.compress(folder, trawl.Recipe(**RECIPE, write=write), tmp_path / write)
    dense, factored = trawl.load(tmp_path / "dense"), trawl.load(tmp_path / "factored")
    torch.testing.assert_close(logits(factored), logits(dense), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(logits(dense), logits(model), atol=1e-3)
    assert isinstance(factored.get_input_embeddings(), FactoredEmbedding)
    assert isinstance(factored.get_output_embeddings(), FactoredLinear)
    assert tied(dense) == tied(model)
    assert len({stack.description.name for stack in trawl.hf.replacement.stacks_of(factored).values()}) == 2 - tied(
        model
    )


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_a_factored_model_is_saved_and_made_dense_again(zoo, tmp_path, name):
    folder = zoo(name)
    trawl.compress(folder, trawl.Recipe(**RECIPE), tmp_path / "dense")
    trawl.compress(folder, trawl.Recipe(**RECIPE, write="factored"), tmp_path / "factored")
    model = trawl.load(tmp_path / "factored")
    model.save_pretrained(tmp_path / "saved")
    again = trawl.load(tmp_path / "saved")
    assert (logits(again) - logits(model)).abs().max() < 1e-4  # memory decides the kernel, and the last bits
    for source in ("factored", "saved"):
        trawl.densify(tmp_path / source, tmp_path / f"{source}-dense")
        found = load_file(tmp_path / f"{source}-dense" / "model.safetensors")
        expected = load_file(tmp_path / "dense" / "model.safetensors")
        assert sorted(found) == sorted(expected)
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    multiplied = again.dequantize()
    torch.testing.assert_close(logits(multiplied), logits(model), rtol=1e-4, atol=1e-5)
    assert tied(multiplied) == tied(build_zoo(name))
    config = transformers.AutoConfig.from_pretrained(tmp_path / "factored")
    del config.quantization_config  # as transformers without trawl, which ignores what it does not know
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "factored", config=config)


def test_the_plan_counts_them_and_all_means_the_layers(zoo):
    untied, stored = trawl.plan(zoo("llama"), trawl.Recipe(**RECIPE, write="factored")), (VOCABULARY + HIDDEN + 1) * 8
    assert [item.stack.name for item in untied.stacks] == ["embed", "lm_head"]
    assert [item.parameters_after for item in untied.stacks] == [stored, stored]
    assert untied.checkpoint.parameters - untied.output_parameters == 2 * (VOCABULARY * HIDDEN - stored)
    assert [item.stack.layers for item in untied.stacks] == [(), ()]
    gpt2 = trawl.plan(zoo("gpt2"), trawl.Recipe(method="svd", rank=8, roles="q,lm_head"))
    assert [item.stack.name for item in gpt2.stacks][-1] == "embed"
    assert any("embed and lm_head are tied: transformer.wte.weight stands for both" in note for note in gpt2.notes)
    everything = trawl.plan(zoo("llama"), trawl.Recipe(method="svd", rank=8))
    assert {role for item in everything.stacks for role in item.stack.roles} == set(ZOO["llama"].roles)


def test_what_takes_stacks_or_blocks_is_refused(zoo):
    with pytest.raises(PlanError, match=r"stands alone, and method cp takes stacks of several; pass --method svd"):
        trawl.plan(zoo("llama"), trawl.Recipe(rank=8, roles="fc,embed"))
    with pytest.raises(PlanError, match=r"goes block by block, and this lies outside"):
        make_plan(open_folder(zoo("llama")), trawl.Recipe(**RECIPE, anchored=True))
    with pytest.raises(PlanError, match="the model has no 'embed' matrices"):
        trawl.plan(zoo("bert"), trawl.Recipe(**RECIPE))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("write", ["dense", "factored"])
def test_a_model_in_memory_gives_the_same(zoo, tmp_path, name, write):
    model = build_zoo(name)
    recipe = trawl.Recipe(**RECIPE, write=write)
    trawl.apply(model, recipe)
    trawl.compress(zoo(name), recipe, tmp_path / "out")
    torch.testing.assert_close(logits(model), logits(trawl.load(tmp_path / "out")), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma2"])
def test_moments_of_tokens_and_of_the_head(zoo, tmp_path, name):
    """The head's is that of what its module is given; the tokens' are their shares."""
    ids = windows(4)
    moments = calibrated(zoo(name), ids, tmp_path)
    model, given = build_zoo(name), []
    model.get_output_embeddings().register_forward_pre_hook(
        lambda _, args: given.append(args[0].flatten(0, 1).double())
    )
    with torch.no_grad():
        model(ids)
    counts = torch.bincount(ids.flatten(), minlength=VOCABULARY)
    outside = match_checkpoint(open_folder(zoo(name))).outside
    (weights, head) = (stack_weights(moments, Stack(role, (outside[role],))) for role in ("embed", "lm_head"))
    torch.testing.assert_close(weights.inner[0], (counts + 0.1).double() / (ids.numel() + 0.1 * VOCABULARY))
    expected = given[0].T @ given[0] / ids.numel()
    if tied(model):
        assert outside["embed"] == outside["lm_head"]
        expected = expected / expected.diagonal().mean() + 0.01 * torch.eye(len(expected))
        torch.testing.assert_close(weights.hidden[0].double(), expected, rtol=1e-4, atol=1e-5)
    else:
        assert weights.hidden == (None,)
        torch.testing.assert_close(head.hidden[0].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_calibrated_run_keeps_more_of_the_text(zoo, text, tmp_path, name):  # noqa: F811
    folder = shutil.copytree(zoo(name), tmp_path / "model")
    make_tokenizer(bos=True).save_pretrained(folder)
    recipe = trawl.Recipe(**RECIPE, write="factored")
    trawl.compress(folder, recipe, tmp_path / "plain")
    report = trawl.compress(folder, recipe, tmp_path / "out", calibrate=text, calibration_tokens=2048)
    assert all(stack.weighted_error < stack.relative_error for stack in report.stacks)
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder)(text.read_text(), verbose=False)["input_ids"][:60]])
    with torch.no_grad():
        model, plain, out = (trawl.load(each)(ids).logits for each in (folder, tmp_path / "plain", tmp_path / "out"))
    assert (out - model).norm() < (plain - model).norm()
