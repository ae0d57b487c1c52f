"""Compress a full-size checkpoint: wall time and peak anonymous memory against a plain copy of it.

    python benchmarks/synthetic_checkpoint.py /tmp/llama-8b
    python benchmarks/large.py /tmp/llama-8b --rank 64 --layers 20-30

The yardstick, measured in the same run, is copy + floor: the time of ``cp -r`` of the checkpoint, and the matrix
products that the plan counts divided by the machine's own rate for a large float32 product. Memory is RssAnon, sampled
from /proc every 20 ms: file-backed pages of the mapped source come and go and are not the process's own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import trawl


def gemm_rate(size: int = 4096, repeats: int = 5) -> float:
    """Return the best float32 rate of a square matrix product, in FLOP/s."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        torch.mm(a, b)
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)


def copy_seconds(source: Path, target: Path) -> float:
    """Return the wall time of ``cp -r``, and remove the copy."""
    started = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)  # noqa: S607 (cp is where the system has it)
    seconds = time.perf_counter() - started
    shutil.rmtree(target)
    return seconds


def anonymous_bytes(pid: int) -> int:
    """Return a process's RssAnon in bytes, 0 once it is gone."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 0


def run_compress(source: Path, out: Path, options: list[str]) -> tuple[float, int, dict[str, Any]]:
    """Run the command line; return wall seconds, peak RssAnon in bytes, and its JSON report."""
    command = [sys.executable, "-c", "import trawl_cli; trawl_cli.main()", "compress", str(source), "-o", str(out)]
    started = time.perf_counter()
    process = subprocess.Popen([*command, *options, "--json"], stdout=subprocess.PIPE, text=True)
    peak = 0

    def watch() -> None:
        nonlocal peak
        while process.poll() is None:
            peak = max(peak, anonymous_bytes(process.pid))
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    text, _ = process.communicate()
    seconds = time.perf_counter() - started
    watcher.join()
    if process.returncode:
        raise SystemExit(f"compress failed with exit code {process.returncode}")
    shutil.rmtree(out)
    return seconds, peak, json.loads(text)


def main() -> None:
    """Print one row per method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--methods", default="cp,tucker")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--layers", default="20-30")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    source: Path = arguments.source
    scratch = source.with_name(source.name + ".benchmark")
    rate = gemm_rate()
    title = (
        f"{source.name}, rank {arguments.rank}, layers {arguments.layers}; {platform.processor() or platform.machine()}"
    )
    table = Table(title=f"{title}, {os.cpu_count()} cores, {rate / 1e9:.0f} GFLOP/s; median of {arguments.repeats}")
    columns = (
        "method",
        "cp -r s",
        "floor s",
        "compress s",
        "ratio",
        "decompose s",
        "peak RssAnon GB",
        "worst rel. error",
    )
    for column in columns:
        table.add_column(column, justify="left" if column == "method" else "right")
    for method in arguments.methods.split(","):
        options = ["--method", method, "--rank", str(arguments.rank), "--layers", arguments.layers]
        recipe = trawl.Recipe(method=method, rank=arguments.rank, layers=arguments.layers)
        planned = trawl.plan(source, recipe)
        rebuilt = sum(2 * item.stack.parameters * item.rank[2] for item in planned.stacks)
        floor = (planned.flops + rebuilt) / rate
        runs = []
        for _ in range(arguments.repeats):
            copied = copy_seconds(source, scratch)
            seconds, peak, report = run_compress(source, scratch, options)
            runs.append((seconds / (copied + floor), copied, seconds, peak, report))
        _, copied, seconds, _, report = sorted(runs, key=lambda run: run[0])[len(runs) // 2]
        stacks = report["stacks"]
        decompose = sum(stack["seconds"] for stack in stacks)
        error = max(stack["relative_error"] for stack in stacks)
        row = (copied, floor, seconds, statistics.median(run[0] for run in runs), decompose)
        memory = max(run[3] for run in runs) / 1e9
        table.add_row(method, *(f"{value:.2f}" for value in row), f"{memory:.2f}", f"{error:.5f}")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
