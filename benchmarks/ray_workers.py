"""A sweep by Ray workers of one thread each against one process of as many threads: seconds, share of ideal, results.

    python benchmarks/ray_workers.py MODEL --task ppl:text.txt --limit 400 --layers 20-29

Ideal is the time of one process with one thread, divided by the CPUs. Each run is a process of its own, into a folder
of its own with no factor file in it. What is compared is the time of the trials, from the base model's score to the
last one's: loading the model is paid once in a study, however long.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import trawl

LEFT_OUT = ("seconds", "updated", "started", "command", "commands")  # times, and the folder's name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("model")
    parser.add_argument("--task", required=True)
    parser.add_argument("--layers", default="all")
    parser.add_argument("--ranks", default="8,64")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--objective", default="log_loss")
    parser.add_argument("--child", nargs=3, metavar=("THREADS", "RAY", "OUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        run(arguments, *arguments.child)
        return
    cpus = len(os.sched_getaffinity(0))
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, threads, address in (
            ("1 process x 1 thread", 1, "no"),
            (f"1 process x {cpus} threads", cpus, "no"),
            (f"{cpus} Ray workers x 1 thread", 1, "local"),
        ):
            out = Path(folder) / f"{threads}-{address}"
            environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
            command = [sys.executable, *sys.argv, "--child", str(threads), address, str(out)]
            subprocess.run(command, check=True, env=environment)
            found[name] = json.loads((out / "timing.json").read_text()) | {"results": stable(out)}
            print(f"{name:28} {found[name]['total']:8.1f} s in all, {found[name]['trials']:8.1f} s for trials")
    alone, _, spread = found.values()
    ideal = alone["trials"] / cpus
    print(f"{cpus} workers take {spread['trials'] / ideal:.2f} times the ideal {ideal:.1f} s")
    print(f"results {'equal' if spread['results'] == alone['results'] else 'DIFFER from'} those of one process")


def run(arguments: argparse.Namespace, threads: str, address: str, out: str) -> None:
    """Run one sweep and write its times: in all, and of its trials."""
    torch.set_num_threads(int(threads))
    began = time.time()
    trawl.sweep(
        arguments.model,
        arguments.task,
        out,
        ranks=[int(rank) for rank in arguments.ranks.split(",")],
        layers=arguments.layers,
        limit=arguments.limit,
        objectives=(arguments.objective,),
        patience=None,
        ray=None if address == "no" else address,
    )
    total = time.time() - began
    scored = [file.stat().st_mtime for file in (Path(out) / "scores").glob("validation-*.json")]
    (Path(out) / "timing.json").write_text(json.dumps({"total": total, "trials": max(scored) - min(scored)}))


def stable(out: Path) -> Any:
    """Return a sweep's results without times."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(item) for key, item in value.items() if key not in LEFT_OUT}
        return [clean(item) for item in value] if isinstance(value, list) else value

    return clean(json.loads((out / "results.json").read_text()))


if __name__ == "__main__":
    main()
