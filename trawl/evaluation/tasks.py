"""Tasks: what a SPEC such as ``qa:questions.jsonl`` names, read and checked before any model is loaded."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeAlias, TypeVar

from trawl.errors import PlanError, shown, suggestion
from trawl.untrusted import parse_json

FORMS = "ppl:FILE, qa:FILE, choice:FILE, pairs:FILE or lm:TASKNAME"
PLAIN_TEMPLATE = "{query}"
LARGEST_SCORE = 1e300  # beyond it, squares overflow
ANSWER_TOKENS = 10  # new tokens in LASER's and TRAWL's question answering

Record = TypeVar("Record")


@dataclass(frozen=True)
class Question:
    """A prompt that any of the answers completes; the scored text is ``prompt + " " + answer``."""

    line: int
    prompt: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Choice:
    """A query with choices, of which one is right; the scored text is ``template(query) + " " + choice``."""

    line: int
    query: str
    choices: tuple[str, ...]
    gold: int


@dataclass(frozen=True)
class Pair:
    """Two sentences and how alike they are to people."""

    line: int
    first: str
    second: str
    score: float


@dataclass(frozen=True)
class PerplexityTask:
    """``ppl:FILE``: perplexity of a text file, taken as one text."""

    kind: ClassVar[str] = "ppl"
    spec: str
    text: str = field(repr=False)


@dataclass(frozen=True)
class QATask:
    """``qa:FILE[?tokens=10]``: greedy answers of at most ``tokens`` new tokens, and the loss of the given answers.

    Losses cost far less than answers: a search takes them first, and answers only where there is hope.
    """

    kind: ClassVar[str] = "qa"
    spec: str
    records: tuple[Question, ...] = field(repr=False)
    tokens: int = ANSWER_TOKENS
    answers: bool = True
    losses: bool = True


@dataclass(frozen=True)
class ChoiceTask:
    r"""``choice:FILE[?template=Question: {query}\nAnswer:]``: which choice the model finds most likely."""

    kind: ClassVar[str] = "choice"
    spec: str
    records: tuple[Choice, ...] = field(repr=False)
    template: str = PLAIN_TEMPLATE


@dataclass(frozen=True)
class PairsTask:
    """``pairs:FILE``: do the model's sentence embeddings find alike what people find alike."""

    kind: ClassVar[str] = "pairs"
    spec: str
    records: tuple[Pair, ...] = field(repr=False)


@dataclass(frozen=True)
class HarnessTask:
    """``lm:TASKNAME[?fewshot=0]``: a task of lm-eval by name, or by the path of its YAML file."""

    kind: ClassVar[str] = "lm"
    spec: str
    name: str
    fewshot: int | None = None


def label(spec: str) -> str:
    """Return a SPEC short enough for a progress line: without folder and options."""
    kind, _, rest = spec.partition(":")
    return f"{kind}:{Path(rest.partition('?')[0]).name}"


Task: TypeAlias = PerplexityTask | QATask | ChoiceTask | PairsTask | HarnessTask


def parse_task(spec: str) -> Task:
    r"""Read a SPEC and the file that it names.

        parse_task("qa:facts.jsonl")
        parse_task(r"choice:arc_easy.jsonl?template=Question: {query}\nAnswer:")

    Args:
        spec: ``KIND:FILE``, with options behind a question mark. ``?template=TEXT`` for choice: ``{query}`` stands for
            the query, ``\n`` for a line break; by default the query alone. ``?tokens=N`` for qa, ``?fewshot=N`` for lm.
    Returns: the task with its records. Files are read whole.
    Raises: PlanError: the kind is unknown, or the file is absent, empty or malformed; with the line number.
    """
    kind, colon, rest = spec.partition(":")
    if not colon or kind not in READERS:
        raise PlanError(f"task {spec!r}: unknown task kind {kind!r}{_kind_hint(spec, kind)}; expected {FORMS}")
    target, options = _split_options(rest, kind, spec)
    if not target:
        raise PlanError(f"task {spec!r} names nothing after {kind}:; expected {FORMS}")
    return READERS[kind](spec, target, options)


def _kind_hint(spec: str, kind: str) -> str:
    """Guess what was meant by a SPEC whose kind is unknown."""
    if hint := suggestion(kind, READERS):
        return hint
    if Path(spec).suffix == ".txt":
        return f"; did you mean 'ppl:{spec}'?"
    return f"; did you mean 'qa:{spec}'?" if Path(spec).suffix == ".jsonl" else ""


def _split_options(rest: str, kind: str, spec: str) -> tuple[str, dict[str, str]]:
    """Return the file or name, and the options behind the question mark."""
    known = OPTIONS.get(kind, ())
    target, mark, tail = rest.partition("?")
    if not mark or Path(rest).exists():
        return rest, {}
    options = {}
    for part in re.split(f"&(?={'|'.join(known)}=)" if known else "&", tail):
        name, equals, value = part.partition("=")
        if name not in known or not equals:
            takes = f"takes {', '.join(f'?{option}=' for option in known)}" if known else "takes no options"
            raise PlanError(f"task {spec!r}: unknown option {name!r}{suggestion(name, known)}; {kind} {takes}")
        options[name] = value
    return target, options


def _integer(options: Mapping[str, str], name: str, least: int, spec: str) -> int | None:
    """Return an option that is a whole number, None where it is not given."""
    if name not in options:
        return None
    text = options[name]
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) < least:
        raise PlanError(f"task {spec!r}: {name} is {shown(text)}; expected a whole number of at least {least}")
    return int(text)


