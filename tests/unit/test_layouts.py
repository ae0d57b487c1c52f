"""Layouts: what each view cuts out, against what transformers' own modelling code does with it.

A head, a key-value group, a unit or an expert that a view places wrongly is told by its effect: taking it away on one
side must change a model's outputs as taking it away on the other side does. Nothing here knows how a family stores it.
"""

import json
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.zoo import EVERY, HEADS, MORE, answer, build_zoo, inputs_of
from trawl.errors import FamilyError, ShapeError
from trawl.families import EXPERTS, match_family

Key = tuple[int, str, int]  # layer, role, expert

PASSING = re.compile(  # matrices and the like in layers that no role holds
    r"(mlp|block_sparse_moe)\.(gate|router(\.layer)?)\.weight|shared_expert_gate\.weight|_proj_bias|conv1d\.weight|A_log"
    r"|relative_attention_bias\.weight|vision_tower\."
)


class Tried:
    """A tiny model without biases or norms over several heads, whose slices can be changed for one run."""

    def __init__(self, name: str) -> None:
        self.name, self.model = name, build_zoo(name)
        for path, _ in list(self.model.named_modules()):
            if path.endswith(("q_norm", "k_norm")):
                self.model.set_submodule(path, torch.nn.Identity())
        self.parameters = dict(self.model.named_parameters())
        for path, parameter in self.parameters.items():
            if path.endswith("bias"):
                parameter.data.zero_()
        shapes = {path: tuple(each.shape) for path, each in self.parameters.items()}
        self.match = match_family(self.model.config.to_dict(), shapes)
        self.parts = {(part.layer, part.role, part.expert): part for part in self.match.placements}
        self.base = answer(name, self.model)

    def rows(self, layer: int, role: str) -> int:
        """Inner width of a role."""
        return self.parts[layer, role, -1].shape[0]

    def scaled(self, factor: float, *changes: tuple[Key, Sequence[int]]) -> Tensor:
        """Return the outputs with some rows of some slices scaled."""
        before = {}
        for key, rows in changes:
            part = self.parts[key]
            data = self.parameters[part.tensor].data
            before.setdefault(part.tensor, data.clone())
            changed = part.view.apply(data).clone()
            changed[list(rows)] *= factor
            part.view.scatter(changed, data)
        found = answer(self.name, self.model)
        for tensor, data in before.items():
            self.parameters[tensor].data.copy_(data)
        return found

    def differ(self, one: Tensor, other: Tensor) -> float:
        """Return how far outputs are apart, relative to the model's own."""
        return float((one - other).abs().max() / self.base.abs().max())

    def same(self, one: Tensor, other: Tensor) -> None:
        """Require two changes to have one effect, and to have an effect."""
        assert self.differ(one, other) < 1e-4
        assert self.differ(one, self.base) > 1e-3


def tower_starts(tried: Tried) -> list[tuple[str, int]]:
    """Return each tower's first layer; nothing but lengths depends on a patcher."""
    return [(tower, layers.start) for tower, layers in tried.match.towers.items() if tower != "patcher"]


def heads_of(name: str, tower: str) -> int:
    return 2 if tower == "vision" or name == "clip_vision" else HEADS


@pytest.mark.parametrize("name", MORE)
def test_disk_and_memory_hold_the_same_slices_and_every_matrix_is_a_role(name, zoo):
    folder: Path = zoo(name)
    disk = {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}
    memory = {key: each.data for key, each in build_zoo(name).named_parameters()}
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    one, other = (
        match_family(config, {key: tuple(each.shape) for key, each in found.items()}) for found in (disk, memory)
    )
    assert (one.family, one.roles, one.assumed) == (MORE[name].family, MORE[name].roles, ())
    assert tuple((tower, len(layers)) for tower, layers in one.towers.items()) == MORE[name].towers
    seen = {}
    for part, same in zip(one.placements, other.placements, strict=True):
        assert (part.tower, part.layer, part.role, part.expert) == (same.tower, same.layer, same.role, same.expert)
        assert torch.equal(part.view.apply(disk[part.tensor]), same.view.apply(memory[same.tensor]))
        marks = seen.setdefault(part.tensor, torch.zeros_like(disk[part.tensor]))
        part.view.scatter(part.view.apply(marks) + 1, marks)
    assert all((marks == 1).all() for marks in seen.values())
    numbered = [key for key, tensor in disk.items() if tensor.dim() > 1 and re.search(r"\.\d+\.", key)]
    assert [key for key in numbered if key not in seen and not PASSING.search(key)] == []


