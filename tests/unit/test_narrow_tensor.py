"""Descriptions of tensors of unequal width: padding, what is refused, and JSON back and forth."""

import pytest
import torch

from trawl.checkpoint import TensorInfo
from trawl.descriptor import Descriptor
from trawl.descriptor_reader import parse_descriptor
from trawl.errors import LoadError
from trawl.narrow_tensor import NarrowTensor, find_narrow_fault

DOWN = NarrowTensor("layers.0.down.weight", (5, 3), (5, 4))
GATE_UP = NarrowTensor("layers.0.gate_up.weight", (4, 5), (6, 5), parts=2)
BIAS = NarrowTensor("layers.0.gate_up.bias", (4,), (6,), parts=2)


@pytest.mark.parametrize(
    ("part", "rows"), [(DOWN, None), (GATE_UP, [0, 1, -1, 2, 3, -1]), (BIAS, [0, 1, -1, 2, 3, -1])]
)
def test_padding_puts_zeros_behind_each_part(part, rows):
    stored = torch.randn(part.shape)
    padded = part.pad(stored)
    assert padded.shape == part.full
    if rows is None:
        assert torch.equal(padded, torch.cat([stored, torch.zeros(5, 1)], dim=1))
    else:
        with_zeros = torch.cat([stored, torch.zeros(1, *part.shape[1:])])
        assert torch.equal(padded, with_zeros[rows])


def test_a_description_survives_json():
    descriptor = Descriptor((), (DOWN, GATE_UP, BIAS))
    assert parse_descriptor(descriptor.to_json(), "config.json") == descriptor


@pytest.mark.parametrize(
    ("narrow", "fault"),
    [
        ([DOWN, DOWN], "described twice"),
        ([NarrowTensor("layers.0.weight", (3,), (4,)), NarrowTensor("embed.scale", (3,), (4,))], "neither the weight"),
        ([NarrowTensor("a.weight", (3, 4), (3, 4))], "one of them shorter"),
        ([NarrowTensor("a.weight", (3, 4), (4, 5))], "one of them shorter"),
        ([NarrowTensor("a.weight", (3, 4), (3,))], "one or two axes"),
        ([NarrowTensor("a.weight", (2, 2, 2), (2, 2, 4))], "one or two axes"),
        ([NarrowTensor("a.weight", (5, 4), (4, 4))], "each shorter"),
        ([NarrowTensor("a.weight", (3, 4), (6, 4), parts=2)], "expected 2 equal parts"),
    ],
)
def test_contradictions_are_found(narrow, fault):
    assert fault in find_narrow_fault(narrow, [])
    with pytest.raises(LoadError, match=fault):
        parse_descriptor(Descriptor((), tuple(narrow)).to_json(), "config.json")


def test_a_tensor_is_not_factored_and_narrow():
    assert "described twice" in find_narrow_fault([DOWN], [DOWN.tensor])
    assert find_narrow_fault([DOWN, GATE_UP, BIAS], ["layers.1.down.weight"]) is None


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("parts", 0, "parts is 0; expected an integer from 1"),
        ("parts", True, "parts is True"),
        ("shape", [3, -1], r"shape is \[3, -1\]; expected a list of integers"),
        ("full", "big", "full is 'big'"),
        ("tensor", "../weight", "tensor is '../weight'"),
        ("width", 3, "unknown field"),
    ],
)
def test_hostile_values_are_refused(field, value, message):
    described = Descriptor((), (DOWN,)).to_json()
    described["narrow"][0][field] = value
    with pytest.raises(LoadError, match=message):
        parse_descriptor(described, "config.json")


def test_nothing_described_is_refused():
    for empty in ({"stacks": []}, {"stacks": [], "narrow": []}):
        with pytest.raises(LoadError, match="expected a list of objects"):
            parse_descriptor({"quant_method": "trawl", "format_version": 1, **empty}, "config.json")


def test_shards_of_another_shape_are_refused():
    info = TensorInfo(DOWN.tensor, "F32", (5, 4), "model.safetensors", 0, 80)
    with pytest.raises(LoadError, match=r"is \(5, 4\); config.json describes it as \(5, 3\)"):
        Descriptor((), (DOWN,)).check_tensors({DOWN.tensor: info}, "out")
    with pytest.raises(LoadError, match="in none of the shards"):
        Descriptor((), (DOWN,)).check_tensors({}, "out")
