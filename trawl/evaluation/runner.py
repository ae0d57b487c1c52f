"""One call that runs tasks on a model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from trawl.errors import PlanError
from trawl.evaluation.choice import evaluate_choice
from trawl.evaluation.lm import check_harness, evaluate_harness
from trawl.evaluation.pairs import evaluate_pairs
from trawl.evaluation.perplexity import evaluate_perplexity
from trawl.evaluation.qa import evaluate_qa
from trawl.evaluation.reading import Readings
from trawl.evaluation.results import TaskResult
from trawl.evaluation.subject import Subject, open_subject
from trawl.evaluation.tasks import ChoiceTask, HarnessTask, PairsTask, PerplexityTask, QATask, Task, parse_task
from trawl.observers import Observer, silent

BATCH_TOKENS = 4096


def evaluate(
    model: Any,
    tasks: str | Task | Sequence[str | Task],
    *,
    tokenizer: Any = None,
    revision: str | None = None,
    limit: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    dtype: str = "auto",
    device: str = "auto",
    context: int | None = None,
    stride: int | None = None,
    trust_remote_code: bool = False,
    observer: Observer = silent,
) -> tuple[TaskResult, ...]:
    """Run tasks on a model and return their figures with standard errors.

        trawl.evaluate("denoised", ["ppl:wiki.txt", "qa:facts.jsonl"], limit=400)[1].figure("correct").value

    Text is fed as it is, without a chat template. Task files and what config.json tells are checked before weights are
    read.

    Args:
        model: a folder, base, denoised or factored; a hub id; a .gguf file; or a loaded model, with its ``tokenizer``.
        tasks: SPECs (see :func:`trawl.evaluation.parse_task`) or tasks.
        tokenizer: by default the one beside the model.
        revision: branch, tag or commit of a hub id.
        limit: the most records of each task, from the beginning of its file; windows for ``ppl``.
        batch_tokens: padded tokens in one batch; it changes speed and memory, and figures by rounding only.
        dtype: to load in: ``auto`` (as stored), ``float32``, ``bfloat16`` or ``float16``, ``f32``, ``bf16``, ``f16``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        context: the most tokens fed at once; by default the model's own limit, and at most 2048 for ``ppl``. A record
            that is longer is left out of the figures and counted in ``overlong``.
        stride: scored tokens in each window of ``ppl``; by default half the context.
        trust_remote_code: run the code that comes with the model, with all the rights of this process.
        observer: told of progress, in tokens of input.
    Returns: one result per task, in their order.
    Raises: TrawlError: PlanError for tasks, options, or a task that the model class cannot do; LoadError for the model.
    Cost: the model, and one batch's activations and logits.
    """
    given = [tasks] if isinstance(tasks, str | Task) else list(tasks)
    if not given:
        raise PlanError("no task given; pass --task, such as --task ppl:FILE")
    for name, value, least in (
        ("limit", limit, 1),
        ("batch_tokens", batch_tokens, 1),
        ("context", context, 2),
        ("stride", stride, 1),
    ):
        if value is not None and value < least:
            raise PlanError(f"{name} is {value}; expected at least {least}")
    parsed = [parse_task(task) if isinstance(task, str) else task for task in given]
    if any(isinstance(task, HarnessTask) for task in parsed):
        check_harness()
    subject = open_subject(
        model,
        parsed,
        tokenizer=tokenizer,
        revision=revision,
        dtype=dtype,
        device=device,
        context=context,
        batch_tokens=batch_tokens,
        trust_remote_code=trust_remote_code,
    )
    training = subject.model.training
    subject.model.eval()
    try:
        return tuple(
            run_task(subject, task, limit=limit, context=context, stride=stride, observer=observer) for task in parsed
        )
    finally:
        subject.model.train(training)


def run_task(
    subject: Subject,
    task: Task,
    *,
    limit: int | None = None,
    context: int | None = None,
    stride: int | None = None,
    readings: Readings | None = None,
    observer: Observer = silent,
) -> TaskResult:
    """Run one task on a loaded model and time it; arguments as for :func:`evaluate` and :func:`evaluate_qa`."""
    began = time.monotonic()
    match task:
        case PerplexityTask():
            result = evaluate_perplexity(subject, task, context=context, stride=stride, limit=limit, observer=observer)
        case QATask():
            result = evaluate_qa(subject, task, limit=limit, readings=readings, observer=observer)
        case ChoiceTask():
            result = evaluate_choice(subject, task, limit=limit, observer=observer)
        case PairsTask():
            result = evaluate_pairs(subject, task, limit=limit, observer=observer)
        case HarnessTask():
            result = evaluate_harness(subject, task, limit=limit, observer=observer)
    return replace(result, seconds=time.monotonic() - began)
