"""Files that may come from strangers: where they really lie, and JSON and YAML whose size and depth stay bounded."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from trawl.errors import CheckpointError

DEEPEST = 64  # levels of nesting; what is written again recurses once a level
LARGEST_YAML = 1 << 20  # bytes; PyYAML takes a second and 100 MB for each
LARGEST_INTEGER = 1 << 64
LONE_SURROGATE = re.compile(r"\\(?:u|U0000)[dD][89a-fA-F]")


def own_file(folder: Path, name: str | Path) -> Path:
    """Return a regular file of a checkpoint folder.

    Args:
        folder: of the checkpoint.
        name: relative to it.
    Returns: its path.
    Raises: CheckpointError: it is missing, a device or a pipe, or a link to a place outside the folder. A snapshot in
        the hub's cache may link to the files of its own repository.
    """
    path = folder / name
    try:
        if not path.is_file():
            what = "is not a regular file" if path.exists() or path.is_symlink() else "is missing"
            raise CheckpointError(f"{path} {what}; expected a file inside the checkpoint folder")
        real, root = path.resolve(), folder.resolve()
    except (OSError, RuntimeError) as e:  # a name too long for the file system, links in a circle
        raise CheckpointError(f"{folder} has no file {str(name)[:80]!r}: {e}") from e
    stores = [root, root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [root]
    if not any(real.is_relative_to(store) for store in stores):
        raise CheckpointError(f"{path} is a link out of the checkpoint folder, to {real}; put a copy in its place")
    return path


def parse_json(raw: bytes, *, unique: bool = False) -> Any:
    """Parse JSON in UTF-8.

    Args:
        raw: the bytes.
        unique: whether a key that stands twice in an object is refused; otherwise the last one counts.
    Raises: ValueError: with the reason in a few words. Text that no UTF-8 can hold and deep nesting are refused.
    Cost: memory in proportion to the bytes.
    """
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique if unique else None)
        if b"\\u" in raw:
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as e:
        raise ValueError(f"nested more than {DEEPEST} levels deep") from e
    except UnicodeError as e:
        raise ValueError(f"not UTF-8: {e.reason} at {e.start}") from e  # type: ignore[attr-defined]
    level = [value]
    for _ in range(DEEPEST):
        level = [child for each in level for child in _children(each) if isinstance(child, dict | list)]
        if not level:
            return value
    raise ValueError(f"nested more than {DEEPEST} levels deep")


def _children(value: Any) -> Any:
    """Return what an object or a list holds."""
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object, and refuse a key that stands twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:80]!r} stands twice")
    return found


class _PlainLoader(yaml.SafeLoader):
    """YAML without objects, and without aliases, of which a few lines can stand for any amount of memory."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose one node, within bounds."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias (*) stands for a value; write the value out")
        self.depth += 1
        if self.depth > DEEPEST:
            raise yaml.YAMLError(f"nested more than {DEEPEST} levels deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _integer(loader: _PlainLoader, node: Any) -> int:
    """Read an integer of a size that can be printed."""
    value: int = loader.construct_yaml_int(node)
    if abs(value) >= LARGEST_INTEGER:
        raise yaml.YAMLError(f"line {node.start_mark.line + 1} has an integer of {value.bit_length()} bits")
    return value


_PlainLoader.add_constructor("tag:yaml.org,2002:int", _integer)


def parse_yaml(text: str) -> Any:
    """Parse YAML of plain values.

    Args:
        text: at most ``LARGEST_YAML`` characters.
    Raises: ValueError: with the reason on one line. Objects, aliases and deep nesting are refused.
    Cost: memory in proportion to the text.
    """
    if len(text) > LARGEST_YAML:
        raise ValueError(f"{len(text):,} characters; expected at most {LARGEST_YAML:,}")
    if LONE_SURROGATE.search(text):
        raise ValueError("a lone surrogate, which is no character")
    try:
        return yaml.load(text, _PlainLoader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as e:
        raise ValueError(" ".join(str(e).split())) from e
    except (ValueError, LookupError, AttributeError, TypeError, ArithmeticError) as e:  # of a scalar's tag
        raise ValueError(f"a value does not fit its tag ({type(e).__name__}: {str(e)[:80]})") from e
