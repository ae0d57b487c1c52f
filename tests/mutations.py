"""Mutations: valid files changed the way that damage and malice change them, and the same ones for the same seed."""

from __future__ import annotations

import copy
import json
import math
import random
import sys
from collections.abc import Iterator
from typing import Any

import yaml

from trawl.checkpoint import BITS

VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 255, 2**31, 2**32 + 1, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, -(10**30),
    10**400, 0.5, 1e308, float("inf"), float("nan"), "", " ", ".", "..", "../x", "/etc/passwd", "a/b", "a\\b", "\0",
    "\n",
    "\x1b[2J",
    "\ud800", "\u202e", "ä", "x" * 300, "x" * 5000, "1" * 5000, "0.0.0.0." * 200, "F64", "F4", "BOOL", "trawl",
    "narrow", "all", "model.layers.99999999999999999999.mlp.up_proj.weight", "hidden", "((", "(a b) c", "a a", "...",
    "1 a", "a -> b",
    "hidden_size * hidden_size * hidden_size * hidden_size", "layer % 2", "{layer % 1}", "{layer}", "{", "{1 // 0}",
    "1 // 0", "__import__('os')", "<script>alert(1)</script>", [], {}, [[]], [1], [0, 0], [2**62, 4], list(range(100)),
    {"a": 1}, {"": {}}, [None], ["x"], [-1], [1.5], "model.safetensors", "config.json", "0-99999999999",
    "fc.0-999999999",
)  # fmt: skip
TOKENS = (
    b"{", b"}", b"[", b"]", b'"', b":", b",", b"\\", b"\\ud800", b"\0", b"\xff", b"\xc3\x28", b"\xed\xa0\x80",
    b"\xef\xbb\xbf", b"NaN", b"Infinity", b"-", b"1e999", b"9" * 5000, b"[" * 3000, b'{"a":' * 3000, b"&a ", b"*a",
    b"<<: *a\n", b"!!python/object/apply:os.system [id]", b"!!python/name:os.system ", b"!!timestamp x", b"!!int ''",
    b"!!bool x", b"!!binary x", b"!!set {a}", b"!!omap [a]", b"0x" + b"f" * 5000, b"1:" * 400 + b"1", b"- " * 300,
    b"? ", b"\t", b"\r\n", b"---\n", b"...\n", b"%YAML 9.9\n", b"#", b"|", b">", b"'", b"{layer}", b" -> ", b"( ",
    b" )",
)  # fmt: skip


def mutate_bytes(seed: bytes, rng: random.Random) -> bytes:
    """Change a few bytes: flip, cut out, double, insert a token, cut off."""
    data = bytearray(seed)
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        at = rng.randrange(len(data) + 1)
        length = min(rng.choice((1, 1, 2, 8, 64)), len(data) - at)
        match rng.randrange(7):
            case 0 if at < len(data):
                data[at] = rng.randrange(256)
            case 1:
                del data[at : at + length]
            case 2:
                data[at:at] = data[at : at + length]
            case 3 | 4:
                data[at:at] = rng.choice(TOKENS)
            case 5:
                data[at : at + length] = rng.choice(TOKENS)
            case _:
                del data[at + rng.randrange(200) :]
    return bytes(data)


def mutate_value(value: Any, rng: random.Random) -> Any:
    """Change a few places of a JSON-like value."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if not isinstance(value, dict | list):
            return rng.choice(VALUES)
        places = list(_places(value))
        if not places:
            return rng.choice(VALUES)
        holder, key = rng.choice(places)
        _change(holder, key, places, rng)
    return value


def _change(holder: Any, key: Any, places: list[tuple[Any, Any]], rng: random.Random) -> None:
    """Change one place of a value."""
    match rng.randrange(8):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[str(rng.choice(VALUES))[:6000]] = holder.pop(key)
        case 2:
            other, place = rng.choice(places)
            if place in other if isinstance(other, dict) else place < len(other):
                holder[key] = copy.deepcopy(other[place])
        case 3 if isinstance(holder[key], int) and not isinstance(holder[key], bool):
            holder[key] += rng.choice((-1, 1, 2**31, -(2**33), 2**63))
        case 4 if isinstance(holder[key], list):
            holder[key] = holder[key] * rng.choice((2, 3, 100))
        case 5:
            for _ in range(rng.choice((1, 3, 70, 400))):
                holder[key] = [holder[key]]
        case _:
            holder[key] = copy.deepcopy(rng.choice(VALUES))


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every (holder, key) of a JSON-like value."""
    waiting = [value]
    while waiting:
        holder = waiting.pop()
        for key in list(holder) if isinstance(holder, dict) else range(len(holder)):
            yield holder, key
            if isinstance(holder[key], dict | list):
                waiting.append(holder[key])


