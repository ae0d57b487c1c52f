"""Write a full-size checkpoint of random weights with a published configuration, so that nothing need be downloaded.

    python benchmarks/synthetic_checkpoint.py /tmp/llama-8b                  # 16.1 GB of bfloat16 in 4 shards
    python benchmarks/synthetic_checkpoint.py /tmp/tiny --config tiny --shards 2

A 2-D weight is `W = std (sqrt(1 - e) N + sqrt(e) A diag(s) B^T)`, with N white noise and A, B of rank RANK: half of the
columns belong to the axis (every matrix on that axis shares them, in all layers) and half to the tensor alone, with
`s_k` falling as k^-DECAY. So single matrices and stacks of many layers both have a decaying spectrum that a low rank
can catch in part, over a noise floor that it cannot. Embeddings are noise, norms are ones.

Each tensor is a function of its name and the seed; the same thread count gives the same bytes. Peak memory is a few
hundred MB: tensors are made in blocks of rows and go straight to their place in the shard.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

STD = 0.02  # of every entry, as in the initialisation of the models imitated
LOW_RANK_ENERGY = 0.7  # e: the share of the squared norm that is not noise
RANK = 256
DECAY = 0.7
BLOCK = 1 << 24  # entries made at a time

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "mlp_bias": False,
    "model_type": "llama",
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": LLAMA
    | {
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "tiny": LLAMA
    | {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_size": 64,
        "intermediate_size": 224,
        "max_position_embeddings": 16384,
        "num_attention_heads": 8,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
}


@dataclass(frozen=True)
class Entry:
    """One tensor to write; `axes` names what its rows and columns run over, and is empty for noise or ones."""

    name: str
    shape: tuple[int, ...]
    axes: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Bytes in bfloat16."""
        return 2 * math.prod(self.shape)


def entries(config: dict[str, Any]) -> Iterator[Entry]:
    """Yield a llama model's tensors in the order of its state dict."""
    hidden, mlp, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    yield Entry("model.embed_tokens.weight", (vocabulary, hidden))
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        yield Entry(f"{prefix}.self_attn.q_proj.weight", (hidden, hidden), ("query", "hidden"))
        yield Entry(f"{prefix}.self_attn.k_proj.weight", (keys, hidden), ("key", "hidden"))
        yield Entry(f"{prefix}.self_attn.v_proj.weight", (keys, hidden), ("key", "hidden"))
        yield Entry(f"{prefix}.self_attn.o_proj.weight", (hidden, hidden), ("hidden", "query"))
        yield Entry(f"{prefix}.mlp.gate_proj.weight", (mlp, hidden), ("mlp", "hidden"))
        yield Entry(f"{prefix}.mlp.up_proj.weight", (mlp, hidden), ("mlp", "hidden"))
        yield Entry(f"{prefix}.mlp.down_proj.weight", (hidden, mlp), ("hidden", "mlp"))
        yield Entry(f"{prefix}.input_layernorm.weight", (hidden,))
        yield Entry(f"{prefix}.post_attention_layernorm.weight", (hidden,))
    yield Entry("model.norm.weight", (hidden,))
    yield Entry("lm_head.weight", (vocabulary, hidden))


