"""Weights edited in memory: what compress would write while it lasts, the exact bits again after it."""

import random

import pytest
import torch

import trawl
from tests.zoo import ZOO, build_zoo, save_model
from trawl.checkpoint import Checkpoint, open_folder
from trawl.errors import CheckpointError, PlanError, TrawlError
from trawl.factors import Factors
from trawl.planning import make_plan
from trawl.stacking import scan
from trawl.sweeps.editing import WeightEditor
from trawl.writing import DenseWriter

FUSED = trawl.Recipe(method="cp", rank=3, roles="q,k,v", layers="0-1", group_layers=1)  # phi3: two stacks in a tensor


def noise(item, seed=0):
    """Return factors of a stack's shape that are quick to make."""
    generator = torch.Generator().manual_seed(seed)
    size, inner, hidden = item.stack.shape
    _, r1, r2 = item.rank
    left, right = torch.randn(inner, r1, generator=generator), torch.randn(hidden, r2, generator=generator)
    core = torch.randn(size, r1, generator=generator) if r1 == r2 else torch.randn(size, r1, r2, generator=generator)
    return Factors(left, right, core)


def bits(model):
    return {name: tensor.reshape(-1).view(torch.uint8).clone() for name, tensor in model.state_dict().items()}


def changed(before, model):
    return {name for name, tensor in bits(model).items() if not torch.equal(tensor, before[name])}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2"])
def test_a_thousand_interventions_leave_every_bit(name, dtype):
    model = build_zoo(name, dtype)
    editor, before = WeightEditor(model), bits(model)
    draw = random.Random(0)
    for number in range(112):  # 9 models
        method, rank = draw.choice([("cp", 1), ("cp", 3), ("svd", 2), ("tucker", 2)])
        layers, roles = draw.choice(["0", "1", "2", "0-1", "all"]), draw.choice(["fc", "attn", "all", "q,k,v", "down"])
        group = draw.choice(["all", 1])
        recipe = trawl.Recipe(method=method, rank=rank, layers=layers, roles=roles, group_layers=group)
        planned = editor.plan(recipe)
        with editor.applied(planned.stacks, lambda item, seed=number: noise(item, seed)):
            assert changed(before, model) == set(planned.changed_tensors)
    editor.verify()
    assert not changed(before, model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ZOO)
def test_applied_weights_are_those_of_compress(name, dtype, tmp_path):
    model = build_zoo(name, dtype)
    folder = open_folder(save_model(model, tmp_path / "model"))
    editor, before = WeightEditor(model), bits(model)
    planned = editor.plan(trawl.Recipe(method="tucker", rank=5, layers="0-1"))
    stacks = tuple(item.stack for item in make_plan(folder, planned.recipe).stacks)
    factors = {item.stack.name: noise(item) for item in planned.stacks}
    absmax = {stack.name: max(scan(folder, name) for name in stack.tensors) for stack in stacks}
    (shard,) = folder.shards
    expected = DenseWriter(folder, stacks, factors.__getitem__, absmax).write(shard, tmp_path / shard.name, bool)
    written = Checkpoint(tmp_path, folder.config, folder.shards)
    with editor.applied(planned.stacks, lambda item: factors[item.stack.name]) as errors:
        assert errors == pytest.approx([expected.relative(stack.name) for stack in stacks], rel=1e-6)
        assert same_bits(model, written)
        assert changed(before, model) == set(planned.changed_tensors)
    assert same_bits(model, folder)


def same_bits(model, checkpoint):
    """Whether a model holds the tensors that a checkpoint has under the same name: all that ever change."""
    state = bits(model)
    common = state.keys() & checkpoint.tensors.keys()
    assert len(common) > 0.8 * len(checkpoint.tensors)
    return all(torch.equal(state[name], checkpoint.read(name).reshape(-1).view(torch.uint8)) for name in common)


def test_stacks_of_several_plans_are_applied_together():
    model = build_zoo("phi3")
    editor, before = WeightEditor(model), bits(model)
    recipes = [
        trawl.Recipe(rank=2, layers="1", roles="gate"),
        trawl.Recipe(rank=4, layers="1", roles="up,down"),
        FUSED,
    ]
    stacks = [item for recipe in recipes for item in editor.plan(recipe).stacks]
    assert [item.stack.name for item in stacks][:2] == ["fc.1", "fc.1"]  # a name says nothing across plans
    alone = {}
    for recipe in recipes:
        planned = editor.plan(recipe)
        with editor.applied(planned.stacks, noise) as errors:
            alone |= dict(zip((id(item) for item in planned.stacks), errors, strict=True))
    with editor.applied(stacks, noise) as errors:
        assert errors == pytest.approx([alone[id(item)] for item in stacks], rel=1e-6)
        assert len(changed(before, model)) == 4
        gate, up = model.model.layers[1].mlp.gate_up_proj.weight.data.chunk(2)
        assert torch.linalg.matrix_rank(gate) == 2
        assert torch.linalg.matrix_rank(up) == 4
    editor.verify()


def test_a_slice_in_two_stacks_is_refused():
    editor = WeightEditor(build_zoo("llama"))
    stacks = (*editor.plan(trawl.Recipe(rank=2, layers="1")).stacks, *editor.plan(trawl.Recipe(rank=1)).stacks)
    with (
        pytest.raises(PlanError, match=r"stacks fc\.1 and fc\.0-2 both hold role gate of layer 1"),
        editor.applied([item for item in stacks if "fc" in item.stack.name], noise),
    ):
        pass
    editor.verify()


