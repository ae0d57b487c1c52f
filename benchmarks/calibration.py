"""Calibration: time against the plain forward passes of the same windows, and peak anonymous memory.

    python benchmarks/calibration.py SmolLM2-135M-Instruct --text wikitext2raw-train1mb.txt      # 128 x 1,024 tokens
    python benchmarks/synthetic_checkpoint.py /tmp/llama-8b
    python benchmarks/calibration.py /tmp/llama-8b --tokens 2048 --no-plain                      # memory only

The plain passes are those of the whole model as transformers loads it, head included, one window at a time, after the
calibration has been timed. Without --text, tokens are random.
CPU seconds tell more than wall seconds where other processes run. Memory is RssAnon, sampled from /proc every 20 ms:
file-backed pages of the mapped checkpoint come and go and are not the process's own.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM

from trawl.calibration import Calibration, open_moments
from trawl.calibration.gathering import gather
from trawl.calibration.streaming import BlockChain, open_chain
from trawl.checkpoint import Checkpoint
from trawl.hub import open_checkpoint
from trawl.models import no_bars
from trawl.observers import Observer
from trawl.planning import match_checkpoint

WINDOW = 1024


def anonymous_bytes() -> int:
    """Return this process's RssAnon in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Yield a list whose one entry is the largest RssAnon in a ``with`` block so far."""
    peak, done = [anonymous_bytes()], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


def discarding(folder: Path) -> tuple[list[int], Observer]:
    """Return a count of bytes written, and an observer that deletes finished moments: an 8B model has 33 GB of them."""
    written = [0]

    def discard(_stage: str, _done: int, _total: int | None) -> None:
        for path in folder.glob("*.safetensors"):
            written[0] += path.stat().st_size
            path.unlink()

    return written, discard


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Return wall and CPU seconds of some work."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def open_windows(checkpoint: Checkpoint, text: str | None, tokens: int) -> tuple[BlockChain, Tensor]:
    """Return the model and the token ids to run through it."""
    match = match_checkpoint(checkpoint)
    if text is not None:
        source = open_moments(checkpoint, match, text, tokens)
        assert isinstance(source, Calibration)
        return source.chain, source.windows
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, checkpoint.config["vocab_size"], (tokens // WINDOW, WINDOW), generator=generator)
    return open_chain(checkpoint, match, torch.device("cpu")), ids


def plain_passes(checkpoint: Checkpoint, windows: Tensor) -> tuple[float, float]:
    """Return wall and CPU seconds of the whole model's forward passes."""
    with no_bars():
        model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def run() -> None:
        for window in windows:
            model(input_ids=window[None], use_cache=False)

    with torch.inference_mode():
        model(input_ids=windows[:1], use_cache=False)  # the first pass reads the weights
    return timed(run)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text")
    parser.add_argument("--tokens", type=int, default=128 * WINDOW)
    parser.add_argument("--scratch", type=Path, default=Path("calibration.benchmark"))
    parser.add_argument("--no-plain", action="store_true")
    arguments = parser.parse_args()
    checkpoint = open_checkpoint(arguments.model)
    chain, windows = open_windows(checkpoint, arguments.text, arguments.tokens)
    written, discard = discarding(arguments.scratch)
    with peak_memory() as peak:
        wall, cpu = timed(lambda: gather(chain, windows, arguments.scratch, discard))
    discard("", 0, None)
    arguments.scratch.rmdir()
    table = Table(
        title=f"{arguments.model}: {len(windows)} x {windows.shape[1]} tokens, {torch.get_num_threads()} threads"
    )
    for column in ("", "wall s", "CPU s", "peak RssAnon GB", "written GB"):
        table.add_column(column, justify="right" if column else "left")
    table.add_row("calibration", f"{wall:.1f}", f"{cpu:.1f}", f"{peak[0] / 1e9:.2f}", f"{written[0] / 1e9:.2f}")
    if not arguments.no_plain:
        plain_wall, plain_cpu = plain_passes(checkpoint, windows)
        table.add_row("plain forward passes", f"{plain_wall:.1f}", f"{plain_cpu:.1f}")
        table.add_row("ratio", f"{wall / plain_wall:.2f}", f"{cpu / plain_cpu:.2f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
