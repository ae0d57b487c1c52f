"""Families: every role of every family against what transformers' own modelling code computes with it."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from transformers import AttentionInterface
from transformers.activations import ACT2FN

from tests.zoo import (
    EVERY,
    GROUPED,
    HIDDEN,
    INNER,
    LAYERS,
    ZOO,
    build_zoo,
    randomize,
    save_model,
    save_unlisted,
    save_zoo,
)
from trawl.errors import FamilyError, ShapeError
from trawl.families import FC, ROLES, load_family, match_family, packaged_families
from trawl.families.expressions import evaluate
from trawl.families.table import render


def read(folder: Path):
    """Return config and shapes of a saved checkpoint."""
    shapes = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (not a dict)
    return json.loads((folder / "config.json").read_text(encoding="utf-8")), shapes


def of_model(model):
    """Return config and shapes of a model in memory; parameter names are those that save_pretrained writes."""
    return model.config.to_dict(), {name: tuple(each.shape) for name, each in model.named_parameters()}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return read(save_zoo("llama", tmp_path_factory.mktemp("llama")))


# ---- every family in the zoo


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("shards", [1, 3])
def test_every_role_of_every_layer_is_placed_in_order(name, shards, tmp_path):
    config, shapes = read(save_zoo(name, tmp_path, shards))
    match = match_family(config, shapes)
    assert (match.family, match.layers, match.roles, match.assumed) == (ZOO[name].family, LAYERS, ZOO[name].roles, ())
    assert [(each.layer, each.role) for each in match.placements] == [
        (layer, role) for layer in range(LAYERS) for role in ZOO[name].roles
    ]
    for each in match.placements:
        assert each.shape == each.view.shape(shapes[each.tensor])
        assert each.shape[1] == HIDDEN
        if each.role in FC:
            assert each.shape[0] == INNER
    if "num_key_value_heads" in ZOO[name].kwargs:
        widths = {each.role: each.shape[0] for each in match.placements}
        assert widths["k"] == widths["v"] == widths["q"] // 2 == widths["o"] // 2


@pytest.mark.parametrize("name", ZOO)
def test_the_roles_of_a_tensor_cover_each_element_once(name):
    config, shapes = of_model(build_zoo(name))
    seen = {}
    for each in match_family(config, shapes).placements:
        marks = seen.setdefault(each.tensor, torch.zeros(shapes[each.tensor]))
        each.view.scatter(each.view.apply(marks) + 1, marks)
    assert all((marks == 1).all() for marks in seen.values())


@pytest.mark.parametrize("name", ZOO)
def test_a_checkpoint_of_the_base_model_alone_matches_too(name, tmp_path):
    model = build_zoo(name)
    whole = match_family(*of_model(model))
    base = match_family(*read(save_model(model.base_model, tmp_path)))
    prefix = model.base_model_prefix + "."
    assert [each.tensor for each in base.placements] == [each.tensor.removeprefix(prefix) for each in whole.placements]


# ---- against the modelling code: with one token the rotary embedding is the identity, so that what reaches the
# attention function is the plain projection of the attention module's input.


def record(model):
    """Run one token; return what reaches the attention function and, by module name, each module's input and output."""
    calls, inputs, outputs = [], {}, {}

    def spy(module, query, key, value, attention_mask, **kwargs):
        calls.append((query, key, value))
        return query.transpose(1, 2).contiguous(), None

    def hook(name):
        def keep(module, args, kwargs, output):
            inputs[name] = args[0] if args else kwargs.get("hidden_states")
            outputs[name] = output

        return keep

    for name, module in model.named_modules():
        if name.endswith(("q_norm", "k_norm")):
            model.set_submodule(name, torch.nn.Identity())
        else:
            module.register_forward_hook(hook(name), with_kwargs=True)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.zero_()
        AttentionInterface.register("spy", spy)
        if "gptj" not in model.config.model_type:  # which calls no attention function; its projections are not fused
            model.set_attn_implementation("spy")
        model(torch.tensor([[5]]))
    return calls, inputs, outputs


def module_of(placement):
    return placement.tensor.removesuffix(".weight")


def slices_of(model):
    """Return the slices by layer and role, and the placements likewise."""
    parameters = dict(model.named_parameters())
    placements = match_family(*of_model(model)).placements
    slices = {(each.layer, each.role): each.view.apply(parameters[each.tensor].detach()) for each in placements}
    return slices, {(each.layer, each.role): each for each in placements}