def generator(seed: int, name: str) -> torch.Generator:
    """Return a generator that depends on the seed and a name only."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class Weights:
    """Makes tensors, in blocks of rows; keeps the factors that all matrices on an axis share."""

    def __init__(self, seed: int) -> None:
        """Start with no shared factor made."""
        self.seed = seed
        self.shared: dict[tuple[str, int], Tensor] = {}

    def blocks(self, entry: Entry) -> Iterator[Tensor]:
        """Yield the rows of one tensor, bfloat16, a block at a time."""
        if len(entry.shape) == 1:
            yield torch.ones(entry.shape, dtype=torch.bfloat16)
            return
        rows, columns = entry.shape
        random = generator(self.seed, entry.name)
        noise = STD * (math.sqrt(1 - LOW_RANK_ENERGY) if entry.axes else 1.0)
        left, right = self.factors(entry, random) if entry.axes else (None, None)
        step = max(1, BLOCK // columns)
        for start in range(0, rows, step):
            block = torch.randn(min(step, rows - start), columns, generator=random).mul_(noise)
            if left is not None and right is not None:
                block.addmm_(left[start : start + step], right.T)
            yield block.to(torch.bfloat16)

    def factors(self, entry: Entry, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return A diag(s), scaled to the energy wanted, and B: (rows, rank) and (columns, rank)."""
        rows, columns = entry.shape
        rank = min(RANK, *entry.shape) // 2
        left = torch.cat([self.axis(entry.axes[0], rows, rank), torch.randn(rows, rank, generator=random)], 1)
        right = torch.cat([self.axis(entry.axes[1], columns, rank), torch.randn(columns, rank, generator=random)], 1)
        decay = torch.arange(1, rank + 1, dtype=torch.float32) ** -DECAY
        gains = torch.cat([decay * (1 + 0.3 * torch.randn(rank, generator=random)), decay])  # (2 rank)
        # columns of A and B are independent with unit variance, so an entry of A diag(s) B^T has variance sum(s^2)
        scale = STD * math.sqrt(LOW_RANK_ENERGY) / float(gains.norm())
        return left * (gains * scale), right

    def axis(self, name: str, length: int, rank: int) -> Tensor:
        """Return the columns that every matrix on an axis shares, (length, rank)."""
        key = (name, rank)
        if key not in self.shared:
            self.shared[key] = torch.randn(length, rank, generator=generator(self.seed, f"axis {name}"))
        return self.shared[key]


def split(items: list[Entry], shards: int) -> list[list[Entry]]:
    """Return consecutive groups of about the same number of bytes."""
    total, passed = sum(entry.size for entry in items), 0
    groups: list[list[Entry]] = [[] for _ in range(shards)]
    for entry in items:
        groups[min(shards - 1, passed * shards // total)].append(entry)
        passed += entry.size
    return [group for group in groups if group]


def header(items: list[Entry]) -> bytes:
    """Return the start of a safetensors file: its length and the description of the tensors that follow."""
    description: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in items:
        data_offsets = [offset, offset + entry.size]
        description[entry.name] = {"dtype": "BF16", "shape": list(entry.shape), "data_offsets": data_offsets}
        offset += entry.size
    text = json.dumps(description, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_shard(file: BinaryIO, items: list[Entry], weights: Weights) -> None:
    """Write one shard, tensor after tensor."""
    file.write(header(items))
    for entry in items:
        file.writelines(block.view(torch.uint8).numpy().data.cast("B") for block in weights.blocks(entry))


def write_checkpoint(out: Path, config: dict[str, Any], shards: int, seed: int) -> int:
    """Write config, shards and index into a new folder, and return the bytes of the tensors."""
    out.mkdir(parents=True)
    items = list(entries(config))
    total = sum(entry.size for entry in items)
    if shutil.disk_usage(out).free < total + (1 << 28):
        out.rmdir()
        sys.exit(f"{out}: {total / 1e9:.1f} GB needed, {shutil.disk_usage(out.parent).free / 1e9:.1f} GB free")
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {"bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"]}
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    weights = Weights(seed)
    groups = split(items, shards)
    names = [f"model-{k:05d}-of-{len(groups):05d}.safetensors" for k in range(1, len(groups) + 1)]
    if len(groups) == 1:
        names = ["model.safetensors"]
    for name, group in zip(names, groups, strict=True):
        started = time.perf_counter()
        with (out / name).open("wb") as file:
            write_shard(file, group, weights)
        size, seconds = sum(entry.size for entry in group), time.perf_counter() - started
        print(f"{name}: {len(group)} tensors, {size / 1e9:.2f} GB, {seconds:.0f} s", flush=True)
    if len(groups) > 1:
        weight_map = {entry.name: name for name, group in zip(names, groups, strict=True) for entry in group}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return total


def main() -> None:
    """Read the arguments and write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a folder that does not exist yet")
    parser.add_argument("--config", choices=sorted(CONFIGS), default="llama-3.1-8b")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.out.exists():
        parser.error(f"{arguments.out} exists")
    if arguments.shards < 1:
        parser.error(f"--shards {arguments.shards}: at least 1")
    started = time.perf_counter()
    total = write_checkpoint(arguments.out, CONFIGS[arguments.config], arguments.shards, arguments.seed)
    print(f"{arguments.out}: {total / 1e9:.2f} GB in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
