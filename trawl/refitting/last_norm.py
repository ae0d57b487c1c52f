"""The norm in front of the head, scaled by one number: how sure of its predictions a refitted model is.

What is fitted to a text is a little too sure of what it predicts on any other. With s on what the norm gives, as a rule
a temperature of the logits,

    s = argmin E KL(p ‖ p̂(s)),

p the original model's predictions and p̂(s) the compressed one's, is close to the lowest point of a parabola through
three values.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from trawl.calibration.block import Batch
from trawl.calibration.streaming import REFUSALS, BlockChain
from trawl.errors import CheckpointError

LOG = logging.getLogger("trawl")

STEP = 0.02  # on either side of 1, of the parabola
LEAST, MOST = 1e-3, 0.2  # by which s differs from 1: less is noise, more is not what a parabola describes
STRIDE = 2  # every so many positions count
TOLERANCE = 1e-4  # relative: what may lie between a scaled output and that of scaled weights


@dataclass(frozen=True, eq=False)
class LastNorm:
    """The norm that reads what leaves the last block.

    Attributes:
        module: with its weights in memory.
        names: of its stored tensors, by those of its parameters.
        shifted: whether what multiplies is the weight plus one.
    """

    module: nn.Module
    names: Mapping[str, str]
    shifted: bool

    def scaled(self, gain: float) -> dict[str, Tensor]:
        """Return parameters by name whose output is a multiple of what it is now."""
        own = {name: parameter.data for name, parameter in self.module.named_parameters()}
        shift = {"weight": float(self.shifted)}
        return {name: gain * (values + shift.get(name, 0.0)) - shift.get(name, 0.0) for name, values in own.items()}

    @contextmanager
    def holding(self, parameters: Mapping[str, Tensor]) -> Iterator[None]:
        """Let the module have other parameters in a ``with`` block."""
        own = {name: parameter.data for name, parameter in self.module.named_parameters()}
        try:
            for name, values in parameters.items():
                self.module.get_parameter(name).data = values.to(own[name])
            yield
        finally:
            for name, values in own.items():
                self.module.get_parameter(name).data = values


@torch.no_grad()
def scale_last_norm(
    chain: BlockChain, original: Sequence[Batch], compressed: Sequence[Batch]
) -> tuple[float, dict[str, Tensor]]:
    """Return s, and what the stored tensors of the norm in front of the head become, by name.

    1 and none where the model has no such norm, see :func:`find_last_norm`, and where s is next to 1, or brings
    predictions no nearer as it is stored.

    Args:
        chain: the original model.
        original: what leaves its last block.
        compressed: likewise of the compressed model.
    Raises: CheckpointError: predictions are NaN or Inf.
    Cost: six products of every second token with the head; memory for the logits of a window, a few times.
    """
    with chain.outer_weights():
        norm = find_last_norm(chain, original[0])
        if norm is None:
            return 1.0, {}
        pairs = [pair for one in zip(original, compressed, strict=True) for pair in _windows(*one)]
        low, now, high = _divergences(chain, norm, pairs, [norm.scaled(1 - STEP), {}, norm.scaled(1 + STEP)])
        curvature = low - 2 * now + high
        step = STEP * (low - high) / (2 * curvature) if curvature > 0 else 0.0
        if abs(step) < LEAST:
            return 1.0, {}
        step = max(-MOST, min(MOST, step))
        dtypes = {name: chain.checkpoint.read(stored).dtype for name, stored in norm.names.items()}
        found = {name: values.to(dtypes[name]) for name, values in norm.scaled(1 + step).items()}
        (reached,) = _divergences(chain, norm, pairs, [found])
    if reached >= now:
        return 1.0, {}
    return 1 + step, {norm.names[name]: values.cpu() for name, values in found.items()}


@torch.no_grad()
def find_last_norm(chain: BlockChain, batch: Batch) -> LastNorm | None:
    """Return the norm that reads what leaves the last block; within ``chain.outer_weights``.

    None where the model predicts no tokens, where its head cannot be run alone, or where scaling the weights of what
    reads the last block does not scale what it gives.
    """
    batch = replace(batch, hidden=batch.hidden[:1, :1])
    read: dict[nn.Module, Tensor] = {}

    def note(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if args and args[0] is batch.hidden:
            read[module] = output

    inside = {module for layer in chain.layers for module in layer.modules()}
    candidates = [module for module in chain.model.modules() if module not in inside and _is_norm(module)]
    hooks = [module.register_forward_hook(note) for module in candidates]
    try:
        logits = getattr(chain.leave(batch), "logits", None)
    except REFUSALS as e:
        LOG.info("the norm in front of the head stays as it is, the head cannot be run alone: %s", e)
        return None
    finally:
        for hook in hooks:
            hook.remove()
    if logits is None or logits.shape[:-1] != batch.hidden.shape[:-1] or len(read) != 1:
        return None
    return _that_scales(chain, *read.popitem(), batch.hidden)


def _that_scales(chain: BlockChain, module: nn.Module, output: Tensor, hidden: Tensor) -> LastNorm | None:
    """Return a norm whose output, twice as much of its weights, is twice what it was; None for any other."""
    names = chain.stored_parameters(module)
    if names.keys() != dict(module.named_parameters()).keys():
        return None
    for shifted in (False, True):
        norm = LastNorm(module, names, shifted)
        with norm.holding(norm.scaled(2.0)):
            off = module(hidden) - 2 * output
        if float(off.norm()) <= TOLERANCE * float(output.norm()):
            return norm
    return None


def _is_norm(module: nn.Module) -> bool:
    """Whether a module has parameters of one dimension only, a weight among them."""
    own = dict(module.named_parameters())
    return "weight" in own and all(parameter.dim() == 1 for parameter in own.values())


def _windows(original: Batch, compressed: Batch) -> Iterator[tuple[Batch, Batch]]:
    """Yield the windows of two batches, every other position."""
    for number in range(len(original.hidden)):
        first, other = (batch.hidden[number : number + 1, ::STRIDE] for batch in (original, compressed))
        yield replace(original, hidden=first), replace(compressed, hidden=other)


def _divergences(
    chain: BlockChain, norm: LastNorm, pairs: Sequence[tuple[Batch, Batch]], tried: Sequence[Mapping[str, Tensor]]
) -> list[float]:
    """Return the mean of KL(p ‖ p̂), nats a token, for each of some parameters of the compressed model's norm."""
    sums, count = [0.0] * len(tried), 0
    for original, compressed in pairs:
        p = chain.leave(original).logits.float().log_softmax(-1)
        for place, parameters in enumerate(tried):
            with norm.holding(parameters):
                q = chain.leave(compressed).logits.float().log_softmax(-1)
            sums[place] += float(torch.linalg.vecdot(p.exp(), p - q).double().sum())
        count += p.shape[:2].numel()
    if not all(map(math.isfinite, sums)):
        raise CheckpointError(f"{chain.checkpoint.folder}: the refitted model predicts NaN or Inf; pass --no-refit")
    return [total / count for total in sums]