def to_json(value: Any, rng: random.Random) -> bytes:
    """Write a value, now and then with a key twice or with bytes changed."""
    sys.set_int_max_str_digits(0)
    try:
        text = json.dumps(value, ensure_ascii=rng.random() < 0.5).encode("utf-8", errors="surrogatepass")
    finally:
        sys.set_int_max_str_digits(4300)
    if rng.random() < 0.1 and text.startswith(b'{"'):
        key = text[: text.index(b'"', 2) + 1]
        text = key + b": 1, " + text[1:] if rng.random() < 0.5 else text[:-1] + b", " + text[1:]
    return mutate_bytes(text, rng) if rng.random() < 0.2 else text


def mutate_json(seed: bytes, rng: random.Random) -> bytes:
    """Change a JSON file."""
    return mutate_bytes(seed, rng) if rng.random() < 0.3 else to_json(mutate_value(json.loads(seed), rng), rng)


def mutate_yaml(seed: bytes, rng: random.Random) -> bytes:
    """Change a YAML file."""
    if rng.random() < 0.4:
        return mutate_bytes(seed, rng)
    try:
        text: str = yaml.safe_dump(mutate_value(yaml.safe_load(seed), rng), allow_unicode=rng.random() < 0.5)
    except (ValueError, UnicodeError, RecursionError):
        return mutate_bytes(seed, rng)
    return text.encode("utf-8", errors="surrogatepass")


def mutate_lines(seed: bytes, rng: random.Random) -> bytes:
    """Change a file of one JSON object a line."""
    lines = seed.split(b"\n")
    at = rng.randrange(len(lines))
    if lines[at] and rng.random() < 0.7:
        lines[at] = mutate_json(lines[at], rng)
        return b"\n".join(lines)
    return mutate_bytes(seed, rng)


def mutate_shard(seed: bytes, rng: random.Random) -> bytes:
    """Change a safetensors file: its header's JSON, the length in front of it, or any bytes."""
    length = int.from_bytes(seed[:8], "little")
    header, data = seed[8 : 8 + length], seed[8 + length :]
    kind = rng.random()
    if kind < 0.2:
        return mutate_bytes(seed, rng)
    if kind < 0.3:
        wrong = rng.choice((0, 1, length - 1, length + 1, len(seed), 2**31, 2**63, 2**64 - 1, rng.randrange(2**20)))
        return wrong.to_bytes(8, "little") + seed[8:]
    if kind < 0.6:
        return consistent(json.loads(header), rng)
    header = mutate_json(header, rng)
    data = data[: rng.randrange(len(data))] if rng.random() < 0.1 else data + bytes(rng.choice((0, 0, 0, 1, 8, 4096)))
    return len(header).to_bytes(8, "little") + header + data


def consistent(entries: dict[str, Any], rng: random.Random) -> bytes:
    """Return a file whose header agrees with its size, with names, shapes and dtypes that a model would not have."""
    names = [name for name in entries if name != "__metadata__"]
    for old in rng.sample(names, min(rng.choice((1, 1, 2, 5)), len(names))):
        entry, name = entries.pop(old), old
        match rng.randrange(5):
            case 0:
                continue
            case 1:
                name = old.replace(
                    *rng.choice(((".0.", ".1."), ("0", "9" * 5000), ("mlp", "x"), ("layers", "\x1b[1m")))
                )
            case 2:
                name = str(rng.choice(VALUES))
            case 3:
                entry["shape"] = rng.choice(([0], [], [1] * 80, [0, 2**40], [3, 5], [12], [2, 4, 12], [2**31, 0]))
            case _:
                entry["dtype"] = rng.choice(("F64", "F16", "BF16", "I64", "U8", "F8_E4M3", "BOOL", "F4", "C64", "U16"))
        entries[name] = entry
    offset = 0
    for name, entry in entries.items():
        if name != "__metadata__":
            nbytes = math.prod(entry["shape"]) * BITS[entry["dtype"]] // 8
            entry["data_offsets"] = [offset, offset + nbytes]
            offset += nbytes
    header = json.dumps(entries).encode()
    return len(header).to_bytes(8, "little") + header + rng.randbytes(offset)
