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

from trawl.calibration.streaming import Batch, BlockChain
from trawl.errors import CheckpointError
from trawl.models import fast_products

WINDOWS = 6  # of the calibration text that damages are measured on
LENGTH = 512  # tokens of each
STRIDE = 2  # every so many positions are scored

Changed = Mapping[str, Tensor]


@dataclass(frozen=True)
class Damage:
    """What a change does.

    Attributes:
        mean: of the divergence, nats a token.
        stderr: over windows.
    """

    mean: float
    stderr: float


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
    _entering: list[Tensor] = field(default_factory=list, init=False)  # of each block, and what leaves the last
    _batch: Batch | None = field(default=None, init=False)

    @contextmanager
    def ready(self) -> Iterator[Gauge]:
        """Run the original model once, and hold what enters each of its blocks.

        Cost: one forward pass; memory for the hidden states of all blocks, and for the embeddings and the head.
        """
        with ExitStack() as stack:
            stack.enter_context(fast_products())
            (batch,) = self.chain.enter([self.windows])
            stack.enter_context(self.chain.outer_weights())
            self._batch = batch
            self._entering = [batch.hidden]
            for number in range(len(self.chain)):
                with self.chain.loaded(number) as block:
                    batch = block.run(batch)
                self._entering.append(batch.hidden)
            yield self
            self._entering.clear()

    def measure(self, number: int, changes: Sequence[Changed]) -> list[Damage]:
        """Return the damage of each of some changes of one block.

        Args:
            number: the block.
            changes: stored tensors by name, in place of the checkpoint's.
        Raises: CheckpointError: the changed model computes NaN.
        Cost: the blocks from that one on and the head, once a change.
        """
        batches = []
        for changed in changes:
            with self.chain.loaded(number, changed) as block:
                batches.append(block.run(self._entered(number)))
        for later in range(number + 1, len(self.chain)):
            with self.chain.loaded(later) as block:
                batches = [block.run(batch) for batch in batches]
        return self._divergences(batches)

    def measure_all(self, changed: Changed) -> Damage:
        """Return the damage of a change of any number of blocks.

        Cost: one forward pass.
        """
        batch = self._entered(0)
        for number in range(len(self.chain)):
            with self.chain.loaded(number, changed) as block:
                batch = block.run(batch)
        return self._divergences([batch])[0]

    def _entered(self, number: int) -> Batch:
        assert self._batch is not None
        return replace(self._batch, hidden=self._entering[number])

    @torch.no_grad()
    def _divergences(self, batches: Sequence[Batch]) -> list[Damage]:
        """Compare what leaves the last block of changed models with what leaves the original's, window by window."""
        means: list[list[float]] = [[] for _ in batches]
        for window, original in enumerate(self._entering[-1]):
            p = self._log_probabilities(batches[0], original)
            probabilities = p.exp()
            for batch, found in zip(batches, means, strict=True):
                q = self._log_probabilities(batch, batch.hidden[window])
                found.append(float(torch.linalg.vecdot(probabilities, p - q).mean()))
        return [self._damage(torch.tensor(found, dtype=torch.float64)) for found in means]

    def _damage(self, values: Tensor) -> Damage:
        """Return mean and standard error of the divergences of windows."""
        if not torch.isfinite(values).all():
            raise CheckpointError(f"{self.chain.checkpoint.folder}: a compressed form of the model computes NaN or Inf")
        spread = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else 0.0
        return Damage(max(float(values.mean()), 0.0), spread)

    def _log_probabilities(self, batch: Batch, hidden: Tensor) -> Tensor:
        """Return the predictions after one window's last block, (positions, vocabulary)."""
        scored = replace(batch, hidden=hidden[None, ::STRIDE])
        logits: Tensor = self.chain.leave(scored).logits[0]
        return logits.float().log_softmax(-1)


def gauge_windows(windows: Tensor) -> Tensor:
    """Return the beginnings of some calibration windows, spread evenly over them, (windows, length)."""
    places = torch.linspace(0, len(windows) - 1, min(WINDOWS, len(windows))).round().long()
    return windows[places, :LENGTH]
