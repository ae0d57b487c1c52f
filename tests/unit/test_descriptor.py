"""Descriptors: made from stacks, read back from JSON, and refused in every damaged form with one line."""

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trawl.checkpoint import TensorInfo
from trawl.descriptor import Descriptor, describe, describe_stack, factors_prefix, stack_id
from trawl.descriptor_reader import parse_descriptor
from trawl.errors import LoadError, PlanError
from trawl.families import Placement
from trawl.stacking import Place, Stack
from trawl.views import View

PLAIN, TURNED = View("inner hidden"), View("hidden inner", "inner hidden")
FUSED = "(heads part dim) hidden"
THIRD = [View(FUSED, FUSED, (("part", 3), ("dim", 4)), (("part", i, i + 1),)) for i in range(3)]


def info(name, shape, dtype="F32"):
    return TensorInfo(name, dtype, shape, "model.safetensors", 0, 0)


def tensors(*entries):
    return {name: info(name, shape) for name, shape in entries}


def fc_stack(name="fc.0-1"):
    slices = []
    for layer in (0, 1):
        for role, view in (("gate", PLAIN), ("up", PLAIN), ("down", TURNED)):
            slices.append(Placement(layer, role, f"model.layers.{layer}.mlp.{role}_proj.weight", view, (12, 8)))
    return Stack(name, tuple(slices))


FC_TENSORS = tensors(
    *((f"model.layers.{layer}.mlp.{role}_proj.weight", (8, 12) if role == "down" else (12, 8))
      for layer in (0, 1) for role in ("gate", "up", "down"))
)  # fmt: skip


def fused_stack(parts=(0, 1, 2), name="attn.0"):
    slices = tuple(Placement(0, "qkv"[i], "h.0.qkv.weight", THIRD[i], (16, 8)) for i in parts)
    return Stack(name, slices)


FUSED_TENSORS = tensors(("h.0.qkv.weight", (48, 8)))


def example():
    fc = describe_stack(fc_stack(), (2, 5, 6), "full", tensors=FC_TENSORS, stack_factor=True, dtype="BF16")
    fused = describe_stack(fused_stack(), (3, 4, 4), "diagonal", tensors=FUSED_TENSORS)
    return describe([fc, fused])


def joined_example():
    """Grouped-query q and k, of unequal width, in one matrix."""
    names = [f"model.layers.0.self_attn.{role}_proj.weight" for role in "qk"]
    slices = tuple(
        Placement(0, role, name, PLAIN, (inner, 8)) for role, name, inner in zip("qk", names, (12, 4), strict=True)
    )
    held = tensors((names[0], (12, 8)), (names[1], (4, 8)))
    return describe([describe_stack(Stack("qk.0", slices, joined=True), (1, 5, 5), "diagonal", tensors=held)])


def stored(descriptor):
    factors = {
        stack.factor_names[factor]: info(stack.factor_names[factor], shape, stack.dtype_of(factor))
        for stack in descriptor.stacks
        for factor, shape in stack.factor_shapes.items()
    }
    return factors | tensors(*((name, (0,)) for name in descriptor.slices))


def test_names_shapes_and_counts():
    fc, fused = example().stacks
    assert fc.factor_names == {
        factor: f"model.layers.0.trawl.fc_0_1.{factor}" for factor in ("left", "right", "core", "stack", "right_order")
    }
    assert fc.interpolated == ("right",)
    assert fc.factor_shapes == {
        "left": (12, 5),
        "right": (2, 6),
        "core": (2, 5, 6),
        "stack": (6, 2),
        "right_order": (8,),
    }
    assert fc.parameters == 12 * 5 + 2 * 6 + 2 * 5 * 6 + 6 * 2 + 8
    assert [fc.dtype_of(factor) for factor in fc.factor_shapes] == ["BF16"] * 4 + ["I64"]
    assert fused.factors == "h.0.trawl.attn_0"
    assert fused.factor_shapes == {"left": (16, 4), "right": (8, 4), "core": (3, 4)}
    assert fused.dtype == "F32"
    assert example().slices["h.0.qkv.weight"] == ((fused, 0), (fused, 1), (fused, 2))


def test_json_round_trip():
    value = json.loads(json.dumps(example().to_json()))
    assert (value["quant_method"], value["format_version"]) == ("trawl", 2)
    assert [stack.get("interpolated") for stack in value["stacks"]] == [["right"], None]
    assert value["stacks"][1]["slices"][2]["view"] == {
        "stored": "(heads part dim) hidden",
        "canonical": "(heads part dim) hidden",
        "sizes": {"part": 3, "dim": 4},
        "take": {"part": [2, 3]},
    }
    assert parse_descriptor(value, "config.json") == example()