@pytest.mark.parametrize("name", [name for name in ZOO if name != "gptj"])
def test_q_k_and_v_are_what_the_attention_function_is_given(name):
    model = build_zoo(name)
    slices, placements = slices_of(model)
    calls, inputs, _ = record(model)
    assert len(calls) == LAYERS
    for layer, given in enumerate(calls):
        x = inputs[module_of(placements[layer, "q"])]  # (1, 1, hidden)
        for role, states in zip("qkv", given, strict=True):
            scaling = 8**-0.5 if (name, role) == ("opt", "q") else 1.0  # modeling_opt.py scales the query beforehand
            projected = states.transpose(1, 2).flatten(2)  # (1, heads, 1, dim) -> (1, 1, heads · dim)
            torch.testing.assert_close(x @ slices[layer, role].T * scaling, projected)


@pytest.mark.parametrize("name", ZOO)
def test_unfused_projections_are_what_their_modules_compute(name):
    model = build_zoo(name)
    slices, placements = slices_of(model)
    _, inputs, outputs = record(model)
    checked = 0
    for key, placement in placements.items():
        if not placement.view.whole:
            continue
        x = inputs[module_of(placement)]
        matrix = slices[key] if placement.role in ("o", "down") else slices[key].T
        torch.testing.assert_close(x @ matrix, outputs[module_of(placement)])
        checked += 1
    assert checked >= 2 * LAYERS  # o and down are never fused


@pytest.mark.parametrize("name", ZOO)
def test_gate_and_up_give_what_down_is_given(name):
    model = build_zoo(name)
    slices, placements = slices_of(model)
    _, inputs, _ = record(model)
    config = model.config
    names = ("hidden_activation", "hidden_act", "activation_function")
    act = ACT2FN[next(getattr(config, each) for each in names if hasattr(config, each))]
    for layer in range(LAYERS):
        x = inputs[module_of(placements[layer, "up"])]
        up = x @ slices[layer, "up"].T
        expected = act(x @ slices[layer, "gate"].T) * up if (layer, "gate") in slices else act(up)
        torch.testing.assert_close(inputs[module_of(placements[layer, "down"])], expected)


# ---- names and configs as published


def test_hub_gpt2_names_and_nulls():
    config, shapes = of_model(build_zoo("gpt2"))
    hub = {name.removeprefix("transformer."): shape for name, shape in shapes.items()}
    hub |= {f"h.{layer}.attn.bias": (1, 1, 64, 64) for layer in range(LAYERS)}  # the mask buffers of old files
    match = match_family(config, hub)
    assert match.placements[0].tensor == "h.0.attn.c_attn.weight"
    wide = {name: tuple(128 if n == INNER else n for n in shape) for name, shape in hub.items()}
    assert match_family({**config, "n_inner": None}, wide).placements[-1].shape == (128, HIDDEN)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model.", "language_model."])
def test_the_gemma3_wrapper_is_read_by_its_text_config(prefix):
    config, shapes = of_model(build_zoo("gemma3_text"))
    wrapped = {name.replace("model.", prefix, 1): shape for name, shape in shapes.items()}
    wrapped |= {f"vision_tower.encoder.layers.{i}.self_attn.q_proj.weight": (16, 16) for i in range(9)}
    outer = {"model_type": "gemma3", "text_config": config, "num_hidden_layers": 99}
    assert match_family(outer, wrapped).placements[0].tensor == f"{prefix}layers.0.self_attn.q_proj.weight"


def test_the_gemma3_wrapper_as_transformers_saves_it(tmp_path):
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config={**GROUPED, "head_dim": 16}, vision_config={**vision, "image_size": 28, "patch_size": 14}
    )
    model = randomize(transformers.Gemma3ForConditionalGeneration(config))
    match = match_family(*read(save_model(model, tmp_path)))
    assert (match.family, match.layers, len(match.placements)) == ("gemma3", LAYERS, 7 * LAYERS)


def test_gemma3_defaults_are_those_of_its_config_class():
    default, (tower,) = transformers.Gemma3TextConfig(), packaged_families()["gemma3"].towers
    fields = {"layers": tower.layers, **dict(tower.sizes)}
    for name, (field, number) in fields.items():
        assert getattr(default, field) == int(number), name


