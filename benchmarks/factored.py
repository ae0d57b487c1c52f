"""Factored against dense: bytes on disk, logits, speed, and memory while loading, in one run.

    python benchmarks/factored.py MODEL

All FC stacks become Tucker [3, r, r], one stack a layer, at the rank that keeps half of their parameters. The dense
side is ``--write dense`` of the same recipe, so that both compute the same function. Speeds are medians of runs that
alternate between the two, without gradients, as generate runs. The attainable ratio beside them is what bytes (decode)
and multiplications (prefill) allow: weights read once a token, and products in the order that the modules take.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

import trawl
from trawl.planning import Plan

PREFILL, DECODE = 512, 48

LOAD = """
import sys, threading, time
from pathlib import Path
import trawl, trawl.hf
def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) * 1024
peak, done = 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.002)
thread = threading.Thread(target=watch)
before = anonymous()
thread.start()
model = trawl.load(sys.argv[1])
done = True
thread.join()
print(before, peak)
"""


def half_rank(model: str) -> tuple[trawl.Recipe, Plan]:
    """Return the recipe with the largest rank at which every FC stack keeps at most half of its parameters."""
    rank = 1
    while True:
        recipe = trawl.Recipe(method="tucker", rank=rank + 1, roles="fc", group_layers=1, write="factored")
        planned = trawl.plan(model, recipe)
        if any(2 * item.parameters_after > item.stack.parameters for item in planned.stacks):
            recipe = recipe.model_copy(update={"rank": rank})
            return recipe, trawl.plan(model, recipe)
        rank += 1


def load(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Load a folder in evaluation mode."""
    model: PreTrainedModel = trawl.load(folder, dtype=dtype)
    return model


def logits_difference(one: PreTrainedModel, other: PreTrainedModel, tokens: torch.Tensor) -> float:
    """Return the largest difference of logits, relative to their range."""
    with torch.no_grad():
        a, b = one(tokens).logits.float(), other(tokens).logits.float()
    return float((a - b).abs().max() / (b.max() - b.min()))


def prefill(model: PreTrainedModel, tokens: torch.Tensor) -> float:
    """Return tokens a second through the layers, with the logits of the last token only, as generate does it."""
    started = time.perf_counter()
    with torch.no_grad():
        model(tokens, logits_to_keep=1)
    return tokens.shape[1] / (time.perf_counter() - started)


def decode(model: PreTrainedModel, tokens: torch.Tensor) -> float:
    """Return generated tokens a second at batch 1, after a prompt of 16 tokens."""
    prompt = tokens[:, :16]
    with torch.no_grad():
        first = model(prompt, use_cache=True)
        cache, token = first.past_key_values, first.logits[:, -1:].argmax(-1)
        started = time.perf_counter()
        for _ in range(DECODE):
            step = model(token, past_key_values=cache, use_cache=True)
            token = step.logits[:, -1:].argmax(-1)
    return DECODE / (time.perf_counter() - started)


def compare(
    speed: Callable[[PreTrainedModel, torch.Tensor], float],
    dense: PreTrainedModel,
    factored: PreTrainedModel,
    tokens: torch.Tensor,
    repeats: int,
) -> tuple[float, float, float]:
    """Return the median speeds of both and the median of the ratios of neighbouring runs."""
    speed(dense, tokens), speed(factored, tokens)
    pairs = [(speed(dense, tokens), speed(factored, tokens)) for _ in range(repeats)]
    ratio = statistics.median(b / a for a, b in pairs)
    return statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs), ratio


def attainable(planned: Plan) -> tuple[float, float]:
    """Return the ratios dense / factored of weights read a token and of multiplications a token."""
    before = sum(item.stack.parameters for item in planned.stacks)
    after = sum(item.parameters_after for item in planned.stacks)
    head = planned.checkpoint.tensors["model.embed_tokens.weight"].parameters  # tied: read once as the output matrix
    linear = sum(part.shape[0] * part.shape[1] for part in planned.match.placements)
    products = 0
    for item in planned.stacks:
        (_, inner, hidden), (_, r1, r2) = item.stack.shape, item.rank
        products += hidden * r2 + 3 * (r1 * r2 + inner * r1) + hidden * r2  # gate and up share the first product
    return (linear + head) / (linear - before + after + head), (linear) / (linear - before + products)


def loading_memory(folder: Path) -> tuple[int, int]:
    """Return anonymous memory before loading and at its peak, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", LOAD, str(folder)], capture_output=True, text=True, check=True)
    before, peak = map(int, done.stdout.split())
    return before, peak


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    recipe, planned = half_rank(arguments.model)
    table = Table(title=f"{Path(arguments.model).name}, Tucker [3, {recipe.rank}, {recipe.rank}] on every FC stack")
    for column in ("what", "dense", "factored", "ratio", "attainable"):
        table.add_column(column, justify="left" if column == "what" else "right")
    with tempfile.TemporaryDirectory() as scratch:
        folders = {write: Path(scratch) / write for write in ("dense", "factored")}
        for write, folder in folders.items():
            trawl.compress(arguments.model, recipe.model_copy(update={"write": write}), folder)
        sizes = {w: sum(f.stat().st_size for f in folder.glob("*.safetensors")) for w, folder in folders.items()}
        table.add_row("bytes of shards", f"{sizes['dense']:,}", f"{sizes['factored']:,}", "", "")
        table.add_row("  as planned", "", f"{planned.output_bytes:,}", "", "")
        table.add_row("parameters", f"{planned.checkpoint.parameters:,}", f"{planned.output_parameters:,}", "", "")
        by_bytes, by_products = attainable(planned)
        tokens = torch.randint(5, 40000, (1, PREFILL), generator=torch.Generator().manual_seed(0))
        for dtype in (torch.float32, torch.bfloat16):
            name = str(dtype).removeprefix("torch.")
            dense, factored = (load(folders[write], dtype) for write in ("dense", "factored"))
            table.add_row(
                f"{name}: logits, largest difference / range", "", f"{logits_difference(factored, dense, tokens):.1e}"
            )
            for what, speed, limit in (("decode", decode, by_bytes), ("prefill", prefill, by_products)):
                one, other, ratio = compare(speed, dense, factored, tokens, arguments.repeats)
                label = f"{name}: {what} tokens/s" + (f" at {PREFILL}" if what == "prefill" else ", batch 1")
                table.add_row(label, f"{one:.1f}", f"{other:.1f}", f"{ratio:.2f}", f"{limit:.2f}")
        exact, rounded = (load(folders["dense"], dtype) for dtype in (torch.float32, torch.bfloat16))
        table.add_row("bfloat16 against float32, dense: logits", f"{logits_difference(rounded, exact, tokens):.1e}", "")
        for write, folder in folders.items():
            before, peak = loading_memory(folder)
            grown = f"{(peak - before) / 1e6:.0f} MB over {sizes[write] / 1e6:.0f} MB of shards"
            table.add_row(
                f"anonymous memory added by loading, {write}",
                grown if write == "dense" else "",
                "" if write == "dense" else grown,
            )
    Console(width=150).print(table)
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