def test_the_first_version_has_whole_factors():
    value = json.loads(json.dumps(example().to_json())) | {"format_version": 1}
    del value["stacks"][0]["interpolated"]
    stack = parse_descriptor(value, "config.json").stacks[0]
    assert stack.factor_shapes == {"left": (12, 5), "right": (8, 6), "core": (2, 5, 6), "stack": (6, 2)}


def test_joined_slices_are_rows_of_the_left_factor():
    (stack,) = joined_example().stacks
    assert stack.shape == (1, 16, 8)
    assert stack.factor_shapes == {"left": (16, 5), "right": (8, 5), "core": (1, 5)}
    assert stack.places == (Place(0, slice(0, 12)), Place(0, slice(12, 16)))
    value = json.loads(json.dumps(joined_example().to_json()))
    assert (value["format_version"], value["stacks"][0]["joined"]) == (2, True)
    assert parse_descriptor(value, "config.json") == joined_example()
    assert not any("joined" in stack for stack in example().to_json()["stacks"])  # what older readers know


def test_names_for_modules():
    assert stack_id("attn-qo.20-30,35") == "attn_qo_20_30_35"
    assert factors_prefix("q.3", "bert.encoder.layer.3.attention.self.query.weight") == "bert.encoder.layer.3.trawl.q_3"
    assert factors_prefix("q.3", "h.3.moe.7.weight") == "h.3.trawl.q_3"
    assert factors_prefix("embed", "model.embed_tokens.weight") == "model.trawl.embed"
    assert factors_prefix("lm_head", "lm_head.weight") == "trawl.lm_head"
    assert factors_prefix("lm_head", "weight") is None


@pytest.mark.parametrize(
    ("stacks", "message"),
    [
        ([(fused_stack((0, 2)), FUSED_TENSORS)], r"h.0.qkv.weight \(48, 8\) is in stacks only in part"),
        ([(fused_stack((0, 1)), FUSED_TENSORS), (fused_stack((1, 2), "x"), FUSED_TENSORS)], "is in stacks twice"),
        ([(fused_stack(), FUSED_TENSORS), (fused_stack(), FUSED_TENSORS)], "same name"),
        ([(fc_stack("fc.0,1"), FC_TENSORS), (fc_stack("fc.0-1"), FC_TENSORS)], "same factors"),
    ],
)
def test_stacks_that_cannot_be_factored_are_refused(stacks, message):
    described = [describe_stack(stack, (len(stack.slices), 4, 4), "diagonal", tensors=held) for stack, held in stacks]
    with pytest.raises(PlanError, match=f"{message}.*--write dense"):
        describe(described)


@pytest.mark.parametrize(
    ("name", "shape", "view", "message"),
    [
        ("h.0.experts.w", (4, 12, 8), PLAIN, "holds experts"),
        ("h.0.mlp.experts.3.up.weight", (12, 8), PLAIN, "holds experts"),
        ("head", (12, 8), PLAIN, "no module"),
    ],
)
def test_slices_outside_linear_modules_are_refused(name, shape, view, message):
    stack = Stack("up.0", (Placement(0, "up", name, view, (12, 8)),))
    with pytest.raises(PlanError, match=message):
        describe_stack(stack, (1, 4, 4), "diagonal", tensors=tensors((name, shape)))


def test_views_that_mix_input_and_output_are_refused():
    view = View("(a b) c", "a (b c)", (("a", 4),))
    stack = Stack("up.0", (Placement(0, "up", "h.0.up.weight", view, (4, 24)),))
    item = describe_stack(stack, (1, 2, 2), "diagonal", tensors=tensors(("h.0.up.weight", (12, 8))))
    with pytest.raises(PlanError, match="mixes input and output"):
        describe([item])


def test_shards_that_agree_pass():
    descriptor = example()
    descriptor.check_tensors(stored(descriptor) | tensors(("model.embed.weight", (5, 8))), "out")


CORE = "model.layers.0.trawl.fc_0_1.core"
GATE = "model.layers.0.mlp.gate_proj.weight"


@pytest.mark.parametrize(
    ("name", "replacement", "message"),
    [
        (CORE, None, f"out: factor core of stack fc.0-1, tensor {CORE}, is in none of the shards"),
        (CORE, info(CORE, (2, 5, 7), "BF16"), r"is \(2, 5, 7\) BF16; config.json describes \(2, 5, 6\) BF16"),
        (CORE, info(CORE, (2, 5, 6), "F32"), "F32; config.json describes .* BF16"),
        (GATE, None, f"{GATE}, is in none"),
        (GATE, info(GATE, (12, 8)), r"is \(12, 8\); config.json says that it is factored"),
        ("h.9.trawl.x.left", info("h.9.trawl.x.left", (2,)), "belongs to no stack"),
    ],
)
def test_shards_that_disagree_are_refused(name, replacement, message):
    held = stored(example())
    held.pop(name, None)
    if replacement:
        held[name] = replacement
    with pytest.raises(LoadError, match=message):
        example().check_tensors(held, "out")