def test_head_width_falls_back_to_hidden_over_heads(llama):
    config, shapes = llama
    without = {key: value for key, value in config.items() if key != "head_dim"}
    assert match_family(without, shapes).placements == match_family(config, shapes).placements
    assert match_family({**config, "head_dim": None}, shapes).placements == match_family(config, shapes).placements


# ---- what does not fit


@pytest.mark.parametrize(
    ("change", "drop", "error", "message"),
    [
        (
            {"num_hidden_layers": 4},
            "",
            FamilyError,
            r"model\.layers\.3\.self_attn\.q_proj\.weight is missing.*4 layers",
        ),
        ({"num_hidden_layers": 2}, "", FamilyError, r"layers\.2\..* is in layer 2 \(counted from 0\).*2 layers"),
        ({"num_hidden_layers": 0}, "", FamilyError, "gives no layers by num_hidden_layers"),
        ({"num_hidden_layers": None}, "", FamilyError, "gives no layers by num_hidden_layers"),
        ({}, "layers.1.mlp.up_proj", FamilyError, r"model\.layers\.1\.mlp\.up_proj\.weight is missing"),
        ({}, "gate_proj", FamilyError, r"model\.layers\.0\.mlp\.gate_proj\.weight is missing"),
        ({}, "model.layers", FamilyError, r"no tensor of family llama found: expected names like model\.layers\.0\."),
        ({"intermediate_size": 40}, "", ShapeError, r"layers\.0\.mlp\.gate_proj\.weight.*\(48, 32\).*\(40, 32\)"),
        ({"num_key_value_heads": 4}, "", ShapeError, r"layers\.0\.self_attn\.k_proj\.weight.*\(16, 32\).*\(32, 32\)"),
        ({"hidden_size": None}, "", FamilyError, "config.json has no hidden_size"),
        ({"hidden_size": "32"}, "", FamilyError, "'hidden_size' is '32'; expected an integer"),
        ({"num_attention_heads": 0, "head_dim": None}, "", FamilyError, "heads=0"),
        ({"intermediate_size": [48, 48, 48]}, "", FamilyError, "expected an integer"),
    ],
)
def test_a_listed_family_that_does_not_fit(llama, change, drop, error, message):
    config, shapes = llama
    kept = {name: shape for name, shape in shapes.items() if not drop or drop not in name}
    with pytest.raises(error, match=message) as caught:
        match_family({**config, **change}, kept)
    assert "\n" not in str(caught.value)


def test_a_role_that_is_not_a_matrix(llama):
    config, shapes = llama
    with pytest.raises(ShapeError, match=r"layers\.1\.mlp\.up_proj\.weight.*has 1 axes \(1536,\)"):
        match_family(config, {**shapes, "model.layers.1.mlp.up_proj.weight": (1536,)})


# ---- the generic fallback


def test_an_unlisted_llama_is_matched_as_llama_and_says_what_was_assumed(llama, tmp_path):
    config, shapes = read(save_unlisted(tmp_path / "unlisted"))
    transformers.LlamaForCausalLM.from_pretrained(tmp_path / "unlisted")
    match, listed = match_family(config, shapes), match_family(*llama)
    assert [(each.layer, each.role, each.tensor, each.shape) for each in match.placements] == [
        (each.layer, each.role, each.tensor, each.shape) for each in listed.placements
    ]
    weight = torch.arange(48 * 32.0)
    for each, other in zip(match.placements, listed.placements, strict=True):
        stored = weight[: torch.Size(shapes[each.tensor]).numel()].reshape(shapes[each.tensor])
        assert torch.equal(each.view.apply(stored), other.view.apply(stored))
    assert match.family == "generic"
    said = "; ".join(match.assumed)
    for part in ("'llamalike-x' is not listed", "role q is model.layers.0.self_attn.q_proj.weight", "nn.Linear", "32"):
        assert part in said


@pytest.mark.parametrize("name", ["mistral", "qwen3", "gemma2", "olmo2", "gptj", "opt"])
def test_other_families_with_unfused_linear_layers_are_inferred_alike(name):
    config, shapes = of_model(build_zoo(name))
    listed = match_family(config, shapes)
    match = match_family({**config, "model_type": "unheard-of"}, shapes)
    assert [(each.tensor, each.shape) for each in match.placements] == [
        (each.tensor, each.shape) for each in listed.placements
    ]


