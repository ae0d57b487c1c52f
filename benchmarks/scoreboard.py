"""Rows of the scoreboard: a JSON file that an interrupted run goes on with, a table for each share kept, a picture."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.box import MARKDOWN
from rich.table import Table

import trawl

TEXTS = ("WikiText", "C4")
HOPELESS = 10_000  # a perplexity above which nothing is left of a model
ORDER = (
    "plain SVD",
    "ASVD scaling",
    "whitened SVD",
    "whitened SVD, interpolative",
    "Basis Sharing",
    "joint whitened SVD",
    "Tucker of each FC",
    "uniform narrow",
    "trawl --plain",
    "trawl",
)
SHOWN = 100  # times whitened SVD's excess, above which a ratio says nothing


def settings(options: argparse.Namespace, fingerprint: str, scored: Iterable[Path]) -> dict[str, Any]:
    """Return what figures depend on, for rows that may stand in one table, wherever the files lie.

    Args:
        options: the command line's.
        fingerprint: of the model.
        scored: files that rows are scored on.
    """
    names = ("windows", "context", "limit", "accuracy", "dtype")
    found: dict[str, Any] = {"model": fingerprint} | {name: getattr(options, name) for name in names}
    for name, files in (("calibrate", options.calibrate), ("scored", scored)):
        found[name] = [f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}" for file in files]
    return found


def commit() -> str:
    """Return which code makes a row, ``-dirty`` where it is not what was committed; the version outside a clone."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return trawl.__version__


def save(options: argparse.Namespace, figures: Mapping[str, Any]) -> None:
    """Write the figures of all rows so far, if they are to be kept; the file is whole at any time."""
    if not options.raw:
        return
    partial = options.raw.with_name(f"{options.raw.name}.partial")
    partial.write_text(json.dumps({"settings": options.settings, "rows": figures}, indent=1), encoding="utf-8")
    partial.replace(options.raw)


def earlier(options: argparse.Namespace) -> dict[str, Any]:
    """Return the rows that an interrupted run has scored."""
    if not options.raw or not options.raw.exists():
        return {}
    found = json.loads(options.raw.read_text(encoding="utf-8"))
    held = found.get("settings", {})
    if differing := [name for name, value in options.settings.items() if held.get(name) != value]:
        sys.exit(f"{options.raw} holds rows of other settings: {', '.join(differing)}; name another file with --raw")
    rows_found: dict[str, Any] = found["rows"]
    return rows_found


def shown(value: Any) -> str:
    """Return a figure in a few letters."""
    if isinstance(value, dict):
        return f"{value['value']:.4g}"
    return f"{value:,.0f}" if value > 99 else f"{value:.3g}"


def in_order(titles: Iterable[str]) -> list[str]:
    """Return rows from the plainest to trawl's; a title begins with one of ORDER."""

    def place(title: str) -> tuple[int, str]:
        known = max((name for name in ORDER if title.startswith(name)), key=len)
        return ORDER.index(known), title

    return sorted(titles, key=place)


def table(figures: Mapping[str, Any], keep: float) -> Table:
    """Return one share's rows as Markdown, with excess perplexity relative to whitened SVD's."""
    base, reference = figures["dense"], figures.get(f"{keep}: whitened SVD")
    accuracies = accuracies_of(base)
    titles = [name.removeprefix(f"{keep}: ") for name in figures if name.startswith(f"{keep}: ")]
    chosen = ["dense", "int8", *(f"{keep}: {title}" for title in in_order(titles))]
    timed = ("decode", "prefill") if any("decode" in figures[name] for name in chosen) else ()
    columns = ("parameters", "MB", *TEXTS, "of whitened's excess", *accuracies, "mean", *timed, "minutes")
    made = Table("", *columns, title=f"keep {keep}", box=MARKDOWN)
    for name in chosen:
        row = figures[name]
        ratios = ""
        if reference and name not in ("dense", "int8"):
            parts = [
                (row[text]["value"] - base[text]["value"]) / (reference[text]["value"] - base[text]["value"])
                for text in TEXTS
            ]
            ratios = " / ".join(f"{part:.3f}" if part < SHOWN else "-" for part in parts)
        mean, _ = mean_accuracy(row)
        made.add_row(
            name.removeprefix(f"{keep}: "),
            f"{row['parameters'] / 1e6:.1f} M",
            f"{row['bytes'] / 1e6:.0f}",
            *(_perplexity(row[text]["value"]) for text in TEXTS),
            ratios,
            *(f"{100 * row[task]['value']:.1f} ± {100 * row[task]['stderr']:.1f}" for task in accuracies),
            f"{100 * mean:.1f}" if accuracies else "",
            *(f"{row[name]:.2f}" if name in row else "" for name in timed),
            f"{row['seconds'] / 60:.1f}",
        )
    return made


def _perplexity(value: float) -> str:
    """Write a perplexity, one that says nothing in few letters."""
    return f"{value:.2f}" if value < HOPELESS else f"{value:.1e}".replace("e+0", "e")


def accuracies_of(row: Mapping[str, Any]) -> list[str]:
    """Return the tasks that a row has accuracies of."""
    return [name for name, value in row.items() if isinstance(value, dict) and "value" in value and name not in TEXTS]


def mean_accuracy(row: Mapping[str, Any]) -> tuple[float, float]:
    """Return the mean over a row's tasks and its standard error, tasks being independent; NaN without any."""
    found = [row[task] for task in accuracies_of(row)]
    if not found:
        return math.nan, math.nan
    return (
        sum(each["value"] for each in found) / len(found),
        math.sqrt(sum(each["stderr"] ** 2 for each in found)) / len(found),
    )
