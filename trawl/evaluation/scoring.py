"""Log-likelihoods, batched by length."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trawl.evaluation.subject import Subject
from trawl.observers import Observer

BATCH_LOGITS = 1 << 26  # logits of one batch: 256 MB in float32
CHUNK_LOGITS = 1 << 24  # of them in float32 at once, whatever the model's dtype
PADDING_SHARE = 1 / 16  # of a batch's tokens: a further batch costs less than more padding

Tick = Callable[[int], None]
"""Told how many tokens of input have been dealt with since the last call."""


def token_counter(stage: str, total: int, observer: Observer) -> Tick:
    """Return a function that adds tokens up and tells the observer."""
    done = 0

    def tick(tokens: int) -> None:
        nonlocal done
        done += tokens
        observer(stage, done, total)

    return tick


@dataclass(frozen=True)
class Request:
    """Tokens to score, given the tokens before them; neither is empty."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    @property
    def inputs(self) -> tuple[int, ...]:
        """What the model is fed: all but the last token, which is only predicted."""
        return self.context + self.continuation[:-1]


@dataclass(frozen=True)
class Likelihood:
    """How likely a continuation is.

    Attributes:
        total: natural logarithm of its probability.
        tokens: number of its tokens.
        greedy: whether each of its tokens is the likeliest.
    """

    total: float
    tokens: int
    greedy: bool

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood of its tokens."""
        return -self.total / self.tokens


@dataclass(frozen=True)
class _Row:
    """One row of a batch: an input, and the requests that share it (they differ in the last token alone)."""

    inputs: tuple[int, ...]
    first: int  # position whose logits predict the first scored token
    requests: tuple[int, ...]


@torch.inference_mode()
def log_likelihoods(subject: Subject, requests: Sequence[Request], tick: Tick) -> list[Likelihood]:
    """Return the log-likelihood of each request's continuation.

    log p(continuation | context) = Σ_t log softmax(logits_t)[token_(t+1)], the softmax in float32, the sum in float64.

    Args:
        subject: a causal language model with its tokenizer.
        requests: none longer than the model's context.
        tick: told of progress in tokens of input.
    Returns: in the order of the requests. They are padded on the right and masked, so that every real token has the
        position and the past that it has alone; requests with the same input are one row.
    Cost: one forward pass over the distinct inputs; beside the model, logits of at most BATCH_LOGITS numbers, or of
        one request. Logits are computed from the first scored position of the batch on.
    """
    shared: dict[tuple[tuple[int, ...], int], list[int]] = defaultdict(list)
    for number, request in enumerate(requests):
        shared[request.inputs, len(request.context) - 1].append(number)
    rows = [_Row(inputs, first, tuple(numbers)) for (inputs, first), numbers in shared.items()]
    found: dict[int, Likelihood] = {}
    for batch in _batches(rows, subject):
        found |= _score(subject, batch, requests)
        tick(sum(len(row.inputs) * len(row.requests) for row in batch))
    return [found[number] for number in range(len(requests))]


def _batches(rows: Sequence[_Row], subject: Subject) -> Iterator[list[_Row]]:
    """Yield rows of like length, the longest first, within the limits of tokens and of logits."""
    vocabulary = int(subject.model.get_output_embeddings().weight.shape[0])
    batch: list[_Row] = []
    first, padding = 0, 0
    for row in sorted(rows, key=lambda row: (-len(row.inputs), -row.first)):
        low = min(first, row.first) if batch else row.first
        length, count = len(batch[0].inputs) if batch else len(row.inputs), len(batch) + 1
        logits = count * (length - low if subject.takes("logits_to_keep") else length) * vocabulary
        wasted = padding + length - len(row.inputs)
        full = count * length > subject.batch_tokens or logits > BATCH_LOGITS
        if batch and (full or wasted > PADDING_SHARE * subject.batch_tokens):
            yield batch
            batch, low, wasted = [], row.first, 0
        batch.append(row)
        first, padding = low, wasted
    if batch:
        yield batch


def _score(subject: Subject, batch: Sequence[_Row], requests: Sequence[Request]) -> dict[int, Likelihood]:
    """Score one batch of rows."""
    low = min(row.first for row in batch)
    ids, mask = padded([row.inputs for row in batch], subject, left=False)  # (batch, length)
    logits = _logits(subject, ids, mask, low)  # (batch, length - low, vocabulary)
    numbers: list[int] = []
    places: list[int] = []
    targets: list[int] = []
    width = logits.shape[1]
    for index, row in enumerate(batch):
        for number in row.requests:
            tokens = requests[number].continuation
            start = index * width + row.first - low
            numbers.append(number)
            places += range(start, start + len(tokens))
            targets += tokens
    values, greedy = log_probabilities(logits.flatten(0, 1), torch.tensor(places), torch.tensor(targets))
    found, end = {}, 0
    for number in numbers:
        start, end = end, end + len(requests[number].continuation)
        found[number] = Likelihood(float(values[start:end].sum()), end - start, bool(greedy[start:end].all()))
    return found


def _logits(subject: Subject, ids: Tensor, mask: Tensor, low: int) -> Tensor:
    """Return the logits at position ``low`` and after it."""
    if not subject.takes("logits_to_keep"):
        whole: Tensor = subject.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return whole[:, low:]
    keep = ids.shape[1] - low
    kept: Tensor = subject.model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=keep).logits
    return kept


def log_probabilities(logits: Tensor, places: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return log-probabilities of tokens at places of flat logits (places, vocabulary), and whether each is highest."""
    values, greedy = [torch.zeros(0, dtype=torch.float64)], [torch.zeros(0, dtype=torch.bool)]
    step = max(CHUNK_LOGITS // logits.shape[-1], 1)
    for start in range(0, len(places), step):
        chosen = logits[places[start : start + step].to(logits.device)].float()  # (step, vocabulary)
        target = targets[start : start + step].to(logits.device)
        taken = chosen.gather(-1, target[:, None]).squeeze(-1) - chosen.logsumexp(-1)
        values.append(taken.double().cpu())
        greedy.append((chosen.argmax(-1) == target).cpu())
    return torch.cat(values), torch.cat(greedy)


def padded(rows: Sequence[Sequence[int]], subject: Subject, *, left: bool) -> tuple[Tensor, Tensor]:
    """Return rows of tokens as one tensor with its attention mask."""
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), subject.padding)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        place = slice(length - len(row), length) if left else slice(0, len(row))
        ids[index, place] = torch.tensor(row)
        mask[index, place] = 1
    return ids.to(subject.device), mask.to(subject.device)
