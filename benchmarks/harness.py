"""Scores of EleutherAI's lm-evaluation-harness on a factored model, and on the same recipe written dense.

    trawl compress MODEL --method tucker --rank 400 --roles fc --group-layers 1 --write dense -o dense
    trawl compress MODEL --method tucker --rank 400 --roles fc --group-layers 1 --write factored -o factored
    python benchmarks/harness.py dense factored --choice arc_easy.jsonl --text wikitext.txt

Both folders compute the same function, so scores differ by rounding only. The harness (extra ``eval``) is given the
loaded model objects and two tasks over local files: multiple choice over records ``{"query", "choices", "gold"}``, and
the likelihood of text, of which each document is a piece of 4000 characters.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer
from transformers.utils import logging

import trawl
from trawl.evaluation import TaskResult

PIECE = 4000  # characters

TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
  cache_dir: {cache}
test_split: test
{body}"""

CHOICE = """output_type: multiple_choice
doc_to_text: "Question: {{query}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: gold
metric_list:
  - metric: acc
  - metric: acc_norm
"""

TEXT = """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: word_perplexity
  - metric: byte_perplexity
  - metric: bits_per_byte
"""


def write_tasks(choice: Path, text: Path, scratch: Path) -> list[str]:
    """Write a task file for each of the two data files and return their SPECs."""
    whole = text.read_text(encoding="utf-8")
    pieces = [json.dumps({"text": whole[start : start + PIECE]}) for start in range(0, len(whole), PIECE)]
    documents = scratch / "documents.jsonl"
    documents.write_text("\n".join(pieces) + "\n", encoding="utf-8")
    specs = []
    for name, data, body in (("choice", choice.resolve(), CHOICE), ("text", documents, TEXT)):
        path = scratch / f"local_{name}.yaml"
        path.write_text(TASK.format(name=f"local_{name}", data=data, cache=scratch, body=body), encoding="utf-8")
        specs.append(f"lm:{path}")
    return specs


def scores(folder: str, specs: list[str], limits: list[int], dtype: str) -> tuple[list[TaskResult], float]:
    """Return what the harness finds for a loaded model object, and its seconds."""
    model, tokenizer = trawl.load(folder, dtype=dtype), AutoTokenizer.from_pretrained(folder)
    started = time.perf_counter()
    results = [
        trawl.evaluate(model, spec, tokenizer=tokenizer, limit=limit)[0]
        for spec, limit in zip(specs, limits, strict=True)
    ]
    return results, time.perf_counter() - started


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense")
    parser.add_argument("factored")
    parser.add_argument("--choice", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--records", type=int, default=200)
    parser.add_argument("--pieces", type=int, default=10)
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        specs = write_tasks(arguments.choice, arguments.text, Path(scratch))
        limits = [arguments.records, arguments.pieces]
        found = [scores(side, specs, limits, arguments.dtype) for side in (arguments.dense, arguments.factored)]
    table = Table(title=f"lm-eval {found[0][0][0].settings['lm_eval']}, {arguments.dtype}")
    for column in ("task", "scored", "figure", "standard error", "dense", "factored", "difference"):
        table.add_column(column, justify="left" if column in ("task", "figure") else "right")
    for data, one, other in zip((arguments.choice, arguments.text), found[0][0], found[1][0], strict=True):
        for a in one.figures:
            b = other.figure(a.name)
            error = "" if a.stderr is None else f"{a.stderr:.4f}"
            difference = f"{b.value - a.value:+.1e}"
            table.add_row(data.name, str(one.scored), a.name, error, f"{a.value:.6f}", f"{b.value:.6f}", difference)
    table.add_row("seconds", "", "", "", f"{found[0][1]:.0f}", f"{found[1][1]:.0f}", "")
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
