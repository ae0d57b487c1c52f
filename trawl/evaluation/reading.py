"""Prompts that a model reads once: how likely texts are behind them, and what it writes there itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trawl.evaluation.scoring import BATCH_LOGITS, Likelihood, log_probabilities, padded
from trawl.evaluation.subject import Subject

PADDING_SHARE = 1 / 8  # of a batch's tokens: another batch reads all weights once more for every token written

Tokens = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Reading:
    """What a model knows once it has read a batch of prompts.

    Attributes:
        ids: the prompts, padded on the left (prompts, width).
        mask: 1 where a token is real (prompts, width).
        cache: the model's keys and values; None for a model that keeps none.
        following: the likeliest token behind each prompt (prompts,).
        likelihoods: per prompt, of each text asked for.
    """

    ids: Tensor
    mask: Tensor
    cache: Any
    following: Tensor
    likelihoods: tuple[tuple[Likelihood, ...], ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the cache."""
        layers = [] if self.cache is None else self.cache.layers
        return sum(value.nbytes for layer in layers for value in vars(layer).values() if isinstance(value, Tensor))


def prompt_batches(prompts: Sequence[Tokens], subject: Subject, tokens: int) -> Iterator[list[int]]:
    """Yield numbers of prompts of like length, the longest first, with room for ``tokens`` behind each."""
    vocabulary = int(subject.model.get_output_embeddings().weight.shape[0])
    batch: list[int] = []
    padding = 0
    for number in sorted(range(len(prompts)), key=lambda number: -len(prompts[number])):
        longest = len(prompts[batch[0]]) if batch else 0
        wasted = padding + longest - len(prompts[number])
        count = len(batch) + 1
        full = count * (longest + tokens) > subject.batch_tokens or count * vocabulary > BATCH_LOGITS
        if batch and (full or wasted > PADDING_SHARE * subject.batch_tokens):
            yield batch
            batch, wasted = [], 0
        batch.append(number)
        padding = wasted
    if batch:
        yield batch


@torch.inference_mode()
def read(subject: Subject, prompts: Sequence[Tokens], texts: Sequence[Sequence[Tokens]]) -> Reading:
    """Feed prompts to the model, and score texts that may stand behind them.

    log p(text | prompt) = Σ_t log softmax(logits_t)[token_(t+1)], the softmax in float32, the sum in float64.

    Args:
        subject: a causal language model with its tokenizer.
        prompts: one batch.
        texts: per prompt any number of texts, none of them empty.
    Cost: one forward pass over the prompts and, for texts of several tokens, one over those texts' own tokens.
    """
    ids, mask = padded(prompts, subject, left=True)
    logits, cache = _feed(subject, ids, mask, None, 1)
    following = logits[:, -1]  # (prompts, vocabulary)
    flat = [(number, text) for number, each in enumerate(texts) for text in each]
    firsts = log_probabilities(following, torch.tensor([n for n, _ in flat]), torch.tensor([t[0] for _, t in flat]))
    values = [[value] for value in zip(firsts[0].tolist(), firsts[1].tolist(), strict=True)]
    longer = [place for place, (_, text) in enumerate(flat) if len(text) > 1]
    for batch in _text_batches(longer, flat, subject, ids.shape[1]):
        found = _continued(subject, ids, mask, cache, [flat[place] for place in batch])
        for place, more in zip(batch, found, strict=True):
            values[place] += more
    scored: list[list[Likelihood]] = [[] for _ in prompts]
    for (number, text), own in zip(flat, values, strict=True):
        likely = Likelihood(sum(value for value, _ in own), len(text), all(greedy for _, greedy in own))
        scored[number].append(likely)
    return Reading(ids, mask, cache, following.argmax(-1), tuple(map(tuple, scored)))


