"""The TRAWL paper's search against LASER's, task by task: gains on the test part, and what they cost in perplexity.

    python benchmarks/experiment.py MODEL --data DATA --out FOLDER --at-once 8 --device cuda

LASER (arXiv:2312.13558): the best SVD of a single matrix over all layers, all seven roles and three ranks. TRAWL
(arXiv:2406.17261): the best of CP and Tucker at ranks 1 to 256, on {gate, up, down} and on attention, layer by layer,
by thirds and over the whole model; then further interventions on top of the winner, from the last layer down, for as
long as validation improves by more than its noise. Each search chooses on a fifth of the records and is reported on
the others, the same for both, so that their difference is paired.

Each study is a `trawl sweep` in a folder of its own and goes on where it was when the command is run again; several
run at once with `--at-once`. Winners are written by the commands that `trawl sweep` gives.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import trawl
from trawl.sweeps.records import OutcomeFiles
from trawl.sweeps.scores import TaskScores

TASKS = {"qa_wikidata": "qa", "counterfact": "qa", "hotpotqa": "qa", "fever": "choice"}
OBJECTIVE = {"qa": "exact", "choice": "accuracy"}
EACH = ("q", "k", "v", "o", "gate", "up", "down")
GRID = ["--ranks", "1,8,64,256", "--roles", "fc", "--roles", "attn", "--group-layers", "1,10,all"]
STUDIES = {
    "laser": ["--method", "svd", "--ranks", "6,58,173", *(word for role in EACH for word in ("--roles", role))],
    "trawl": ["--method", "cp,tucker", *GRID, "--compose", "5"],
}
COMPARED = (("trawl", "laser"), ("composed", "laser"), ("composed", "trawl"))
WHAT = ("method", "rank", "roles", "layers")
TRAWL = [sys.executable, "-c", "import trawl_cli; trawl_cli.main()"]


def sweep(task: str, study: str, options: argparse.Namespace) -> None:
    """Run one study to its end, or go on with it; what it prints goes to a log beside its folder."""
    kind, out = TASKS[task], options.out / task / study
    out.parent.mkdir(parents=True, exist_ok=True)
    words = ["sweep", options.model, *STUDIES[study], "--layers", options.layers]
    words += [
        "--task",
        f"{kind}:{options.data / task}.jsonl",
        "--objective",
        OBJECTIVE[kind],
        "--objective",
        "log_loss",
    ]
    words += ["--limit", str(options.limit), "--dtype", "bf16", "--batch-tokens", str(options.batch_tokens)]
    words += ["--device", options.device, "-o", str(out)]
    began = time.perf_counter()
    with out.with_suffix(".log").open("a") as log:
        code = subprocess.run([*TRAWL, *words], check=False, stdout=log, stderr=subprocess.STDOUT).returncode
    if code:
        raise SystemExit(f"the study {task}, {study} ended with exit code {code}; {log.name} says why")
    print(f"{task}, {study}: {time.perf_counter() - began:.0f} s", flush=True)


def winners(task: str, study: str, options: argparse.Namespace) -> dict[str, float]:
    """Return the perplexity of a study's winner, and of what was composed on it, from the checkpoints that it names."""
    results = json.loads((options.out / task / study / "results.json").read_text())
    found = {}
    for number, command in enumerate(results["commands"]):
        words = shlex.split(command)
        out = Path(words[words.index("-o") + 1])
        if not out.exists():
            code = subprocess.run([*TRAWL, *words[1:]], check=False, stdout=subprocess.DEVNULL).returncode
            if code:
                raise SystemExit(f"'{command}' ended with exit code {code}")
        found["composed" if number else "best"] = perplexity(out, options)
    return found


def perplexity(model: str | Path, options: argparse.Namespace) -> float:
    """Return perplexity on WikiText-2."""
    text = f"ppl:{options.data / 'wikitext2raw-valid.txt'}"
    result = trawl.evaluate(str(model), text, limit=options.windows, dtype="bf16", device=options.device)[0]
    return result.figure("perplexity").value


def scored(folder: Path, name: str) -> TaskScores:
    """Return what an intervention made of every record of the test part."""
    outcome = OutcomeFiles(folder).read(name, "test")
    assert outcome is not None, f"{folder} has not scored {name} on the test part"
    return outcome.scores.tasks[0]