@pytest.mark.parametrize("name", ["phi3", "gpt2", "gpt_neox", "bert"])
def test_other_layouts_are_refused_with_what_was_seen(name):
    config, shapes = of_model(build_zoo(name))
    match = None
    with pytest.raises(FamilyError) as caught:
        match = match_family({**config, "model_type": "unheard-of"}, shapes)
    assert match is None
    message = str(caught.value)
    assert "--family FILE.yaml" in message
    assert "2-D tensors seen: " in message
    assert "*." in message
    assert f"({HIDDEN}, " in message
    assert "\n" not in message
    assert len(message) < 2000


def test_a_near_model_type_is_suggested():
    with pytest.raises(FamilyError, match="did you mean 'qwen3'"):
        match_family({"model_type": "qwen33", "hidden_size": 4}, {"a.weight": (2, 2)})


def test_half_a_layer_is_inferred_where_the_other_half_is_unknown(llama):
    config, shapes = llama
    fused = {name.replace("q_proj", "wqkv"): shape for name, shape in shapes.items()}
    match = match_family({**config, "model_type": "fused"}, fused)
    assert match.roles == FC
    assert "roles q, k, v, o were not found and pass through" in match.assumed
    match = match_family({**config, "model_type": "moe"}, {n: s for n, s in shapes.items() if "down_proj" not in n})
    assert match.roles == ("q", "k", "v", "o")


@pytest.mark.parametrize(
    ("change", "shape", "message"),
    [
        ({"hidden_size": 40}, {}, "hidden size 40"),
        ({"hidden_size": None}, {}, "no hidden_size or n_embd"),
        ({"num_hidden_layers": 5}, {}, "does not fit.*is missing"),
        ({"num_hidden_layers": None}, {}, "gives no layers"),
        ({}, {"model.layers.1.mlp.up_proj.weight": (40, 32)}, r"inner width \d+ and .* \d+; expected one"),
        ({}, {"model.layers.1.mlp.up_proj.weight": (48, 31)}, r"does not fit.*layers\.1\.mlp\.up_proj\.weight"),
        ({}, {"model.layers.1.self_attn.k_proj.weight": (8, 32)}, r"k_proj\.weight has inner width 8"),
    ],
)
def test_an_unlisted_model_that_contradicts_itself(llama, change, shape, message):
    config, shapes = llama
    with pytest.raises(FamilyError, match=message):
        match_family({**config, "model_type": "llamalike-x", **change}, {**shapes, **shape})


# ---- family files

OWN = """
model_types: [mine]
prefixes: [body.]
layer: block_{layer}/
layers: depth
sizes: {hidden: width, heads: [n_heads, 4], dim: hidden // heads, part: 3}
roles:
  k: {tensor: qkv, view: hidden (heads part dim) -> (heads part dim) hidden, take: {part: 1}}
  up: {tensor: [w_in, up], view: rows hidden, take: {rows: [0, 2 * width2]}}
"""


