"""One tiny random model per family, made with transformers and without a network.

    folder = save_zoo("phi3", tmp_path / "phi3", shards=3, dtype=torch.bfloat16)

Every size is small and no two that could be confused are equal; every parameter, norms and biases too, is random, so
that a tensor which is not carried over bit by bit shows.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

LAYERS, HIDDEN, INNER, HEADS, KV_HEADS, VOCABULARY = 3, 32, 48, 4, 2, 96

PLAIN = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WIDE = {**PLAIN, "intermediate_size": INNER}
GROUPED = {**WIDE, "num_key_value_heads": KV_HEADS}
GPT = {
    "n_embd": HIDDEN,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "n_inner": INNER,
    "n_positions": 64,
    "vocab_size": VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class ZooEntry:
    """How to make one tiny model.

    Attributes:
        config: name of the config class in transformers.
        kwargs: its arguments.
        auto: name of the Auto class that builds and loads it.
        family: the family file that serves it.
        roles: the roles that it has.
    """

    config: str
    kwargs: dict[str, Any] = field(repr=False)
    auto: str = "AutoModelForCausalLM"
    family: str = "llama"
    roles: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up", "down")


UNGATED = ("q", "k", "v", "o", "up", "down")
MASKED = "AutoModelForMaskedLM"

ZOO: dict[str, ZooEntry] = {
    "llama": ZooEntry("LlamaConfig", GROUPED),
    "mistral": ZooEntry("MistralConfig", {**GROUPED, "head_dim": 16}),  # head_dim apart from hidden / heads, as in Nemo
    "qwen2": ZooEntry("Qwen2Config", GROUPED),
    "qwen3": ZooEntry("Qwen3Config", {**GROUPED, "head_dim": 16}),
    "gemma2": ZooEntry("Gemma2Config", {**GROUPED, "head_dim": 16}),
    "gemma3_text": ZooEntry("Gemma3TextConfig", {**GROUPED, "head_dim": 16}, family="gemma3"),
    "phi3": ZooEntry("Phi3Config", GROUPED, family="phi3"),
    "olmo2": ZooEntry("Olmo2Config", GROUPED),
    "gpt2": ZooEntry("GPT2Config", GPT, family="gpt2", roles=UNGATED),
    "gptj": ZooEntry("GPTJConfig", {**GPT, "rotary_dim": 4}, family="gptj", roles=UNGATED),
    "gpt_neox": ZooEntry("GPTNeoXConfig", WIDE, family="gpt_neox", roles=UNGATED),
    "opt": ZooEntry("OPTConfig", {**PLAIN, "ffn_dim": INNER, "word_embed_proj_dim": 24}, family="opt", roles=UNGATED),
    "bert": ZooEntry("BertConfig", WIDE, MASKED, family="bert", roles=UNGATED),
    "roberta": ZooEntry("RobertaConfig", WIDE, MASKED, family="bert", roles=UNGATED),
}


def build_zoo(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Build one family's tiny model in evaluation mode; the same bytes at every call."""
    entry = ZOO[name]
    config = getattr(transformers, entry.config)(**entry.kwargs)
    model: PreTrainedModel = getattr(transformers, entry.auto).from_config(config)
    for parameter in randomize(model).parameters():
        parameter.data = parameter.data.to(dtype)  # not model.to: that rounds rotary buffers, which loading keeps
    return model.eval()


def randomize(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Fill every parameter from one seed: norm weights around 1, all else around 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = parameter.dim() == 1 and not name.endswith("bias")
            parameter.normal_(1.0 if norm else 0.0, 0.2, generator=generator)
    return model


def save_zoo(name: str, folder: Path, shards: int = 1, dtype: torch.dtype = torch.float32) -> Path:
    """Save one family's tiny model as a checkpoint folder of one shard, or of at least ``shards``."""
    return save_model(build_zoo(name, dtype), folder, shards)


def save_model(model: PreTrainedModel, folder: Path, shards: int = 1) -> Path:
    """Save any model in one shard, or in at least ``shards``."""
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    limit: int | str = size // shards if shards > 1 else "1GB"
    model.save_pretrained(folder, max_shard_size=limit)
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) >= shards, f"asked for {shards} shards, got {[file.name for file in files]}"
    return folder


def save_unlisted(folder: Path) -> Path:
    """Save a llama whose config.json calls itself a model type that nobody lists; LlamaForCausalLM still loads it."""
    save_zoo("llama", folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "model_type": "llamalike-x"}), encoding="utf-8")
    return folder
