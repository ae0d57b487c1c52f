"""The factors of one stack as a module, which several linear modules multiply by."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from trawl.descriptor import DescribedStack
from trawl.factors import Factors
from trawl.hf.sharing import SharedProduct
from trawl.interpolation import Side, restore


class FactorStack(nn.Module):
    """The factors of one stack, each a parameter: left, right, core, and stack where the stack mode is compressed.

    Attributes:
        description: what the checkpoint says about the stack.
        left: (inner, r1), or (inner - r1, r1) in interpolative form: all rows but those of the identity.
        right: (hidden, r2), or (hidden - r2, r2) likewise.
        left_order: (inner,) in interpolative form: the identity's rows, then the others; None for a whole factor.
        right_order: (hidden,) likewise.
    """

    left: nn.Parameter
    right: nn.Parameter
    core: nn.Parameter
    stack: nn.Parameter | None
    left_order: Tensor | None
    right_order: Tensor | None

    def __init__(self, description: DescribedStack, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.description = description
        shapes = description.factor_shapes
        for factor in ("left", "right", "core", "stack"):
            made = nn.Parameter(torch.empty(shapes[factor], dtype=dtype, device=device)) if factor in shapes else None
            self.register_parameter(factor, made)
        for order in ("left_order", "right_order"):
            rows = torch.empty(shapes[order], dtype=torch.int64, device=device) if order in shapes else None
            self.register_buffer(order, rows)
        self.places = description.places
        self.of_hidden: SharedProduct[Tensor] = SharedProduct()
        self.of_inner: SharedProduct[Tensor] = SharedProduct()

    def middle(self, index: int | slice) -> Tensor:
        """Return M at one index, (r,) or (r1, r2), or at a range of them, with one axis more."""
        if self.stack is None:
            return self.core[index]
        mixed: Tensor = torch.tensordot(self.stack[index], self.core, dims=1)
        return mixed

    def lay_out(self) -> None:
        """Keep each factor that is on the CPU by its longer axis in memory; shape and values stay.

        A product with few rows takes the time of reading the factor, which goes faster the longer its runs are.
        """
        for factor in (self.left, self.right):
            if factor.device.type == "cpu" and factor.shape[0] > factor.shape[1]:
                factor.data = factor.data.T.contiguous().T

    def times(self, side: Side, x: Tensor) -> Tensor:
        """Multiply by a factor, (..., rows) to (..., r)."""
        factor, order = (self.left, self.left_order) if side == "left" else (self.right, self.right_order)
        if order is None:
            return x @ factor
        rank = factor.shape[1]
        moved = x.reshape(-1, x.shape[-1]).index_select(-1, order)
        return torch.addmm(moved[:, :rank], moved[:, rank:], factor).view(*x.shape[:-1], rank)

    def times_transposed(self, side: Side, y: Tensor, bias: Tensor | None = None) -> Tensor:
        """Multiply by a factor transposed, (..., r) to (..., rows), and add a bias."""
        factor, order = (self.left, self.left_order) if side == "left" else (self.right, self.right_order)
        if order is None:
            return functional.linear(y, factor, bias)
        moved = torch.cat([y, functional.linear(y, factor)], -1)
        rows = torch.empty_like(moved).index_copy_(-1, order, moved)
        return rows if bias is None else rows + bias

    def left_of(self, first: int, stop: int) -> Tensor:
        """Return the rows of left, stored whole, that a range of slices has: their own where they are joined."""
        if not self.description.joined or stop - first == len(self.places):
            return self.left
        return self.left[self.places[first].rows.start : self.places[stop - 1].rows.stop]

    def matrix(self, number: int) -> Tensor:
        """Multiply out one slice in float32 or wider, (inner, hidden), detached, rounded once to the factors' dtype."""
        dtype, index = torch.promote_types(self.left.dtype, torch.float32), self.places[number].s
        left, right = self.left_of(number, number + 1).detach().contiguous(), self.right.detach().contiguous()
        left = (left if self.left_order is None else restore(left, self.left_order)).to(dtype)
        right = (right if self.right_order is None else restore(right, self.right_order)).to(dtype)
        mixing = None if self.stack is None else self.stack.detach()[index, None].to(dtype)  # (1, A)
        core = self.core.detach() if mixing is not None else self.core.detach()[index, None]
        return Factors(left, right, core.to(dtype), mixing).slice(0).to(self.left.dtype)

    def extra_repr(self) -> str:
        """Return the stack's name, shape and ranks."""
        return f"{self.description.name}, shape={self.description.shape}, rank={self.description.rank}"
