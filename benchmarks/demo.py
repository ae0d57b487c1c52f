"""Print what a denoised checkpoint answers to factual cloze questions, against the model that it was made from.

Two measures for each question, both without sampling:
- correct: whether the greedy continuation of the prompt begins with an accepted answer, case and article aside;
- log p: the natural logarithm of the probability of `prompt + " " + answer` given the prompt, summed over the answer's
  tokens, of the accepted answer that the model likes best.

`make demo` runs this after `trawl compress`; by hand:

    python benchmarks/demo.py model.gguf denoised/
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from trawl.gguf import converted

QUESTIONS = Path(__file__).with_name("demo_questions.jsonl")
BATCH = 24
ANSWER_TOKENS = 6  # the longest accepted answer has five
SAMPLE_TOKENS = 40
WIDTH = 140  # where the output is no terminal
SAMPLES = (
    "The three states of matter are",
    "To boil an egg, first",
    "Once upon a time, in a small village by the sea,",
)


@dataclass(frozen=True)
class Question:
    """A prompt that a fact completes, and the completions that count as correct."""

    prompt: str
    answers: tuple[str, ...]
    topic: str


@dataclass(frozen=True)
class Score:
    """What one model makes of one question."""

    greedy: str
    correct: bool
    log_probability: float


def read_questions(path: Path) -> list[Question]:
    """Return the questions of a file that holds one JSON object a line."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [Question(r["prompt"], tuple(r["answers"]), r.get("topic", "other")) for r in records]


def batches(items: Sequence[str]) -> Iterator[list[str]]:
    """Yield consecutive runs of at most BATCH items."""
    for start in range(0, len(items), BATCH):
        yield list(items[start : start + BATCH])


class Reader:
    """A causal language model and its tokenizer, as two functions of text."""

    def __init__(self, folder: Path) -> None:
        """Load a checkpoint folder in float32."""
        # transformers is not type checked here, hence Any
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    @torch.inference_mode()
    def continuations(self, prompts: Sequence[str], tokens: int) -> list[str]:
        """Return the greedy continuation of each prompt, at most that many tokens long."""
        texts: list[str] = []
        for batch in batches(prompts):
            inputs = self.tokenizer(batch, return_tensors="pt", padding=True, padding_side="left")
            length = inputs["input_ids"].shape[1]
            out = self.model.generate(
                **inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=self.tokenizer.pad_token_id
            )
            texts += self.tokenizer.batch_decode(out[:, length:], skip_special_tokens=True)
        return texts

    @torch.inference_mode()
    def log_probabilities(self, prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        """Return log p(" " + answer | prompt), summed over the answer's tokens, for each pair."""
        totals: list[float] = []
        starts = [len(self.tokenizer(prompt)["input_ids"]) for prompt in prompts]
        texts = [f"{prompt} {answer}" for prompt, answer in zip(prompts, answers, strict=True)]
        for batch in batches(texts):
            inputs = self.tokenizer(batch, return_tensors="pt", padding=True, padding_side="right")
            ids: Tensor = inputs["input_ids"]  # (batch, length)
            logits: Tensor = self.model(**inputs).logits[:, :-1]  # (batch, length - 1, vocabulary)
            taken = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)  # (batch, length - 1)
            for values, mask in zip(taken, inputs["attention_mask"], strict=True):
                start, end = starts[len(totals)], int(mask.sum())  # values[t] is the log-probability of token t + 1
                totals.append(float(values[start - 1 : end - 1].double().sum()))
        return totals


def is_correct(continuation: str, answers: Sequence[str]) -> bool:
    """Say whether a continuation begins with one of the answers as a whole word, case and a leading article aside."""
    text = continuation.strip().casefold()
    for article in ("the ", "a ", "an "):
        if text.startswith(article) and not any(answer.casefold().startswith(article) for answer in answers):
            text = text.removeprefix(article)
            break
    return any(
        text.startswith(answer.casefold()) and not text[len(answer) : len(answer) + 1].isalnum() for answer in answers
    )


def score(folder: Path, questions: Sequence[Question]) -> tuple[list[Score], list[str]]:
    """Return a model's score for each question, and its continuations of the samples."""
    reader = Reader(folder)
    greedy = reader.continuations([question.prompt for question in questions], ANSWER_TOKENS)
    pairs = [(question.prompt, answer) for question in questions for answer in question.answers]
    values = iter(reader.log_probabilities([prompt for prompt, _ in pairs], [answer for _, answer in pairs]))
    scores = [
        Score(text, is_correct(text, question.answers), max(next(values) for _ in question.answers))
        for question, text in zip(questions, greedy, strict=True)
    ]
    return scores, reader.continuations(SAMPLES, SAMPLE_TOKENS)


def sign_test(gained: int, lost: int) -> float:
    """Return the two-sided exact p-value of so many gains against so many losses, were both equally likely."""
    n = gained + lost
    tail = sum(math.comb(n, k) for k in range(max(gained, lost), n + 1)) / (1 << n)
    return min(1.0, 2 * tail)


