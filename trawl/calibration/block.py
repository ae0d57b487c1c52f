"""One block of a model that is run block by block, and what goes through it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from trawl.calibration.products import Products, See, SeeBack

EPSILON = 1e-6  # of mean squares, as in norms of models


@dataclass(frozen=True)
class Call:
    """What the model gives one block beside the hidden states: masks, positions and the like."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class Batch:
    """Windows that are run at once.

    Attributes:
        hidden: the hidden states that enter the next block, (windows, length, hidden).
        calls: of each block.
        as_tuple: whether the blocks return them as the first of a tuple.
    """

    hidden: Tensor
    calls: tuple[Call, ...]
    as_tuple: bool = False


@dataclass(frozen=True, eq=False)
class Block:
    """One block with its weights in memory.

    Attributes:
        number: counted from 0.
        layer: the module.
        low: whether it multiplies in bfloat16, its weights staying in float32.
    """

    number: int
    layer: nn.Module
    low: bool = False

    @torch.no_grad()
    def run(self, batch: Batch, see: See | None = None) -> Batch:
        """Run the block.

        Args:
            batch: with the hidden states that enter it.
            see: called with the name and the input, (..., in), of each weight that something is multiplied by, in the
                order of the computation.
        Returns: the batch with the hidden states that leave it.
        """
        with Products(self._weights(), see) if see else nullcontext():
            return self._output(batch)

    @torch.enable_grad()
    def back(self, batch: Batch, gradient: Tensor, see: SeeBack) -> Tensor:
        """Run the block and go back through it.

        Args:
            batch: with the hidden states that enter it.
            gradient: of a loss by the hidden states that leave it.
            see: called with the name, the input (..., in) and the gradient of the loss by the output (..., out) of
                each weight that something is multiplied by.
        Returns: the gradient by the hidden states that enter it.
        """
        self.layer.requires_grad_(requires_grad=False)
        entering = batch.hidden.detach().requires_grad_()
        with Products(self._weights(), see_back=see):
            leaving = self._output(replace(batch, hidden=entering)).hidden
        return torch.autograd.grad(leaving, entering, gradient)[0]

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights that something can be multiplied by."""
        return ((name, weight) for name, weight in self.layer.named_parameters() if weight.dim() in (2, 3))

    def _output(self, batch: Batch) -> Batch:
        """Return the batch with the hidden states that leave the block."""
        call, entering = batch.calls[self.number], batch.hidden
        with torch.autocast(entering.device.type, torch.bfloat16, enabled=self.low):
            output = self.layer(entering, *call.args, **call.kwargs)
        as_tuple = isinstance(output, tuple)
        return replace(batch, hidden=(output[0] if as_tuple else output).to(entering), as_tuple=as_tuple)


def importance(stream: Tensor) -> Tensor:
    """Return how much an error in each token's stream (tokens, hidden) counts to what reads it normalised, (tokens, 1).

    It is 1 / mean(h²). Without it the few tokens on which some models let the stream grow a thousandfold decide alone.
    """
    return 1.0 / (stream.square().mean(1, keepdim=True) + EPSILON)
