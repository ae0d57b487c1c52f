"""Validation and test parts: what chooses never reports, and what reports never chooses."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from trawl.errors import PlanError
from trawl.evaluation.tasks import ChoiceTask, HarnessTask, PairsTask, PerplexityTask, QATask, Task

CHUNKS = 40  # of a text, at line ends; a window of perplexity never spans two parts
FIRST_SHARE = 0.25  # of the validation part, scored before the rest to see whether a trial is hopeless
FIRST_LEAST = 50  # records: fewer tell too little

Item = TypeVar("Item")


@dataclass(frozen=True)
class Piece:
    """Some records of a task, or one of their measures, scored in one go.

    Attributes:
        task: the task with these records alone.
        limit: the most windows, for ``ppl``; None for all.
    """

    task: Task
    limit: int | None = None


@dataclass(frozen=True)
class Parts:
    """A task's two parts; validation in pieces, the first of which may end a trial.

    Attributes:
        validation: pieces in the order of their cost; the first may end a trial, greedy answers come last.
        test: one piece.
    """

    validation: tuple[Piece, ...]
    test: tuple[Piece, ...]


def split_task(task: Task, fraction: float, seed: int, limit: int | None) -> Parts:
    """Cut a task into a validation part, drawn at random, and the rest.

    Args:
        task: any task but ``lm``, which scores only as a whole.
        fraction: the validation part's share of records, or of text.
        seed: of the draw; the same seed draws the same records.
        limit: the most records, from the file's beginning; windows for ``ppl``.
    Raises: PlanError: the task cannot be cut, or a part would be empty.
    """
    match task:
        case PerplexityTask():
            return _split_text(task, fraction, seed, limit)
        case HarnessTask():
            raise PlanError(f"task {task.spec}: lm-eval scores a task whole; sweep over qa:, choice:, pairs: or ppl:")
        case QATask():
            questions, other_questions = _draw(task.records[:limit], fraction, seed, task.spec)
            drawn = _pieces(questions)
            quick = [Piece(replace(task, records=part, answers=False)) for part in drawn]
            slow = [Piece(replace(task, records=part, losses=False)) for part in drawn] if task.answers else []
            return Parts((*quick, *slow), (Piece(replace(task, records=other_questions)),))
        case ChoiceTask():
            choices, other_choices = _draw(task.records[:limit], fraction, seed, task.spec)
            pieces = tuple(Piece(replace(task, records=part)) for part in _pieces(choices))
            return Parts(pieces, (Piece(replace(task, records=other_choices)),))
        case PairsTask():  # a rank correlation has no pieces
            pairs, other_pairs = _draw(task.records[:limit], fraction, seed, task.spec)
            return Parts((Piece(replace(task, records=pairs)),), (Piece(replace(task, records=other_pairs)),))


def _pieces(records: tuple[Item, ...]) -> list[tuple[Item, ...]]:
    """Return the first records and the others, all in one where they are few."""
    first = max(round(FIRST_SHARE * len(records)), FIRST_LEAST)
    return [records[:first], records[first:]] if len(records) >= 2 * FIRST_LEAST else [records]


def _draw(items: Sequence[Item], fraction: float, seed: int, spec: str) -> tuple[tuple[Item, ...], tuple[Item, ...]]:
    """Return a seeded sample in shuffled order, and the others in their own."""
    count = round(fraction * len(items))
    if not 0 < count < len(items):
        raise PlanError(
            f"task {spec}: {len(items)} record(s) cannot be split into a validation part of {fraction:.0%} and a test "
            "part; give more records"
        )
    numbers = random.Random(seed).sample(range(len(items)), count)  # noqa: S311 (not for secrets)
    drawn = set(numbers)
    return tuple(items[n] for n in numbers), tuple(item for n, item in enumerate(items) if n not in drawn)


def _split_text(task: PerplexityTask, fraction: float, seed: int, limit: int | None) -> Parts:
    """Cut a text at line ends into chunks and draw some of them."""
    lines = task.text.splitlines(keepends=True)
    if len(lines) < CHUNKS:
        raise PlanError(f"task {task.spec}: {len(lines)} line(s) of text; a sweep needs at least {CHUNKS} to split")
    size = len(task.text) / CHUNKS
    chunks, length = [""] * CHUNKS, 0
    for line in lines:
        chunks[min(int(length / size), CHUNKS - 1)] += line
        length += len(line)
    chosen, rest = _draw([chunk for chunk in chunks if chunk.strip()], fraction, seed, task.spec)
    first = max(round(FIRST_SHARE * len(chosen)), 1)
    pieces = [chosen[:first], chosen[first:]] if len(chosen) > first else [chosen]
    windows = [None] * 2 if limit is None else [round(limit * fraction), limit - round(limit * fraction)]
    if windows[0] == 0 or windows[1] == 0:
        raise PlanError(f"task {task.spec}: limit {limit} leaves a part without a window; give a higher limit")
    shares = _shares(windows[0], [len(piece) / len(chosen) for piece in pieces])
    return Parts(
        tuple(Piece(replace(task, text="".join(piece)), n) for piece, n in zip(pieces, shares, strict=True)),
        (Piece(replace(task, text="".join(rest)), windows[1]),),
    )


def _shares(total: int | None, shares: list[float]) -> list[int | None]:
    """Divide a number of windows; each share gets at least one."""
    return [None if total is None else max(round(total * share), 1) for share in shares]
