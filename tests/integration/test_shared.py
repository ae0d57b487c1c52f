"""Matrices that share a right factor: joined in the plan, and apart again in every form of the output."""

import pytest
import torch
import transformers

import trawl
from tests.zoo import ZOO, build_zoo
from trawl.checkpoint import open_folder
from trawl.densifying import densify
from trawl.errors import PlanError

TOKENS = torch.arange(3, 35).reshape(2, 16)
JOINS = {"input": {"share": "input"}, "inputs of two layers": {"share": "input", "group_layers": 2}}
JOINS["role"] = {"share": "role", "group_layers": "all"}
FUSED = ("llama", "phi3", "gpt_neox", "gpt2")
CASES = [(name, join) for name in ZOO for join in JOINS if join == "input" or name in FUSED]


def recipe(join="input", **fields):
    return trawl.Recipe(**({"method": "svd", "rank": 5, "write": "factored"} | JOINS[join] | fields))


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def stored(folder):
    checkpoint = open_folder(folder, factored=True)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}, checkpoint


@pytest.mark.parametrize(("name", "join"), CASES)
def test_every_form_of_the_output_is_the_same_model(name, join, zoo, tmp_path):
    source, wanted = zoo(name), recipe(join)
    planned = trawl.plan(source, wanted)
    report = trawl.compress(source, wanted, tmp_path / "factored")
    dense = trawl.compress(source, wanted.model_copy(update={"write": "dense"}), tmp_path / "dense")
    for one, other in zip(report.stacks, dense.stacks, strict=True):
        assert one.relative_error == pytest.approx(other.relative_error, rel=1e-5)

    tensors, written = stored(tmp_path / "factored")
    assert (written.nbytes, written.parameters) == (planned.output_bytes, planned.output_parameters)
    densify(tmp_path / "factored", tmp_path / "again")
    again, expected = (tmp_path / folder / "model.safetensors" for folder in ("again", "dense"))
    assert again.read_bytes() == expected.read_bytes()

    model = trawl.load(tmp_path / "factored")
    reference = logits(getattr(transformers, ZOO[name].auto).from_pretrained(tmp_path / "dense"))
    assert (logits(model) - reference).abs().max() < 1e-4 * (reference.max() - reference.min())
    model.save_pretrained(tmp_path / "saved")
    saved, folder = stored(tmp_path / "saved")
    assert saved.keys() == tensors.keys()
    assert all(torch.equal(saved[tensor], tensors[tensor]) for tensor in tensors)
    assert folder.config["quantization_config"] == written.config["quantization_config"]


def test_the_joined_matrix_is_decomposed_as_one(zoo, tmp_path):
    """q, k and v of unequal width: the factors are the SVD of [q; k; v], and each role is its rows of the product."""
    source = open_folder(zoo("llama"))
    report = trawl.compress(zoo("llama"), recipe(layers="1", write="dense"), tmp_path / "out")
    assert {stack.name: stack.shape for stack in report.stacks} == {
        "qkv.1": (1, 64, 32), "o.1": (1, 32, 32), "gateup.1": (1, 96, 32), "down.1": (1, 48, 32)
    }  # fmt: skip
    names = [f"model.layers.1.self_attn.{role}_proj.weight" for role in "qkv"]
    joined = torch.cat([source.read(name) for name in names])
    u, sigma, vt = torch.linalg.svd(joined, full_matrices=False)
    best = (u[:, :5] * sigma[:5]) @ vt[:5]
    written = torch.cat([open_folder(tmp_path / "out").read(name) for name in names])
    torch.testing.assert_close(written, best, rtol=1e-4, atol=1e-5)
    assert report.stacks[0].relative_error == pytest.approx(float((joined - best).norm() / joined.norm()), rel=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_rounded_factors_are_measured_as_stored(name, zoo, tmp_path):
    source = zoo(name, 1, torch.bfloat16)
    report = trawl.compress(source, recipe("inputs of two layers"), tmp_path / "factored")
    densify(tmp_path / "factored", tmp_path / "dense")
    before, after = open_folder(source), open_folder(tmp_path / "dense")
    for stack in report.stacks:
        assert 1e-5 < stack.rounding_error < 0.01
        if name == "llama":  # a fused tensor holds other stacks' slices too
            one, other = (
                torch.cat([at.read(name).double().flatten() for name in stack.tensors]) for at in (before, after)
            )
            assert stack.relative_error == pytest.approx(float((one - other).norm() / one.norm()), rel=2e-3)


@pytest.mark.parametrize("join", JOINS)
def test_a_model_in_memory_becomes_what_its_checkpoint_loads_as(join, zoo, tmp_path):
    trawl.compress(zoo("llama"), recipe(join), tmp_path / "out")
    model = build_zoo("llama")
    trawl.apply(model, recipe(join))
    torch.testing.assert_close(logits(model), logits(trawl.load(tmp_path / "out")), rtol=1e-4, atol=1e-5)


def test_a_fused_tensor_in_part_is_refused(zoo, tmp_path):
    with pytest.raises(PlanError, match="select all of the tensor's roles"):
        trawl.compress(zoo("phi3"), recipe(roles="q,k"), tmp_path / "out")


def test_a_plan_that_joins_nothing_is_refused(zoo):
    with pytest.raises(PlanError, match=r"share 'input' joins nothing in roles 'o,down' of layers 'all'"):
        trawl.plan(zoo("llama"), recipe(roles="o,down"))
    with pytest.raises(PlanError, match="gate, up in one layer; choose other roles"):
        trawl.plan(zoo("gpt2"), recipe(roles="fc"))
    assert [item.stack.name for item in trawl.plan(zoo("gpt2"), recipe(roles="fc", group_layers=3)).stacks] == [
        "up.0-2", *(f"down.{layer}" for layer in range(3))
    ]  # fmt: skip


def test_the_plan_counts_the_joined_matrix(zoo):
    joined, single = (trawl.plan(zoo("llama"), recipe(layers="1", share=share)) for share in ("input", "none"))
    assert joined.stacks[0].memory == 64 * 32 * 4 + joined.stacks[0].method.working_set((1, 64, 32))
    assert single.stacks[0].memory == single.stacks[0].method.working_set((1, 32, 32))
    assert joined.notes == ()
    assert single.notes