def put(path, value):
    """Return a change that sets one place of the JSON; a value of ``...`` deletes it."""

    def change(config):
        for key in path[:-1]:
            config = config[key]
        if value is ...:
            del config[path[-1]]
        else:
            config[path[-1]] = value

    return change


STACK, SLICE = ("stacks", 0), ("stacks", 0, "slices", 0)
DAMAGED = [
    (put(("quant_method",), "gptq"), "quant_method is 'gptq'"),
    (put(("format_version",), 3), "format_version is 3; expected 1 or 2, which this trawl reads"),
    (put((*STACK, "interpolated"), ["left"]), "in interpolative form: left; expected right"),
    (put((*STACK, "interpolated"), ["left", "right"]), "in interpolative form: left, right; expected right"),
    (put(("stacks", 1, "interpolated"), ["right"]), "in interpolative form: right; expected none"),
    (put((*STACK, "interpolated"), ["right", "right"]), "a list of left, right, or both in this order"),
    (put((*STACK, "interpolated"), "right"), "interpolated is 'right'; expected a list of left, right"),
    (put((*STACK, "interpolated"), [["right"]]), "a list of left, right, or both in this order"),
    (put(("format_version",), True), "format_version is True"),
    (put(("format_version",), ...), "has no format_version"),
    (put(("extra",), 1), "unknown field 'extra'"),
    (put(("stacks",), []), "stacks is .*; expected a list"),
    (put(STACK, 7), r"stacks\[0\] is 7; expected an object"),
    (put((*STACK, "name"), "../../etc/passwd"), r"stacks\[0\]: name is '../../etc/passwd'"),
    (put((*STACK, "name"), ".."), "name is '..'"),
    (put((*STACK, "name"), "a/b"), "name is 'a/b'"),
    (put((*STACK, "name"), "x" * 1000), "name is 'xxx.*\\.\\.\\.;"),
    (
        put((*STACK, "name"), "fc.7"),
        "has its factors at model.layers.0.trawl.fc_0_1; expected model.layers.0.trawl.fc_7",
    ),
    (put((*STACK, "factors"), "model/../x"), "factors is 'model/../x'"),
    (put((*STACK, "factors"), "model.layers.1.trawl.fc_0_1"), "expected model.layers.0.trawl.fc_0_1"),
    (put((*STACK, "shape"), [6, 12]), "shape is .*; expected three integers"),
    (put((*STACK, "shape"), [6, 12, 10**30]), "shape is .*; expected a list of integers"),
    (put((*STACK, "shape"), [6, 12, 8.0]), "shape is"),
    (put((*STACK, "shape"), 10**5000), "shape is of type int and too large to show"),
    (put((*STACK, "shape"), [6, 12, -8]), "shape is"),
    (put((*STACK, "shape"), [5, 12, 8]), r"shape \(5, 12, 8\) but 6 slices"),
    (put((*STACK, "shape"), [6, 12, 9]), r"is \(12, 8\); expected \(12, 9\)"),
    (put((*STACK, "rank"), [2, 13, 6]), r"ranks \(2, 13, 6\), above its sizes"),
    (put((*STACK, "rank"), [7, 5, 6]), "stack rank 7 for 6 slices"),
    (put((*STACK, "stack_factor"), False), "stack rank 2 for 6 slices and no stack factor"),
    (put((*STACK, "stack_factor"), 1), "stack_factor is 1; expected true or false"),
    (put((*STACK, "core"), "diagonal"), "diagonal core and ranks 5 and 6"),
    (put((*STACK, "core"), "tt"), "core is 'tt'"),
    (put((*STACK, "dtype"), "I8"), "dtype is 'I8'"),
    (put((*SLICE, "tensor"), "../x"), r"slices\[0\]: tensor is '../x'"),
    (put((*SLICE, "tensor"), "model..x"), "tensor is 'model..x'"),
    (put((*SLICE, "tensor"), "model.layers.0.mlp.up_proj.weight"), "is in stacks twice"),
    (put((*SLICE, "stored_shape"), [12, 8, 1]), "stored_shape is .*; expected two sizes"),
    (put((*SLICE, "stored_shape"), [8, 12]), r"is \(8, 12\); expected \(12, 8\)"),
    (put((*SLICE, "view"), "inner hidden"), "view is 'inner hidden'; expected an object"),
    (put((*SLICE, "view", "stored"), "inner hidden ..."), "stored is 'inner hidden ...'"),
    (put((*SLICE, "view", "stored"), "(inner hidden"), "malformed"),
    (put((*SLICE, "view", "canonical"), "inner other"), "does not name the same axes"),
    (put((*SLICE, "view", "sizes"), {"inner": True}), "sizes.inner is True"),
    (put((*SLICE, "view", "sizes"), [1]), "sizes is"),
    (put((*SLICE, "view", "sizes"), {"inner": 5}), r"tensor is \(12, 8\); expected \(5, hidden\)"),
    (put((*SLICE, "view", "take"), {"inner": [0, 6]}), r"is \(6, 8\); expected \(12, 8\)"),
    (put((*SLICE, "view", "take"), {"inner": [0]}), "take.inner is"),
    (put((*SLICE, "view", "take"), {"inner": [6, 2]}), "cannot take 6:2"),
    (put(("stacks", 1, "slices", 0, "view", "take"), {"part": [1, 2]}), "h.0.qkv.weight is in stacks twice"),
    (put(("stacks", 1, "slices", 0, "view", "sizes"), {"part": 3, "heads": 4}), None),  # another way to say the same
]


