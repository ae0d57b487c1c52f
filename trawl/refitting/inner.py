"""What an FC computes between the weights that write its units and the one that reads them, by the model's own code.

The code itself is run, with pre-activations in place of what the writing modules give, as far as the reading module: no
activation function and no gating needs to be known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from trawl.calibration.block import Batch, Block
from trawl.calibration.streaming import REFUSALS
from trawl.errors import PlanError
from trawl.families import Placement
from trawl.models import Forward, around
from trawl.narrowing.cuts import positions
from trawl.stacking import READ_INNER

TOLERANCE = 1e-3  # relative: what may lie between a unit among all and the same unit among those kept


class _Read(BaseException):
    """Raised where the reading module would run: nothing after it is wanted. No model code catches it."""


@dataclass(eq=False)
class InnerFunction:
    """a = φ(s₁, …), the units of an FC by their pre-activations s = V x + b; each unit depends on its own alone.

    Attributes:
        block: with its weights in memory.
        parts: the FC's slices.
        names: of the weight that each slice lies in, as the block tells it.
        shapes: of the stored tensor that each slice lies in.
    """

    block: Block
    parts: Sequence[Placement]
    names: Mapping[Placement, str]
    shapes: Mapping[Placement, tuple[int, ...]]
    _given: tuple[tuple[Any, ...], dict[str, Any]] | None = field(default=None, init=False, repr=False)

    @property
    def writers(self) -> list[Placement]:
        """Slices that write units."""
        return [part for part in self.parts if part.role not in READ_INNER]

    @property
    def reader(self) -> Placement:
        """The slice that reads the units."""
        return next(part for part in self.parts if part.role in READ_INNER)

    def run(self, batch: Batch, see: Callable[[str, Tensor], None]) -> Batch:
        """Run the block on a batch, as :meth:`trawl.calibration.block.Block.run`, and note how the FC is called."""

        def note(forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            self._given = self._given or (args, kwargs)
            return forward(*args, **kwargs)

        with around(self._whole, note):
            return self.block.run(batch, see)

    def __call__(self, pre: Mapping[Placement, Tensor]) -> Tensor:
        """Return units (n, k), differentiable by pre-activations (n, k) of each writer.

        Raises: PlanError: the model's code does more between the modules than can be repeated so.
        """
        assert self._given is not None
        read: list[Tensor] = []

        def stop(_: Forward, args: tuple[Any, ...], __: Any) -> Any:
            read.append(args[0])
            raise _Read

        with ExitStack() as stack:
            for module in {self._module(part): None for part in self.writers}:
                joined = self._joined(module, pre)[None]
                stack.enter_context(around(module, lambda *_, joined=joined: joined))
            stack.enter_context(around(self._module(self.reader), stop))
            try:
                self._whole(*self._given[0], **self._given[1])
            except _Read:
                return read[0].reshape(-1, read[0].shape[-1])
            except REFUSALS as e:
                raise self._refusal(str(e)) from e
        raise self._refusal("it never comes to what reads the units")

    def check(self, pre: Mapping[Placement, Tensor], kept: Tensor) -> None:
        """Raise PlanError where units depend on one another, so that leaving some out changes those that stay."""
        among_all = self(pre)[:, kept]
        alone = self({part: values[:, kept] for part, values in pre.items()})
        if float((alone - among_all).norm()) > TOLERANCE * float(among_all.norm()):
            raise self._refusal("its units depend on one another")

    def slopes(self, pre: Mapping[Placement, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Return units (n, k), and ∂a/∂s of each writer, (n, k): of each unit by its own pre-activation."""
        leaves = {part: pre[part].detach().requires_grad_() for part in self.writers}
        with torch.enable_grad():
            units = self(leaves)
            found = torch.autograd.grad(units.sum(), list(leaves.values()))
        return units.detach(), list(found)

    def _joined(self, module: nn.Module, pre: Mapping[Placement, Tensor]) -> Tensor:
        """Return what a module of one or several writers gives, by the pre-activations of each."""
        own = [part for part in self.writers if self._module(part) is module]
        if len(own) == 1:
            return pre[own[0]]
        places = torch.cat([positions(part.view, self.shapes[part])[: pre[part].shape[1]] for part in own])
        return torch.cat([pre[part] for part in own], dim=1)[:, places.argsort().to(pre[own[0]].device)]

    def _module(self, part: Placement) -> nn.Module:
        """Return the module that multiplies by a slice."""
        return self.block.layer.get_submodule(self.names[part].rpartition(".")[0])

    @property
    def _whole(self) -> nn.Module:
        """The innermost module that runs all of the FC."""
        paths = zip(*(self.names[part].split(".")[:-2] for part in self.parts), strict=False)
        shared = takewhile(lambda names: len(set(names)) == 1, paths)
        return self.block.layer.get_submodule(".".join(names[0] for names in shared))

    def _refusal(self, reason: str) -> PlanError:
        return PlanError(f"the FC of layer {self.block.number} cannot be refitted: {reason}; pass --no-refit")
