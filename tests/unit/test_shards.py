import os

import pytest
import torch
from safetensors.torch import load_file, save

from trawl.checkpoint import read_shard
from trawl.shards import FileRange, copy_file, sealed, write_shard


@pytest.fixture
def shard(tmp_path):
    path = tmp_path / "source.safetensors"
    tensors = {name: torch.randn(3, 5) for name in "abcd"} | {"odd": torch.ones(3, dtype=torch.uint8)}
    path.write_bytes(save(tensors, metadata={"format": "pt"}))
    return path


def test_a_shard_of_ranges_is_the_same_file(shard, tmp_path):
    read = read_shard(shard)
    parts = [FileRange(shard, info.start, info.stop) for info in read.tensors]
    write_shard(tmp_path / "copy", read.header, parts)
    assert (tmp_path / "copy").read_bytes() == shard.read_bytes()


@pytest.mark.parametrize("replaced", [{"a"}, {"b", "c"}, {"d", "odd"}, {"a", "b", "c", "d", "odd"}])
def test_tensors_take_the_place_of_ranges(replaced, shard, tmp_path):
    read = read_shard(shard)
    before = load_file(shard)
    parts = [
        before[info.name] * 2 if info.name in replaced else FileRange(shard, info.start, info.stop)
        for info in read.tensors
    ]
    write_shard(tmp_path / "new", read.header, parts)
    for name, tensor in load_file(tmp_path / "new").items():
        assert torch.equal(tensor, before[name] * (2 if name in replaced else 1))


@pytest.mark.parametrize("kernel", [True, False])
def test_a_copy_is_the_same_file_with_and_without_the_kernel(kernel, shard, tmp_path, monkeypatch):
    if not kernel:

        def refuse(*_args, **_kwargs):
            raise OSError(18, "Invalid cross-device link")

        monkeypatch.setattr(os, "copy_file_range", refuse)
    copy_file(shard, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == shard.read_bytes()


def test_a_file_that_fails_half_way_does_not_appear(shard, tmp_path):
    read = read_shard(shard)
    beyond = FileRange(shard, read.nbytes - 8, read.nbytes + 8)
    with pytest.raises(OSError, match="file ended at byte"):
        write_shard(tmp_path / "new", read.header, [beyond])
    assert not (tmp_path / "new").exists()


def test_sealed_replaces_only_when_complete(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(TypeError), sealed(path) as file:
        file.write(None)
    assert path.read_text() == "old"
    with sealed(path) as file:
        file.write(b"new")
    assert path.read_text() == "new"
