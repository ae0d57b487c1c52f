"""Damage: the divergence of a model's predictions when some of its weights change, from the changed block on.

The damage of a change is the Kullback-Leibler divergence ``KL(p ‖ p̂)`` of the next-token distributions of the original
model and the changed one, in nats a token, averaged over calibration text.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from trawl.calibration.block import Batch
from trawl.calibration.streaming import BlockChain
from trawl.errors import CheckpointError
from trawl.models import fast_products

WINDOWS = 6  # of the calibration text that damages are measured on
LENGTH = 512  # tokens of each
STRIDE = 2  # every so many positions are scored
AT_ONCE = 3  # windows that are run together; changes whose error suffices are not run on the next ones
SUFFICES = 0.1  # of the damage: a standard error that is small enough
NEGLIGIBLE = 2e-4  # nats a token: one that is small enough whatever the damage

Changed = Mapping[str, Tensor]


@dataclass(frozen=True)
class Damage:
    """What a change does.

    Attributes:
        mean: of the divergence, nats a token.
        stderr: over windows.
        windows: how many it was measured on.
    """

    mean: float
    stderr: float
    windows: int

    @property
    def suffices(self) -> bool:
        """Whether the error is so small that more windows would change no choice worth naming."""
        return self.windows > 1 and self.stderr <= max(SUFFICES * self.mean, NEGLIGIBLE)


@dataclass(eq=False)
class Gauge:
    """Measures damage: blocks before the first changed one never run again.

        with Gauge(chain, windows).ready() as gauge:
            damages = gauge.measure(12, [changed, other])

    Products run in the processor's fast low precision, both in the original and in the changed model; a change that
    does less than about 1e-4 nats drowns in its rounding.

    Attributes:
        chain: the model.
        windows: token ids (windows, length).
    """

    chain: BlockChain
    windows: Tensor
    _entering: list[list[Batch]] = field(default_factory=list, init=False)  # each block, and what leaves the last

    @contextmanager
    def ready(self) -> Iterator[Gauge]:
        """Run the original model once, and hold what enters each of its blocks.

        Cost: one forward pass; memory for the hidden states of all blocks, and for the embeddings and the head.
        """
        with ExitStack() as stack:
            stack.enter_context(fast_products())
            batches = self.chain.enter(torch.split(self.windows, AT_ONCE))
            stack.enter_context(self.chain.outer_weights())
            self._entering = [batches]
            for number in range(len(self.chain)):
                with self.chain.loaded(number) as block:
                    batches = [block.run(batch) for batch in batches]
                self._entering.append(batches)
            yield self
            self._entering.clear()

    def measure(self, number: int, changes: Sequence[Changed]) -> list[Damage]:
        """Return the damage of each of some changes from one block on.

        A few windows are run first, and further ones for changes whose :attr:`Damage.suffices` is not true by then.

        Args:
            number: the first block that any of them changes.
            changes: stored tensors by name, in place of the checkpoint's.
        Raises: CheckpointError: the changed model computes NaN.
        Cost: the blocks from that one on and the head, once a change.
        """
        values: list[list[float]] = [[] for _ in changes]
        unsure = list(range(len(changes)))
        for entering, leaving in zip(self._entering[number], self._entering[-1], strict=True):
            batches = [entering] * len(unsure)
            for later in range(number, len(self.chain)):
                batches = self._run(later, batches, [changes[place] for place in unsure])
            for place, found in zip(unsure, self._divergences(batches, leaving), strict=True):
                values[place] += found
            unsure = [place for place in unsure if not self._damage(values[place]).suffices]
            if not unsure:
                break
        return [self._damage(each) for each in values]

    def _run(self, number: int, batches: Sequence[Batch], changes: Sequence[Changed]) -> list[Batch]:
        """Run each batch through a block as its change makes it; it is loaded once for all that leave it as it is."""
        names, found = self.chain.tensors(number), list(batches)
        alike = [place for place, changed in enumerate(changes) if not any(name in changed for name in names)]
        if alike:
            with self.chain.loaded(number) as block:
                for place in alike:
                    found[place] = block.run(batches[place])
        for place in set(range(len(changes))).difference(alike):
            with self.chain.loaded(number, changes[place]) as block:
                found[place] = block.run(batches[place])
        return found

    def measure_all(self, changed: Changed) -> Damage:
        """Return the damage of a change of any number of blocks.

        Cost: one forward pass.
        """
        batches = self._entering[0]
        for number in range(len(self.chain)):
            with self.chain.loaded(number, changed) as block:
                batches = [block.run(batch) for batch in batches]
        parts = zip(batches, self._entering[-1], strict=True)
        return self._damage([value for batch, leaving in parts for value in self._divergences([batch], leaving)[0]])

    @torch.no_grad()
    def _divergences(self, batches: Sequence[Batch], leaving: Batch) -> list[list[float]]:
        """Compare what leaves the last block of changed models with what leaves the original's, window by window."""
        means: list[list[float]] = [[] for _ in batches]
        for window, original in enumerate(leaving.hidden):
            p = self._log_probabilities(leaving, original)
            probabilities = p.exp()
            for batch, found in zip(batches, means, strict=True):
                q = self._log_probabilities(batch, batch.hidden[window])
                found.append(float(torch.linalg.vecdot(probabilities, p - q).mean()))
        return means

    def _damage(self, found: Sequence[float]) -> Damage:
        """Return mean and standard error of the divergences of windows."""
        values = torch.tensor(found, dtype=torch.float64)
        if not torch.isfinite(values).all():
            raise CheckpointError(f"{self.chain.checkpoint.folder}: a compressed form of the model computes NaN or Inf")
        spread = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else 0.0
        return Damage(max(float(values.mean()), 0.0), spread, len(values))

    def _log_probabilities(self, batch: Batch, hidden: Tensor) -> Tensor:
        """Return the predictions after one window's last block, (positions, vocabulary)."""
        scored = replace(batch, hidden=hidden[None, ::STRIDE])
        logits: Tensor = self.chain.leave(scored).logits[0]
        return logits.float().log_softmax(-1)


def gauge_windows(windows: Tensor) -> Tensor:
    """Return the beginnings of some calibration windows, spread evenly over them, (windows, length)."""
    places = torch.linspace(0, len(windows) - 1, min(WINDOWS, len(windows))).round().long()
    return windows[places, :LENGTH]
