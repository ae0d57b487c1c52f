"""Perplexity of a text in sliding windows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from trawl.errors import PlanError
from trawl.evaluation.results import Figure, TaskResult
from trawl.evaluation.scoring import Request, log_likelihoods, token_counter
from trawl.evaluation.subject import Subject
from trawl.evaluation.tasks import PerplexityTask, label
from trawl.observers import Observer

DEFAULT_CONTEXT = 2048


@dataclass(frozen=True)
class Window:
    """Which tokens of a text one window feeds and which it scores.

    Attributes:
        start: first token of the text that is fed, behind the beginning-of-sequence token.
        first: first token that is scored.
        stop: the token after the last that is scored; the last is only predicted, not fed.
    """

    start: int
    first: int
    stop: int


def make_windows(tokens: int, context: int, stride: int, prefix: int, *, scores_first: bool) -> list[Window]:
    """Return windows that score every token of a text exactly once.

    The first window scores all that it holds, each later one the next ``stride`` tokens, given as many tokens before
    them as the context has room for.

    Args:
        tokens: length of the text.
        context: the most tokens that are fed at once, the prefix counted.
        stride: scored tokens a window, at most the context; with a prefix of more than one token, less by the others.
        prefix: tokens before the text in every window.
        scores_first: whether the first token of the text can be scored, because something stands before it.
    Returns: in text order.
    """
    room = context - max(prefix, int(scores_first))
    windows = []
    first, stop = 0 if scores_first else 1, min(room + 1, tokens)
    while first < stop:
        windows.append(Window(max(stop - 1 - (context - prefix), 0), first, stop))
        first, stop = stop, min(stop + stride, tokens)
    return windows


def evaluate_perplexity(
    subject: Subject,
    task: PerplexityTask,
    *,
    context: int | None = None,
    stride: int | None = None,
    limit: int | None = None,
    observer: Observer,
) -> TaskResult:
    """Return perplexity and bits per byte of a text.

    perplexity = exp(Σ loss / Σ tokens) over all tokens of all windows; bits per byte = Σ loss / (ln 2 · bytes), which
    models of different tokenizers can be compared by.

    Where the tokenizer adds a beginning-of-sequence token, it stands in every window. Where it does not, the text's
    first token is conditioned on the beginning- or end-of-sequence token, as lm-eval does it, or is not scored if
    there is neither. With stride = context, and no such token added, the windows are lm-eval's own.

    Standard errors are between windows: with s_w the summed loss of window w and n_w its tokens, that of the loss
    L = Σ s_w / Σ n_w is sqrt(W / (W − 1) · Σ (s_w − L n_w)²) / Σ n_w, the ratio estimator's (Cochran 1977, section
    6.4); perplexity's is that times perplexity. None for a single window.

    Args:
        subject: a causal language model with its tokenizer.
        task: the text.
        observer: told of progress in tokens of input.
        context: the most tokens fed at once; by default the model's, at most 2048.
        stride: scored tokens a window; by default half the context.
        limit: the most windows.
    Raises: PlanError: the text has nothing to score, or the stride is longer than the context.
    """
    context = context or min(subject.context or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
    stride = stride or max(context // 2, 1)
    prefix = subject.prefix
    longest = context - max(len(prefix), 1) + 1
    if stride > longest:
        raise PlanError(f"stride {stride} would leave tokens out; with context {context} it can be at most {longest}")
    ids = subject.encode_plain(task.text)
    windows = make_windows(len(ids), context, stride, len(prefix), scores_first=bool(subject.start))[:limit]
    if not windows:
        raise PlanError(f"task {task.spec}: the text has {len(ids)} token(s); nothing to score")
    requests = [_request(subject, ids, window) for window in windows]
    fed = sum(len(request.inputs) for request in requests)
    found = log_likelihoods(subject, requests, token_counter(f"{label(task.spec)}: windows", fed, observer))
    losses, counts = [-item.total for item in found], [item.tokens for item in found]
    size = _bytes(subject, task.text, windows[-1].stop, len(ids))
    return TaskResult(
        task=task.spec,
        kind=task.kind,
        figures=_figures(losses, counts, size),
        scored=len(windows),
        overlong=0,
        settings={"context": context, "stride": stride, "bos": bool(prefix), "tokens": sum(counts), "bytes": size},
        scores={"loss_sum": tuple(losses), "tokens": tuple(map(float, counts))},
    )


def _request(subject: Subject, ids: Sequence[int], window: Window) -> Request:
    """Return what one window feeds and scores."""
    before = subject.prefix or (subject.start if window.start == window.first else ())
    return Request((*before, *ids[window.start : window.first]), tuple(ids[window.first : window.stop]))


def _figures(losses: Sequence[float], counts: Sequence[int], size: int) -> tuple[Figure, ...]:
    """Return perplexity, bits per byte and loss from each window's summed loss and tokens."""
    tokens, windows = sum(counts), len(counts)
    loss = math.fsum(losses) / tokens
    error: float | None = None
    if windows > 1:
        squares = math.fsum((s - loss * n) ** 2 for s, n in zip(losses, counts, strict=True))
        error = math.sqrt(windows / (windows - 1) * squares) / tokens
    perplexity = math.exp(loss) if loss < 700 else math.inf  # a broken model's loss has no exponential in float64
    bits = tokens / (math.log(2) * size)
    return (
        Figure("perplexity", perplexity, None if error is None else error * perplexity, higher_is_better=False),
        Figure("bits_per_byte", loss * bits, None if error is None else error * bits, higher_is_better=False),
        Figure("loss", loss, error, higher_is_better=False),
    )


def _bytes(subject: Subject, text: str, stop: int, tokens: int) -> int:
    """Return the UTF-8 bytes of the text up to a token."""
    if stop >= tokens:
        return len(text.encode())
    if not subject.tokenizer.is_fast:
        return len(subject.tokenizer.decode(subject.encode_plain(text)[:stop]).encode())
    offsets = subject.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return len(text[: offsets["offset_mapping"][stop - 1][1]].encode())
