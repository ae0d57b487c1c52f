"""Tables, progress and log lines."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import rich_click as click
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

PLAIN_SECONDS = 10.0  # between two lines of progress where there is no terminal

ERR = Console(stderr=True, markup=False)


def print_json(value: Any) -> None:
    """Print one JSON document."""
    click.echo(json.dumps(value, indent=2))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> None:
    """Print a table whose first ``left`` columns are text and the others numbers; never squeezed into a file."""
    table = Table(title=Text(printable(title)), title_justify="left", title_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(printable, row))
    console = Console(markup=False)
    if not console.is_terminal:  # a file has no width to fit into
        console = Console(markup=False, width=Console(markup=False, width=10_000).measure(table).maximum)
    console.print(table)


def log_handler() -> logging.Handler:
    """Return a handler that writes log lines above a progress bar."""
    return RichHandler(console=ERR, show_path=False, show_time=False, markup=False, highlighter=None)


@contextmanager
def observing(quiet: bool, unit: str = "bytes") -> Iterator[Any]:
    """Yield an observer of long work, counted in a unit: a bar with rate and time left, or plain lines without one."""
    if quiet:
        from trawl.observers import silent

        yield silent
    elif ERR.is_terminal:
        with _bars(unit) as bars:
            yield bars
    else:
        yield _plain()


class _RateColumn(ProgressColumn):
    """How many of a unit are done in a second."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        """Return the rate, once it is known."""
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f} {self.unit}/s" if speed else "", style="progress.data.speed")


@contextmanager
def _bars(unit: str) -> Iterator[Any]:
    counted: tuple[ProgressColumn, ...] = (MofNCompleteColumn(), _RateColumn(unit))
    if unit == "bytes":
        counted = (DownloadColumn(), TransferSpeedColumn())
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), *counted, TimeRemainingColumn())
    with Progress(*columns, console=ERR, transient=True) as progress:
        tasks: dict[str, TaskID] = {}

        def observe(stage: str, done: int, total: int | None) -> None:
            if stage not in tasks:
                for task in tasks.values():
                    progress.update(task, visible=False)
                tasks[stage] = progress.add_task(stage, total=total)
            progress.update(tasks[stage], completed=done)

        yield observe


def _plain() -> Any:
    last_stage, last_time, last_line = "", 0.0, ""

    def observe(stage: str, done: int, total: int | None) -> None:
        nonlocal last_stage, last_time, last_line
        now = time.monotonic()
        finished = total is not None and done >= total
        if stage == last_stage and not finished and now - last_time < PLAIN_SECONDS:
            return
        line = f"{stage} {done / total:.0%}" if total else stage
        if finished and line == last_line:
            return
        last_stage, last_time, last_line = stage, now, line
        ERR.print(line, highlight=False)

    return observe


def printable(text: str) -> str:
    """Return a text from a file with every character escaped that could steer a terminal."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def human_bytes(count: float) -> str:
    """Write a number of bytes with a decimal unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def times(sizes: Sequence[int]) -> str:
    """Write a shape or rank."""
    return " x ".join(str(size) for size in sizes)