def test_a_file_of_ones_own(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(OWN.replace("2 * width2", "2 * dim"), encoding="utf-8")
    shapes = {"body.block_0/qkv": (8, 24), "body.block_0/up": (9, 8)}
    match = match_family({"width": 8, "depth": 1, "model_type": "llama"}, shapes, path)
    assert (match.family, match.assumed) == ("mine", ())
    assert [(each.role, each.shape) for each in match.placements] == [("k", (8, 8)), ("up", (4, 8))]
    both = {"body.block_0/w_in": (6, 8), **shapes}  # the first name of the list wins, wherever it stands
    assert match_family({"width": 8, "depth": 1}, both, path).placements[1].tensor == "body.block_0/w_in"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("prefixes", "prefixs", r"mine\.yaml: unknown key 'prefixs'; did you mean 'prefixes'\?"),
        ("  up:", "  upp:", r"mine\.yaml: roles: unknown key 'upp'; did you mean 'up'\?"),
        ("tensor: qkv", "tensors: qkv", r"roles\.k: unknown key 'tensors'; did you mean 'tensor'\?"),
        ("tensor: qkv, ", "", r"roles\.k\.tensor is None"),
        ("layer: block_{layer}/", "layer: block/", r"layer is 'block/'; expected a path with \{layer\}"),
        ("layers: depth", "", r"mine\.yaml: layers is None"),
        ("layers: depth", "layers: open('x')", r"layers: size \"open\('x'\)\" may hold only"),
        ("hidden // heads", "hidden / heads", r"sizes\.dim: size 'hidden / heads' may hold only"),
        ("[n_heads, 4]", "[n_heads, 4.5]", r"sizes\.heads is \['n_heads', 4\.5\]"),
        ("-> (heads part dim) hidden", "-> (heads part) hidden", r"roles\.k\.view: .*same axes"),
        ("view: rows hidden", "view: hidden rows", r"roles\.up\.view ends in 'hidden rows'"),
        ("view: rows hidden", "view: (rows hidden", r"roles\.up\.view: .*malformed"),
        ("{part: 1}", "{parts: 1}", r"roles\.k\.take has no axis 'parts'"),
        ("{rows: [0, 2 * width2]}", "{rows: [0, 1, 2]}", r"roles\.up\.take\.rows is .*\[start, stop\]"),
        ("roles:", "roles: {}\nfoo:", "unknown key 'foo'"),
        ("{part: 1}", "[part, 1]", r"roles\.k\.take is .*expected a mapping"),
        ("model_types: [mine]", "model_types: [1]", r"model_types is \[1\]"),
        ("model_types: [mine]", "model_types: [", "is not YAML"),
        (
            "view: rows hidden,",
            "view: rows hidden, unless: [a],",
            r"roles\.up\.unless is .*expected the name of a tensor",
        ),
        ("view: rows hidden,", "view: rows hidden, optional: 1,", r"roles\.up\.optional is 1; expected true or false"),
        ("tensor: [w_in, up]", 'tensor: ["{3 ** layer}", up]', r"roles\.up\.tensor: size '3 \*\* layer' may hold only"),
        ("  up:", "  expert_up:", "roles has experts; expected their number under experts"),
        (
            "roles:",
            "kinds: [attn, mlp]\nroles:",
            r"mine\.yaml: kinds has 'mlp'; expected some of attn, cross, ssm, fc, experts",
        ),
        ("roles:", "kinds: [cross]\nroles:", r"mine\.yaml: roles is empty"),
        ("roles:", "towers: {}\nroles:", r"mine\.yaml: towers has 0 entries"),
        ("roles:", "towers: {a: {layer: b}}\nroles:", r"mine\.yaml: towers\.a: layer is 'b'; expected a path"),
        ("roles:", "towers: {a: {roles: {k: []}}}\nroles:", r"towers\.a: roles\.k is empty"),
    ],
)
def test_a_malformed_file_is_refused_by_key(tmp_path, old, new, message):
    path = tmp_path / "mine.yaml"
    assert old in OWN
    path.write_text(OWN.replace(old, new), encoding="utf-8")
    with pytest.raises(FamilyError, match=message) as caught:
        load_family(path)
    assert "\n" not in str(caught.value)


TOWERS = """
prefixes: [body.]
layer: "{tower}"
layers: 2
sizes: {hidden: width, inner: 6}
roles:
  up: {tensor: up, view: inner hidden}
  q: {tensor: q, view: hidden hidden2 -> hidden2 hidden, optional: true}
towers:
  first: {layer: "a.{layer // 2}.{layer % 2}.", layers: 3}
  second: {layer: "b.{layer + 1}.", sizes: {inner: inner2}, roles: {down: {tensor: down, view: inner hidden}}}
  third: {layer: "c.{layer}."}
"""


