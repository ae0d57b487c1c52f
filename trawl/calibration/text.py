"""Calibration texts: a file or a stream of the hub, cut into windows of tokens."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trawl.errors import PlanError, suggestion

LOG = logging.getLogger("trawl.calibration")
HUB = "hub:"
BLANK_LINE = "\n\n"  # between records, as between the paragraphs of a text
CHARACTERS_PER_TOKEN = 16  # of a stream are read: several times what a token takes, in any language
SHAPES = '{"text": str}, {"prompt": str, "answers": [str, ...]} or {"query": str, "choices": [str, ...], "gold": int}'
Specs = str | Path | Sequence[str | Path]  # of one text or of several
FORMS = "FILE.txt, FILE.jsonl or hub:DATASET/SPLIT/FIELD"


@dataclass(frozen=True)
class Text:
    """A text to calibrate on, or several.

    Attributes:
        names: of each, the file's name or the spec of a stream.
        parts: all of each.
    """

    names: tuple[str, ...]
    parts: tuple[str, ...]

    @property
    def name(self) -> str:
        """What to call it."""
        return " and ".join(self.names)

    @cached_property
    def sha256(self) -> str:
        """Digest of the UTF-8 bytes, with a NUL, which no text holds, between several texts."""
        return hashlib.sha256("\0".join(self.parts).encode()).hexdigest()


RANDOM_TOKENS = Text(("random tokens",), ("",))  # see random_windows
COMMON_TOKENS = 20  # that are drawn about equally often


def specs_of(given: Specs | None) -> tuple[str, ...]:
    """Return the specs of one text, of several or of none."""
    if given is None:
        return ()
    return (str(given),) if isinstance(given, str | Path) else tuple(map(str, given))


def read_texts(specs: Sequence[str], tokens: int) -> Text:
    """Read the texts to calibrate on, each as :func:`read_text` does."""
    names, parts = zip(*(read_text(spec, tokens) for spec in specs), strict=True)
    return Text(names, parts)


def read_text(spec: str, tokens: int) -> tuple[str, str]:
    """Read one text to calibrate on.

    Args:
        spec: ``FILE.txt``, the text itself; ``FILE.jsonl``, one record a line, joined by blank lines: its ``text``, or
            its ``prompt`` with the first of its ``answers``, or its ``query`` with the right one of its ``choices``;
            ``hub:DATASET/SPLIT/FIELD`` or ``hub:ORG/NAME/CONFIG/SPLIT/FIELD``, a field of a stream's first records.
        tokens: how many are wanted; decides how much of a stream is read.
    Returns: its name and the text.
    Raises: PlanError: there is no such text, or it is empty, binary or malformed; with the line number.
    """
    if spec.startswith(HUB):
        text = BLANK_LINE.join(_limited(_stream(spec), CHARACTERS_PER_TOKEN * tokens))
        name = spec
    else:
        path = Path(spec)
        text, name = _read_file(path), path.name
        if path.suffix == ".jsonl":
            text = BLANK_LINE.join(_records(path, text))
    if not text.strip():
        raise PlanError(f"calibration text {spec} is empty; expected text")
    return name, text


def random_windows(count: int, length: int, vocabulary: int, seed: int = 0) -> Tensor:
    """Draw token ids one by one, the same at every call with a seed, for want of a text.

    ``P(id) ∝ 1 / (id + c)``, by Zipf's law with the id as its rank: tokenizers number tokens in the order in which
    they merged them, the frequent first (Sennrich et al. 2016, arXiv:1508.07909). Even draws are nothing like a text.

    Args:
        count: windows.
        length: tokens of a window.
        vocabulary: ids are below it.
        seed: of the draws.
    Returns: (count, length), int64.
    """
    draws = torch.rand(count, length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ids = COMMON_TOKENS * ((vocabulary / COMMON_TOKENS + 1) ** draws - 1)
    return ids.long().clamp_max(vocabulary - 1)


def cut_windows(ids: Sequence[int], prefix: Sequence[int], length: int, count: int, name: str) -> Tensor:
    """Cut a text's tokens into windows that are spread evenly over it and do not overlap.

    Args:
        ids: the text's tokens, without a prefix.
        prefix: tokens that stand before every window.
        length: tokens of a window, prefix included.
        count: windows wanted; fewer, with a warning, where the text is too short.
        name: what to call the text.
    Returns: (windows, length), int64.
    Raises: PlanError: the text does not fill one window.
    """
    room = length - len(prefix)
    if room < 1 or len(ids) < room:
        raise PlanError(
            f"calibration text {name} is too short: it has {len(ids):,} tokens, and one window takes {max(room, 1):,}; "
            "give a longer text, or fewer --calibration-tokens"
        )
    if (possible := len(ids) // room) < count:
        LOG.warning(
            "calibration text %s has %s tokens: enough for %d windows of the %d asked for",
            name,
            f"{len(ids):,}",
            possible,
            count,
        )
        count = possible
    starts = [number * (len(ids) - room) // max(count - 1, 1) for number in range(count)]
    return torch.tensor([[*prefix, *ids[start : start + room]] for start in starts])


def _read_file(path: Path) -> str:
    """Read a UTF-8 file whole."""
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as e:
        line = e.object.count(b"\n", 0, e.start) + 1
        raise PlanError(f"{path}:{line}: byte {e.start} is not UTF-8; expected a text, as {FORMS}") from e
    except FileNotFoundError as e:
        near = suggestion(path.name, (other.name for other in path.parent.iterdir())) if path.parent.is_dir() else ""
        raise PlanError(f"no such calibration text: {path}{near}; expected {FORMS}") from e
    except OSError as e:
        raise PlanError(f"cannot read the calibration text {path}: {e.strerror}") from e
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise PlanError(f"{path}:{line}: holds NUL bytes, so it is binary; expected a text, as {FORMS}")
    return text


def _records(path: Path, text: str) -> Iterator[str]:
    """Yield the text of each line's record; blank lines are passed over."""
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            yield _record_text(value)
        except (ValueError, RecursionError) as e:
            raise PlanError(f"{path}:{number}: not JSON ({e}); expected one object a line: {SHAPES}") from e
        except (KeyError, IndexError, TypeError) as e:
            raise PlanError(f"{path}:{number}: a record of another shape; expected {SHAPES}") from e


