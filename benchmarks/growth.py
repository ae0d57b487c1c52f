"""Growth of time and memory with layers and rank, against what the docstrings' O() predict; draws a PNG.

    python benchmarks/growth.py --out docs/growth.png

Stacks are random with a nearly flat spectrum, as trained weights have it, (S, 1536, 576) in float32: 3 slices a layer
for 1 to 16 layers at rank 64, and 4 layers at ranks 16 to 256. Each point decomposes in a process of its own with
sweeps capped at 5, so that every point makes the same number of passes; memory is the growth of its anonymous memory
over the state just before, and the stack itself is memory-mapped.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tensorly.decomposition  # noqa: F401 (which CP imports at its first use: it is no part of what that takes)
import torch
from rich.console import Console
from rich.table import Table

from trawl.decompose import CP, Method, Tucker

INNER, HIDDEN, SWEEPS = 1536, 576, 5
LAYERS, RANKS = (1, 2, 4, 8, 16), (16, 32, 64, 128, 256)
FIXED_LAYERS, FIXED_RANK = 4, 64


def make_stack(layers: int, path: Path) -> None:
    """Write a stack of 3 slices a layer to a file, with the nearly flat spectrum of trained weights."""
    generator = torch.Generator().manual_seed(layers)
    left = torch.randn(INNER, HIDDEN, generator=generator) / INNER**0.5
    right = torch.randn(HIDDEN, HIDDEN, generator=generator) / HIDDEN**0.5
    decay = torch.arange(1, HIDDEN + 1) ** -0.15
    stack = torch.from_file(str(path), shared=True, size=3 * layers * INNER * HIDDEN).view(-1, INNER, HIDDEN)
    for s in range(3 * layers):
        own = torch.randn(HIDDEN, HIDDEN, generator=generator) / HIDDEN**0.5
        stack[s] = (left * decay) @ (right + 0.5 * own)


def peak_bytes() -> int:
    """Return this process's peak anonymous memory so far, by the kernel's account of data pages now in use."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon")


class WatchedSlices:
    """A memory-mapped stack that notes the largest anonymous memory seen whenever a slice is drawn."""

    def __init__(self, path: Path, layers: int) -> None:
        self.shape = (3 * layers, INNER, HIDDEN)
        size = 3 * layers * INNER * HIDDEN
        self.tensor = torch.from_file(str(path), shared=False, size=size).view(self.shape)
        self.absmax = float(self.tensor.abs().max())
        self.peak = 0

    def slices(self):  # type: ignore[no-untyped-def]  # noqa: ANN201 (an iterator of tensors)
        """Make one pass."""
        for matrix in self.tensor:
            self.peak = max(self.peak, peak_bytes())
            yield matrix
        self.peak = max(self.peak, peak_bytes())


def measure(method: str, layers: int, rank: int, path: Path) -> None:
    """Decompose once to warm up and once measured; print seconds and bytes as JSON."""
    logging.getLogger("trawl").setLevel(logging.ERROR)
    classes: dict[str, type[CP | Tucker]] = {"cp": CP, "tucker": Tucker}
    decomposition: Method = classes[method](rank, n_iter_max=SWEEPS, tol=0.0)
    source = WatchedSlices(path, layers)
    before = peak_bytes()
    decomposition.decompose(source)
    memory = source.peak - before
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        decomposition.decompose(source)
        seconds.append(time.perf_counter() - started)
    predicted = {"flops": decomposition.flops(source.shape), "predicted": decomposition.working_set(source.shape)}
    print(json.dumps({"seconds": statistics.median(seconds), "memory": memory, **predicted}))


def run(method: str, layers: int, rank: int, path: Path) -> dict[str, float]:
    """Measure one point in a fresh process."""
    command = [sys.executable, __file__, "--point", method, str(layers), str(rank), "--stack", str(path)]
    found: dict[str, float] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return found


def main() -> None:
    """Measure all points, print them and draw them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("growth.png"))
    parser.add_argument("--point", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--stack", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.point:
        method, layers, rank = arguments.point
        measure(method, int(layers), int(rank), arguments.stack)
        return
    points = []
    with tempfile.TemporaryDirectory() as folder:
        for layers in LAYERS:
            make_stack(layers, Path(folder) / str(layers))
        for method in ("cp", "tucker"):
            for layers in LAYERS:
                stack = Path(folder) / str(layers)
                points.append(("layers", method, layers, FIXED_RANK, run(method, layers, FIXED_RANK, stack)))
            for rank in RANKS:
                stack = Path(folder) / str(FIXED_LAYERS)
                points.append(("rank", method, FIXED_LAYERS, rank, run(method, FIXED_LAYERS, rank, stack)))
    show(points)
    draw(points, arguments.out)


Points = list[tuple[str, str, int, int, dict[str, float]]]


def show(points: Points) -> None:
    """Print every point with its growth over the first of its series, measured and predicted."""
    table = Table(title=f"({INNER}, {HIDDEN}) slices, {SWEEPS} sweeps; growth over the first row of each series")
    for column in ("varied", "method", "layers", "rank", "seconds", "growth", "GFLOP growth", "MB", "predicted MB"):
        table.add_column(column, justify="right")
    first: dict[tuple[str, str], dict[str, float]] = {}
    for varied, method, layers, rank, found in points:
        base = first.setdefault((varied, method), found)
        row = (found["seconds"], found["seconds"] / base["seconds"], found["flops"] / base["flops"])
        memory = (found["memory"] / 1e6, found["predicted"] / 1e6)
        table.add_row(
            varied,
            method,
            str(layers),
            str(rank),
            *(f"{value:.2f}" for value in row),
            *(f"{value:.1f}" for value in memory),
        )
    Console(width=120).print(table)


def draw(points: Points, path: Path) -> None:
    """Draw time and memory against layers and rank, with the prediction through the largest point."""
    from matplotlib.figure import Figure  # noqa: PLC0415 (of the extra `plot`)

    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 2)
    for column, varied in enumerate(("layers", "rank")):
        for number, method in enumerate(("cp", "tucker")):
            series = [
                (row[2] if varied == "layers" else row[3], row[4]) for row in points if row[:2] == (varied, method)
            ]
            x = [value for value, _ in series]
            for line, (key, predicted, unit) in enumerate((("seconds", "flops", 1.0), ("memory", "predicted", 1e6))):
                y = [found[key] / unit for _, found in series]
                scale = y[-1] / (series[-1][1][predicted] / unit) if key == "seconds" else 1.0
                expected = [found[predicted] / unit * scale for _, found in series]
                axes[line, column].plot(x, y, "o-", color=f"C{number}", label=f"{method}, measured")
                axes[line, column].plot(x, expected, "--", color=f"C{number}", alpha=0.6, label=f"{method}, predicted")
        for line, label in enumerate(("seconds", "MB beside the mapped stack")):
            axes[line, column].set(xscale="log", yscale="log", xlabel=varied, ylabel=label)
            axes[line, column].set_xticks(x, [str(value) for value in x])
            axes[line, column].minorticks_off()
            axes[line, column].grid(alpha=0.3)
    axes[0, 0].legend(frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
