"""Hypothesis strategies: stacks of every kind that a decomposition must take, and ranks that fit them."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st
from torch import Tensor

KINDS = ("random", "planted", "deficient", "ill-conditioned")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@st.composite
def shapes(draw, most=(5, 24, 18)):
    """(S, inner, hidden), any of them 1 at times."""
    return tuple(draw(st.integers(1, limit)) for limit in most)


@st.composite
def stacks(draw, kinds=KINDS, dtypes=DTYPES, scales=(1.0,), most=(5, 24, 18)):
    """A stack with a rank for it: (tensor, rank)."""
    shape = draw(shapes(most))
    size, inner, hidden = shape
    rank = draw(st.integers(1, min(6, size * inner, size * hidden, inner * hidden)))
    kind = draw(st.sampled_from(kinds))
    dtype = draw(st.sampled_from(dtypes))
    scale = draw(st.sampled_from(scales))
    tensor = make_stack(kind, shape, rank, draw(st.integers(0, 10**6)))
    tensor = tensor / tensor.abs().max().clamp(min=1e-30) * fitting(scale, dtype)
    tensor = tensor.to(dtype)
    if draw(st.booleans()):  # as a transposed view of storage, like down_proj
        tensor = tensor.transpose(1, 2).contiguous().transpose(1, 2)
    return tensor, rank


def fitting(scale: float, dtype: torch.dtype) -> float:
    """Keep a scale within what a dtype can hold: float16 ends at 65504 and loses digits under 6e-5."""
    return min(max(scale, 0.02), 1e4) if dtype == torch.float16 else scale


def make_stack(kind: str, shape: tuple[int, int, int], rank: int, seed: int) -> Tensor:
    """Make a stack: Gaussian, of exact CP rank, of half that rank, or with components over five decades."""
    random = torch.Generator().manual_seed(seed)
    if kind == "random":
        return torch.randn(shape, generator=random)
    components = max(1, rank // 2) if kind == "deficient" else rank
    weights = torch.logspace(0, -5, components) if kind == "ill-conditioned" else torch.ones(components)
    a, b, c = (torch.randn(n, components, generator=random) / math.sqrt(n) for n in shape)
    return torch.einsum("sr,ir,hr->sih", a * weights, b, c)