def mean_and_margin(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the half width of its 95 % interval (normal approximation)."""
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, 1.96 * math.sqrt(variance / len(values))


def answer_cell(result: Score) -> Text:
    """Return a mark and the greedy answer on one line."""
    mark = Text("yes ", style="green") if result.correct else Text("no  ", style="red")
    return mark + Text(" ".join(result.greedy.split()))


def paired_columns(table: Table, width: int) -> None:
    """Add the columns that both tables share: each model's answer and log p, and the change of log p."""
    for name in ("base", "denoised"):
        table.add_column(name, width=width, no_wrap=True, overflow="ellipsis")
        table.add_column("log p", width=6, justify="right", no_wrap=True)
    table.add_column("change", width=6, justify="right", no_wrap=True)


def question_table(questions: Sequence[Question], base: Sequence[Score], denoised: Sequence[Score]) -> Table:
    """Return one row a question."""
    table = Table(box=box.SIMPLE_HEAD, title="Factual cloze questions: greedy answer correct, and log p of the answer")
    table.add_column("question and answer", overflow="fold", min_width=30)
    paired_columns(table, 24)
    for question, b, d in zip(questions, base, denoised, strict=True):
        table.add_row(
            Text(question.prompt + " ") + Text(question.answers[0], style="bold"),
            answer_cell(b),
            f"{b.log_probability:.2f}",
            answer_cell(d),
            f"{d.log_probability:.2f}",
            f"{d.log_probability - b.log_probability:+.2f}",
        )
    return table


def totals_table(questions: Sequence[Question], base: Sequence[Score], denoised: Sequence[Score]) -> Table:
    """Return one row a topic and one for all questions: correct answers and mean log p."""
    table = Table(box=box.SIMPLE_HEAD, title="Correct greedy answers and mean log p")
    table.add_column("topic")
    table.add_column("questions", justify="right")
    paired_columns(table, 11)
    topics = list(dict.fromkeys(question.topic for question in questions))
    for topic in [*topics, "all"]:
        chosen = [i for i, question in enumerate(questions) if topic in (question.topic, "all")]
        n = len(chosen)
        hits_base, hits_denoised = (sum(scores[i].correct for i in chosen) for scores in (base, denoised))
        mean_base, mean_denoised = (
            math.fsum(scores[i].log_probability for i in chosen) / n for scores in (base, denoised)
        )
        table.add_row(
            topic,
            str(n),
            f"{hits_base} ({hits_base / n:.0%})",
            f"{mean_base:.2f}",
            f"{hits_denoised} ({hits_denoised / n:.0%})",
            f"{mean_denoised:.2f}",
            f"{mean_denoised - mean_base:+.2f}",
            style="bold" if topic == "all" else None,
        )
    return table


def sample_table(before: Sequence[str], after: Sequence[str]) -> Table:
    """Return the free continuations side by side."""
    table = Table(box=box.SIMPLE_HEAD, title="Greedy continuations", show_lines=True)
    for name, ratio in (("prompt", 1), ("base", 3), ("denoised", 3)):
        table.add_column(name, ratio=ratio)
    for row in zip(SAMPLES, before, after, strict=True):
        table.add_row(*(Text(" ".join(text.split())) for text in row))
    return table


def reading(base: Sequence[Score], denoised: Sequence[Score]) -> str:
    """Return what the numbers say and what they do not."""
    gained = sum(d.correct and not b.correct for b, d in zip(base, denoised, strict=True))
    lost = sum(b.correct and not d.correct for b, d in zip(base, denoised, strict=True))
    p = sign_test(gained, lost)
    change, margin = mean_and_margin(
        [d.log_probability - b.log_probability for b, d in zip(base, denoised, strict=True)]
    )
    hits = "chance hardly explains it" if p < 0.05 else "chance could explain it"
    direction = "no clear change" if abs(change) <= margin else "an improvement" if change > 0 else "a loss"
    return (
        f"Correct: {sum(s.correct for s in base)} before, {sum(s.correct for s in denoised)} after; {gained} gained, "
        f"{lost} lost; two-sided sign test p = {p:.3f}: {hits}.\n"
        f"Log p of the answer: {change:+.2f} a question, 95 % interval ±{margin:.2f}: {direction}.\n"
        "One small model, one stack, a few questions a topic: read the topics as hints. The stack and its rank were "
        "chosen on other questions about facts. The samples above are the only look at other abilities, and no measure."
    )


def main() -> None:
    """Score both models and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, help="the model before: a .gguf file or a checkpoint folder")
    parser.add_argument("denoised", type=Path, help="the checkpoint folder that trawl compress wrote from it")
    parser.add_argument("--questions", type=Path, default=QUESTIONS, help="one {prompt, answers} a line")
    arguments = parser.parse_args()

    logging.disable_progress_bar()
    started = time.perf_counter()
    questions = read_questions(arguments.questions)
    folder = converted(arguments.base) if arguments.base.suffix == ".gguf" else arguments.base
    base, before = score(folder, questions)
    denoised, after = score(arguments.denoised, questions)

    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    console.print(question_table(questions, base, denoised))
    console.print(sample_table(before, after))
    console.print(totals_table(questions, base, denoised))
    console.print(reading(base, denoised), highlight=False)
    seconds = time.perf_counter() - started
    console.print(f"{torch.get_num_threads()} threads, scored in {seconds:.0f} s", highlight=False)


if __name__ == "__main__":
    main()
