"""Disturb runs in every way, run each again, and compare with an undisturbed one.

python benchmarks/faults.py --kills 100

Prints a table: the fault, how often it was injected, how often it hit the run before its end, and how often the second
run gave the same bytes, with the source as it was and nothing left beside the output. Needs ``unshare`` for a disk that
is really full.
"""

from __future__ import annotations

import argparse
import errno
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))

import trawl
from tests import faults
from tests.faults import contents, disturbed, failing, finished, start, state

RECIPES = {
    "dense": faults.RECIPE,
    "factored": trawl.Recipe(method="tucker", rank=(3, 2, 2), roles="fc", layers="0-1", write="factored"),
    "narrow": trawl.Recipe(method="narrow", width=0.5),
}
SHARES = {"dense": 0.5, "factored": 0.4, "narrow": 0.1}  # of the kills; a narrow run imports transformers: seconds
SIZES = (8, 16, 24, 40, 64, 80, 96, 112, 128, 144, 160)  # kB of a disk that fills up


@dataclass
class Row:
    """One line of the table."""

    fault: str
    injected: int = 0
    hit: int = 0
    same: int = 0
    wrong: list[str] = field(default_factory=list)


@dataclass
class Bench:
    """A source, what undisturbed runs make of it, and a folder to work in."""

    source: Path
    folder: Path
    wanted: dict[str, dict[str, object]]

    @property
    def out(self) -> Path:
        """The output of every run."""
        return self.folder / "work" / "out"

    def again(self, row: Row, recipe: str, hit: bool) -> None:
        """Run a second time over what a fault left, and count."""
        before = state(self.source)
        row.injected, row.hit = row.injected + 1, row.hit + hit
        try:
            trawl.compress(self.source, RECIPES[recipe], self.out, resume=True)
            same = contents(self.out) == self.wanted[recipe]
            alone = [path.name for path in self.out.parent.iterdir()] == ["out"]
            row.same += same and alone and state(self.source) == before
        except Exception as e:  # noqa: BLE001 (told of in the table)
            row.wrong.append(f"{type(e).__name__}: {e}")
        shutil.rmtree(self.out.parent)
        self.out.parent.mkdir()


def kills_at_operations(bench: Bench) -> Row:
    """Kill at every file operation of a run, the last ones while an old output is replaced."""
    row = Row("SIGKILL at each file operation")
    for at in itertools.count():
        code = finished(faults.run_disturbed, bench.source, bench.out, at, {})
        if code == 0:
            return row
        bench.again(row, "dense", code == -signal.SIGKILL)
    raise AssertionError


def kills_at_random(bench: Bench, count: int, seed: int) -> Iterator[Row]:
    """Kill at random moments of runs of each kind."""
    moments = random.Random(seed)  # noqa: S311 (no secret)
    for name, recipe in RECIPES.items():
        row = Row(f"SIGKILL at a random moment, {name}")
        started = time.monotonic()
        finished(faults.run_plain, bench.source, bench.out, recipe, {})
        seconds = time.monotonic() - started
        shutil.rmtree(bench.out)
        for _ in range(round(count * SHARES[name])):
            process = start(faults.run_plain, bench.source, bench.out, recipe, {})
            time.sleep(moments.uniform(0, seconds))
            process.kill()
            process.join()
            bench.again(row, name, process.exitcode == -signal.SIGKILL)
        yield row


def errors_at_operations(bench: Bench, code: int) -> Row:
    """Let every file operation fail once."""
    row = Row(f"{errno.errorcode[code]} of each file operation")
    for at in itertools.count():
        hit = False
        with disturbed(at, failing(code)) as operations:
            try:
                trawl.compress(bench.source, RECIPES["dense"], bench.out)
            except OSError:
                hit = True
        bench.again(row, "dense", hit)
        if len(operations) <= at:
            return row
    raise AssertionError