def _text_batches(
    places: Sequence[int], flat: Sequence[tuple[int, Tokens]], subject: Subject, width: int
) -> Iterator[list[int]]:
    """Yield places of texts of several tokens, the longest first, within the limits of tokens and of logits."""
    vocabulary = int(subject.model.get_output_embeddings().weight.shape[0])
    order = sorted(places, key=lambda place: -len(flat[place][1]))
    while order:
        length = len(flat[order[0]][1]) - 1
        count = max(min(subject.batch_tokens // (width + length), BATCH_LOGITS // (length * vocabulary)), 1)
        yield order[:count]
        order = order[count:]


def _continued(
    subject: Subject, ids: Tensor, mask: Tensor, cache: Any, texts: Sequence[tuple[int, Tokens]]
) -> list[list[tuple[float, bool]]]:
    """Return, for texts' tokens after the first, their log-probability and whether they are the likeliest."""
    rows = torch.tensor([number for number, _ in texts], device=ids.device)
    own, own_mask = padded([text[:-1] for _, text in texts], subject, left=False)
    if cache is not None:
        cache = deepcopy(cache)
        cache.batch_select_indices(rows)
    ids, mask = torch.cat([ids[rows], own], 1), torch.cat([mask[rows], own_mask], 1)
    logits, _ = _feed(subject, ids, mask, cache, own.shape[1])  # (texts, length, vocabulary)
    places = [row * own.shape[1] + step for row, (_, text) in enumerate(texts) for step in range(len(text) - 1)]
    targets = [token for _, text in texts for token in text[1:]]
    found = log_probabilities(logits.flatten(0, 1), torch.tensor(places), torch.tensor(targets))
    pairs = zip(found[0].tolist(), found[1].tolist(), strict=True)
    return [[next(pairs) for _ in text[1:]] for _, text in texts]


def _feed(subject: Subject, ids: Tensor, mask: Tensor, cache: Any, keep: int) -> tuple[Tensor, Any]:
    """Feed what the cache does not hold yet; return the last ``keep`` positions' logits, and the cache."""
    fed = ids.shape[1] if cache is None else keep
    given: dict[str, Any] = {"attention_mask": mask, "past_key_values": cache, "use_cache": True}
    if subject.takes("position_ids"):
        given["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -fed:]
    if subject.takes("logits_to_keep"):
        given["logits_to_keep"] = keep
    out = subject.model(input_ids=ids[:, -fed:], **given)
    return out.logits[:, -keep:], getattr(out, "past_key_values", None)


@torch.inference_mode()
def write(subject: Subject, reading: Reading, tokens: int) -> list[str]:
    """Return what the model writes behind each prompt when it always takes the likeliest token.

    Args:
        subject: that has read the prompts.
        reading: used up: its cache grows.
        tokens: the most tokens of each text; an end-of-sequence token ends it earlier.
    Returns: texts without special tokens, in the order of the prompts. Settings of the model's own generation
        configuration, such as a repetition penalty, do not apply.
    """
    ends = _ends(subject)
    ids, mask, newest = reading.ids, reading.mask, reading.following
    cache, written = reading.cache, [newest]
    ended = torch.isin(newest, ends)
    while len(written) < tokens and not bool(ended.all()):
        ids = torch.cat([ids, newest[:, None]], 1)
        mask = torch.cat([mask, torch.ones_like(newest[:, None])], 1)
        logits, cache = _feed(subject, ids, mask, cache, 1)
        newest = logits[:, -1].argmax(-1)
        written.append(newest)
        ended |= torch.isin(newest, ends)
    rows = torch.stack(written, 1)  # (prompts, written)
    counts = torch.isin(rows, ends).cumsum(1).sub(torch.isin(rows, ends).long()).eq(0).sum(1)  # up to the first end
    kept = [row[:count] for row, count in zip(rows.tolist(), counts.tolist(), strict=True)]
    texts: list[str] = subject.tokenizer.batch_decode(kept, skip_special_tokens=True)
    return texts


def _ends(subject: Subject) -> Tensor:
    """Return the tokens that end a text."""
    ends = getattr(subject.model.generation_config, "eos_token_id", None)
    listed = [] if ends is None else ends if isinstance(ends, list | tuple) else [ends]
    return torch.tensor(listed, dtype=torch.long, device=subject.device)


@dataclass(eq=False)
class Readings:
    """Readings kept from one task for the next one over the same prompts, while the model stays as it is."""

    _room: int = 0
    _kept: dict[tuple[Tokens, ...], Reading] = field(default_factory=dict)

    @contextmanager
    def kept(self, nbytes: int) -> Iterator[None]:
        """Keep readings up to a number of bytes in a ``with`` block, in which no weight changes."""
        self._room = nbytes
        try:
            yield
        finally:
            self._room = 0
            self._kept.clear()

    def put(self, prompts: Sequence[Tokens], reading: Reading) -> None:
        """Keep a reading where there is room."""
        if reading.nbytes <= self._room:
            self._room -= reading.nbytes
            self._kept[tuple(prompts)] = reading

    def take(self, prompts: Sequence[Tokens]) -> Reading | None:
        """Give a reading away, None where it is not kept."""
        reading = self._kept.pop(tuple(prompts), None)
        if reading is not None:
            self._room += reading.nbytes
        return reading
