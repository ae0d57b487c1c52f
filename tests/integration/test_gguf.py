"""GGUF files: converted once, then like any other checkpoint."""

import io
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, dynamic_module_utils

from trawl.checkpoint import open_folder
from trawl.errors import CheckpointError
from trawl.hub import open_checkpoint

gguf = pytest.importorskip("gguf", reason="needs the extra: pip install 'trawl-llm[gguf]'")

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS = 32, 64, 2, 4, 2


def write_gguf(path: Path) -> Path:
    """Write a tiny llama with byte-level tokens and eight-bit matrices."""
    torch.manual_seed(0)
    tokens = ["<unk>", "<s>", "</s>", *sorted(chr(c) for c in range(33, 127)), "Ġ", "th", "the"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["t h", "th e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)

    def add(name: str, *shape: int) -> None:
        values = (torch.randn(*shape) * 0.2).numpy()
        if len(shape) == 1:
            writer.add_tensor(name, values)
            return
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    add("token_embd.weight", len(tokens), HIDDEN)
    add("output_norm.weight", HIDDEN)
    add("output.weight", len(tokens), HIDDEN)
    for layer in range(LAYERS):
        block = f"blk.{layer}"
        add(f"{block}.attn_norm.weight", HIDDEN)
        add(f"{block}.ffn_norm.weight", HIDDEN)
        add(f"{block}.attn_q.weight", HIDDEN, HIDDEN)
        add(f"{block}.attn_k.weight", HIDDEN * KV_HEADS // HEADS, HIDDEN)
        add(f"{block}.attn_v.weight", HIDDEN * KV_HEADS // HEADS, HIDDEN)
        add(f"{block}.attn_output.weight", HIDDEN, HIDDEN)
        add(f"{block}.ffn_gate.weight", INNER, HIDDEN)
        add(f"{block}.ffn_up.weight", INNER, HIDDEN)
        add(f"{block}.ffn_down.weight", HIDDEN, INNER)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_becomes_a_checkpoint_with_the_same_logits(tmp_path, monkeypatch):
    import trawl

    monkeypatch.setenv("TRAWL_CACHE", str(tmp_path / "cache"))
    path = write_gguf(tmp_path / "tiny.Q8_0.gguf")
    checkpoint = open_checkpoint(path)
    assert "quantization_config" not in checkpoint.config
    assert {info.dtype for info in checkpoint.tensors.values()} == {"F32"}

    reference = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).eval()
    converted = AutoModelForCausalLM.from_pretrained(checkpoint.folder).eval()
    tokens = AutoTokenizer.from_pretrained(checkpoint.folder)("the thing", return_tensors="pt").input_ids
    assert tokens.shape[1] > 1
    with torch.no_grad():
        torch.testing.assert_close(converted(tokens).logits, reference(tokens).logits)

    before = (checkpoint.folder / "model.safetensors").stat().st_mtime_ns
    assert open_checkpoint(path).folder == checkpoint.folder
    assert (checkpoint.folder / "model.safetensors").stat().st_mtime_ns == before

    report = trawl.compress(path, trawl.Recipe(rank=4, roles="fc"), tmp_path / "out")
    assert report.stacks[0].shape == (6, INNER, HIDDEN)
    assert open_folder(tmp_path / "out").tensors.keys() == checkpoint.tensors.keys()


def test_code_beside_a_file_is_not_run(tmp_path, monkeypatch):
    """Transformers reads the folder's tokenizer_config.json too, and asks on a terminal where nothing is said."""
    monkeypatch.setenv("TRAWL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 10))  # somebody who says yes to everything
    write_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": [null, "own.OwnTokenizer"]}}')
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(CheckpointError, match=r"which is not run; move tiny\.gguf into a folder of its own"):
        open_checkpoint(tmp_path / "tiny.gguf")
    assert not (tmp_path / "ran").exists()
    assert not list((tmp_path / "cache" / "gguf").iterdir())


def test_a_file_that_is_not_gguf_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("TRAWL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "bad.gguf").write_bytes(b"GGUFnot really" * 100)
    with pytest.raises(CheckpointError, match=r"transformers cannot read .*bad\.gguf"):
        open_checkpoint(tmp_path / "bad.gguf")
    assert not list((tmp_path / "cache" / "gguf").iterdir())
