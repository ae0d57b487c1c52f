"""What a report is made of, read from a sweep's results.json or a compress output's trawl.json."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from trawl.errors import PlanError
from trawl.untrusted import parse_json

RESULTS_NAME = "results.json"
RECORD_NAME = "trawl.json"
FORMAT_VERSION = 1
ONE_LAYER = re.compile(r"[0-9]{1,4}")
RUN_OF_LAYERS = re.compile(r"([0-9]{1,4})(?:-([0-9]{1,4}))?")

T = TypeVar("T")


@dataclass(frozen=True)
class Measure:
    """One figure of a model and its paired difference to the base model.

    Attributes:
        value: the estimate; None where it is not finite.
        stderr: its standard error, where known.
        gain: the difference to the base, oriented so that positive is better; None for the base itself.
        gain_stderr: the standard error of the paired difference, where known.
    """

    value: float | None
    stderr: float | None = None
    gain: float | None = None
    gain_stderr: float | None = None

    @property
    def stands_out(self) -> bool:
        """Whether the gain, or the loss, exceeds two standard errors."""
        return self.gain is not None and self.gain_stderr is not None and abs(self.gain) > 2 * self.gain_stderr


@dataclass(frozen=True)
class Scores:
    """What a model scored on one part of the records.

    Attributes:
        records: records scored.
        of: records of the part; more than ``records`` where a trial was stopped early.
        objectives: measures by objective.
        figures: (task, figure's name) and measure of everything that the tasks report.
    """

    records: int
    of: int
    objectives: Mapping[str, Measure]
    figures: tuple[tuple[str, str, Measure], ...]


@dataclass(frozen=True)
class StackError:
    """How closely one stack was approximated.

    Attributes:
        name: the stack's name.
        layers: layers that it covers.
        shape: (S, inner, hidden).
        rank: (stack, inner, hidden).
        relative_error: ‖T − T̂‖_F / ‖T‖_F.
    """

    name: str
    layers: tuple[int, ...]
    shape: tuple[int, ...]
    rank: tuple[int, ...]
    relative_error: float

    @property
    def kept_energy(self) -> float:
        """Share of ‖T‖² that is left."""
        return 1.0 - self.relative_error**2

    @property
    def kind(self) -> str:
        """What the stack holds, such as ``fc`` or ``attn-kv``: its name without the layers."""
        return self.name.rpartition(".")[0] or self.name


@dataclass(frozen=True)
class Trial:
    """One intervention and what came of it; fields as in results.json."""

    number: int
    method: str
    roles: str
    layers: str
    group_layers: str
    rank: tuple[int, ...]
    state: str
    error: str | None
    stacks: tuple[StackError, ...]
    kept: float | None
    validation: Scores | None
    test: Scores | None

    @property
    def one_layer(self) -> int | None:
        """The layer, where there is one only."""
        return int(self.layers) if ONE_LAYER.fullmatch(self.layers) else None

    @property
    def rank_text(self) -> str:
        """The rank as the command line takes it."""
        return ",".join(map(str, self.rank))

    @property
    def settings(self) -> tuple[str, str, str]:
        """What trials of one panel share: method, roles and layers in one stack."""
        return self.method, self.roles, self.group_layers

    def scores(self, part: str) -> Scores | None:
        """Scores on ``validation`` or ``test`` over all of its records, None where there are none."""
        found = self.validation if part == "validation" else self.test
        return found if self.state == "complete" else None

    def measure(self, part: str, objective: str) -> Measure:
        """The measure of an objective over all records of a part; an empty one where it was not scored."""
        scores = self.scores(part)
        return (scores.objectives.get(objective) if scores else None) or Measure(None)


@dataclass(frozen=True)
class Step:
    """One intervention that a composition tried."""

    trial: int
    kept: bool
    reason: str
    improvement: float | None
    noise: float | None


@dataclass(frozen=True)
class Composition:
    """Interventions put together greedily; fields as in results.json."""

    order: str
    steps: tuple[Step, ...]
    trials: tuple[int, ...]
    validation: Scores | None
    test: Scores | None


@dataclass(frozen=True)
class Study:
    """A sweep as its results.json tells it; fields as there."""

    trawl: str
    model: str
    family: str
    layers: int
    parameters: int
    command: str | None
    seed: int
    started: str
    updated: str
    state: str
    sampler: str
    objectives: tuple[str, ...]
    tasks: tuple[Mapping[str, Any], ...]
    base: Mapping[str, Scores | None]
    trials: tuple[Trial, ...]
    best: int | None
    best_of_layer: Mapping[int, int]
    front: tuple[int, ...]
    composition: Composition | None
    commands: tuple[str, ...]

    @property
    def shown_objectives(self) -> tuple[str, ...]:
        """Every objective that was scored, the study's own first; kept parameters are an axis, not a score."""
        scored = [self.base["validation"], *(trial.validation for trial in self.trials)]
        names = [*self.objectives, *(name for scores in scores_of(scored) for name in scores.objectives)]
        known = {name for scores in scores_of(scored) for name in scores.objectives}
        return tuple(name for name in dict.fromkeys(names) if name != "kept" and name in known)

    def trial(self, number: int | None) -> Trial | None:
        """The trial of that number, None if there is none."""
        return next((trial for trial in self.trials if trial.number == number), None)

    def count(self, state: str) -> int:
        """How many trials are in a state."""
        return sum(trial.state == state for trial in self.trials)


@dataclass(frozen=True)
class Output:
    """A compress output as its trawl.json tells it.

    Attributes:
        folder: the output.
        record: trawl.json as it is, for what is only shown.
        recipe: the recipe's values.
        stacks: how closely each stack was approximated.
        parameters_before: entries of the stacks' matrices.
        parameters_after: entries of the stacks' factors.
    """

    folder: Path
    record: Mapping[str, Any]
    recipe: Mapping[str, Any]
    stacks: tuple[StackError, ...]
    parameters_before: int
    parameters_after: int

    @property
    def model(self) -> str:
        """What the source was called."""
        return str(self.record["source"]["model"])


def read_folder(folder: Path) -> Study | Output:
    """Read what a folder holds.

    Args:
        folder: the output of ``trawl sweep`` or of ``trawl compress``.
    Returns: the study where there is a results.json, else the compress output.
    Raises: PlanError: the folder holds neither, or what it holds cannot be read.
    """
    if (folder / RESULTS_NAME).is_file():
        return _understood(folder / RESULTS_NAME, read_study)
    if (folder / RECORD_NAME).is_file():
        return _understood(folder / RECORD_NAME, lambda values: read_output(folder, values))
    if not folder.is_dir():
        raise PlanError(f"no such folder: {folder}; expected the output of trawl sweep or of trawl compress")
    raise PlanError(
        f"{folder} has neither {RESULTS_NAME} (written by trawl sweep) nor {RECORD_NAME} (written by trawl compress); "
        "name the folder that one of them was told with -o"
    )


def _understood(path: Path, read: Callable[[dict[str, Any]], T]) -> T:
    """Parse a JSON file; what is missing or of a wrong kind is said in one line."""
    try:
        values = parse_json(path.read_bytes())
    except (OSError, ValueError) as e:
        raise PlanError(f"{path} is not readable JSON: {e}; write it anew with the command that made it") from e
    if not isinstance(values, dict):
        raise PlanError(f"{path} holds a JSON {type(values).__name__}; expected an object")
    version = values.get("format_version")
    if path.name == RESULTS_NAME and version != FORMAT_VERSION:
        raise PlanError(
            f"{path} has format_version {version!r}; this version of trawl reads {FORMAT_VERSION}; "
            "make the report with the version of trawl that ran the sweep"
        )
    try:
        return read(values)
    except KeyError as e:
        raise PlanError(f"{path} has no {e}; write it anew with the command that made it") from e
    except (TypeError, ValueError, AttributeError, IndexError, OverflowError) as e:
        raise PlanError(
            f"{path} is not as trawl writes it: {str(e)[:200]}; write it anew with the command that made it"
        ) from e


def read_study(values: Mapping[str, Any]) -> Study:
    """Read the values of a results.json."""
    names = ("trawl", "model", "family", "state", "sampler", "started", "updated")
    texts: dict[str, Any] = {name: str(values[name]) for name in names}
    numbers: dict[str, Any] = {name: int(values[name]) for name in ("layers", "parameters", "seed")}
    return Study(
        **texts,
        **numbers,
        command=values["command"],
        objectives=tuple(map(str, values["objectives"])),
        tasks=tuple({**task, "task": str(task["task"])} for task in values["tasks"]),
        base={part: _scores(values["base"][part]) for part in ("validation", "test")},
        trials=tuple(map(_trial, values["trials"])),
        best=values["best"],
        best_of_layer={int(layer): number for layer, number in values["best_of_layer"].items()},
        front=tuple(values["front"]),
        composition=_composition(values["composition"]),
        commands=tuple(map(str, values["commands"])),
    )


def read_output(folder: Path, values: Mapping[str, Any]) -> Output:
    """Read the values of a trawl.json."""
    stacks = values["stacks"]
    return Output(
        folder=folder,
        record={**values, "source": dict(values["source"]), "versions": dict(values["identity"]["versions"])},
        recipe=dict(values["identity"]["recipe"]),
        stacks=tuple(_stack(stack, tuple(map(int, stack["layers"]))) for stack in stacks),
        parameters_before=sum(int(stack["parameters_before"]) for stack in stacks),
        parameters_after=sum(int(stack["parameters_after"]) for stack in stacks),
    )


def _trial(values: Mapping[str, Any]) -> Trial:
    rank = values["rank"]
    layers = str(values["layers"])
    return Trial(
        number=int(values["number"]),
        method=str(values["method"]),
        roles=str(values["roles"]),
        layers=layers,
        group_layers=str(values["group_layers"]),
        rank=tuple(map(int, rank)) if isinstance(rank, list) else (int(rank),),
        state=str(values["state"]),
        error=values["error"],
        stacks=tuple(_stack(stack, ()) for stack in values["stacks"] or ()),
        kept=_number(values["kept"]),
        validation=_scores(values["validation"]),
        test=_scores(values["test"]),
    )


def _stack(values: Mapping[str, Any], layers: tuple[int, ...]) -> StackError:
    """Read one stack; without layers of its own its name tells them, as in ``fc.20-29``."""
    name = str(values["name"])
    shape, rank = (tuple(map(int, values[key])) for key in ("shape", "rank"))
    return StackError(
        name, layers or expand_layers(name.rpartition(".")[2]), shape, rank, float(values["relative_error"])
    )


def _scores(values: Mapping[str, Any] | None) -> Scores | None:
    if values is None:
        return None
    objectives = {str(name): _measure(measure) for name, measure in values["objectives"].items()}
    figures = tuple(
        (str(task["task"]), str(figure["name"]), _measure(figure))
        for task in values["tasks"]
        for figure in task["figures"]
    )
    return Scores(int(values["records"]), int(values["of"]), objectives, figures)


def _measure(values: Mapping[str, Any]) -> Measure:
    known = {name: _number(values.get(name)) for name in ("stderr", "gain", "gain_stderr")}
    return Measure(_number(values["value"]), **known)


def _composition(values: Mapping[str, Any] | None) -> Composition | None:
    if values is None:
        return None
    steps = tuple(
        Step(
            int(step["trial"]),
            bool(step["kept"]),
            str(step["reason"]),
            _number(step["improvement"]),
            _number(step["noise"]),
        )
        for step in values["steps"]
    )
    scores = {part: _scores(values[part]) for part in ("validation", "test")}
    return Composition(str(values["order"]), steps, tuple(values["trials"]), scores["validation"], scores["test"])


def _number(value: Any) -> float | None:
    """Read a number that may be null; JSON's NaN and infinities count as null."""
    number = None if value is None else float(value)
    return number if number is not None and abs(number) < float("inf") else None


def scores_of(values: Sequence[Scores | None]) -> list[Scores]:
    """Return those that there are."""
    return [scores for scores in values if scores is not None]


def expand_layers(text: str) -> tuple[int, ...]:
    """Read ``20-30,35``; nothing where the text is something else."""
    found: list[int] = []
    for piece in text.split(","):
        if not (match := RUN_OF_LAYERS.fullmatch(piece.strip())):
            return ()
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    return tuple(found)
