"""Tokens of plain text, the way a model is fed them."""

from __future__ import annotations

from typing import Any

from torch import nn

from trawl.errors import PlanError

PROBE = "a b"


def prefix_tokens(tokenizer: Any) -> tuple[int, ...]:
    """Return the tokens that a tokenizer puts before every text, such as a beginning-of-sequence token."""
    whole = list(tokenizer(PROBE)["input_ids"])
    plain = list(tokenizer(PROBE, add_special_tokens=False)["input_ids"])
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return tuple(whole[:start])
    return ()


def encode_plain(tokenizer: Any, text: str, vocabulary: int) -> list[int]:
    """Return a text's tokens without any that the tokenizer adds.

    Raises: PlanError: the model has no embedding of one of them.
    """
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    if ids and max(ids) >= vocabulary:
        raise PlanError(
            f"the tokenizer does not belong to the model: it gives token {max(ids)}, "
            f"the model has {vocabulary} embeddings"
        )
    return ids


def position_limit(model: Any, tokenizer: Any) -> int | None:
    """Return the most positions that model and tokenizer agree on, None where there is no limit."""
    limits = [
        getattr(owner, name, None)
        for owner, name in (
            (model.config.get_text_config(), "max_position_embeddings"),
            (model.config.get_text_config(), "max_seq_len"),
            (tokenizer, "model_max_length"),
        )
    ]
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            reserved = 0 if module.padding_idx is None else module.padding_idx + 1  # RoBERTa counts from there
            limits.append(module.num_embeddings - reserved)
    return min((int(limit) for limit in limits if isinstance(limit, int) and 0 < limit < 10**9), default=None)
