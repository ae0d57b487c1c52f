"""Sentence pairs: whether an encoder's embeddings find alike what people find alike."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from trawl.errors import PlanError
from trawl.evaluation.qa import check_any
from trawl.evaluation.results import Figure, TaskResult
from trawl.evaluation.scoring import Tick, padded, token_counter
from trawl.evaluation.subject import Subject
from trawl.evaluation.tasks import PairsTask, label
from trawl.observers import Observer


def evaluate_pairs(subject: Subject, task: PairsTask, *, limit: int | None = None, observer: Observer) -> TaskResult:
    """Return the rank correlation between the cosine of two sentences' embeddings and their scores.

    An embedding is the mean of the last hidden states over all tokens of the sentence, those that the tokenizer adds
    included. The standard error is Bonett and Wright's for Spearman's ρ, (1 − ρ²) sqrt((1 + ρ²/2) / (n − 3)).

    Args:
        subject: a model without a next-token head with its tokenizer.
        task: the records.
        observer: told of progress in tokens of input.
        limit: the most records, from the file's beginning.
    Returns: the figure over the pairs of which both sentences fit into the context; the others are counted in
        ``overlong``.
    Raises: PlanError: no pair fits, or all cosines, or all scores up to the limit, are equal.
    Reference: Bonett & Wright 2000, doi:10.1007/BF02294183; Reimers & Gurevych 2019, arXiv 1908.10084.
    """
    records = task.records[:limit]
    texts = list(dict.fromkeys(text for record in records for text in (record.first, record.second)))
    tokens = {text: list(subject.tokenizer(text, verbose=False)["input_ids"]) for text in texts}
    fitting = {text for text in texts if subject.context is None or len(tokens[text]) <= subject.context}
    kept = [record for record in records if record.first in fitting and record.second in fitting]
    check_any(len(kept), len(records), task.spec, subject)
    used = [text for text in texts if text in fitting]
    tick = token_counter(f"{label(task.spec)}: sentences", sum(len(tokens[text]) for text in used), observer)
    rows = dict(zip(used, embed(subject, [tokens[text] for text in used], tick), strict=True))
    cosines = [float(torch.cosine_similarity(rows[r.first], rows[r.second], dim=0)) for r in kept]
    rho = spearman(cosines, [record.score for record in kept])
    if math.isnan(rho):
        raise PlanError(
            f"task {task.spec}: {len(kept)} pair(s) whose scores, or whose cosines, are all equal or not finite; "
            "a rank correlation needs different ones"
        )
    count = len(kept)
    error = (1 - rho**2) * math.sqrt((1 + rho**2 / 2) / (count - 3)) if count > 3 else None
    return TaskResult(
        task=task.spec,
        kind=task.kind,
        figures=(Figure("spearman", rho, error, higher_is_better=True),),
        scored=count,
        overlong=len(records) - count,
        settings={"pooling": "mean", "context": subject.context},
        scores={"cosine": tuple(cosines)},
    )


@torch.inference_mode()
def embed(subject: Subject, rows: Sequence[Sequence[int]], tick: Tick) -> list[Tensor]:
    """Return the mean last hidden state of each row of tokens in float64, in the order of the rows."""
    found: dict[int, Tensor] = {}
    order = sorted(range(len(rows)), key=lambda number: -len(rows[number]))
    while order:
        count = max(subject.batch_tokens // max(len(rows[order[0]]), 1), 1)
        batch, order = order[:count], order[count:]
        ids, mask = padded([rows[number] for number in batch], subject, left=False)
        hidden = subject.model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state.double()
        weight = mask[:, :, None].double()
        means = (hidden * weight).sum(1) / weight.sum(1)  # (batch, hidden)
        found |= dict(zip(batch, means.cpu(), strict=True))
        tick(sum(len(rows[number]) for number in batch))
    return [found[number] for number in range(len(rows))]


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Return Spearman's ρ: Pearson's correlation of ranks, equal values sharing their mean rank; NaN if undefined."""
    a, b = _ranks(first), _ranks(second)
    a, b = a - a.mean(), b - b.mean()
    scale = float(a.norm() * b.norm())
    finite = all(map(math.isfinite, first))
    return float(a @ b) / scale if scale > 0 and finite else math.nan


def _ranks(values: Sequence[float]) -> Tensor:
    """Return ranks from 1 on, equal values sharing their mean rank."""
    ordered = torch.tensor(values, dtype=torch.float64).sort()
    below = torch.searchsorted(ordered.values, torch.tensor(values, dtype=torch.float64))
    upto = torch.searchsorted(ordered.values, torch.tensor(values, dtype=torch.float64), right=True)
    return (below + 1 + upto).double() / 2
