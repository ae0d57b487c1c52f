"""Time a sweep of every layer's FC stack against the published way: reload, tensorly's parafac, a question at a time.

    python benchmarks/sweep.py MODEL questions.jsonl --questions 500 --layers 0-29 --ranks 1,8,64

The published way reloads the model for every cell, decomposes with 100 iterations of ``tensorly.decomposition.parafac``
and answers the questions one by one, loss and ten greedy tokens each. It is timed on one cell a rank, over ``--sample``
questions scaled to all of them, and extrapolated; a second figure batches it as ``trawl eval`` does. The sweep is timed
over all cells, early stopping included, and without it over those of ``--to-end``. All run here, in one process, by
turns, so that other work on the machine meets them alike; seconds of the CPU stand beside those of the clock. At the
end, trials' answers are compared with those of their rebuilt checkpoints, to one question at a time.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tensorly as tl
import torch
from tensorly.decomposition import parafac

import trawl
from trawl.evaluation.qa import contains, evaluate_qa
from trawl.evaluation.runner import BATCH_TOKENS
from trawl.evaluation.subject import Subject, open_subject
from trawl.evaluation.tasks import QATask, parse_task
from trawl.observers import silent
from trawl.recipe import Recipe
from trawl.sweeps.records import OutcomeFiles
from trawl.sweeps.split import split_task

ITERATIONS = 100
VALIDATION = 0.99
LAYER = 15  # of the cells timed as published; its cost does not depend on the layer


@dataclass
class Seconds:
    """Time by the clock and time of the CPU."""

    wall: float = 0.0
    cpu: float = 0.0

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.wall + other.wall, self.cpu + other.cpu)

    def __mul__(self, factor: float) -> Seconds:
        return Seconds(self.wall * factor, self.cpu * factor)

    def __str__(self) -> str:
        return f"{self.wall:.1f} s ({self.cpu:.1f} CPU s)"

    def over(self, other: Seconds) -> str:
        """Say how many times another's time this is."""
        return f"{self.wall / other.wall:.1f} times ({self.cpu / other.cpu:.1f} of CPU time)"


@contextmanager
def timed() -> Iterator[Seconds]:
    """Time a ``with`` block."""
    found, wall, cpu = Seconds(), time.perf_counter(), time.process_time()
    yield found
    found.wall, found.cpu = time.perf_counter() - wall, time.process_time() - cpu


def put_parafac(subject: Subject, layer: int, rank: int) -> None:
    """Decompose a layer's {gate, up, down} as published, and write it into the model."""
    mlp = subject.model.model.layers[layer].mlp
    weights = [mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight]
    with torch.no_grad(), tl.backend_context("pytorch"):
        stack = torch.stack([weights[0], weights[1], weights[2].T]).float()
        parts = parafac(stack, rank, n_iter_max=ITERATIONS, init="random", random_state=0)
        low = tl.cp_to_tensor(parts)
        for weight, new in zip(weights, (low[0], low[1], low[2].T), strict=True):
            weight.copy_(new)


@torch.inference_mode()
def one_by_one(subject: Subject, task: QATask) -> list[float]:
    """Answer the questions one at a time, loss first; return which are answered correctly."""
    correct = []
    for question in task.records:
        before, after = subject.encode_pair(question.prompt, f" {question.answers[0]}")
        subject.model(input_ids=torch.tensor([before + after[:-1]]))
        ids = torch.tensor([before])
        out = subject.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=task.tokens, do_sample=False
        )
        text = subject.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        correct.append(float(any(contains(text, answer) for answer in question.answers)))
    return correct


@dataclass
class Published:
    """The published way, timed a cell at a time."""

    model: Path
    task: QATask
    sample: int
    dtype: str
    cells: list[Seconds] = field(default_factory=list)
    batched: list[Seconds] = field(default_factory=list)

    def cell(self, rank: int) -> None:
        """Time one cell, and its questions once more in batches."""
        with timed() as reload:
            subject = open_subject(self.model, [self.task], dtype=self.dtype, batch_tokens=BATCH_TOKENS)
        with timed() as decompose:
            put_parafac(subject, LAYER, rank)
        few = QATask(self.task.spec, self.task.records[: self.sample])
        with timed() as answer:
            one_by_one(subject, few)
        with timed() as batched:
            evaluate_qa(subject, self.task, observer=silent)
        questions = answer * (len(self.task.records) / len(few.records))
        self.cells.append(reload + decompose + questions)
        self.batched.append(reload + decompose + batched)
        print(f"published, rank {rank}: reload {reload}, parafac {decompose}, questions {questions}, "
              f"in batches {batched}", flush=True)  # fmt: skip

    def mean(self, cells: list[Seconds]) -> Seconds:
        """Return the mean of some cells."""
        return sum(cells, Seconds()) * (1 / len(cells))


