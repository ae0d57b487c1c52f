"""What a sweep leaves behind: every record's scores, results.json, trials.csv, and commands that rebuild a winner."""

from __future__ import annotations

import csv
import io
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from trawl.errors import LoadError, ResumeError
from trawl.locks import locked
from trawl.shards import sealed
from trawl.sweeps.scorer import Outcome, Part
from trawl.sweeps.scores import Scores
from trawl.sweeps.space import Intervention, rank_text

FORMAT_VERSION = 1


def write_json(path: Path, value: Any) -> None:
    """Write a sealed JSON file."""
    write_bytes(path, json.dumps(value, indent=1, allow_nan=True).encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a sealed file that several processes may write at once; the last one's stays."""
    with locked(path.parent / "writing.lock"), sealed(path) as file:
        file.write(content)


def read_json(path: Path) -> Any:
    """Read a file of the sweep's own.

    Raises: LoadError: it is not readable.
    """
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as e:
        raise LoadError(f"{path} is not readable: {e}; delete it to make it again") from e


@dataclass(frozen=True)
class OutcomeFiles:
    """Outcomes that are known already, one sealed file each, under ``scores/``."""

    folder: Path
    _known: dict[Path, Outcome] = field(default_factory=dict, repr=False)

    def path(self, name: str, part: Part) -> Path:
        """Where an outcome lies."""
        return self.folder / "scores" / f"{part}-{name}.json"

    def write(self, name: str, part: Part, outcome: Outcome) -> None:
        """Keep an outcome."""
        value = vars(outcome) | {"scores": outcome.scores.to_json(), "stacks": list(outcome.stacks)}
        write_json(self.path(name, part), value)

    def read(self, name: str, part: Part) -> Outcome | None:
        """Return an outcome, None where it is not known yet."""
        path = self.path(name, part)
        if path in self._known:
            return self._known[path]
        if not path.exists():
            return None
        value = read_json(path)
        self._known[path] = Outcome(
            **value | {"scores": Scores.from_json(value["scores"]), "stacks": tuple(value["stacks"])}
        )
        return self._known[path]


def check_identity(folder: Path, identity: Mapping[str, Any]) -> None:
    """Record what a study belongs to, or refuse to mix another sweep into it.

    Raises: ResumeError: the folder holds another sweep; the message names what differs.
    """
    path = folder / "sweep.json"
    wanted = json.loads(json.dumps(identity))
    if not path.exists():
        write_json(path, wanted)
        return
    before = read_json(path)
    differing = [name for name in sorted({*before, *wanted}) if before.get(name) != wanted.get(name)]
    if differing:
        raise ResumeError(
            f"{folder} holds a sweep that differs in {', '.join(differing)}; repeat that sweep's options to go on with "
            "it, or choose another folder with -o"
        )


def rebuild_commands(
    model: str, interventions: Sequence[Intervention], folder: Path, options: Mapping[str, Any]
) -> list[str]:
    """Return the commands that write the checkpoint of some interventions, each from the sweep's own factor files."""
    commands = []
    source = model
    for number, item in enumerate(interventions, start=1):
        out = "winner" if number == len(interventions) else f"winner-step{number}"
        ladder = options["libraries"][item.method]
        words = ["trawl", "compress", source, "--method", item.method, "--rank", rank_text(item.rank)]
        words += ["--layers", item.layers, "--roles", item.roles, "--seed", str(options["seed"])]
        for flag, value in (("--n-iter-max", options["n_iter_max"]), ("--tol", options["tol"])):
            words += [] if value is None else [flag, str(value)]
        if options["revision"] is not None and number == 1:  # later ones start from what the first has made
            words += ["--revision", options["revision"]]
        words += ["--factors", str(ladder), "-o", str(folder / out)]
        commands.append(shlex.join(words))
        source = str(folder / out)
    return commands


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as CSV."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(path, text.getvalue().encode())


def flat_row(trial: Mapping[str, Any]) -> dict[str, Any]:
    """Return a trial of results.json as one row of a table."""
    names = ("number", "method", "roles", "layers", "group_layers", "rank", "state", "kept", "seconds")
    row = {name: trial[name] for name in names}
    row["rank"] = rank_text(tuple(row["rank"]) if isinstance(row["rank"], list) else row["rank"])
    for part in ("validation", "test"):
        for name, found in (trial[part] or {"objectives": {}})["objectives"].items():
            for key, value in found.items():
                row[f"{part}_{name}_{key}" if key != "value" else f"{part}_{name}"] = value
    return row


def now() -> str:
    """Return the time in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def trawl_version() -> str:
    """Return the distribution's version."""
    return version("trawl-llm")