WITH_HEADS = [name for name, entry in MORE.items() if {"k", "cross_k"} & set(entry.roles)]


@pytest.mark.parametrize("name", WITH_HEADS)
def test_a_head_is_the_same_rows_on_both_sides(name):
    tried = Tried(name)
    checked = 0
    for tower, layer in tower_starts(tried):
        for kind in ("", "cross_"):
            if (layer, f"{kind}q", -1) not in tried.parts:
                continue
            size = tried.rows(layer, f"{kind}q") // heads_of(name, tower)
            groups = tried.rows(layer, f"{kind}k") // size
            one = range((groups - 1) * size, groups * size)  # the last key-value head
            width = tried.rows(layer, f"{kind}q") // groups
            all_of_it = range((groups - 1) * width, groups * width)  # and its query heads
            side = {role: (layer, kind + role, -1) for role in "qkvo"}
            tried.same(tried.scaled(0, (side["v"], one)), tried.scaled(0, (side["o"], all_of_it)))
            tried.same(tried.scaled(3, (side["v"], one)), tried.scaled(3, (side["o"], all_of_it)))
            positions = [(layer, role, -1) for role in ("pos_q", "pos_k") if (layer, role, -1) in tried.parts]
            query, key = [(side["q"], all_of_it)], [(side["k"], one)]
            for role, changes in zip(positions, (query, key), strict=False):  # deberta's scores have these, too
                changes.append((role, one))
            tried.same(tried.scaled(0, *query), tried.scaled(0, *key))
            checked += 1
    assert checked == len([tower for tower in tried.match.towers if tower != "patcher"]) + (
        "encoder" in tried.match.towers and name != "blt"
    )


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v2_lite", "deepseek_v3"])
def test_latent_attention_has_its_heads_and_their_halves_in_order(name):
    tried = Tried(name)
    nope, rope, value = 8, 4, 6
    query, last = "q_b" if "q_b" in tried.match.roles else "q", HEADS - 1
    both = last * (nope + value)
    values, keys = range(both + nope, both + nope + value), range(both, both + nope)
    out, asked = range(last * value, HEADS * value), range(last * (nope + rope), last * (nope + rope) + nope)
    tried.same(tried.scaled(0, ((0, "kv_b", -1), values)), tried.scaled(0, ((0, "o", -1), out)))
    tried.same(tried.scaled(0, ((0, "kv_b", -1), keys)), tried.scaled(0, ((0, query, -1), asked)))
    rotary = range(20, 24)  # rows of kv_a behind the latent: the rotary key, one for all heads
    turned = [row for head in range(HEADS) for row in range(head * 12 + nope, head * 12 + 12)]
    tried.same(tried.scaled(0, ((0, "kv_a", -1), rotary)), tried.scaled(0, ((0, query, -1), turned)))


