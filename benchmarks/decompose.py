"""Time CP, Tucker and SVD against tensorly and torch, with both in the same run.

    python benchmarks/decompose.py --model SmolLM2-135M-Instruct     # a folder of safetensors, any precision
    python benchmarks/decompose.py                                   # the SVD row only: it needs no model

CP and Tucker take FC stacks of SmolLM2: layer 28's gate, up and down, (3, 1536, 576), and those of layers 20 to 29,
(30, 1536, 576). The CP baseline is `tensorly.decomposition.parafac` with n_iter_max 50 and tol 1e-5 from a random and
from an SVD start, each timed; the better is the one with the lower error, and the speed-up over the faster one is
printed too. The Tucker baseline is `tensorly.decomposition.tucker`, SVD start, same limits. SVD is of rank 64 of a
4096 x 14336 matrix whose spectrum falls as k^-0.7. Every time is the median of `--repeats` runs, baseline and ours in
turn; every error is ‖T − T̂‖ / ‖T‖ by subtraction in float64.
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tensorly
import torch
from safetensors import safe_open
from tensorly.decomposition import parafac, tucker
from torch import Tensor

from trawl.decompose import CP, SVD, Method, Tucker, decompose
from trawl.decompose.reference import relative_error
from trawl.factors import Factors

RANKS = (16, 64)
LAYERS = {"layer 28": range(28, 29), "layers 20-29": range(20, 30)}


@dataclass(frozen=True)
class Row:
    """One line of the table: ours against one baseline."""

    work: str
    baseline: str
    seconds: float
    error: float
    baseline_seconds: float
    baseline_error: float
    faster_start: float = math.nan

    @property
    def speedup(self) -> float:
        """How many times faster than the baseline."""
        return self.baseline_seconds / self.seconds


def read_stack(folder: Path, layers: Sequence[int]) -> Tensor:
    """Read FC matrices as one tensor (S, 1536, 576): gate, up and transposed down of each layer."""
    found: dict[str, Tensor] = {}
    wanted = {f"model.layers.{n}.mlp.{role}_proj.weight" for n in layers for role in ("gate", "up", "down")}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name).float() for name in wanted & set(file.keys())}
    parts = []
    for n in layers:
        gate, up, down = (found[f"model.layers.{n}.mlp.{role}_proj.weight"] for role in ("gate", "up", "down"))
        parts += [gate, up, down.T]
    return torch.stack(parts)


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Return seconds and the result."""
    started = time.perf_counter()
    result = run()
    return time.perf_counter() - started, result


def in_turn(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, tuple[float, Any]]:
    """Run all in turn, ``repeats`` times; return the median seconds and the last result of each."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    results: dict[str, Any] = {}
    for _ in range(repeats):
        for name, run in runs.items():
            spent, results[name] = timed(run)
            seconds[name].append(spent)
    return {name: (statistics.median(seconds[name]), results[name]) for name in runs}


def cp_row(label: str, stack: Tensor, rank: int, repeats: int) -> Row:
    """Time CP against parafac from both of its starts."""
    runs: dict[str, Callable[[], Any]] = {"ours": lambda: decompose(stack, CP(rank))}
    for init in ("random", "svd"):
        runs[init] = partial(parafac, stack, rank, n_iter_max=50, tol=1e-5, init=init, random_state=0)
    results = in_turn(runs, repeats)
    measured = {}
    for init in ("random", "svd"):
        seconds, (_, (mixing, left, right)) = results[init]
        measured[init] = (relative_error(stack, Factors(left, right, mixing)), seconds)
    better = min(measured, key=lambda init: measured[init][0])
    faster = min(seconds for _, seconds in measured.values())
    seconds, factors = results["ours"]
    error, baseline = measured[better]
    return Row(
        f"CP {rank}, {label} {tuple(stack.shape)}",
        f"parafac, {better} start",
        seconds,
        relative_error(stack, factors),
        baseline,
        error,
        faster / seconds,
    )


def tucker_row(label: str, stack: Tensor, rank: int, repeats: int) -> Row:
    """Time Tucker [S, rank, rank] against tensorly's."""
    shape = [stack.shape[0], rank, rank]
    results = in_turn(
        {
            "ours": lambda: decompose(stack, Tucker(rank)),
            "tensorly": lambda: tucker(stack, shape, n_iter_max=50, tol=1e-5, init="svd"),
        },
        repeats,
    )
    baseline, (core, (mixing, left, right)) = results["tensorly"]
    seconds, factors = results["ours"]
    theirs = Factors(left, right, core, mixing)
    return Row(
        f"Tucker [S,{rank},{rank}], {label} {tuple(stack.shape)}",
        "tucker, SVD start",
        seconds,
        relative_error(stack, factors),
        baseline,
        relative_error(stack, theirs),
    )


