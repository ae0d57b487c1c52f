"""A narrow checkpoint against whitened SVD at the same parameters, and its speed in transformers without trawl.

    python benchmarks/narrow.py MODEL --calibrate train.txt --text valid.txt --text other.txt --width 0.75

Both sides use the same moments. The baseline is that of SVD-LLM (arXiv:2403.07378): every matrix of the layers by its
own whitened SVD, multiplied out, of the rank that keeps the share of parameters that the narrow model keeps of all
layers. Excess is perplexity above the dense model's. Speeds are medians of runs that alternate between the dense and
the narrow folder, each in a process of its own that imports transformers and must not find trawl imported.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

import trawl
from trawl.calibration import Moments, make_moments, open_moments
from trawl.calibration.weights import stack_weights
from trawl.decompose import SVD
from trawl.decompose.source import TensorSlices
from trawl.families import Placement
from trawl.hub import open_checkpoint
from trawl.planned import Plan
from trawl.stacking import Stack

CONTEXT = 1024
PREFILL, DECODE = 512, 64

SPEED = f"""
import sys, time, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
assert not any(name == "trawl" or name.startswith("trawl.") for name in sys.modules)
prompt = torch.randint(3, model.config.vocab_size, (1, {PREFILL}), generator=torch.Generator().manual_seed(0))
def decode():
    model.generate(prompt[:, :8], min_new_tokens={DECODE}, max_new_tokens={DECODE}, do_sample=False, pad_token_id=0)
def prefill():
    model(prompt, use_cache=False, logits_to_keep=1)
for line in sys.stdin:
    with torch.inference_mode():
        decode() if line.startswith("warm") else None
        started = time.process_time()
        globals()[line.split()[-1]]()
        print(time.process_time() - started, flush=True)
"""


def windows_of(tokenizer: object, text: Path, count: int) -> torch.Tensor:
    """Return the first windows of a text, (windows, CONTEXT)."""
    characters = text.read_text(encoding="utf-8")[: count * CONTEXT * 8]
    ids = tokenizer(characters, add_special_tokens=False, verbose=False)["input_ids"]  # type: ignore[operator]
    count = min(count, len(ids) // CONTEXT)
    return torch.tensor(ids[: count * CONTEXT]).reshape(count, CONTEXT)


@torch.inference_mode()
def perplexity(model: PreTrainedModel, windows: torch.Tensor) -> float:
    """Return the perplexity of windows that are read one by one."""
    total = 0.0
    for window in windows:
        logits = model(window[None], use_cache=False).logits[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
    return math.exp(total / (windows.numel() - len(windows)))


def whiten(model: PreTrainedModel, planned: Plan, moments: Moments, keep: float) -> int:
    """Replace every matrix of the layers by its whitened SVD, and return the parameters of all factors."""
    state, parameters = model.state_dict(), 0
    for part in planned.match.placements:
        inner, hidden = part.shape
        rank = int(keep * inner * hidden / (inner + hidden))
        parameters += rank * (inner + hidden)
        stored = state[part.tensor]
        matrix = part.view.apply(stored).float()[None].contiguous()
        factors = SVD(rank=rank).decompose(TensorSlices(matrix), weights=stack_weights(moments, _single(part)))
        part.view.scatter(factors.slice(0), stored)
    return parameters


def _single(part: Placement) -> Stack:
    return Stack(f"{part.role}.{part.layer}", (part,))


def quality(options: argparse.Namespace, narrow: Path, moments: Moments, planned: Plan) -> Table:
    """Score dense, narrow and whitened models on every text."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    texts = [windows_of(tokenizer, text, options.windows) for text in options.text]
    of_layers = sum(math.prod(part.shape) for part in planned.match.placements)
    lost = sum(item.stack.parameters - item.parameters_after for item in planned.stacks)
    keep = 1 - lost / of_layers

    def load(folder: Path) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, options.dtype)).eval()

    scores = {
        side: [perplexity(load(folder), text) for text in texts]
        for side, folder in (("dense", options.model), ("narrow", narrow))
    }
    baseline = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    kept = {"dense": of_layers, "narrow": of_layers - lost, "whitened SVD": whiten(baseline, planned, moments, keep)}
    whitened = baseline.to(getattr(torch, options.dtype)).eval()
    scores["whitened SVD"] = [perplexity(whitened, text) for text in texts]
    table = Table("side", "parameters of the layers", *(text.name for text in options.text), "excess")
    for side, found in scores.items():
        excess = [score - dense for score, dense in zip(found, scores["dense"], strict=True)]
        shown = [f"{score:.2f}" for score in found]
        table.add_row(side, f"{kept[side]:,}", *shown, " / ".join(f"{each:.2f}" for each in excess))
    ratios = [
        (narrowed - dense) / (svd - dense)
        for dense, narrowed, svd in zip(scores["dense"], scores["narrow"], scores["whitened SVD"], strict=True)
    ]
    table.add_row("narrow / whitened SVD", "", *(f"{ratio:.3f}" for ratio in ratios), "of the excess")
    return table


