"""A realistic results.json, made from a seed: no model, no search, the shape of what a sweep writes.

python -m tests.synthetic_sweep FOLDER [unfinished]
"""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Iterator, Mapping
from itertools import count, product
from pathlib import Path
from typing import Any

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
LAYERS, RANKS, METHODS, ROLES = 30, (1, 8, 64), ("cp", "tucker"), ("fc", "attn")
SHAPES = {"fc": [3, 1536, 576], "attn-qo": [2, 576, 576], "attn-kv": [2, 192, 576]}
STACKS_OF = {"fc": ("fc",), "attn": ("attn-qo", "attn-kv")}
PARAMETERS = 134_515_008
TASKS = ["qa:qa_wikidata.jsonl", "ppl:wiki.txt"]
BASE = {"accuracy": 0.048, "log_loss": 6.12, "perplexity": 21.4}
PARTS = {"validation": 300, "test": 1200}
RANGES = ("0-9", "10-19", "20-29", "all")


def synthetic_sweep(state: str = "complete", seed: int = 0, tried: int = LAYERS, **changes: Any) -> dict[str, Any]:
    """Return a results.json's values.

    Args:
        state: ``complete``, or ``searching`` for a study half way through, without test parts.
        seed: of every number.
        tried: how many layers were tried one by one, the last of the model.
        changes: values to put in place of others, at the top.
    """
    draw = random.Random(seed)
    trials = list(_trials(draw, tried))
    if state != "complete":
        for trial in trials[len(trials) // 2 :]:
            trial |= {"state": "waiting", "stacks": [], "kept": None, "kept_targeted": None, "validation": None}
        trials[len(trials) // 2]["state"] = "running"
    done = [trial for trial in trials if trial["state"] == "complete"]
    best = max(done, key=_accuracy)
    singles = [trial for trial in done if trial["layers"].isdigit()]
    best_of_layer = {
        layer: max((trial for trial in singles if trial["layers"] == layer), key=_accuracy)
        for layer in {trial["layers"] for trial in singles}
    }
    front = [trial for trial in done if not any(_dominates(other, trial) for other in done)]
    tested = [*best_of_layer.values(), best] if state == "complete" else []
    for trial in tested:
        gain = trial["validation"]["objectives"]["accuracy"]["gain"]
        trial["test"] = _scores(draw, "test", 0.8 * gain, shrink=0.8)
    values = {
        "format_version": 1, "trawl": "0.1.0", "model": MODEL, "family": "llama",
        "layers": LAYERS, "parameters": PARAMETERS, "seed": 0, "state": state, "sampler": "grid",
        "command": f"trawl sweep {MODEL} --method cp,tucker --ranks 1,8,64 --task "
                   "qa:qa_wikidata.jsonl --task ppl:wiki.txt --compose 3 -o study",
        "started": "2030-01-02T03:04:05+00:00", "updated": "2030-01-02T04:05:06+00:00", "objectives": ["accuracy"],
        "tasks": [
            {"task": TASKS[0], "kind": "qa", "accuracy": "correct", "log_loss": "log_loss", **PARTS},
            {"task": TASKS[1], "kind": "ppl", "accuracy": None, "log_loss": "log_loss", "validation": 40, "test": 160},
        ],
        "base": {"validation": _scores(draw, "validation", None), "test": _scores(draw, "test", None)},
        "trials": trials, "best": best["number"], "front": [trial["number"] for trial in front],
        "best_of_layer": {layer: trial["number"] for layer, trial in best_of_layer.items()},
        "composition": _composition(draw, best, singles),
        "commands": [f"trawl compress {MODEL} --method {best['method']} --rank {best['rank']} -o best"],
    }  # fmt: skip
    if state != "complete":
        values["base"]["test"] = values["composition"] = None
        values["commands"] = []
    return values | changes


def _accuracy(trial: Mapping[str, Any]) -> float:
    return float(trial["validation"]["objectives"]["accuracy"]["value"])


def _dominates(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether one trial is no worse in both gain and kept parameters, and better in one."""
    a, b = ((_accuracy(trial), -trial["kept"]) for trial in (one, other))
    return a != b and a[0] >= b[0] and a[1] >= b[1]


def _trials(draw: random.Random, tried: int) -> Iterator[dict[str, Any]]:
    numbers = count()
    layers = [*map(str, range(LAYERS - tried, LAYERS)), *RANGES]
    for method, roles, where, rank in product(METHODS, ROLES, layers, RANKS):
        trial = _trial(draw, next(numbers), method=method, roles=roles, where=where, rank=rank)
        if where.isdigit() and draw.random() < 0.08 and where != "28" and (tried < LAYERS or int(where) < 8):
            trial |= {"state": "stopped", "validation": trial["validation"] | {"records": 60}}
        if trial["number"] == 3:
            trial |= {"state": "failed", "error": "CheckpointError: model.safetensors: cannot read x", "stacks": []}
            trial |= {"kept": None, "kept_targeted": None, "validation": None}
        yield trial


def _trial(draw: random.Random, number: int, *, method: str, roles: str, where: str, rank: int) -> dict[str, Any]:
    first, _, last = ("0-29" if where == "all" else where).partition("-")
    span = int(last or first) - int(first) + 1
    middle = (int(first) + int(last or first)) / 2 / LAYERS
    group = "all" if span == 1 else draw.choice(["all", "1"])
    late = max(0.0, middle - 0.6) * (1.0 if roles == "fc" else 0.25)
    gain = 0.26 * late * (0.4 + 0.6 * (rank <= 8)) - 0.05 * (1 - middle) * draw.random() - 0.01 * (span - 1)
    if (method, roles, where, rank) == ("cp", "fc", "28", 8):
        gain += 0.06
    stacks = [_stack(draw, name, where if where != "all" else "0-29", span, rank) for name in STACKS_OF[roles]]
    before = sum(math.prod(stack["shape"]) for stack in stacks)
    after = sum(rank * sum(stack["shape"]) for stack in stacks)
    return {
        "number": number, "method": method, "roles": roles, "layers": where, "group_layers": group, "rank": rank,
        "state": "complete", "error": None, "stacks": stacks, "kept": 1 - (before - after) / PARAMETERS,
        "kept_targeted": after / before, "seconds": round(1 + draw.random(), 2),
        "validation": _scores(draw, "validation", max(gain, -BASE["accuracy"])), "test": None,
    }  # fmt: skip


def _stack(draw: random.Random, name: str, where: str, span: int, rank: int) -> dict[str, Any]:
    slices, inner, hidden = SHAPES[name]
    error = (1 - 0.08 * math.log(1 + rank) / 2.5 - 0.03 * draw.random()) ** (1 / span**0.2)
    shape, ranks = [slices * span, inner, hidden], [slices * span, rank, rank]
    return {"name": f"{name}.{where}", "shape": shape, "rank": ranks, "relative_error": error}


def _scores(draw: random.Random, part: str, gain: float | None, shrink: float = 1.0) -> dict[str, Any]:
    """Return scores with a gain of accuracy and what goes with it, or the base's."""
    records = PARTS[part]
    noise = 0.25 / math.sqrt(records)
    base = gain is None
    gained = {
        "accuracy": 0.0 if base else gain + draw.gauss(0, noise * 0.5),
        "log_loss": 0.0 if base else 2.2 * gain * shrink + draw.gauss(0, 0.05),
        "perplexity": 0.0 if base else -abs(draw.gauss(0.6, 0.5)),
    }
    measures = {}
    for name, better in (("accuracy", 1), ("log_loss", -1), ("perplexity", -1)):
        scale = {"accuracy": 1.0, "log_loss": 3.0, "perplexity": 4.0}[name]
        value = BASE[name] + better * gained[name]
        measures[name] = {"value": max(value, 0.0), "stderr": scale * noise}
        if not base:
            measures[name] |= {"gain": gained[name], "gain_stderr": scale * noise * 0.9}
    figures = [{"name": "correct", **measures["accuracy"], "higher_is_better": True},
               {"name": "log_loss", **measures["log_loss"], "higher_is_better": False}]  # fmt: skip
    tasks = [
        {"task": TASKS[0], "figures": figures},
        {"task": TASKS[1], "figures": [{"name": "perplexity", **measures["perplexity"], "higher_is_better": False}]},
    ]
    objectives = {name: measures[name] for name in ("accuracy", "log_loss")}
    return {"records": records, "of": records, "objectives": objectives, "tasks": tasks}


def _composition(draw: random.Random, best: Mapping[str, Any], singles: list[dict[str, Any]]) -> dict[str, Any]:
    second, third = sorted((trial for trial in singles if trial["layers"] != best["layers"]), key=_accuracy)[-2:]
    gain = best["validation"]["objectives"]["accuracy"]["gain"]
    names = ("trial", "kept", "reason", "improvement", "noise")
    rows = (
        (best["number"], True, "the best single intervention", gain, 0.014),
        (third["number"], True, "improves by more than its noise", 0.026, 0.012),
        (second["number"], False, "improves by less than its noise", 0.006, 0.013),
    )
    steps = [dict(zip(names, row, strict=True)) for row in rows]
    for step, gained in zip(steps, (gain, gain + 0.026, gain + 0.032), strict=True):
        step["validation"] = _scores(draw, "validation", gained)
    return {
        "order": "best-first", "steps": steps, "trials": [best["number"], third["number"]],
        "validation": _scores(draw, "validation", gain + 0.026), "test": _scores(draw, "test", 0.8 * gain + 0.02),
    }  # fmt: skip


def write_sweep(folder: Path, state: str = "complete", tried: int = LAYERS, **changes: Any) -> Path:
    """Write a synthetic results.json into a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(synthetic_sweep(state, tried=tried, **changes)), encoding="utf-8")
    return folder


if __name__ == "__main__":
    write_sweep(Path(sys.argv[1]), "searching" if "unfinished" in sys.argv[2:] else "complete")
