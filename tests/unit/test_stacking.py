import pytest
import torch

from trawl.checkpoint import open_folder
from trawl.decompose import CP
from trawl.errors import CheckpointError
from trawl.planning import match_checkpoint
from trawl.stacking import StoredSlices, format_layers, make_stacks, scan


@pytest.fixture
def checkpoint(zoo):
    return open_folder(zoo("llama", 1, torch.bfloat16))


def slices_of(checkpoint, roles=("gate", "up", "down")):
    return [part for part in match_checkpoint(checkpoint).placements if part.role in roles]


@pytest.mark.parametrize(
    ("layers", "text"), [((1,), "1"), ((0, 1, 2), "0-2"), ((5, 1, 2, 9, 8), "1-2,5,8-9"), ((), "")]
)
def test_layers_are_written_as_runs(layers, text):
    assert format_layers(layers) == text


@pytest.mark.parametrize(
    ("group", "names"),
    [
        (None, ["attn-qo.0-2", "attn-kv.0-2", "fc.0-2"]),
        (2, ["attn-qo.0-1", "attn-kv.0-1", "fc.0-1", "attn-qo.2", "attn-kv.2", "fc.2"]),
        (1, [f"{kind}.{layer}" for layer in range(3) for kind in ("attn-qo", "attn-kv", "fc")]),
    ],
)
def test_stacks_group_layers_then_kinds_then_shapes(group, names, checkpoint):
    placements = match_checkpoint(checkpoint).placements
    stacks = make_stacks(placements, group)
    assert [stack.name for stack in stacks] == names
    assert sorted(p.tensor for stack in stacks for p in stack.slices) == sorted(p.tensor for p in placements)
    assert all({part.shape for part in stack.slices} == {stack.shape[1:]} for stack in stacks)
    assert len(make_stacks(placements, group, single=True)) == len(placements)


@pytest.mark.parametrize(
    ("share", "group", "names"),
    [
        ("none", 1, [f"{role}.{layer}" for layer in range(3) for role in ("q", "k", "v", "o", "gate", "up", "down")]),
        ("input", 1, [f"{roles}.{layer}" for layer in range(3) for roles in ("qkv", "o", "gateup", "down")]),
        ("input", 2, ["qkv.0-1", "o.0", "gateup.0-1", "down.0", "o.1", "down.1", "qkv.2", "o.2", "gateup.2", "down.2"]),
        (
            "role",
            None,
            ["q.0-2", "k.0-2", "v.0-2", "o.0", "gate.0-2", "up.0-2", "down.0", "o.1", "down.1", "o.2", "down.2"],
        ),
    ],
)
def test_matrices_join_by_what_they_read(share, group, names, checkpoint):
    placements = match_checkpoint(checkpoint).placements
    stacks = make_stacks(placements, group, single=True, share=share)
    assert [stack.name for stack in stacks] == names
    assert sorted(p.tensor for stack in stacks for p in stack.slices) == sorted(p.tensor for p in placements)
    for stack in stacks:
        assert stack.joined == (len(stack.slices) > 1)
        assert stack.shape == (1, sum(part.shape[0] for part in stack.slices), 32)
        assert stack.parameters == sum(part.shape[0] * 32 for part in stack.slices)


def test_joined_slices_are_one_matrix_that_is_read_once(checkpoint, monkeypatch):
    stack = make_stacks(slices_of(checkpoint, ("q", "k", "v")), 2, single=True, share="input")[0]
    reads = []
    read = type(checkpoint).read
    monkeypatch.setattr(type(checkpoint), "read", lambda self, name: reads.append(name) or read(self, name))
    source = StoredSlices(checkpoint, stack, 1.0, torch.device("cpu"))
    for _ in range(3):
        (matrix,) = source.slices()
        assert (1, *matrix.shape) == source.shape == (1, 128, 32)
        assert matrix.dtype == torch.bfloat16
    assert reads == [part.tensor for part in stack.slices]
    for place, part in zip(stack.places, stack.slices, strict=True):
        assert place.s == 0
        assert torch.equal(matrix[place.rows], part.view.apply(checkpoint.read(part.tensor)))


def test_scan_finds_the_largest_magnitude_and_refuses_integers(checkpoint, tmp_path):
    name = slices_of(checkpoint)[0].tensor
    assert scan(checkpoint, name) == float(checkpoint.read(name).abs().max())
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2, 2, dtype=torch.int8)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        CheckpointError, match=r"tensor a \(2, 2\) is stored as I8; expected one of F64, F32, F16, BF16"
    ):
        scan(open_folder(tmp_path), "a")
    save_file({"a": torch.full((2, 2), 1e200, dtype=torch.float64)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"tensor a \(2, 2\) holds an entry of 1e\+200, whose square overflows"):
        scan(open_folder(tmp_path), "a")


@pytest.mark.parametrize("kept", [0, 1, 4, 9])
def test_kept_slices_are_read_once_and_change_no_bit(kept, checkpoint, monkeypatch):
    (stack,) = make_stacks(slices_of(checkpoint), None)
    nbytes = stack.shape[1] * stack.shape[2] * 2
    reads = []
    read = type(checkpoint).read
    monkeypatch.setattr(type(checkpoint), "read", lambda self, name: reads.append(name) or read(self, name))
    source = StoredSlices(checkpoint, stack, 1.0, torch.device("cpu"), max_memory=kept * nbytes + 1)
    first = [matrix.clone() for matrix in source.slices()]
    for again in (source.slices(), source.slices()):
        for matrix, before in zip(again, first, strict=True):
            assert torch.equal(matrix, before)
            assert matrix.stride() in ((32, 1), (1, 48))
    assert len(reads) == 9 + 2 * (9 - kept)
    with_cache = CP(rank=3).decompose(source)
    without = CP(rank=3).decompose(StoredSlices(checkpoint, stack, 1.0, torch.device("cpu")))
    for name, tensor in with_cache.tensors().items():
        assert torch.equal(tensor, without.tensors()[name])


def test_every_slice_is_counted(checkpoint):
    (stack,) = make_stacks(slices_of(checkpoint), None)
    seen = []
    source = StoredSlices(checkpoint, stack, 1.0, torch.device("cpu"), lambda: seen.append(1))
    for _ in range(2):
        assert len(list(source.slices())) == 9
    assert len(seen) == 18
