import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from trawl.checkpoint import open_folder
from trawl.errors import CheckpointError


@pytest.fixture
def folder(zoo, tmp_path) -> Path:
    return Path(shutil.copytree(zoo("llama", 3), tmp_path / "model"))


@pytest.fixture
def single(zoo, tmp_path) -> Path:
    return Path(shutil.copytree(zoo("llama"), tmp_path / "model"))


def edit_config(folder: Path, **values) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64])
def test_headers_and_reads_agree_with_safetensors(tmp_path, dtype):
    tensors = {"b": torch.arange(12).reshape(3, 4).to(dtype), "a": torch.ones(5, dtype=torch.float16)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    checkpoint = open_folder(tmp_path)
    for name, tensor in tensors.items():
        info = checkpoint.tensors[name]
        assert info.shape == tuple(tensor.shape)
        assert info.nbytes == tensor.numel() * tensor.element_size()
        assert torch.equal(checkpoint.read(name), tensor)
    assert checkpoint.parameters == 17


def test_reading_is_memory_mapped(single):
    checkpoint = open_folder(single)
    name = "model.embed_tokens.weight"
    assert checkpoint.read(name).untyped_storage().data_ptr() == checkpoint.read(name).untyped_storage().data_ptr()


def test_side_files_leave_out_weights_and_earlier_records(folder):
    for name in ("pytorch_model.bin", "model.gguf", "trawl.json", "README.md", ".hidden", "tokenizer.json"):
        (folder / name).write_text("x")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / "report").mkdir()
    (folder / "report" / "spectra.png").write_text("x")
    (folder / "report.html").write_text("x")
    names = {str(path) for path in open_folder(folder).side_files}
    assert not names & {"report.html", "report/spectra.png"}
    (folder / "trawl.json").unlink()
    assert {"report.html", "report/spectra.png"} <= {str(path) for path in open_folder(folder).side_files}
    assert {"config.json", "tokenizer.json", "1_Pooling/config.json", "model.safetensors.index.json"} <= names
    assert not names & {"pytorch_model.bin", "model.gguf", "trawl.json", "README.md", ".hidden"}


def test_fingerprint_follows_weights_headers_and_config(single, tmp_path):
    first = open_folder(single).fingerprint
    copy = Path(shutil.copytree(single, tmp_path / "copy"))
    assert open_folder(copy).fingerprint == first
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert open_folder(copy).fingerprint != first
    edit_config(single, rope_theta=1.0)
    assert open_folder(single).fingerprint != first


def break_nothing_there(folder):
    shutil.rmtree(folder)


def break_no_config(folder):
    (folder / "config.json").unlink()


def break_config_syntax(folder):
    (folder / "config.json").write_text("{'a': 1")


def break_config_type(folder):
    (folder / "config.json").write_text("[1]")


def break_missing_shard(folder):
    sorted(folder.glob("*.safetensors"))[1].unlink()


def break_truncated_shard(folder):
    path = sorted(folder.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-7])


def break_truncated_header(folder):
    sorted(folder.glob("*.safetensors"))[1].write_bytes(struct.pack("<Q", 1 << 40) + b"{}")


def break_header_json(folder):
    sorted(folder.glob("*.safetensors"))[1].write_bytes(struct.pack("<Q", 4) + b"nope")


def break_header_holes(folder):
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}).encode()
    path = sorted(folder.glob("*.safetensors"))[1]
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(12))


def break_absent_tensor(folder):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.extra.weight"] = next(iter(index["weight_map"].values()))
    path.write_text(json.dumps(index))


def break_shard_path(folder):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = "../model-00001.safetensors"
    path.write_text(json.dumps(index))


def break_no_index(folder):
    (folder / "model.safetensors.index.json").unlink()


def break_pickle_only(folder):
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")


def break_no_weights(folder):
    for path in folder.glob("*.safetensors*"):
        path.unlink()


def break_quantized(folder):
    edit_config(folder, quantization_config={"quant_method": "awq", "bits": 4})


def break_factored(folder):
    edit_config(folder, quantization_config={"quant_method": "trawl"})


BROKEN = [
    (break_nothing_there, "is not a folder"),
    (break_no_config, r"has no config\.json"),
    (break_config_syntax, r"config\.json is not readable JSON"),
    (break_config_type, "holds a JSON list; expected an object"),
    (break_missing_shard, r"index\.json names the shard model-00002-of-\d+\.safetensors, which is not in"),
    (break_truncated_shard, r"model-00002-of-\d+\.safetensors is truncated: its header needs \d+ bytes, the file has"),
    (break_truncated_header, r"is truncated or not a safetensors file: its header claims 1099511627776 bytes"),
    (break_header_json, "unreadable safetensors header"),
    (break_header_holes, r"tensor a \(2,\) F32 claims bytes"),
    (break_absent_tensor, r"places tensor model\.extra\.weight in .*, but it is nowhere"),
    (break_shard_path, r"names the shard '\.\./model-00001\.safetensors'; expected a plain file name"),
    (break_no_index, r"safetensors files .* but no model\.safetensors\.index\.json"),
    (break_pickle_only, r"only pickled weights \(pytorch_model\.bin\).*save_pretrained"),
    (break_no_weights, r"has no weights: expected model\.safetensors"),
    (break_quantized, r"quantized \(quant_method 'awq'\)"),
    (break_factored, "is factored by trawl already; .*trawl densify"),
]


@pytest.mark.parametrize(("breaker", "message"), BROKEN, ids=lambda value: getattr(value, "__name__", ""))
def test_a_broken_checkpoint_is_named_on_one_line(breaker, message, folder):
    breaker(folder)
    with pytest.raises(CheckpointError, match=message) as error:
        open_folder(folder)
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)


def test_a_tensor_in_two_shards_is_refused(folder):
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    shutil.copy(first, second)
    with pytest.raises(CheckpointError, match=r"stand in two shards"):
        open_folder(folder)
