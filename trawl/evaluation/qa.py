"""Question answering as the LASER and TRAWL papers score it."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

from trawl.errors import PlanError
from trawl.evaluation.results import TaskResult, mean
from trawl.evaluation.scoring import Request, greedy_continuations, log_likelihoods, token_counter
from trawl.evaluation.subject import Subject
from trawl.evaluation.tasks import QATask, Question, label
from trawl.observers import Observer

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def evaluate_qa(subject: Subject, task: QATask, *, limit: int | None = None, observer: Observer) -> TaskResult:
    """Return how well a model answers questions that a short text completes.

    - ``correct``: share of questions where an accepted answer stands, as whole words and case aside, in the greedy
      continuation of ``task.tokens`` new tokens. The papers' measure, with two repairs: theirs searches the prompt too
      and finds "no" in "now".
    - ``f1``: of the words that the continuation's first line and an answer share, as SQuAD counts them (case,
      punctuation and articles aside); the best of the accepted answers.
    - ``log_loss``: −log p(answer | prompt) / tokens of the answer, the mean over questions (not over tokens), as in the
      papers; of several accepted answers the one of lowest loss.
    - ``exact``: share of questions where every token of an accepted answer is the likeliest (lm-eval's is_greedy).

    Args:
        subject: a causal language model with its tokenizer.
        task: the records, the length of an answer, and whether answers, losses or both are wanted.
        observer: told of progress in tokens of input.
        limit: the most records, from the file's beginning.
    Returns: figures over the records that fit into the context; the others are counted in ``overlong``.
    Raises: PlanError: an answer tokenises to nothing, or no record fits.
    Reference: Sharma et al. 2023, arXiv 2312.13558, appendix; Rajpurkar et al. 2016, arXiv 1606.05250, for F1.
    """
    questions, requests = [], []
    for question in task.records[:limit]:
        candidates = _requests(subject, task, question)
        longest = max(len(candidate.inputs) for candidate in candidates)
        room = max(longest, len(candidates[0].context) + task.tokens - 1)
        if subject.context is None or room <= subject.context:
            questions.append(question)
            requests.append(candidates)
    total = len(task.records[:limit])
    check_any(len(questions), total, task.spec, subject)
    scores: dict[str, list[float]] = {}
    if task.answers:
        prompts = [candidates[0].context for candidates in requests]
        tick = token_counter(f"{label(task.spec)}: greedy answers", sum(map(len, prompts)), observer)
        texts = greedy_continuations(subject, prompts, task.tokens, tick)
        pairs = list(zip(texts, questions, strict=True))
        scores["correct"] = [float(any(contains(text, answer) for answer in q.answers)) for text, q in pairs]
        scores["f1"] = [max(token_f1(text, answer) for answer in q.answers) for text, q in pairs]
    if task.losses:
        scores["log_loss"], scores["exact"] = _losses(subject, task, requests, observer)
    return TaskResult(
        task=task.spec,
        kind=task.kind,
        figures=tuple(mean(name, values, higher_is_better=name != "log_loss") for name, values in scores.items()),
        scored=len(questions),
        overlong=total - len(questions),
        settings={"tokens": task.tokens, "context": subject.context},
        scores={name: tuple(values) for name, values in scores.items()},
    )


def check_any(fitting: int, total: int, spec: str, subject: Subject) -> None:
    """Raise where not one record fits into the context."""
    if not fitting:
        raise PlanError(f"task {spec}: none of {total} record(s) fits into the context of {subject.context} tokens")


def _requests(subject: Subject, task: QATask, question: Question) -> list[Request]:
    """Return one request for each accepted answer."""
    requests = []
    for answer in question.answers:
        before, after = subject.encode_pair(question.prompt, f" {answer}")
        if not after:
            raise PlanError(f"task {task.spec}: line {question.line}: the answer {answer!r} tokenises to nothing")
        requests.append(Request(tuple(before), tuple(after)))
    return requests


def _losses(
    subject: Subject, task: QATask, requests: Sequence[Sequence[Request]], observer: Observer
) -> tuple[list[float], list[float]]:
    """Return the lowest loss of each question's answers, and whether any is what the model would write."""
    flat = [request for candidates in requests for request in candidates]
    tick = token_counter(f"{label(task.spec)}: log-loss", sum(len(request.inputs) for request in flat), observer)
    found = iter(log_likelihoods(subject, flat, tick))
    losses, exact = [], []
    for candidates in requests:
        scored = [next(found) for _ in candidates]
        losses.append(min(item.loss for item in scored))
        exact.append(float(any(item.greedy for item in scored)))
    return losses, exact


def contains(text: str, answer: str) -> bool:
    """Whether an answer stands in a text as whole words, case and outer blanks aside."""
    return re.search(rf"(?<!\w){re.escape(answer.strip().casefold())}(?!\w)", text.casefold()) is not None


def token_f1(text: str, answer: str) -> float:
    """Return the F1 of the words of a text's first line against an answer's.

    F1 = 2 · shared / (words of the text + words of the answer), words counted as often as they stand there.
    """
    written, wanted = words(text.strip().split("\n")[0]), words(answer)
    shared = sum((Counter(written) & Counter(wanted)).values())
    if not written or not wanted:
        return float(written == wanted)
    return 2 * shared / (len(written) + len(wanted))


def words(text: str) -> list[str]:
    """Return a text's words without case, punctuation and articles."""
    return ARTICLES.sub(" ", text.casefold().translate(PUNCTUATION)).split()