def _read_ppl(spec: str, target: str, _options: Mapping[str, str]) -> PerplexityTask:
    text = _read_text(Path(target))
    if not text.strip():
        raise PlanError(f"{target} is empty; expected text")
    return PerplexityTask(spec, text)


def _read_qa(spec: str, target: str, options: Mapping[str, str]) -> QATask:
    tokens = _integer(options, "tokens", 1, spec) or ANSWER_TOKENS
    return QATask(spec, _read_records(Path(target), _question), tokens)


def _read_choice(spec: str, target: str, options: Mapping[str, str]) -> ChoiceTask:
    template = options.get("template", PLAIN_TEMPLATE).replace("\\n", "\n")
    if "{query}" not in template:
        raise PlanError(f"task {spec!r}: the template {template!r} has no {{query}} to put the query in")
    return ChoiceTask(spec, _read_records(Path(target), _choice), template)


def _read_pairs(spec: str, target: str, _options: Mapping[str, str]) -> PairsTask:
    records = _read_records(Path(target), _pair)
    if len({record.score for record in records}) < 2:
        raise PlanError(f"{target}: every pair has the same score; a rank correlation needs at least two")
    return PairsTask(spec, records)


def _read_harness(spec: str, target: str, options: Mapping[str, str]) -> HarnessTask:
    if Path(target).suffix in (".yaml", ".yml") and not Path(target).is_file():
        raise PlanError(f"task {spec!r}: no such file: {target}")
    return HarnessTask(spec, target, _integer(options, "fewshot", 0, spec))


READERS: Mapping[str, Callable[[str, str, Mapping[str, str]], Task]] = {
    "ppl": _read_ppl,
    "qa": _read_qa,
    "choice": _read_choice,
    "pairs": _read_pairs,
    "lm": _read_harness,
}
OPTIONS: Mapping[str, tuple[str, ...]] = {"qa": ("tokens",), "choice": ("template",), "lm": ("fewshot",)}


def _read_text(path: Path) -> str:
    """Read a UTF-8 file as it is, line ends included."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as e:
        line = e.object.count(b"\n", 0, e.start) + 1
        raise PlanError(f"{path}:{line}: byte {e.start} is not UTF-8; expected UTF-8 text") from e
    except FileNotFoundError as e:
        near = suggestion(path.name, (other.name for other in path.parent.iterdir())) if path.parent.is_dir() else ""
        raise PlanError(f"no such task file: {path}{near}") from e
    except OSError as e:
        raise PlanError(f"cannot read the task file {path}: {e.strerror}") from e


def _read_records(path: Path, parse: Callable[[int, dict[str, Any]], Record]) -> tuple[Record, ...]:
    """Read a file of one JSON object a line; blank lines are passed over."""
    records = []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = parse_json(line.encode())
        except ValueError as e:
            raise PlanError(f"{path}:{number}: not JSON ({e}); expected one JSON object a line") from e
        if not isinstance(value, dict):
            raise PlanError(f"{path}:{number}: a JSON {type(value).__name__}; expected one JSON object a line")
        try:
            records.append(parse(number, value))
        except ValueError as e:
            raise PlanError(f"{path}:{number}: {e}") from e
    if not records:
        raise PlanError(f"{path} is empty; expected one JSON object a line")
    return tuple(records)


def _question(line: int, value: dict[str, Any]) -> Question:
    expected = '{"prompt": str, "answers": [str, ...]}'
    return Question(line, _text(value, "prompt", expected), _texts(value, "answers", expected))


def _choice(line: int, value: dict[str, Any]) -> Choice:
    expected = '{"query": str, "choices": [str, ...], "gold": int}'
    choices = _texts(value, "choices", expected)
    if len(choices) < 2:
        raise ValueError(f"one choice; expected at least two: {expected}")
    gold = value.get("gold")
    if type(gold) is not int or not 0 <= gold < len(choices):
        raise ValueError(f"gold is {shown(gold)}; expected the number of a choice, 0 to {len(choices) - 1}")
    return Choice(line, _text(value, "query", expected), choices, gold)


def _pair(line: int, value: dict[str, Any]) -> Pair:
    expected = '{"sentence1": str, "sentence2": str, "score": number}'
    score = value.get("score")
    if isinstance(score, bool) or not isinstance(score, int | float) or not abs(score) < LARGEST_SCORE:
        raise ValueError(f"score is {shown(score)}; expected a number: {expected}")
    return Pair(line, _text(value, "sentence1", expected), _text(value, "sentence2", expected), float(score))


def _text(value: dict[str, Any], key: str, expected: str) -> str:
    """Return a field that is a text and not blank."""
    text = value.get(key)
    if key not in value:
        raise ValueError(f"no {key!r}{suggestion(key, value)}; expected {expected}")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{key} is {shown(text)}; expected a text that is not blank: {expected}")
    return text


def _texts(value: dict[str, Any], key: str, expected: str) -> tuple[str, ...]:
    """Return a field that is a list of texts, none blank."""
    texts = value.get(key)
    if key not in value:
        raise ValueError(f"no {key!r}{suggestion(key, value)}; expected {expected}")
    if not isinstance(texts, list) or not texts:
        raise ValueError(f"{key} is {shown(texts)}; expected a list of texts: {expected}")
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{key} holds {shown(text)}; expected texts that tokenise to something")
    return tuple(texts)