@pytest.mark.parametrize("name", [name for name, entry in MORE.items() if {"up", "expert_up"} & set(entry.roles)])
def test_a_unit_of_an_fc_is_one_row_of_each_of_its_matrices(name):
    tried = Tried(name)
    checked = set()
    for (layer, role, expert), part in tried.parts.items():
        kind = role.removesuffix("up")
        if not role.endswith("up") or part.tower == "patcher" or (kind, part.tower, part.shape) in checked:
            continue
        unit, down = range(7), (layer, f"{kind}down", expert)
        gate = (layer, f"{kind}gate", expert)
        without = tried.scaled(0, (down, unit))
        if tried.differ(without, tried.base) == 0:  # an expert that no token of the batch goes to
            continue
        checked.add((kind, part.tower, part.shape))
        if name != "gpt_oss":  # whose up is added to one
            tried.same(tried.scaled(0, ((layer, role, expert), unit)), without)
        if gate in tried.parts:
            tried.same(tried.scaled(0, (gate, unit)), without)
            assert tried.differ(tried.scaled(3, (gate, unit)), tried.scaled(3, (down, unit))) > 1e-4
            if name != "gpt_oss":
                tried.same(tried.scaled(3, ((layer, role, expert), unit)), tried.scaled(3, (down, unit)))
            else:
                assert tried.differ(tried.scaled(0, ((layer, role, expert), unit)), without) > 1e-3
    downs = [part for part in tried.match.placements if part.role.endswith("down") and part.tower != "patcher"]
    assert checked == {(part.role.removesuffix("down"), part.tower, part.shape) for part in downs}


FUSED = ["gpt_bigcode", "gpt_bigcode_heads", "falcon", "falcon_multi_query", "falcon_old", "bloom", "mpt", "modernbert"]


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "phi3", *FUSED, "mamba", "mamba2"])
def test_only_queries_and_the_gate_of_a_mixer_keep_to_their_position(name):
    """What another position's query gives reaches no position but its own; a key, a value and a state do."""
    tried = Tried(name)
    last = tried.match.layers - 1
    own = "ssm_gate" if "mamba" in name else "q"
    module = tried.model.get_submodule(tried.parts[last, own, -1].tensor.removesuffix(".weight"))
    kept = []
    handle = module.register_forward_hook(lambda _module, _inputs, output: kept.append(output.requires_grad_()))
    logits = tried.model(**inputs_of(name)).logits
    handle.remove()
    (projected,) = kept
    (gradient,) = torch.autograd.grad(logits[:, 5].square().sum(), projected)
    away = gradient[:, 2].abs().amax(0)  # per row of the stored tensor
    for (layer, role, _), part in tried.parts.items():
        if layer == last and part.tensor == tried.parts[last, own, -1].tensor:
            weight = tried.parameters[part.tensor]
            columns = part.view.stored.startswith("hidden")  # as Conv1D stores it
            shape = weight.shape if not columns else weight.shape[::-1]
            of_rows = away[:, None].expand(shape)
            found = part.view.apply(of_rows.T.contiguous() if columns else of_rows.contiguous())
            assert (found == 0).all() == (role == own), role
            assert role == own or float((found > 0).float().mean()) > 0.5, role


def test_a_mixers_gate_and_output_have_the_same_units():
    tried = Tried("mamba")
    unit = range(9)
    tried.same(tried.scaled(0, ((0, "ssm_gate", -1), unit)), tried.scaled(0, ((0, "ssm_out", -1), unit)))
    double = tried.scaled(2, ((0, "ssm_dt", -1), range(64)))
    tried.same(double, tried.scaled(2, ((0, "ssm_x", -1), range(3))))  # the step's low rank comes first


# ---- what does not fit


def shapes_of(name):
    model = build_zoo(name)
    return model.config.to_dict(), {key: tuple(each.shape) for key, each in model.named_parameters()}


@pytest.fixture(scope="module")
def one_by_one(tmp_path_factory):
    """Config and shapes of a checkpoint that holds experts one by one."""
    folder = tmp_path_factory.mktemp("moe")
    build_zoo("qwen2_moe").save_pretrained(folder)
    shapes = {key: tuple(each.shape) for file in folder.glob("*.safetensors") for key, each in load_file(file).items()}
    return json.loads((folder / "config.json").read_text(encoding="utf-8")), shapes