def compare(task: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of one task: each search's winner, what was composed, and differences between them."""
    figure = OBJECTIVE[TASKS[task]]
    found: dict[str, Any] = {}
    scores: dict[str, TaskScores] = {}
    for study in STUDIES:
        folder = options.out / task / study
        results = json.loads((folder / "results.json").read_text())
        trials = {trial["number"]: trial for trial in results["trials"]}
        best = trials[results["best"]]
        perplexities = winners(task, study, options)
        states = [trial["state"] for trial in results["trials"]]
        seconds = sum(trial["seconds"] or 0.0 for trial in results["trials"])
        entry = {"trials": len(states), "stopped": len(states) - states.count("complete"), "seconds": seconds}
        entry |= {key: best[key] for key in WHAT} | {"perplexity": perplexities["best"]}
        entry |= {part: best[part]["objectives"] for part in ("validation", "test")}
        found |= {"base": results["base"]["test"]["objectives"], study: entry}
        scores[study] = scored(folder, str(best["number"]))
        kept = [step["trial"] for step in (results["composition"] or {"steps": []})["steps"] if step["kept"]]
        if kept:
            added = [{key: trials[n][key] for key in WHAT} for n in kept]
            entry = {"added": added, "perplexity": perplexities["composed"]}
            entry |= {part: results["composition"][part]["objectives"] for part in ("validation", "test")}
            found["composed"] = entry
            scores["composed"] = scored(folder, "-".join(str(n) for n in (best["number"], *kept)))
    for one, other in COMPARED:
        if one in scores:
            gain, error = scores[one].gains(scores[other])[figure]
            found[f"{one} over {other}"] = {"value": gain, "stderr": error}
    return found


def table(found: dict[str, Any]) -> Table:
    """Return all tasks' figures; those of choices in percent."""
    shown = Table("task", "", "what", "trials", "validation", "test", "gain", "log-loss gain", "perplexity")
    for task, figures in found.items():
        if task == "base perplexity":
            continue
        figure = OBJECTIVE[TASKS[task]]
        base = figures["base"]
        shown.add_row(
            task, "base", "", "", "", f"{100 * base[figure]['value']:.1f}", "", "", f"{found['base perplexity']:.1f}"
        )
        for name in ("laser", "trawl", "composed"):
            if name not in figures:
                continue
            row = figures[name]
            each = row["added"] if name == "composed" else [row]
            what = ", ".join(
                f"{part['method']} rank {part['rank']} of {part['roles']} in {part['layers']}" for part in each
            )
            trials = f"{row['trials']}, {row['stopped']} stopped" if "trials" in row else ""
            validation, test = (f"{100 * row[part][figure]['value']:.1f}" for part in ("validation", "test"))
            gain, loss = (_gain(row["test"][key], scale) for key, scale in ((figure, 100), ("log_loss", 1)))
            shown.add_row("", name, what, trials, validation, test, gain, loss, f"{row['perplexity']:.1f}")
        for name in (f"{one} over {other}" for one, other in COMPARED):
            if name in figures:
                difference = figures[name]
                text = f"{100 * difference['value']:+.1f} ± {100 * difference['stderr']:.1f}"
                shown.add_row("", name, "", "", "", "", text, "", "")
    return shown


def _gain(part: dict[str, float], scale: float) -> str:
    digits = 1 if scale > 1 else 3
    return f"{scale * part['gain']:+.{digits}f} ± {scale * part['gain_stderr']:.{digits}f}"


def main() -> None:
    """Run all studies, and print their figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True, help="folder of task files and of WikiText")
    parser.add_argument("--out", type=Path, required=True, help="folder of all studies")
    parser.add_argument("--task", action="append", choices=TASKS, help="by default all four")
    parser.add_argument("--layers", default="all")
    parser.add_argument("--limit", type=int, default=1500, help="records of each task")
    parser.add_argument("--windows", type=int, default=30, help="of WikiText")
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--at-once", type=int, default=1, help="studies")
    parser.add_argument("--raw", type=Path, help="JSON file of all figures")
    options = parser.parse_args()
    tasks = options.task or list(TASKS)
    with ThreadPoolExecutor(options.at_once) as pool:
        running = [pool.submit(sweep, task, study, options) for study in STUDIES for task in tasks]
        try:
            for study in running:
                study.result()
        finally:  # of those that have not begun, where one failed
            pool.shutdown(wait=False, cancel_futures=True)
    found: dict[str, Any] = {"base perplexity": perplexity(options.model, options)}
    found |= {task: compare(task, options) for task in tasks}
    Console(width=200).print(table(found))
    if options.raw:
        options.raw.write_text(json.dumps(found, indent=1))
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    print(json.dumps({"torch": torch.__version__, "machine": f"{where}, {os.cpu_count()} CPUs"}))


if __name__ == "__main__":
    main()
