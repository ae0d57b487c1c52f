"""Time a sweep of one layer's FC stack against the published way: reload, tensorly's parafac, a question at a time.

    python benchmarks/sweep.py MODEL questions.jsonl --questions 500 --layers 0,15,29 --ranks 1,8,64

The published way reloads the model for every cell, decomposes with 100 iterations of ``tensorly.decomposition.parafac``
and answers the questions one by one, loss and ten greedy tokens each. It is timed on three cells, over ``--sample``
questions scaled to all of them, and extrapolated; a second figure batches it as ``trawl eval`` does. The sweep is timed
over the layers given, early stopping included, and again without. Both run here, in one process, by turns.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import tensorly as tl
import torch
from tensorly.decomposition import parafac

import trawl
from trawl.evaluation.qa import contains, evaluate_qa
from trawl.evaluation.runner import BATCH_TOKENS
from trawl.evaluation.subject import Subject, open_subject
from trawl.evaluation.tasks import QATask, parse_task
from trawl.observers import silent

ITERATIONS = 100


def put_parafac(subject: Subject, layer: int, rank: int) -> None:
    """Decompose a layer's {gate, up, down} as published, and write it into the model."""
    mlp = subject.model.model.layers[layer].mlp
    weights = [mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight]
    with torch.no_grad(), tl.backend_context("pytorch"):
        stack = torch.stack([weights[0], weights[1], weights[2].T])
        parts = parafac(stack, rank, n_iter_max=ITERATIONS, init="random", random_state=0)
        low = tl.cp_to_tensor(parts)
        for weight, new in zip(weights, (low[0], low[1], low[2].T), strict=True):
            weight.copy_(new)


@torch.inference_mode()
def one_by_one(subject: Subject, task: QATask) -> float:
    """Answer the questions one at a time, loss first; return the share answered correctly."""
    correct = 0
    for question in task.records:
        before, after = subject.encode_pair(question.prompt, f" {question.answers[0]}")
        subject.model(input_ids=torch.tensor([before + after[:-1]]))
        ids = torch.tensor([before])
        out = subject.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=task.tokens, do_sample=False
        )
        text = subject.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        correct += any(contains(text, answer) for answer in question.answers)
    return correct / len(task.records)


def published_cell(model: Path, task: QATask, layer: int, rank: int, sample: int) -> dict[str, float]:
    """Time one cell as published, in seconds."""
    began = time.perf_counter()
    subject = open_subject(model, [task], batch_tokens=BATCH_TOKENS)
    loaded = time.perf_counter()
    put_parafac(subject, layer, rank)
    decomposed = time.perf_counter()
    few = QATask(task.spec, task.records[:sample])
    one_by_one(subject, few)
    answered = time.perf_counter()
    evaluate_qa(subject, task, observer=silent)
    batched = time.perf_counter()
    scale = len(task.records) / len(few.records)
    fixed = decomposed - began
    return {
        "reload": loaded - began,
        "parafac": decomposed - loaded,
        "questions": (answered - decomposed) * scale,
        "total": fixed + (answered - decomposed) * scale,
        "total, batched": fixed + batched - answered,
    }


def swept(model: Path, file: Path, layers: str, ranks: list[int], patience: float | None) -> float:
    """Time a sweep's search: base, decompositions and trials, its loading included, in seconds a cell."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        result = trawl.sweep(
            model,
            f"qa:{file}",
            folder,
            ranks=ranks,
            layers=layers,
            validation=0.99,
            patience=patience,
            order="last-first",
        )
        seconds = time.perf_counter() - began
        tests = [trial["number"] for trial in result.results["trials"] if trial["test"]]
        print(f"  {len(result.rows)} cells, {len(tests)} of them scored on the test part too: {seconds:.1f} s")
        return seconds / len(result.rows)


def main() -> None:
    """Print both and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("questions_file", type=Path)
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--sample", type=int, default=50)
    parser.add_argument("--layers", default="0-29")
    parser.add_argument("--ranks", default="1,8,64")
    options = parser.parse_args()
    ranks = [int(rank) for rank in options.ranks.split(",")]
    whole = parse_task(f"qa:{options.questions_file}")
    assert isinstance(whole, QATask)
    task = QATask(whole.spec, whole.records[: options.questions])
    cells = [published_cell(options.model, task, 15, rank, options.sample) for rank in ranks]
    for rank, cell in zip(ranks, cells, strict=True):
        print(f"published, rank {rank}: " + ", ".join(f"{name} {value:.1f} s" for name, value in cell.items()))
    published = sum(cell["total"] for cell in cells) / len(cells)
    batched = sum(cell["total, batched"] for cell in cells) / len(cells)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "questions.jsonl"
        rows = [json.dumps({"prompt": q.prompt, "answers": list(q.answers)}) for q in task.records]
        extra = rows[:5]  # the test part: 1 % of the records
        file.write_text("\n".join(rows + extra) + "\n", encoding="utf-8")
        for name, patience in (("early stopping", 0.5), ("every trial to its end", None)):
            ours = swept(options.model, file, options.layers, ranks, patience)
            print(f"sweep, {name}: {ours:.2f} s a cell, {published / ours:.1f}x the published way's speed, "
                  f"{batched / ours:.1f}x the batched one's")  # fmt: skip


if __name__ == "__main__":
    main()