@pytest.mark.parametrize(
    ("change", "drop", "error", "message"),
    [
        (
            {},
            "layers.0.mlp.experts.3.up_proj",
            FamilyError,
            r"experts\.3\.up_proj\.weight or .*gate_up_proj is missing",
        ),
        (
            {},
            "layers.0.mlp.experts",
            FamilyError,
            r"experts\.0\.gate_proj\.weight .* is missing.*role expert_gate in each without mlp.gate_proj",
        ),
        (
            {},
            "layers.1.mlp.up_proj",
            FamilyError,
            r"layers\.1\.mlp\.up_proj\.weight or .*missing.*role up in each without mlp.gate.weight",
        ),
        ({}, "layers.1.self_attn.q_proj", FamilyError, r"layers\.1\.self_attn\.q_proj\.weight is missing"),
        (
            {"num_experts": 4},
            "",
            FamilyError,
            r"experts\.4\.\w+\.weight is expert 4 \(counted from 0\).*says 4 experts",
        ),
        ({"num_experts": 6}, "", FamilyError, r"experts\.5\.gate_proj\.weight or .* is missing"),
        ({"moe_intermediate_size": 41}, "", ShapeError, r"experts\.0\.gate_proj\.weight.*\(40, 32\).*\(41, 32\)"),
    ],
)
def test_experts_that_do_not_fit(one_by_one, change, drop, error, message):
    config, shapes = one_by_one
    kept = {name: shape for name, shape in shapes.items() if not drop or drop not in name}
    with pytest.raises(error, match=message):
        match_family({**config, **change}, kept)


def test_fused_experts_have_the_number_that_the_config_says():
    config, shapes = shapes_of("mixtral")
    with pytest.raises(ShapeError, match=r"gate_up_proj .*\(5, 96, 32\).*expected \(4, 96, 32\)"):
        match_family({**config, "num_local_experts": 4}, shapes)


def test_packed_experts_pass_through():
    config, shapes = shapes_of("gpt_oss")
    packed = {re.sub(r"(gate_up|down)_proj$", r"\1_proj_blocks", name): shape for name, shape in shapes.items()}
    assert match_family(config, packed).roles == ("q", "k", "v", "o")


def test_an_encoder_alone_has_one_tower():
    config, shapes = shapes_of("t5")
    match = match_family(config, {name: shape for name, shape in shapes.items() if "decoder" not in name})
    assert (match.layers, dict(match.towers), match.inner_field) == (2, {"encoder": range(2)}, "d_ff")
    with pytest.raises(FamilyError, match=r"decoder\.block\.2\..*wi\.weight or .* is missing"):
        match_family(config, {name: shape for name, shape in shapes.items() if "decoder.block.2.layer.2" not in name})


def test_layers_that_predict_further_tokens_pass_through():
    config, shapes = shapes_of("deepseek_v3")
    further = {name.replace("layers.1.", "layers.2."): shape for name, shape in shapes.items()}
    with pytest.raises(FamilyError, match="is in layer 2"):
        match_family({**config, "num_nextn_predict_layers": 0}, {**shapes, **further})
    match = match_family({**config, "num_nextn_predict_layers": 1}, {**shapes, **further})
    assert match.placements == match_family(config, shapes).placements


def test_the_router_is_in_no_role():
    for name, entry in EVERY.items():
        if set(EXPERTS) & set(entry.roles):
            tensors = {part.tensor for part in Tried(name).match.placements}
            assert not [tensor for tensor in tensors if "router" in tensor or "mlp.gate." in tensor]


def test_layers_are_numbered_through_all_towers():
    config, shapes = shapes_of("bart")
    match = match_family(config, shapes)
    assert [one.layer <= other.layer for one, other in pairwise(match.placements)].count(False) == 0
    assert match.placements[-1].tensor == "model.decoder.layers.2.fc2.weight"
    assert match.placements[-1].layer == 4
