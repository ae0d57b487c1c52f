"""Forward calls of modules: telling them apart, comparing what they leave."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from trawl.shards import tensor_bytes


def caches(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Cache]:
    """Return the key-value caches among a call's arguments."""
    return [value for value in (*args, *kwargs.values()) if isinstance(value, Cache)]


def digest_of_call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bytes | None:
    """Return what tells a call from others, caches being empty; None where an argument has no digest."""
    digest = hashlib.sha256()
    return digest.digest() if _feed(digest, [args, kwargs]) else None


def _feed(digest: Any, value: Any) -> bool:
    """Feed a call's argument to a digest; False for one of an unknown kind."""
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype} {tuple(value.shape)} ".encode())
        digest.update(tensor_bytes(value.detach().cpu()))
        return True
    if isinstance(value, Cache):
        digest.update(type(value).__name__.encode())
        return True
    if isinstance(value, Mapping):
        return _feed(digest, [item for key in sorted(value) for item in (key, value[key])])
    if isinstance(value, (list, tuple)):
        digest.update(f"{len(value)} ".encode())
        return all(_feed(digest, item) for item in value)
    digest.update(f"{type(value).__name__} {value!r} ".encode())
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype))


def leaves(value: Any) -> Iterator[Any]:
    """Yield tensors and plain values of nested outputs and caches, in a fixed order."""
    if isinstance(value, Mapping):
        for key in value:
            yield from leaves(value[key])
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from leaves(item)
    elif isinstance(value, Cache):
        for layer in value.layers:
            yield from leaves(vars(layer))
    elif isinstance(value, (Tensor, bool, int, float, str)):
        yield value


def same(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether two lists of tensors and plain values are equal to the last bit."""
    return len(one) == len(other) and all(_equal(a, b) for a, b in zip(one, other, strict=True))


def _equal(a: Any, b: Any) -> bool:
    """Whether two tensors or plain values are equal to the last bit; NaN equals NaN of the same bits."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return type(a) is type(b) and bool(a == b)
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