def svd_rows(repeats: int) -> list[Row]:
    """Time SVD against the exact one and against torch's randomized one, at an error no worse than each needs."""
    random = torch.Generator().manual_seed(0)
    inner, hidden, terms, rank = 4096, 14336, 2048, 64
    decay = torch.arange(1, terms + 1).float() ** -0.7
    left = torch.randn(inner, terms, generator=random) * decay
    matrix = left @ torch.randn(terms, hidden, generator=random).T.contiguous().T
    methods: dict[str, Method] = {"default": SVD(rank), "tol 1e-2": SVD(rank, tol=1e-2)}
    runs: dict[str, Callable[[], Any]] = {name: partial(decompose, matrix, method) for name, method in methods.items()}
    runs["torch.svd_lowrank"] = lambda: torch.svd_lowrank(matrix, q=rank)
    runs["torch.linalg.svd"] = lambda: torch.linalg.svd(matrix, full_matrices=False)
    results = in_turn(runs, repeats)
    stack = matrix[None]
    errors = {name: relative_error(stack, results[name][1]) for name in methods}
    rows = []
    exact, randomized = "torch.linalg.svd", "torch.svd_lowrank"
    for baseline, name in ((exact, "default"), (randomized, "default"), (randomized, "tol 1e-2")):
        seconds, (u, sigma, v) = results[baseline]
        v = v if baseline == randomized else v.T
        theirs = Factors(u[:, :rank], v[:, :rank], sigma[None, :rank])
        work = f"SVD {rank}, {name}, {tuple(matrix.shape)}"
        rows.append(Row(work, baseline, results[name][0], errors[name], seconds, relative_error(stack, theirs)))
    return rows


def print_table(rows: list[Row]) -> None:
    """Print a Markdown table and the geometric means."""
    columns = "work", "seconds", "error", "baseline", "seconds", "error", "difference", "times faster", "faster start"
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        faster = "" if math.isnan(row.faster_start) else f"{row.faster_start:.1f}"
        print(
            f"| {row.work} | {row.seconds:.3f} | {row.error:.6f} | {row.baseline} | {row.baseline_seconds:.3f} | "
            f"{row.baseline_error:.6f} | {row.error - row.baseline_error:+.1e} | {row.speedup:.1f} | {faster} |"
        )
    for kind in ("CP", "Tucker"):
        of_kind = [row for row in rows if row.work.startswith(kind)]
        if of_kind:
            print(
                f"\n{kind}: geometric mean {statistics.geometric_mean(row.speedup for row in of_kind):.1f} times faster"
            )
    starts = [row.faster_start for row in rows if not math.isnan(row.faster_start)]
    if starts:
        print(
            f"\nCP against the faster start, whatever its error: geometric mean {statistics.geometric_mean(starts):.1f}"
        )


def machine() -> str:
    """Name processor, threads and library versions."""
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    versions = f"torch {torch.__version__}, tensorly {tensorly.__version__}, Python {platform.python_version()}"
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads; {versions}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a SmolLM2-135M checkpoint in safetensors")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each; the median counts (3)")
    parser.add_argument("--no-svd", action="store_true", help="leave out the SVD rows, whose baseline takes minutes")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="Trying to compute SVD")
    rows: list[Row] = []
    with tensorly.backend_context("pytorch"):
        decompose(torch.randn(3, 40, 30), CP(4))  # what a first call loads is not the work
        if options.model:
            for label, layers in LAYERS.items():
                stack = read_stack(options.model, layers)
                for rank in RANKS:
                    rows += [
                        cp_row(label, stack, rank, options.repeats),
                        tucker_row(label, stack, rank, options.repeats),
                    ]
        if not options.no_svd:
            rows += svd_rows(options.repeats)
    print(machine() + f"; median of {options.repeats}\n")
    print_table(sorted(rows, key=lambda row: row.work.split()[0]))


if __name__ == "__main__":
    main()