def _record_text(value: Mapping[str, Any]) -> str:
    """Return the text of one record."""
    parts: list[str]
    if "text" in value:
        parts = [value["text"]]
    elif "prompt" in value:
        parts = [value["prompt"], value["answers"][0]]
    else:
        parts = [value["query"], value["choices"][value["gold"]]]
    return " ".join(parts)


def _stream(spec: str) -> Iterator[str]:
    """Yield a field of the records of a data set, as they come over the network."""
    parts = spec.removeprefix(HUB).split("/")
    if not 3 <= len(parts) <= 5 or not all(parts):
        raise PlanError(f"calibration text {spec!r} is malformed; expected hub:DATASET/SPLIT/FIELD")
    if importlib.util.find_spec("datasets") is None:
        raise PlanError(f"calibration text {spec} needs the package datasets: pip install 'trawl-llm[calib]'")
    import datasets  # noqa: PLC0415 (an extra)

    *names, split, field = parts
    name, config = "/".join(names[:2]), next(iter(names[2:]), None)
    try:
        for record in datasets.load_dataset(name, config, split=split, streaming=True):
            if not isinstance(record.get(field), str):
                known = [key for key, value in record.items() if isinstance(value, str)]
                raise PlanError(
                    f"calibration text {spec}: the records have no text under {field!r}{suggestion(field, known)}; "
                    f"they have {', '.join(known) or 'no texts'}"
                )
            yield record[field]
    except (OSError, ValueError, RuntimeError, ImportError) as e:
        reason = " ".join(str(e).split())
        raise PlanError(f"calibration text {spec} cannot be read: {type(e).__name__}: {reason}") from e


def _limited(texts: Iterable[str], characters: int) -> Iterator[str]:
    """Yield texts until they have this many characters."""
    for text in texts:
        yield text
        characters -= len(text)
        if characters <= 0:
            return
