"""Prefixes: the unchanged model's activations, so that a trial runs only what follows its first change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from trawl.models import Forward, around
from trawl.sweeps.calls import caches, digest_of_call, leaves, same

REFUSALS = (AttributeError, AssertionError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
EXTRAS = ("output_attentions", "output_hidden_states", "output_router_logits")  # what skipped layers do not make
CHECKED_STARTS = 3

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class _Update(NamedTuple):
    """What a layer put into the key-value cache."""

    key: Tensor
    value: Tensor
    layer: int


@dataclass(eq=False)
class _Call:
    """What is kept of one forward call.

    Attributes:
        entering: the hidden state entering some layers.
        updates: of the key-value cache, by layer.
        outputs: length of each layer's output, 0 where it is the hidden state alone.
        latest: what the last layer returned while the call is being recorded.
    """

    entering: dict[int, Tensor] = field(default_factory=dict)
    updates: dict[int, list[_Update]] = field(default_factory=dict)
    outputs: list[int] = field(default_factory=list)
    latest: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept."""
        updates = (update for updates in self.updates.values() for update in updates)
        cached = sum(update.key.nbytes + update.value.nbytes for update in updates)
        return cached + sum(tensor.nbytes for tensor in self.entering.values())

    def thin(self, layers: Sequence[int]) -> None:
        """Forget what replays from these layers do not need."""
        self.entering = {layer: tensor for layer, tensor in self.entering.items() if layer in layers}
        self.updates = {layer: updates for layer, updates in self.updates.items() if layer < max(layers)}