def test_towers_take_what_stands_beside_them_and_names_hold_expressions(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(TOWERS.replace('layer: "{tower}"\n', ""), encoding="utf-8")
    names = ["a.0.0.up", "a.0.1.up", "a.1.0.up", *(f"b.{layer}.{name}" for layer in (1, 2) for name in ("up", "down"))]
    shapes = {f"body.{name}": (6 if name[0] == "a" else 5, 8) for name in names}
    config = {"width": 8, "inner2": 5}
    match = match_family(config, shapes, path)
    assert [(part.layer, part.tower, part.tensor.removeprefix("body.")) for part in match.placements] == [
        (0, "first", "a.0.0.up"),
        (1, "first", "a.0.1.up"),
        (2, "first", "a.1.0.up"),
        (3, "second", "b.1.up"),
        (3, "second", "b.1.down"),
        (4, "second", "b.2.up"),
        (4, "second", "b.2.down"),
    ]
    assert (match.layers, dict(match.towers)) == (5, {"first": range(3), "second": range(3, 5)})
    some = {**shapes, "body.a.0.1.q": (8, 8)}  # optional: in all layers of a tower, or in none
    with pytest.raises(FamilyError, match=r"body\.a\.0\.0\.q is missing.*3 layers"):
        match_family(config, some, path)
    whole = {**shapes, **{f"body.{name}.q": (8, 8) for name in ("a.0.0", "a.0.1", "a.1.0")}}
    assert [part.role for part in match_family(config, whole, path).placements[:2]] == ["q", "up"]


@pytest.mark.parametrize(("family", "config"), [("clip", "CLIP"), ("siglip", "Siglip")])
def test_tower_defaults_are_those_of_their_config_classes(family, config):
    for tower in packaged_families()[family].towers:
        default = getattr(transformers, f"{config}{tower.name.capitalize()}Config")()
        fields = {"layers": tower.layers, **dict(tower.sizes)}
        numbers = {values[0]: int(values[1]) for values in fields.values() if len(values) == 2}
        assert set(numbers) == {"num_hidden_layers", "hidden_size", "intermediate_size"}
        assert all(getattr(default, field) == number for field, number in numbers.items())


def test_a_file_that_cannot_work_out_its_cuts(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(OWN, encoding="utf-8")
    shapes = {"body.block_0/qkv": (8, 24), "body.block_0/up": (9, 8)}
    with pytest.raises(FamilyError, match="take of role up uses a name not under sizes"):
        match_family({"width": 8, "depth": 1}, shapes, path)
    path.write_text(OWN.replace("{part: 1}", "{part: 3}"), encoding="utf-8")
    with pytest.raises(FamilyError, match=r"role k.*cannot take 3:4 of part=3"):
        match_family({"width": 8, "depth": 1}, shapes, path)


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00", b"- a list"])
def test_an_unreadable_file(tmp_path, content):
    path = tmp_path / "mine.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(FamilyError, match=r"mine\.yaml"):
        load_family(path)


def test_packaged_files_list_each_model_type_once_and_the_zoo_has_each():
    listed = [name for family in packaged_families().values() for name in family.model_types]
    assert len(listed) == len(set(listed))
    for entry in EVERY.values():
        assert all(role in ROLES for role in entry.roles)
    made = {getattr(transformers, entry.config).model_type: entry.family for entry in EVERY.values()}
    families = {name: family.name for family in packaged_families().values() for name in family.model_types}
    alike = {"mt5": "t5", "clip_text_model": "clip_tower", "siglip_text_model": "clip_tower"}
    assert families == {**made, **alike, "siglip_vision_model": "clip_tower"}


# ---- expressions


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("3", 3),
        ("a", 7),
        ("a + 2 * b", 13),
        ("(a - b) * b", 12),
        ("a // b", 2),
        ("a + missing", None),
        ("null", None),
        ("a % b", 1),
        ("a if yes else b", 7),
        ("a if no else b", 3),
        ("a if none else b", None),
    ],
)
def test_expressions(expression, value):
    assert evaluate(expression, {"a": 7, "b": 3, "null": None, "yes": True, "no": False}) == value


@pytest.mark.parametrize(
    "expression",
    [
        "",
        "a +",
        "a / b",
        "a ** b",
        "f(a)",
        "a.b",
        "a[0]",
        "-a",
        "1.5",
        "'a'",
        "True",
        "a if b + 1 else a",
        "a if b else f(a)",
        "__import__('os')",
    ],
)
def test_expressions_that_are_refused(expression):
    with pytest.raises(FamilyError, match="size"):
        evaluate(expression, {"a": 7, "b": 3})


@pytest.mark.parametrize(
    ("value", "message"), [(0, "divides by zero"), (True, "expected an integer"), (2.0, "expected an")]
)
def test_fields_that_are_refused(value, message):
    with pytest.raises(FamilyError, match=message):
        evaluate("a // b", {"a": 7, "b": value})


def test_the_page_about_families_is_current_and_names_every_model_type():
    page = (Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8")
    assert page == render(), "run python -m trawl.families > docs/families.md"
    for family in packaged_families().values():
        assert all(re.search(rf"\b{re.escape(name)}\b", page) for name in family.model_types)
