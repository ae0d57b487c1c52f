"""Read files of strangers by the hundred thousand: every case ends in TrawlError or is read.

python benchmarks/fuzz.py --cases 100000

Prints a table of counts by kind of file and outcome, and writes the first case of each failure into ``--keep``.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from collections import Counter
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.hostile import Kind, cases, make_kinds, outcome

MEMORY = 1 << 30  # bytes of address space that all cases together may add


def main() -> None:
    """Run the cases, print the table, and exit with 1 if any failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=100_000, help="of all kinds together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="kinds whose name holds this text")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-failures"), help="folder for cases that fail")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        kinds = make_kinds(Path(root))
        chosen = {name: found for name, found in kinds.items() if options.only in name}
        bound_memory()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        started = time.process_time()
        counts = {
            name: run(kind, folder, options.cases // len(chosen), options.seed, options.keep)
            for name, (kind, folder) in chosen.items()
        }
        seconds = time.process_time() - started
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1000
    print_table(counts)
    print(f"{sum(map(Counter.total, counts.values())):,} cases, {seconds:.0f} CPU seconds, {grown:.0f} MB more memory")
    sys.exit(any(what.startswith("FAULT") for found in counts.values() for what in found))


def bound_memory() -> None:
    """Let memory that runs away fail the case that asks for it."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, resource.RLIM_INFINITY))


def run(kind: Kind, folder: Path, count: int, seed: int, keep: Path) -> Counter[str]:
    """Run the cases of one kind, and count what came of them."""
    found: Counter[str] = Counter()
    valid = {path.name for path in folder.iterdir()}
    for number, content in enumerate(islice(cases(kind, seed), count)):
        what = outcome(kind, folder, content)
        if new := {path.name for path in folder.iterdir()} - valid:
            what = f"FAULT: left {', '.join(new)}"
        found[what] += 1
        if what.startswith("FAULT") and found[what] == 1:
            keep.mkdir(exist_ok=True)
            (keep / f"{folder.name}-{number}-{kind.file}").write_bytes(content)
    return found


def print_table(counts: dict[str, Counter[str]]) -> None:
    """Print counts by kind and outcome as Markdown."""
    outcomes = sorted({what for found in counts.values() for what in found}, key=lambda what: (what != "read", what))
    print("| kind of file | cases |", " | ".join(outcomes), "|")
    print("|---|" + "---|" * (len(outcomes) + 1))
    for name, found in counts.items():
        print(f"| {name} | {found.total():,} |", " | ".join(f"{found[what]:,}" for what in outcomes), "|")


if __name__ == "__main__":
    main()