def swept(
    options: argparse.Namespace, file: Path, folder: Path, layers: str, patience: float | None
) -> tuple[Any, Seconds]:
    """Time a sweep, its loading and its test part included; return it with the seconds of a cell."""
    with timed() as whole:
        result = trawl.sweep(
            options.model,
            f"qa:{file}",
            folder,
            ranks=[int(rank) for rank in options.ranks.split(",")],
            layers=layers,
            validation=VALIDATION,
            patience=patience,
            dtype=options.dtype,
        )
    states = [trial["state"] for trial in result.results["trials"]]
    print(f"  {len(states)} cells, {states.count('stopped')} stopped early: {whole}", flush=True)
    return result, whole * (1 / len(states))


def compare(options: argparse.Namespace, result: Any, task: QATask) -> None:
    """Rebuild some trials' checkpoints from their factors, and answer questions with them one at a time."""
    drawn = split_task(task, VALIDATION, 0, None).validation
    asked = [piece.task for piece in drawn if isinstance(piece.task, QATask) and piece.task.answers]
    records = [record for part in asked for record in part.records][: options.sample]
    ends = [trial for trial in result.results["trials"] if trial["state"] == "complete"]
    for trial in ends[:: max(len(ends) // 3, 1)][:3]:
        stored = OutcomeFiles(result.folder).read(str(trial["number"]), "validation")
        assert stored is not None
        values: Mapping[str, Any] = stored.scores.tasks[0].values
        library = next((result.folder / "factors").iterdir())
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "rebuilt"
            recipe = Recipe(rank=trial["rank"], layers=trial["layers"], roles="fc", group_layers=1)
            trawl.compress(options.model, recipe, out, factors=library)
            subject = open_subject(out, [task], dtype=options.dtype, batch_tokens=BATCH_TOKENS)
            alone = one_by_one(subject, QATask(task.spec, tuple(records)))
        differ = sum(one != other for one, other in zip(alone, values["correct"], strict=False))
        print(f"layer {trial['layers']} rank {trial['rank']}, {len(alone)} questions: correct {sum(alone):.0f} one by "
              f"one, {sum(values['correct'][: len(alone)]):.0f} in the sweep, {differ} differ", flush=True)  # fmt: skip


def main() -> None:
    """Print both and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("model", type=Path)
    parser.add_argument("questions_file", type=Path)
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--sample", type=int, default=50)
    parser.add_argument("--layers", default="0-29")
    parser.add_argument("--to-end", default="5,15,25")
    parser.add_argument("--ranks", default="1,8,64")
    parser.add_argument("--dtype", default="auto")
    options = parser.parse_args()
    first, *others = [int(rank) for rank in options.ranks.split(",")]
    whole = parse_task(f"qa:{options.questions_file}")
    assert isinstance(whole, QATask)
    task = QATask(whole.spec, whole.records[: options.questions])
    published = Published(options.model, task, options.sample, options.dtype)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "questions.jsonl"
        rows = [json.dumps({"prompt": q.prompt, "answers": list(q.answers)}) for q in task.records]
        extra = rows[: max(round(len(rows) * (1 / VALIDATION - 1)), 1)]  # the test part
        file.write_text("\n".join(rows + extra) + "\n", encoding="utf-8")
        published.cell(first)
        found = {}
        for name, layers, patience, rank in (
            ("every trial to its end", options.to_end, None, others[:1]),
            ("early stopping", options.layers, 0.5, others[1:]),
        ):
            result, found[name] = swept(options, file, Path(scratch) / name.replace(" ", "-"), layers, patience)
            for each in rank:
                published.cell(each)
        compare(options, result, QATask(f"qa:{file}", (*task.records, *task.records[: len(extra)])))
    way, batched = published.mean(published.cells), published.mean(published.batched)
    print(f"published: {way} a cell; in batches: {batched}")
    for name, ours in found.items():
        print(
            f"sweep, {name}: {ours} a cell; the published way takes {way.over(ours)}, in batches {batched.over(ours)}"
        )


if __name__ == "__main__":
    main()
