"""Text that a model writes itself: to calibrate on beside a text of one kind, or for want of any.

What a model writes is spread over what it has learnt, as no single text is.

Reference: Williams, Chrysostomou & Aletras 2024, arXiv:2410.17170; of quantization Liu et al. 2023, arXiv:2305.17888,
whose random first token this has.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from trawl.calibration.text import BLANK_LINE, random_windows
from trawl.errors import PlanError
from trawl.evaluation.subject import open_subject
from trawl.observers import Observer, silent
from trawl.tokens import prefix_tokens

DEFAULT_SAMPLE = 32768  # tokens
LENGTH = 512  # tokens of a document, at most
AT_ONCE = 32  # documents


def sample(
    model: str | Path | Any,
    tokens: int = DEFAULT_SAMPLE,
    *,
    tokenizer: Any = None,
    seed: int = 0,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    observer: Observer = silent,
) -> str:
    """Let a model write documents of up to 512 tokens, each from a random first token, at temperature one.

    Args:
        model: a folder, a hub id, a ``.gguf`` file, or a loaded causal language model.
        tokens: to be written at least, over all documents.
        tokenizer: of a loaded model.
        seed: of everything random; a text is the same again where torch, its threads and the device are.
        revision: branch, tag or commit of a hub id.
        dtype: to load in; ``auto`` is the checkpoint's.
        device: where to compute.
        trust_remote_code: whether a checkpoint's own code may run.
        observer: told of progress, in tokens.
    Returns: the documents, with blank lines between them, and without NUL characters, which no text holds.
    Raises: PlanError: the model is no causal language model, or no tokens are asked for. LoadError: there is no such
        model, or no tokenizer with it.
    Cost: the whole model in memory, with keys and values of 32 documents; a pass through it for each token of a
        document, for 32 documents at once.
    """
    if tokens < 1:
        raise PlanError(f"{tokens} tokens are to be sampled; expected a number from 1, such as {DEFAULT_SAMPLE}")
    if not 0 <= seed < 1 << 63:
        raise PlanError(f"seed is {seed}; expected a number from 0 that has 63 bits")
    subject = open_subject(
        model,
        (),
        tokenizer=tokenizer,
        revision=revision,
        dtype=dtype,
        device=device,
        batch_tokens=1,
        trust_remote_code=trust_remote_code,
    )
    model, tokenizer = subject.model, subject.tokenizer
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise PlanError(f"{type(model).__name__} writes no text by itself; expected a causal language model")
    ends, length = _ends(model), min(LENGTH, subject.context or LENGTH)
    texts: list[str] = []
    written = 0
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        while written < tokens:
            documents = min(AT_ONCE, -(-(tokens - written) // length))
            begin = _begin(model, tokenizer, documents, seed + len(texts))
            told = _Told(observer, written, tokens, ends)
            for document in _write(model, begin, ends, length, told):
                written += len(document)
                texts.append(tokenizer.decode(document, skip_special_tokens=True).replace("\0", "").strip())
    observer("sampling", tokens, tokens)
    return BLANK_LINE.join(text for text in texts if text)


class _Told:
    """Tells an observer how far a batch of documents is, as a stopping criterion that never stops any."""

    def __init__(self, observer: Observer, written: int, tokens: int, ends: list[int]) -> None:
        self.observer, self.written, self.tokens, self.ends = observer, written, tokens, ends

    def __call__(self, ids: Tensor, _scores: Any, **_kwargs: Any) -> Tensor:
        ended = torch.isin(ids, torch.tensor(self.ends, dtype=ids.dtype, device=ids.device))
        written = self.written + int((~ended).sum())
        self.observer("sampling", min(written, self.tokens), self.tokens)
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)


def _ends(model: Any) -> list[int]:
    """Return the tokens that end a document."""
    end = model.generation_config.eos_token_id
    return [] if end is None else [end] if isinstance(end, int) else list(end)


def _begin(model: Any, tokenizer: Any, documents: int, seed: int) -> Tensor:
    """Return what documents begin with: the tokenizer's own first tokens, and a random one that is not special."""
    rows = min(model.get_input_embeddings().weight.shape[0], len(tokenizer))
    special = set(tokenizer.all_special_ids)
    ordinary = torch.tensor([token for token in range(rows) if token not in special])
    first = ordinary[random_windows(documents, 1, len(ordinary), seed)]
    prefix = torch.tensor(prefix_tokens(tokenizer), dtype=first.dtype).expand(documents, -1)
    return torch.cat([prefix, first], dim=1).to(model.device)


def _write(model: Any, begin: Tensor, ends: list[int], length: int, told: _Told) -> list[list[int]]:
    """Return the documents of one batch, without what ends them."""
    config = GenerationConfig(
        do_sample=True,
        top_k=0,
        max_length=length,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,
    )
    try:
        found = model.generate(
            begin, attention_mask=torch.ones_like(begin), generation_config=config, stopping_criteria=[told]
        )
    except RuntimeError as e:
        if "probability tensor" not in str(e):
            raise
        raise PlanError(
            "the model's predictions are NaN or Inf, so nothing can be sampled from it; its weights may hold NaN, or "
            "overflow: try --dtype float32"
        ) from e
    documents = []
    for row in found.tolist():
        stop = next((place for place in range(begin.shape[1], len(row)) if row[place] in ends), len(row))
        documents.append(row[:stop])
    return documents
