"""Rows of the scoreboard: a JSON file that an interrupted run goes on with, and a table for each share kept."""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

import trawl


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return what figures depend on, for rows that may stand in one table."""
    names = ("model", "data", "windows", "context", "limit", "accuracy", "dtype", "calibrate")
    return {name: str(getattr(options, name)) for name in names}


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
    partial.write_text(json.dumps({"settings": settings(options), "rows": figures}, indent=1), encoding="utf-8")
    partial.replace(options.raw)


def earlier(options: argparse.Namespace) -> dict[str, Any]:
    """Return the rows that an interrupted run has scored."""
    if not options.raw or not options.raw.exists():
        return {}
    found = json.loads(options.raw.read_text(encoding="utf-8"))
    if found.get("settings") != settings(options):
        sys.exit(f"{options.raw} holds rows of other settings, {found.get('settings')}; name another file with --raw")
    rows_found: dict[str, Any] = found["rows"]
    return rows_found


def shown(value: Any) -> str:
    """Return a figure in a few letters."""
    if isinstance(value, dict):
        return f"{value['value']:.4g}"
    return f"{value:,.0f}" if value > 99 else f"{value:.3g}"


def table(figures: Mapping[str, Any], keep: float) -> Table:
    """Return one share's rows, with excess perplexity relative to whitened SVD's."""
    base, reference = figures["dense"], figures.get(f"{keep}: whitened SVD")
    names = [name for name in base if isinstance(base[name], dict)]
    accuracies = [name for name in names if name not in ("WikiText", "C4")]
    chosen = ["dense", "int8", *(name for name in figures if name.startswith(f"{keep}: "))]
    timed = ("decode", "prefill") if any("decode" in figures[name] for name in chosen) else ()
    columns = ("parameters", "MB", "WikiText", "C4", "of whitened's excess", *accuracies, "mean", *timed, "minutes")
    made = Table(f"keep {keep}", *columns)
    for name in chosen:
        row = figures[name]
        ratios = ""
        if reference and name not in ("dense", "int8"):
            parts = [
                (row[text]["value"] - base[text]["value"]) / (reference[text]["value"] - base[text]["value"])
                for text in ("WikiText", "C4")
            ]
            ratios = " / ".join(f"{part:.3f}" for part in parts)
        mean = sum(row[task]["value"] for task in accuracies) / len(accuracies) if accuracies else math.nan
        made.add_row(
            name.removeprefix(f"{keep}: "),
            f"{row['parameters'] / 1e6:.1f} M",
            f"{row['bytes'] / 1e6:.0f}",
            f"{row['WikiText']['value']:.2f}",
            f"{row['C4']['value']:.2f}",
            ratios,
            *(f"{100 * row[task]['value']:.1f} ± {100 * row[task]['stderr']:.1f}" for task in accuracies),
            f"{100 * mean:.1f}" if accuracies else "",
            *(f"{row[name]:.2f}" if name in row else "" for name in timed),
            f"{row['seconds'] / 60:.1f}",
        )
    return made