@dataclass(eq=False)
class PrefixCache:
    """The hidden states that enter a model's layers, for calls that come again while later layers change.

        prefixes = PrefixCache(model, find_layers(model, editor.match), max_memory=2 << 30)
        with prefixes.recording():
            score(model)  # the unchanged model
        with editor.applied(planned, library), prefixes.replaying(first_changed):
            score(model)  # the same numbers as without replaying, to the bit

    It works below the code that scores: a call of the model with the same inputs, without gradients, in evaluation
    mode and with an empty key-value cache or none starts at the nearest layer whose hidden state is kept, and puts into
    the cache what the layers before it would have. Any other call, such as the steps of decoding, runs as ever.
    Where a model does more between or inside its layers than this can repeat, ``reason`` says what, and nothing is
    replayed.

    Attributes:
        model: a decoder or an encoder; between recording and replaying only its layers' weights may change.
        layers: its layers in order, see :func:`trawl.models.find_layers`.
        max_memory: bytes to hold, on the model's device. Where the states of all starts do not fit, those are dropped
            that replays miss least; where one state for every call does not fit, later calls are not kept.
        starts: first changed layers that replays will ask for; by default any.
        reason: why nothing can be replayed; empty where it can.
        missed: calls that were not kept for want of memory.
    """

    model: PreTrainedModel
    layers: Sequence[nn.Module]
    max_memory: int
    starts: Sequence[int] | None = None
    reason: str = field(default="", init=False)
    missed: int = field(default=0, init=False)
    _starts: tuple[int, ...] = field(init=False, repr=False)
    _kept: list[int] = field(init=False, repr=False)
    _nbytes: int = field(default=0, init=False, repr=False)
    _calls: dict[bytes, _Call] = field(default_factory=dict, init=False, repr=False)
    _samples: dict[tuple[str, ...], tuple[int, bytes, Arguments]] = field(default_factory=dict, init=False, repr=False)
    _current: _Call | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        asked = range(len(self.layers)) if self.starts is None else self.starts
        self._starts = tuple(sorted(set(asked) - {0}))
        self._kept = list(self._starts)
        if getattr(self.model.config, "is_encoder_decoder", False):
            self._refuse("an encoder-decoder model runs two chains of layers")
        elif len(set(map(id, self.layers))) < len(self.layers):
            self._refuse("some of its layers are one module that runs more than once")
        elif not self._starts:
            self._refuse("no layer but the first is ever the first that changes")

    @cached_property
    def _chain(self) -> nn.Module:
        """The innermost module that runs all the layers."""
        wanted = set(self.layers)
        modules: list[nn.Module] = [module for module in self.model.modules() if wanted <= set(module.modules())]
        return next(module for module in reversed(modules) if not isinstance(module, nn.ModuleList))

    @property
    def nbytes(self) -> int:
        """Bytes of activations held."""
        return self._nbytes

    @property
    def calls(self) -> int:
        """Number of calls held."""
        return len(self._calls)

    @property
    def kept(self) -> tuple[int, ...]:
        """Layers that a replay can start at, beside layer 0."""
        return tuple(self._kept) if self._calls else ()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep the activations of the model's calls in a ``with`` block, then :meth:`check` that they can be replayed.

        Cost: a copy of what is kept, and a few runs of the smallest call.
        """
        try:
            with ExitStack() as stack:
                if not self.reason:
                    for number, layer in enumerate(self.layers):
                        stack.enter_context(around(layer, partial(self._record_layer, number)))
                    stack.enter_context(around(self._chain, self._record_call))
                yield
        except BaseException:
            self._forget()  # nothing unchecked is ever replayed
            raise
        self.check()

    @contextmanager
    def replaying(self, first_changed: int) -> Iterator[None]:
        """Start known calls in a ``with`` block at the nearest layer kept, at or before the first changed one."""
        start = max((layer for layer in self.kept if layer <= first_changed), default=0)
        with ExitStack() as stack:
            if start and not self.reason:
                for number, layer in enumerate(self.layers[:start]):
                    stack.enter_context(around(layer, partial(self._replay_layer, number, start)))
                stack.enter_context(around(self._chain, self._replay_call))
            yield

    @torch.inference_mode()
    def check(self) -> None:
        """Replay the smallest call of each kind and compare outputs and caches with full runs, bit for bit.

        A difference, or an error of the model's, sets ``reason``. Called after recording, with the weights unchanged.
        """
        for _, key, inputs in tuple(self._samples.values()):
            if self.reason or key not in self._calls:
                continue
            whole = self._outcome(inputs)
            for start in {self._kept[number] for number in _spread(len(self._kept), CHECKED_STARTS)}:
                try:
                    with self.replaying(start):
                        replayed = self._outcome(inputs)
                except REFUSALS as e:
                    self._refuse(f"it fails when layers before {start} are left out ({type(e).__name__}: {e})")
                    break
                if not same(whole, replayed):
                    self._refuse(f"its outputs differ when layers before {start} are left out")
                    break

    def _outcome(self, inputs: Arguments) -> list[Any]:
        """Return all that a call leaves: outputs and caches, as tensors and plain values."""
        args, kwargs = deepcopy(inputs)
        output = self._chain(*args, **kwargs)
        return [*leaves(output), *leaves(args), *leaves(kwargs)]

    def _refuse(self, reason: str) -> None:
        """Declare the cache unusable, and free it."""
        self.reason = self.reason or f"{type(self.model).__name__}: {reason}"
        self._forget()

    def _forget(self) -> None:
        """Free all that is held."""
        self._calls.clear()
        self._samples.clear()
        self._nbytes, self._current = 0, None

    def _key(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bytes | None:
        """Return what tells a call from others; None for one that is not to be kept."""
        extras = any(kwargs.get(name) for name in EXTRAS)
        if self.reason or extras or torch.is_grad_enabled() or self._chain.training:
            return None
        if any(cache.get_seq_length() for cache in caches(args, kwargs)):
            return None
        return digest_of_call(args, kwargs)

    def _record_call(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the model, keeping what its layers do."""
        key = self._key(args, kwargs)
        if key is None or key in self._calls:
            return forward(*args, **kwargs)
        sample = self._sample(key, args, kwargs)
        call = self._calls[key] = self._current = _Call()
        try:
            output = forward(*args, **kwargs)
        except BaseException:
            self._calls.pop(key, None)
            self._nbytes = self._held()
            raise
        finally:
            self._current = None
        if not self.reason and len(call.outputs) != len(self.layers) and key in self._calls:
            self._refuse(f"{len(call.outputs)} of {len(self.layers)} layers ran in a call")
        if key in self._calls:
            self._samples |= sample
            call.latest = None
        return output

    def _sample(
        self, key: bytes, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[tuple[str, ...], tuple[int, bytes, Arguments]]:
        """Return a call's inputs by its kind if it is the smallest of its kind so far."""
        given = {**{str(place): value for place, value in enumerate(args)}, **kwargs}
        kind = tuple(sorted(name for name, value in given.items() if value is not None))
        size = sum(value.numel() for value in given.values() if isinstance(value, Tensor))
        if kind in self._samples and self._samples[kind][0] <= size:
            return {}
        return {kind: (size, key, deepcopy((args, kwargs)))}

    def _record_layer(self, number: int, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a layer, keeping what enters it and what it puts into the cache."""
        call = self._current
        hidden = _hidden(args, kwargs)
        if call is None:
            return forward(*args, **kwargs)
        if hidden is None or number != len(call.outputs):
            self._refuse(f"layer {number} runs out of turn, or without a hidden state")
        elif number and hidden is not call.latest:
            self._refuse(f"something happens to the hidden state between layers {number - 1} and {number}")
        updates: list[_Update] = []
        with ExitStack() as stack:
            for cache in caches(args, kwargs):
                stack.enter_context(_watched(cache, updates))
            output = forward(*args, **kwargs)
        if self._current is call and hidden is not None:
            call.outputs.append(len(output) if isinstance(output, tuple) else 0)
            call.latest = output[0] if isinstance(output, tuple) else output
            self._keep(call, number, hidden, updates)
        return output

    def _keep(self, call: _Call, number: int, hidden: Tensor, updates: list[_Update]) -> None:
        """Keep what a layer did, as far as memory allows."""
        if number in self._kept:
            call.entering[number] = hidden.detach().clone()
            self._nbytes += hidden.nbytes
        if updates and number < self._kept[-1]:
            call.updates[number] = [_Update(u.key.detach().clone(), u.value.detach().clone(), u.layer) for u in updates]
            self._nbytes += sum(u.key.nbytes + u.value.nbytes for u in updates)
        while self._nbytes > self.max_memory and len(self._kept) > 1:
            self._kept.remove(least_missed(self._kept, self._starts))
            for each in self._calls.values():
                each.thin(self._kept)
            self._nbytes = self._held()
        if self._nbytes > self.max_memory:
            self._calls = {key: each for key, each in self._calls.items() if each is not call}
            self._nbytes, self._current = self._held(), None
            self.missed += 1

    def _held(self) -> int:
        """Count the bytes held."""
        return sum(call.nbytes for call in self._calls.values())

    def _replay_call(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the model; layers that are replayed find the call's activations."""
        key = self._key(args, kwargs)
        self._current = self._calls.get(key) if key else None
        try:
            return forward(*args, **kwargs)
        finally:
            self._current = None

    def _replay_layer(
        self, number: int, start: int, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Stand in for a layer before ``start``."""
        call = self._current
        if call is None:
            return forward(*args, **kwargs)
        for update in call.updates.get(number, ()):
            for cache in caches(args, kwargs):
                cache.update(*update)
        hidden = call.entering[start].clone() if number == start - 1 else _hidden(args, kwargs)
        length = call.outputs[number]
        return (hidden, *[None] * (length - 1)) if length else hidden


def least_missed(kept: Sequence[int], starts: Sequence[int]) -> int:
    """Return the layer of ``kept`` without which replays from ``starts`` run fewest layers more.

    Each start in [k_j, k_(j+1)) then begins at k_(j-1): cost = starts there · (k_j − k_(j-1)); the first of equals.
    """
    following = [*kept[1:], max(starts) + 1]
    bounds = zip([0, *kept], kept, following, strict=False)
    costs = {
        layer: (layer - before) * sum(layer <= start < after for start in starts) for before, layer, after in bounds
    }
    return min(costs, key=costs.__getitem__)


def _spread(length: int, count: int) -> set[int]:
    """Return up to ``count`` indices of a sequence, first and last among them."""
    return {round(number * (length - 1) / (count - 1)) for number in range(count)} if length else set()


@contextmanager
def _watched(cache: Cache, updates: list[_Update]) -> Iterator[None]:
    """Note what is put into a cache."""
    original = cache.update

    def update(key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        updates.append(_Update(key_states, value_states, layer_idx))
        return original(key_states, value_states, layer_idx, *args, **kwargs)

    vars(cache)["update"] = update
    try:
        yield
    finally:
        del vars(cache)["update"]


def _hidden(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the hidden state among a layer's arguments."""
    value = args[0] if args else kwargs.get("hidden_states")
    return value if isinstance(value, Tensor) else None