def speeds(folders: Sequence[Path], repeats: int) -> list[dict[str, float]]:
    """Return CPU seconds of one decode and one prefill in each folder: medians of runs that alternate."""
    with TemporaryDirectory() as elsewhere:  # so that no trawl lies in the working directory
        sides = [
            subprocess.Popen(
                [sys.executable, "-c", SPEED, str(folder.resolve())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=elsewhere,
            )
            for folder in folders
        ]
        found: list[dict[str, list[float]]] = [{"decode": [], "prefill": []} for _ in sides]
        for repeat in range(repeats + 1):
            for side, times in zip(sides, found, strict=True):
                for kind, seconds in times.items():
                    assert side.stdin is not None
                    assert side.stdout is not None
                    print("warm" if repeat == 0 else "", kind, file=side.stdin, flush=True)
                    spent = float(side.stdout.readline())
                    seconds.extend([spent] * (repeat > 0))
        for side in sides:
            side.communicate()
    return [{kind: statistics.median(seconds) for kind, seconds in times.items()} for times in found]


def speed_table(dense: Path, narrow: Path, repeats: int) -> Table:
    """Compare tokens a second with what fewer parameters would give."""
    one, other = speeds([dense, narrow], repeats)
    before, after = (open_checkpoint(folder).parameters for folder in (dense, narrow))
    table = Table("tokens a CPU second", "dense", "narrow", "ratio", "parameters dense / narrow", "of that")
    for kind, count in (("decode", DECODE), ("prefill", PREFILL)):
        ratio = one[kind] / other[kind]
        speed = [f"{count / seconds[kind]:.1f}" for seconds in (one, other)]
        table.add_row(kind, *speed, f"{ratio:.3f}", f"{before / after:.3f}", f"{ratio * after / before:.2f}")
    return table


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibrate", help="text to take moments on")
    parser.add_argument("--moments", type=Path, help="folder that has them, or is to keep them")
    parser.add_argument("--text", type=Path, action="append", required=True, help="scored by perplexity")
    parser.add_argument("--width", type=float, default=0.75)
    parser.add_argument("--output-weighting", default="none", help="of the choice of units; the baseline has none")
    parser.add_argument("--refit", action="store_true", help="what writes the units too, on the --calibrate text")
    parser.add_argument("--compute", default="float32", help="of the calibration and the refit: float32 or bf16")
    parser.add_argument("--windows", type=int, default=12, help="of 1024 tokens, to score")
    parser.add_argument("--dtype", default="bfloat16", help="to score in; speeds are in float32")
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    logging.disable_progress_bar()
    console = Console(width=150)
    with TemporaryDirectory() as scratch:
        checkpoint = open_checkpoint(str(options.model))
        match = trawl.planning.match_checkpoint(checkpoint)
        folder = options.moments or Path(scratch) / "moments"
        how = {"output_weighting": options.output_weighting, "compute": options.compute}
        recipe = trawl.Recipe(method="narrow", width=options.width, refit=options.refit, **how)
        source = open_moments(checkpoint, match, options.calibrate, folder=options.moments, **how)
        moments = make_moments(source, folder)
        assert moments is not None, "give --calibrate TEXT or --moments FOLDER"
        text = options.calibrate if options.refit else None
        trawl.compress(options.model, recipe, Path(scratch) / "narrow", calibrate=text, moments=folder)
        planned = trawl.plan(options.model, recipe, calibrate=text, moments=folder)
        console.print(quality(options, Path(scratch) / "narrow", replace(moments, outputs=None), planned))
        console.print(speed_table(options.model, Path(scratch) / "narrow", options.repeats))
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads"
    print(json.dumps({"torch": torch.__version__, "machine": machine}))


if __name__ == "__main__":
    main()
