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