DAMAGED_JOINED = [
    (put((*STACK, "joined"), ...), r"shape \(1, 16, 8\) but 2 slices"),
    (put((*STACK, "joined"), False), r"shape \(1, 16, 8\) but 2 slices"),
    (put((*STACK, "joined"), 1), "joined is 1; expected true or false"),
    (put((*STACK, "joined"), None), "joined is None; expected true or false"),
    (put((*STACK, "shape"), [2, 16, 8]), r"shape \(2, 16, 8\) is joined; expected a size of 1"),
    (put((*STACK, "shape"), [1, 17, 8]), r"shape \(1, 17, 8\) but its joined slices have 16 rows together"),
    (put((*STACK, "shape"), [1, 12, 8]), "joined slices have 16 rows"),
    (put((*STACK, "shape"), [1, 16, 9]), r"is \(12, 8\); expected \(12, 9\)"),
    (put((*STACK, "core"), "full"), "is joined; expected .* a diagonal core"),
    (put((*STACK, "stack_factor"), True), "is joined; expected .* no stack factor"),
    (put((*STACK, "rank"), [1, 9, 9]), "diagonal core and ranks 9 and 9"),
    (put((*STACK, "rank"), [2, 5, 5]), "stack rank 2 for 1 slices"),
    (put((*SLICE, "stored_shape"), [12, 6]), r"is \(12, 6\); expected \(12, 8\)"),
    (put((*SLICE, "stored_shape"), [1 << 40, 8]), "rows together"),
    (put((*SLICE, "tensor"), "model.layers.0.self_attn.k_proj.weight"), "several shapes"),
]


@pytest.mark.parametrize(("change", "message"), DAMAGED_JOINED)
def test_damaged_joined_descriptors_say_what_and_where(change, message):
    config = json.loads(json.dumps(joined_example().to_json()))
    change(config)
    with pytest.raises(LoadError, match=message) as caught:
        parse_descriptor(config, "out/config.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("number", range(len(DAMAGED)))
def test_damaged_descriptors_say_what_and_where(number):
    change, message = DAMAGED[number]
    config = json.loads(json.dumps(example().to_json()))
    change(config)
    if message is None:
        assert parse_descriptor(config, "out/config.json").factor_shapes == example().factor_shapes
        return
    with pytest.raises(LoadError, match=message) as caught:
        parse_descriptor(config, "out/config.json")
    text = str(caught.value)
    assert text.startswith("out/config.json")
    assert "\n" not in text
    assert len(text) < 700


@pytest.mark.parametrize("value", [None, 3, [], "trawl", {}])
def test_other_json_is_refused(value):
    with pytest.raises(LoadError, match=r"out/config\.json"):
        parse_descriptor(value, "out/config.json")


def places(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in items:
        yield from places(each, (*path, key))


EXAMPLE = describe([*example().stacks, *joined_example().stacks]).to_json()
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=200, deadline=None)
@given(path=st.sampled_from([path for path in places(EXAMPLE) if path]), junk=JUNK)
def test_junk_anywhere_is_a_load_error_or_the_same(path, junk):
    config = copy.deepcopy(EXAMPLE)
    put(path, junk)(config)
    try:
        found = parse_descriptor(config, "config.json")
    except LoadError as e:
        assert "\n" not in str(e)  # noqa: PT017 (both outcomes are right)
    else:
        assert isinstance(found, Descriptor)
        assert parse_descriptor(found.to_json(), "config.json") == found
