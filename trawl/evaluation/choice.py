"""Multiple choice: which of several continuations a model finds most likely."""

from __future__ import annotations

import math

from trawl.errors import PlanError
from trawl.evaluation.qa import check_any
from trawl.evaluation.results import TaskResult, mean
from trawl.evaluation.scoring import Likelihood, Request, log_likelihoods, token_counter
from trawl.evaluation.subject import Subject
from trawl.evaluation.tasks import Choice, ChoiceTask, label
from trawl.observers import Observer


def evaluate_choice(subject: Subject, task: ChoiceTask, *, limit: int | None = None, observer: Observer) -> TaskResult:
    """Return how often a model finds the right choice the likeliest.

    With ``l_c = log p(" " + choice_c | template(query))``:

    - ``accuracy``: share of questions where the right choice has the greatest l_c; lm-eval's acc.
    - ``accuracy_norm``: the same for l_c / characters of choice_c, so that long choices are not at a disadvantage;
      lm-eval's acc_norm.
    - ``log_loss``: −l_gold / tokens of the right choice, the mean over questions, as the LASER and TRAWL papers score
      it; the other choices play no part.

    Args:
        subject: a causal language model with its tokenizer.
        task: the records and the template.
        observer: told of progress in tokens of input.
        limit: the most records, from the file's beginning.
    Returns: figures over the records of which every choice fits into the context; the others are counted in
        ``overlong``. Of equal choices the first counts, as in lm-eval.
    Raises: PlanError: a choice tokenises to nothing, or no record fits.
    """
    kept: list[tuple[Choice, list[Request]]] = []
    for record in task.records[:limit]:
        requests = _requests(subject, task, record)
        if subject.context is None or max(len(request.inputs) for request in requests) <= subject.context:
            kept.append((record, requests))
    total = len(task.records[:limit])
    check_any(len(kept), total, task.spec, subject)
    flat = [request for _, requests in kept for request in requests]
    tick = token_counter(f"{label(task.spec)}: choices", sum(len(request.inputs) for request in flat), observer)
    found = iter(log_likelihoods(subject, flat, tick))
    scores: dict[str, list[float]] = {"accuracy": [], "accuracy_norm": [], "log_loss": []}
    for record, requests in kept:
        scored = [next(found) for _ in requests]
        plain, by_length = predictions(record, scored)
        scores["accuracy"].append(float(plain == record.gold))
        scores["accuracy_norm"].append(float(by_length == record.gold))
        scores["log_loss"].append(scored[record.gold].loss)
    return TaskResult(
        task=task.spec,
        kind=task.kind,
        figures=tuple(mean(name, values, higher_is_better=name != "log_loss") for name, values in scores.items()),
        scored=len(kept),
        overlong=total - len(kept),
        settings={"template": task.template, "context": subject.context},
        scores={name: tuple(values) for name, values in scores.items()},
    )


def _requests(subject: Subject, task: ChoiceTask, record: Choice) -> list[Request]:
    """Return one request for each choice."""
    context = task.template.replace("{query}", record.query)
    requests = []
    for choice in record.choices:
        before, after = subject.encode_pair(context, f" {choice}")
        if not after:
            raise PlanError(f"task {task.spec}: line {record.line}: the choice {choice!r} tokenises to nothing")
        requests.append(Request(tuple(before), tuple(after)))
    return requests


def predictions(record: Choice, scored: list[Likelihood]) -> tuple[int, int]:
    """Return the likeliest choice, and the likeliest by its length in characters; -1, no choice, where one is NaN."""
    if any(math.isnan(each.total) for each in scored):
        return -1, -1
    numbers = range(len(scored))
    plain = max(numbers, key=lambda c: scored[c].total)
    by_length = max(numbers, key=lambda c: scored[c].total / len(record.choices[c]))
    return plain, by_length