def signals(bench: Bench, number: signal.Signals, count: int, seed: int) -> Row:
    """Send a signal to the command at random moments."""
    row, moments = Row(f"{number.name} at a random moment"), random.Random(seed)  # noqa: S311 (no secret)
    recipe = RECIPES["dense"]
    command = ["compress", str(bench.source), "-o", str(bench.out), "--rank", str(recipe.rank), "--roles", recipe.roles]
    command += ["--layers", recipe.layers, "--group-layers", str(recipe.group_layers)]
    errors = bench.folder / "errors"
    for _ in range(count):
        process = start(faults.run_command, command, errors)
        time.sleep(moments.uniform(0.1, 0.4))
        if process.is_alive():
            os.kill(process.pid, number)
        process.join()
        said = errors.read_text(encoding="utf-8") if errors.exists() else ""
        if "Traceback" in said:
            row.wrong.append(said.splitlines()[-1])
        bench.again(row, "dense", process.exitcode == 128 + number)
    return row


def full_disks(bench: Bench) -> Row:
    """Fill file systems of several sizes up, then give them more room."""
    row = Row("a full disk (tmpfs)")
    for size in SIZES:
        command = [sys.executable, __file__, "--inside", str(bench.source), str(bench.folder / "disk"), str(size)]
        (bench.folder / "disk").mkdir(exist_ok=True)
        done = subprocess.run(["/usr/bin/unshare", "-rm", *command], capture_output=True, text=True, check=False)
        row.injected += 1
        row.hit += "hit" in done.stdout
        row.same += "same" in done.stdout
        if done.returncode:
            row.wrong.append(done.stderr.strip().splitlines()[-1])
    return row


def inside(source: Path, disk: Path, size: int) -> None:
    """Compress onto a disk of ``size`` kB that says it had room, then onto the same with more."""
    subprocess.run(["/usr/bin/mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", disk], check=True)
    wanted = disk.parent / "wanted"
    try:
        with mock.patch.object(shutil, "disk_usage", return_value=mock.Mock(free=1 << 40)):
            trawl.compress(source, RECIPES["dense"], disk / "out")
    except OSError as e:
        print("hit" if e.errno == errno.ENOSPC and not (disk / "out").exists() else e)
    subprocess.run(["/usr/bin/mount", "-o", "remount,size=10m", disk], check=True)
    trawl.compress(source, RECIPES["dense"], disk / "out", resume=True)
    trawl.compress(source, RECIPES["dense"], wanted, overwrite=True)
    print("same" if contents(disk / "out") == contents(wanted) else "other bytes")


def rows(bench: Bench, kills: int, seed: int, only: str) -> Iterator[Row]:
    """Inject everything, or one sort of fault."""
    if only in ("", "kills"):
        yield kills_at_operations(bench)
        yield from kills_at_random(bench, kills, seed)
    if only in ("", "errors"):
        yield from (errors_at_operations(bench, code) for code in (errno.ENOSPC, errno.EIO, errno.EACCES))
    if only in ("", "signals"):
        yield from (signals(bench, number, 20, seed) for number in (signal.SIGINT, signal.SIGTERM))
    if only in ("", "disk"):
        yield full_disks(bench)


def main() -> None:
    """Print the table, and exit with 1 if any second run gave something else."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="SIGKILLs at random moments")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", choices=("kills", "errors", "signals", "disk"))
    parser.add_argument("--inside", nargs=3, metavar=("SOURCE", "DISK", "KB"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        inside(Path(options.inside[0]), Path(options.inside[1]), int(options.inside[2]))
        return
    from tests.zoo import save_zoo  # noqa: PLC0415 (transformers: seconds for each process that imports this file)

    started, good = time.monotonic(), True
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        source = save_zoo("llama", folder / "source", 3)
        wanted = {}
        for name, recipe in RECIPES.items():
            trawl.compress(source, recipe, folder / name)
            wanted[name] = contents(folder / name)
        bench = Bench(source, folder, wanted)
        bench.out.parent.mkdir()
        print("| fault | injected | hit the run | second run the same |\n|---|---|---|---|")
        for row in rows(bench, options.kills, options.seed, options.only):
            print(f"| {row.fault} | {row.injected} | {row.hit} | {row.same} |", *row.wrong, flush=True)
            good &= row.same == row.injected and not row.wrong
    print(f"{time.monotonic() - started:.0f} s")
    sys.exit(not good)


if __name__ == "__main__":
    main()
