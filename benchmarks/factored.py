"""Factored against dense: bytes on disk, logits, speed, and memory while loading, in one run.

    python benchmarks/factored.py MODEL

All FC stacks become Tucker [3, r, r], one stack a layer, at the rank that keeps half of their parameters, or at
``--rank``; with ``--method svd`` gate and up become one matrix of that rank, and down another. The dense side is
``--write dense`` of the same recipe, so that both compute the same function. Speeds are medians of runs that alternate
between the two, without gradients, as generate runs, with the weights of both in anonymous memory.

The attainable ratios beside them are of the linear modules. For decode, of weights read a token: the larger if each
factor comes from memory once, the smaller if left and right, which gate and up need first and down again, come twice,
because they have left the cache in between. For prefill, of multiplications a token. A dense FC takes
3 · inner · hidden of them; through the factors gate and up share x · right, and each slice has a core and a product
with left of its own: 2 · (hidden - r) · r + 3 · (r² + (inner - r) · r), since r rows of left and of right are the
identity's. With inner = 1536 and hidden = 576, [3, 400, 400] stores 38 % of a dense FC and multiplies 75 %, and half of
the parameters are [3, 507, 507], which multiplies 91 %. An SVD reads and multiplies each of its parameters once.
"""

from __future__ import annotations

import argparse
import math
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
from trawl.planned import Plan

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


def recipe_of(method: str, rank: int) -> trawl.Recipe:
    """Return the recipe of all FC stacks at one rank; an SVD joins gate and up."""
    share = {"share": "input"} if method == "svd" else {}
    return trawl.Recipe(method=method, rank=rank, roles="fc", group_layers=1, write="factored", **share)


def half_rank(model: str, method: str) -> tuple[trawl.Recipe, Plan]:
    """Return the recipe with the largest rank at which the FC stacks keep at most half of their parameters."""
    for rank in range(trawl.plan(model, recipe_of(method, 1)).stacks[0].stack.shape[2], 0, -1):
        planned = trawl.plan(model, recipe_of(method, rank))
        if 2 * sum(item.parameters_after for item in planned.stacks) <= sum(s.stack.parameters for s in planned.stacks):
            return recipe_of(method, rank), planned
    raise SystemExit("no rank keeps at most half of the parameters")


def load(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Load a folder in evaluation mode, its weights copied from the mapped file into anonymous memory.

    A file that was just written lies in the page cache as its writer left it; equal matrices of two such files were
    read at speeds that differ by 1.65.
    """
    model: PreTrainedModel = trawl.load(folder, dtype=dtype)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
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


def feed_forward(model: PreTrainedModel, tokens: torch.Tensor) -> float:
    """Return tokens a second through the FC modules alone, one token at a time."""
    layers = [layer.mlp for layer in model.get_submodule("model.layers").children()]
    with torch.no_grad():
        x = model.get_input_embeddings()(tokens[:, :1])
        started = time.perf_counter()
        for _ in range(DECODE):
            for layer in layers:
                layer(x)
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


def attainable(planned: Plan) -> dict[str, str]:
    """Return the ratios dense / factored of weights read and of multiplications, by what is measured."""
    before = sum(item.stack.parameters for item in planned.stacks)
    after = sum(item.parameters_after for item in planned.stacks)
    head = planned.checkpoint.tensors["model.embed_tokens.weight"].parameters  # tied: read once as the output matrix
    linear = sum(part.shape[0] * part.shape[1] for part in planned.match.placements)
    assert planned.descriptor is not None
    shapes = {described.name: described.factor_shapes for described in planned.descriptor.stacks}
    products = again = 0
    for item in planned.stacks:
        if planned.recipe.method == "svd":
            products += item.parameters_after  # each is read and multiplied once
            continue
        left, right, core = (math.prod(shapes[item.stack.name][factor]) for factor in ("left", "right", "core"))
        products += 2 * right + 3 * left + core  # gate and up share the first product
        again += left + right
    rest = linear - before
    whole = [(linear + head) / (rest + after + more + head) for more in (again, 0)]
    alone = [before / (after + more) for more in (again, 0)]
    return {
        "decode": f"{whole[0]:.2f} to {whole[1]:.2f}",
        "FC alone": f"{alone[0]:.2f} to {alone[1]:.2f}",
        "prefill": f"{linear / (rest + products):.2f}",
    }


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
    parser.add_argument("--method", choices=("tucker", "svd"), default="tucker")
    parser.add_argument("--rank", type=int, help="by default what keeps half of the parameters")
    arguments = parser.parse_args()
    if arguments.rank:
        recipe = recipe_of(arguments.method, arguments.rank)
        planned = trawl.plan(arguments.model, recipe)
    else:
        recipe, planned = half_rank(arguments.model, arguments.method)
    ranks = (
        f"Tucker [3, {recipe.rank}, {recipe.rank}]" if recipe.method == "tucker" else f"joint SVD, rank {recipe.rank},"
    )
    table = Table(title=f"{Path(arguments.model).name}, {ranks} on every FC stack")
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
        limits = attainable(planned)
        tokens = torch.randint(5, 40000, (1, PREFILL), generator=torch.Generator().manual_seed(0))
        for dtype in (torch.float32, torch.bfloat16):
            name = str(dtype).removeprefix("torch.")
            dense, factored = (load(folders[write], dtype) for write in ("dense", "factored"))
            table.add_row(
                f"{name}: logits, largest difference / range", "", f"{logits_difference(factored, dense, tokens):.1e}"
            )
            for what, speed in (("decode", decode), ("FC alone", feed_forward), ("prefill", prefill)):
                one, other, ratio = compare(speed, dense, factored, tokens, arguments.repeats)
                label = f"{name}: {what} tokens/s" + (f" at {PREFILL}" if what == "prefill" else ", batch 1")
                table.add_row(label, f"{one:.1f}", f"{other:.1f}", f"{ratio:.2f}", limits[what])
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
