"""Question answering as the LASER and TRAWL papers score it."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from trawl.errors import PlanError
from trawl.evaluation.reading import Readings, Tokens, prompt_batches, read, write
from trawl.evaluation.results import TaskResult, mean
from trawl.evaluation.scoring import Likelihood, token_counter
from trawl.evaluation.subject import Subject
from trawl.evaluation.tasks import QATask, Question, label
from trawl.observers import Observer

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def evaluate_qa(
    subject: Subject, task: QATask, *, limit: int | None = None, readings: Readings | None = None, observer: Observer
) -> TaskResult:
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
        limit: the most records, from the file's beginning.
        readings: keeps prompts that were read for losses until answers to them are wanted.
        observer: told of progress in tokens of input.
    Returns: figures over the records that fit into the context; the others are counted in ``overlong``.
    Raises: PlanError: an answer tokenises to nothing, or no record fits.
    Cost: each prompt is fed once, each answer's tokens after the first once, and each token that the model writes.
    Reference: Sharma et al. 2023, arXiv 2312.13558, appendix; Rajpurkar et al. 2016, arXiv 1606.05250, for F1.
    """
    asked = [_encoded(subject, task, question) for question in task.records[:limit]]
    fitting = [item for item in asked if subject.context is None or item.room(task.tokens) <= subject.context]
    check_any(len(fitting), len(asked), task.spec, subject)
    scores = _scores(subject, task, fitting, readings or Readings(), observer)
    return TaskResult(
        task=task.spec,
        kind=task.kind,
        figures=tuple(mean(name, values, higher_is_better=name != "log_loss") for name, values in scores.items()),
        scored=len(fitting),
        overlong=len(asked) - len(fitting),
        settings={"tokens": task.tokens, "context": subject.context},
        scores={name: tuple(values) for name, values in scores.items()},
    )


def check_any(fitting: int, total: int, spec: str, subject: Subject) -> None:
    """Raise where not one record fits into the context."""
    if not fitting:
        raise PlanError(f"task {spec}: none of {total} record(s) fits into the context of {subject.context} tokens")


@dataclass(frozen=True)
class _Encoded:
    """A question's accepted answers, and the tokens of its prompt and of each of them."""

    accepted: tuple[str, ...]
    prompt: Tokens
    answers: tuple[Tokens, ...]

    def room(self, tokens: int) -> int:
        """Return the most tokens that the model is fed; the last one is only predicted."""
        return len(self.prompt) + max(tokens, *map(len, self.answers)) - 1


def _encoded(subject: Subject, task: QATask, question: Question) -> _Encoded:
    """Return a question as tokens."""
    answers = []
    for answer in question.answers:
        before, after = subject.encode_pair(question.prompt, f" {answer}")
        if not after:
            raise PlanError(f"task {task.spec}: line {question.line}: the answer {answer!r} tokenises to nothing")
        answers.append(tuple(after))
    return _Encoded(question.answers, tuple(before), tuple(answers))


def _scores(
    subject: Subject, task: QATask, questions: Sequence[_Encoded], readings: Readings, observer: Observer
) -> dict[str, list[float]]:
    """Return each measure that the task wants, of each question."""
    prompts = [question.prompt for question in questions]
    tick = token_counter(f"{label(task.spec)}: questions", sum(map(len, prompts)), observer)
    found: dict[int, dict[str, float]] = {}
    for numbers in prompt_batches(prompts, subject, task.tokens):
        batch = [questions[number] for number in numbers]
        key = tuple(question.prompt for question in batch)
        texts = [question.answers if task.losses else () for question in batch]
        reading = (None if task.losses else readings.take(key)) or read(subject, key, texts)
        if task.answers:
            written = write(subject, reading, task.tokens)
            answers = [_of_answer(text, question.accepted) for text, question in zip(written, batch, strict=True)]
        else:
            readings.put(key, reading)
            answers = [{} for _ in batch]
        losses = [_of_likelihoods(likely) if task.losses else {} for likely in reading.likelihoods]
        found |= {number: one | two for number, one, two in zip(numbers, answers, losses, strict=True)}
        tick(sum(map(len, key)))
    return {name: [found[number][name] for number in range(len(questions))] for name in found[0]}


def _of_answer(text: str, accepted: Sequence[str]) -> dict[str, float]:
    """Measure what the model wrote."""
    correct = any(contains(text, answer) for answer in accepted)
    return {"correct": float(correct), "f1": max(token_f1(text, answer) for answer in accepted)}


def _of_likelihoods(likelihoods: Sequence[Likelihood]) -> dict[str, float]:
    """Measure the likeliest of a question's answers, and whether any is what the model would write."""
    greedy = any(likelihood.greedy for likelihood in likelihoods)
    return {"log_loss": min(likelihood.loss for likelihood in likelihoods), "exact": float(greedy)}


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
