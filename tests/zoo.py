"""One tiny random model per architecture, made with transformers and without a network.

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
SWEEPS = {"cp": 8, "tucker": 8, "svd": None}  # n_iter_max; more take longer to say the same about an output

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
        inputs: what its forward function takes, see :func:`inputs_of`.
        towers: number of layers of each tower.
    """

    config: str
    kwargs: dict[str, Any] = field(repr=False)
    auto: str = "AutoModelForCausalLM"
    family: str = "llama"
    roles: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up", "down")
    inputs: str = "tokens"
    towers: tuple[tuple[str, int], ...] = (("", LAYERS),)


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

FEW = {**PLAIN, "num_hidden_layers": 2}
FEW_WIDE = {**FEW, "intermediate_size": INNER}
FEW_GROUPED = {**FEW_WIDE, "num_key_value_heads": KV_HEADS}
MOE = {"num_experts": 5, "num_experts_per_tok": 2}
LOCAL_MOE = {"num_local_experts": 5, "num_experts_per_tok": 2}
FEW_GPT = {**GPT, "n_layer": 2}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
TALL = {"d_model": HIDDEN, "vocab_size": VOCABULARY, "decoder_start_token_id": 2}
T5 = {**TALL, "d_ff": INNER, "d_kv": 6, "num_heads": HEADS, "num_layers": 2, "num_decoder_layers": 3}
BART = {
    **TALL,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": INNER,
    "decoder_ffn_dim": 56,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MLA = {
    **FEW_WIDE,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "first_k_dense_replace": 1,
    "n_routed_experts": 6,
    "moe_intermediate_size": 40,
    "num_experts_per_tok": 2,
}
BYTES = {**FEW_GROUPED, "hidden_size_global": 2 * HIDDEN}
ONE, BOTH = (("", 2),), (("encoder", 2), ("decoder", 3))
EXPERTS = ("expert_gate", "expert_up", "expert_down")
CROSS = ("cross_q", "cross_k", "cross_v", "cross_o")
GATED = ("q", "k", "v", "o", "gate", "up", "down")
MIXED = ("q", "k", "v", "o", *EXPERTS)
SEQ2SEQ = "AutoModelForSeq2SeqLM"


def _few(config: str, kwargs: dict[str, Any], family: str, roles: tuple[str, ...], **other: Any) -> ZooEntry:
    """Describe a model of two layers."""
    return ZooEntry(config, kwargs, family=family, roles=roles, **{"towers": ONE, **other})


MORE: dict[str, ZooEntry] = {
    **{
        name: _few(f"{config}Config", kwargs, "llama", GATED)
        for name, config, kwargs in (
            ("gemma", "Gemma", {**FEW_GROUPED, "head_dim": 16}),
            ("olmo", "Olmo", FEW_GROUPED),
            ("cohere", "Cohere", FEW_GROUPED),
            ("cohere2", "Cohere2", FEW_GROUPED),
            ("granite", "Granite", FEW_GROUPED),
            ("smollm3", "SmolLM3", FEW_GROUPED),
        )
    },
    "stablelm": _few("StableLmConfig", FEW_GROUPED, "stablelm", GATED),
    "phi": _few("PhiConfig", FEW_GROUPED, "phi", UNGATED),
    "starcoder2": _few("Starcoder2Config", FEW_GROUPED, "phi", UNGATED),
    "gpt_neo": _few(
        "GPTNeoConfig",
        {
            "hidden_size": HIDDEN,
            "num_layers": 2,
            "num_heads": HEADS,
            "intermediate_size": INNER,
            "max_position_embeddings": 64,
            "vocab_size": VOCABULARY,
            "attention_types": [[["global", "local"], 1]],
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        "gpt_neo",
        UNGATED,
    ),
    "gpt_bigcode": _few("GPTBigCodeConfig", FEW_GPT, "gpt_bigcode", UNGATED),
    "gpt_bigcode_heads": _few("GPTBigCodeConfig", {**FEW_GPT, "multi_query": False}, "gpt_bigcode", UNGATED),
    "falcon": _few(
        "FalconConfig",
        {**FEW, "ffn_hidden_size": INNER, "new_decoder_architecture": True, "num_kv_heads": KV_HEADS},
        "falcon",
        UNGATED,
    ),
    "falcon_multi_query": _few("FalconConfig", {**FEW, "ffn_hidden_size": INNER}, "falcon", UNGATED),
    "falcon_old": _few(
        "FalconConfig", {**FEW, "ffn_hidden_size": INNER, "multi_query": False, "alibi": True}, "falcon", UNGATED
    ),
    "bloom": _few(
        "BloomConfig",
        {"hidden_size": HIDDEN, "n_layer": 2, "n_head": HEADS, "vocab_size": VOCABULARY},
        "bloom",
        UNGATED,
    ),
    "mpt": _few(
        "MptConfig",
        {"d_model": HIDDEN, "n_layers": 2, "n_heads": HEADS, "vocab_size": VOCABULARY, "max_seq_len": 64},
        "mpt",
        UNGATED,
    ),
    "mixtral": _few("MixtralConfig", {**FEW_GROUPED, **LOCAL_MOE}, "mixtral", MIXED),
    "phimoe": _few("PhimoeConfig", {**FEW_GROUPED, **LOCAL_MOE}, "mixtral", MIXED),
    "qwen2_moe": _few(
        "Qwen2MoeConfig",
        {
            **FEW_GROUPED,
            **MOE,
            "moe_intermediate_size": 40,
            "shared_expert_intermediate_size": 56,
            "mlp_only_layers": [1],
        },
        "qwen2_moe",
        (*GATED, *EXPERTS),
    ),
    "qwen3_moe": _few(
        "Qwen3MoeConfig",
        {**FEW_GROUPED, **MOE, "head_dim": 16, "moe_intermediate_size": 40, "mlp_only_layers": [1]},
        "qwen2_moe",
        (*GATED, *EXPERTS),
    ),
    "olmoe": _few("OlmoeConfig", {**FEW_GROUPED, **MOE}, "qwen2_moe", MIXED),
    "granitemoe": _few("GraniteMoeConfig", {**FEW_GROUPED, **LOCAL_MOE}, "granitemoe", MIXED),
    "gpt_oss": _few("GptOssConfig", {**FEW_GROUPED, **LOCAL_MOE, "head_dim": 16}, "gpt_oss", MIXED),
    "deepseek_v2": _few(
        "DeepseekV2Config",
        {**MLA, "q_lora_rank": 24, "n_shared_experts": 2},
        "deepseek",
        ("o", "q_a", "q_b", "kv_a", "kv_b", "gate", "up", "down", *EXPERTS),
    ),
    "deepseek_v2_lite": _few(
        "DeepseekV2Config",
        {**MLA, "q_lora_rank": None, "n_shared_experts": 2},
        "deepseek",
        ("q", "o", "kv_a", "kv_b", "gate", "up", "down", *EXPERTS),
    ),
    "deepseek_v3": _few(
        "DeepseekV3Config",
        {**MLA, "q_lora_rank": 28, "n_shared_experts": 1, "n_group": 2, "topk_group": 1},
        "deepseek",
        ("o", "q_a", "q_b", "kv_a", "kv_b", "gate", "up", "down", *EXPERTS),
    ),
    "mamba": _few(
        "MambaConfig",
        {**FEW, "state_size": 4, "time_step_rank": 3},
        "mamba",
        ("ssm_in", "ssm_gate", "ssm_x", "ssm_dt", "ssm_out"),
    ),
    "mamba2": _few(
        "Mamba2Config",
        {**FEW, "state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8},
        "mamba2",
        ("ssm_in", "ssm_gate", "ssm_x", "ssm_out"),
    ),
    "gemma3": _few(
        "Gemma3Config",
        {"text_config": {**FEW_GROUPED, "head_dim": 16}, "vision_config": VISION},
        "gemma3",
        GATED,
        auto="AutoModelForImageTextToText",
    ),
    "distilbert": _few(
        "DistilBertConfig",
        {
            "dim": HIDDEN,
            "hidden_dim": INNER,
            "n_layers": 2,
            "n_heads": HEADS,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 64,
        },
        "distilbert",
        UNGATED,
        auto=MASKED,
    ),
    "electra": _few("ElectraConfig", {**FEW_WIDE, "embedding_size": 20}, "bert", UNGATED, auto=MASKED),
    "mpnet": _few("MPNetConfig", FEW_WIDE, "mpnet", UNGATED, auto=MASKED),
    "albert": _few(
        "AlbertConfig",
        {**PLAIN, "intermediate_size": INNER, "embedding_size": 20},
        "albert",
        UNGATED,
        auto=MASKED,
        towers=(("", 1),),
    ),
    "albert_groups": _few(
        "AlbertConfig",
        {**PLAIN, "intermediate_size": INNER, "embedding_size": 20, "num_hidden_groups": 3, "inner_group_num": 2},
        "albert",
        UNGATED,
        auto=MASKED,
        towers=(("", 6),),
    ),
    "deberta_v2": _few(
        "DebertaV2Config",
        {**FEW_WIDE, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
        "deberta_v2",
        ("q", "k", "v", "o", "pos_q", "pos_k", "up", "down"),
        auto=MASKED,
    ),
    "modernbert": _few(
        "ModernBertConfig", {**FEW_WIDE, "cls_token_id": 1, "sep_token_id": 2}, "modernbert", GATED, auto=MASKED
    ),
    "t5": ZooEntry(
        "T5Config", T5, SEQ2SEQ, "t5", ("q", "k", "v", "o", *CROSS, "up", "down"), inputs="seq2seq", towers=BOTH
    ),
    "t5_gated": ZooEntry(
        "T5Config",
        {**T5, "feed_forward_proj": "gated-gelu"},
        SEQ2SEQ,
        "t5",
        ("q", "k", "v", "o", *CROSS, "gate", "up", "down"),
        inputs="seq2seq",
        towers=BOTH,
    ),
    "bart": ZooEntry(
        "BartConfig", BART, SEQ2SEQ, "bart", ("q", "k", "v", "o", *CROSS, "up", "down"), inputs="seq2seq", towers=BOTH
    ),
    "whisper": ZooEntry(
        "WhisperConfig",
        {**BART, "max_target_positions": 64, "max_source_positions": 16, "num_mel_bins": 8},
        "AutoModelForSpeechSeq2Seq",
        "bart",
        ("q", "k", "v", "o", *CROSS, "up", "down"),
        inputs="speech",
        towers=BOTH,
    ),
    "vit": _few(
        "ViTConfig",
        {**VISION, "hidden_size": HIDDEN, "intermediate_size": INNER, "num_attention_heads": HEADS},
        "vit",
        UNGATED,
        auto="AutoModelForImageClassification",
        inputs="image",
    ),
    "clip": _few(
        "CLIPConfig",
        {"text_config": FEW_WIDE, "vision_config": VISION, "projection_dim": 12},
        "clip",
        UNGATED,
        auto="AutoModel",
        inputs="both",
        towers=(("text", 2), ("vision", 2)),
    ),
    "siglip": _few(
        "SiglipConfig",
        {"text_config": FEW_WIDE, "vision_config": {**VISION, "hidden_size": HIDDEN}},
        "siglip",
        UNGATED,
        auto="AutoModel",
        inputs="both",
        towers=(("text", 2), ("vision", 2)),
    ),
    "clip_vision": _few("CLIPVisionConfig", VISION, "clip_tower", UNGATED, auto="AutoModel", inputs="image"),
    "blt": _few(
        "BltConfig",
        {
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 64,
            "use_cache": False,
            "encoder_hash_byte_group_vocab": 30,
            "patching_threshold": 100.0,
            "max_patch_length": 4,
            "patcher_config": BYTES,
            "encoder_config": BYTES,
            "decoder_config": {**BYTES, "cross_attn_all_layers": True},
            "global_config": {**FEW_GROUPED, "hidden_size": 2 * HIDDEN},
        },
        "blt",
        ("q", "k", "v", "o", *CROSS, "gate", "up", "down"),
        towers=(
            ("patcher", 2),
            ("encoder", 2),
            ("encoder_cross", 1),
            ("global", 2),
            ("decoder", 2),
            ("decoder_cross", 2),
        ),
    ),
}
"""Every other architecture: what each is tried on costs less, because there are many."""

EVERY = {**ZOO, **MORE}


def inputs_of(name: str) -> dict[str, torch.Tensor]:
    """Return a small batch for a model's forward function: token ids, a decoder's ids, pictures or sound."""
    tokens = torch.arange(3, 35).reshape(2, 16)
    noise = torch.Generator().manual_seed(1)
    pictures = torch.randn(2, 3, 28, 28, generator=noise)
    return {
        "tokens": {"input_ids": tokens},
        "seq2seq": {"input_ids": tokens, "decoder_input_ids": tokens[:, :7]},
        "speech": {"input_features": torch.randn(2, 8, 32, generator=noise), "decoder_input_ids": tokens[:, :7]},
        "image": {"pixel_values": pictures},
        "both": {"input_ids": tokens, "pixel_values": pictures},
    }[EVERY[name].inputs]


def answer(name: str, model: torch.nn.Module) -> torch.Tensor:
    """Run a model on its small batch; return what it is used for."""
    with torch.no_grad():
        output = model(**inputs_of(name))
    found: torch.Tensor = next(
        output[key] for key in ("logits", "logits_per_text", "last_hidden_state") if key in output
    )
    return found


def build_zoo(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Build one family's tiny model in evaluation mode; the same bytes at every call."""
    entry = EVERY[name]
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
