"""Watching products: whatever a module's code multiplies by a stored weight is handed over with the weight's name.

Linear modules, GPT-2's Conv1D and experts in one 3-D tensor come down to a few functions of torch, so that no module
needs to be known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

OPERANDS: Mapping[Any, tuple[int, int]] = {  # places of the activation and of the weight among the arguments
    functional.linear: (0, 1),
    torch.addmm: (1, 2),
    torch.mm: (0, 1),
    torch.matmul: (0, 1),
    torch.Tensor.matmul: (0, 1),
    torch.Tensor.mm: (0, 1),
    torch.bmm: (0, 1),
}

See = Callable[[str, Tensor], None]
SeeBack = Callable[[str, Tensor, Tensor], None]


def expert_name(name: str, expert: int) -> str:
    """Name one expert of a weight that holds them all."""
    return f"{name}[{expert}]"


class Products(TorchFunctionMode):
    """Hands over the input of every product with one of some weights while it is entered.

    Going back, it hands it over with the gradient of the product, when automatic differentiation comes by.

    Attributes:
        weights: (in, out) or (out, in) matrices by name, or such of all experts, (experts, ..., ...).
        see: called as ``see(name, x)`` with x (..., in), ``name[expert]`` for one expert of a 3-D weight.
        see_back: called in its place as ``see_back(name, x, gradient)`` with the gradient (..., out).
    """

    def __init__(
        self, weights: Iterable[tuple[str, Tensor]], see: See | None = None, see_back: SeeBack | None = None
    ) -> None:
        super().__init__()
        self.see, self.see_back = see, see_back
        self.names: dict[tuple[int, int], str] = {}  # by address and axes
        for name, weight in weights:
            self.names[weight.data_ptr(), weight.dim()] = name
            if weight.dim() == 3:
                for expert, part in enumerate(weight):
                    self.names[part.data_ptr(), 2] = expert_name(name, expert)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Make a call and look at it."""
        output = func(*args, **(kwargs or {}))
        if func in OPERANDS:
            x, weight = (args[place] for place in OPERANDS[func])
            name = self.names.get((weight.data_ptr(), weight.dim()))
            if name is not None and self.see:
                _hand_over(self.see, name, weight.dim() == 3, x)
            if name is not None and self.see_back and output.requires_grad:
                output.register_hook(partial(_hand_over, self.see_back, name, weight.dim() == 3, x.detach()))
        return output


def _hand_over(see: Callable[..., None], name: str, experts: bool, *tensors: Tensor) -> None:
    """Call ``see`` with tensors of one product, or expert by expert with those of a product with all of them.

    What it computes is not part of a block that multiplies in bfloat16.
    """
    with torch.autocast(tensors[0].device.type, enabled=False):
        if not experts:
            return see(name, *tensors)
        for expert, parts in enumerate(zip(*tensors, strict=True)):
            see(expert_name(name, expert), *parts)
    return None