def test_a_stack_given_twice_is_refused():
    editor = WeightEditor(build_zoo("llama"))
    stacks = editor.plan(trawl.Recipe(rank=2, layers="1", roles="fc")).stacks
    with pytest.raises(PlanError, match="both hold role gate of layer 1"), editor.applied(stacks * 2, noise):
        pass
    editor.verify()


def test_a_tied_weight_is_refused_under_two_names():
    model = build_zoo("llama")
    model.model.layers[2].mlp.up_proj.weight = model.model.layers[1].mlp.up_proj.weight
    editor = WeightEditor(model)
    with (
        pytest.raises(PlanError, match=r"layers\.1\.mlp\.up_proj\.weight and model\.layers\.2.*one tied tensor"),
        editor.applied(editor.plan(trawl.Recipe(rank=2, roles="up")).stacks, noise),
    ):
        pass
    with editor.applied(editor.plan(trawl.Recipe(rank=2, roles="up", layers="0-1")).stacks, noise):
        assert torch.equal(model.model.layers[1].mlp.up_proj.weight, model.model.layers[2].mlp.up_proj.weight)
    editor.verify()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_weights_come_back_after_an_error(error):
    model = build_zoo("gpt2")
    editor, before = WeightEditor(model), bits(model)
    planned = editor.plan(trawl.Recipe(rank=2))

    def failing(item):
        if item is planned.stacks[-1]:
            raise error("no factors")
        return noise(item)

    with pytest.raises(error, match="in the body"), editor.applied(planned.stacks, noise):
        raise error("in the body")
    assert not changed(before, model)
    with pytest.raises(error, match="no factors"), editor.applied(planned.stacks, failing):
        pytest.fail("the body ran")
    assert not changed(before, model)
    with editor.applied(planned.stacks, noise):
        assert changed(before, model)


def test_a_foreign_change_is_found():
    model = build_zoo("llama")
    editor = WeightEditor(model)
    editor.verify()
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-3
    with pytest.raises(TrawlError, match=r"model\.norm\.weight of LlamaForCausalLM is not what it was"):
        editor.verify()
    weight = model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight[0, 0] += 1e-3
    with (
        pytest.raises(TrawlError, match=r"layers\.0\.mlp\.up_proj\.weight .* is not what it was"),
        editor.applied(editor.plan(trawl.Recipe(rank=2, layers="0", roles="up")).stacks, noise),
    ):
        pass


def test_one_intervention_at_a_time():
    editor = WeightEditor(build_zoo("llama"))
    first, second = (editor.plan(trawl.Recipe(rank=2, layers=layers)).stacks for layers in ("0", "1"))
    with editor.applied(first, noise):
        with pytest.raises(PlanError, match="edited already"), editor.applied(second, noise):
            pass
        editor.restore()
        editor.verify()
    editor.verify()


def test_a_fingerprint_is_of_weights_and_configuration(tmp_path):
    model = build_zoo("llama")
    editor = WeightEditor(model)
    save_model(model, tmp_path / "somewhere")
    assert WeightEditor(trawl.load(tmp_path / "somewhere")).fingerprint == editor.fingerprint
    with editor.applied(editor.plan(trawl.Recipe(rank=2)).stacks, noise):
        assert editor.fingerprint == WeightEditor(build_zoo("llama")).fingerprint
        assert WeightEditor(model).fingerprint != editor.fingerprint
    assert WeightEditor(build_zoo("llama", torch.bfloat16)).fingerprint != editor.fingerprint
    other = build_zoo("llama")
    other.config.rms_norm_eps = 1e-3
    assert WeightEditor(other).fingerprint != editor.fingerprint


def test_the_checkpoint_holds_the_unchanged_weights():
    model = build_zoo("llama")
    editor = WeightEditor(model)
    fc = editor.plan(trawl.Recipe(rank=2, layers="1", roles="fc")).stacks[0]
    mlp = model.model.layers[1].mlp
    largest = max(float(part.weight.detach().abs().max()) for part in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    up = model.model.layers[1].mlp.up_proj.weight.detach().clone()
    with editor.applied(editor.plan(trawl.Recipe(rank=2, layers="0-1", roles="up")).stacks, noise):
        assert editor.absmax(fc.stack) == pytest.approx(largest, abs=0)
        assert torch.equal(editor.checkpoint.read("model.layers.1.mlp.up_proj.weight"), up)
        assert not torch.equal(model.model.layers[1].mlp.up_proj.weight, up)
    model.model.layers[2].mlp.up_proj.weight.data[0, 0] = float("nan")
    broken = editor.plan(trawl.Recipe(rank=2, layers="2"))
    with (
        pytest.raises(CheckpointError, match=r"layers\.2\.mlp\.up_proj\.weight .* NaN"),
        editor.applied(broken.stacks, noise),
    ):
        pass


def test_only_dense_models_and_recipes(zoo, tmp_path):
    editor = WeightEditor(build_zoo("llama"))
    with pytest.raises(PlanError, match="only write='dense' can be applied"):
        editor.plan(trawl.Recipe(rank=2, write="factored"))
    assert editor.plan(trawl.Recipe(rank=2)) is editor.plan(trawl.Recipe(rank=2))
    trawl.compress(zoo("llama"), trawl.Recipe(rank=2, write="factored"), tmp_path / "factored")
    with pytest.raises(PlanError, match="LlamaForCausalLM is factored or quantized"):
        WeightEditor(trawl.load(tmp_path / "factored"))
