"""Tokens a second of checkpoint folders, dense or factored, against the first of them.

    python benchmarks/speed.py DENSE FACTORED NARROW ...

Every folder is loaded in one process, in float32; decoding at batch 1 and prefill of 512 tokens are timed in turns, so
that whatever else the machine does meets all folders alike. Ratios are medians of each turn's ratio to the first.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

import trawl

PREFILL, DECODE = 512, 32


def decode(model: Any, prompt: torch.Tensor) -> None:
    """Generate at batch 1."""
    model.generate(prompt[:, :8], min_new_tokens=DECODE, max_new_tokens=DECODE, do_sample=False, pad_token_id=0)


def prefill(model: Any, prompt: torch.Tensor) -> None:
    """Read a prompt."""
    model(prompt, use_cache=False, logits_to_keep=1)


@torch.inference_mode()
def seconds(run: Callable[[Any, torch.Tensor], None], model: Any, prompt: torch.Tensor) -> float:
    """Return the CPU seconds of one run."""
    began = time.process_time()
    run(model, prompt)
    return time.process_time() - began


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    logging.disable_progress_bar()
    models = [trawl.load(folder, dtype=torch.float32).eval() for folder in options.folders]
    sizes = [sum(path.stat().st_size for path in folder.glob("*.safetensors")) for folder in options.folders]
    vocabulary = models[0].config.vocab_size
    prompt = torch.randint(3, vocabulary, (1, PREFILL), generator=torch.Generator().manual_seed(0))
    table = Table("folder", "bytes", "decode, tokens/CPU s", "ratio", "prefill, tokens/CPU s", "ratio")
    found: dict[str, list[list[float]]] = {}
    for run in (decode, prefill):
        turns = [[seconds(run, model, prompt) for model in models] for _ in range(options.repeats + 1)][1:]
        found[run.__name__] = [list(times) for times in zip(*turns, strict=True)]
    for number, folder in enumerate(options.folders):
        cells = []
        for name, count in (("decode", DECODE), ("prefill", PREFILL)):
            own, first = found[name][number], found[name][0]
            ratio = statistics.median(one / other for one, other in zip(first, own, strict=True))
            cells += [f"{count / statistics.median(own):.1f}", f"{ratio:.3f}"]
        table.add_row(str(folder), f"{sizes[number]:,}", *cells)
    Console(width=140).print(table)
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads"
    print(json.dumps({"torch": torch.__version__, "machine": machine}))


if __name__ == "__main__":
    main()
