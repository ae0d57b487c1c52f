"""Decompositions of stacks of matrices: CP, Tucker and SVD, streamed slice by slice.

>>> import torch
>>> from trawl.decompose import Tucker, decompose
>>> decompose(torch.ones(3, 8, 6), Tucker(rank=2)).left.shape
torch.Size([8, 2])
"""

from __future__ import annotations

from torch import Tensor

from trawl.decompose.cp import CP
from trawl.decompose.method import Method
from trawl.decompose.nesting import Rank, nested_chain
from trawl.decompose.source import SliceSource, TensorSlices
from trawl.decompose.spectrum import Spectrum, spectrum
from trawl.decompose.svd import SVD
from trawl.decompose.tucker import Tucker
from trawl.decompose.weights import Weights
from trawl.errors import ShapeError
from trawl.factors import Factors

__all__ = [
    "CP",
    "SVD",
    "Method",
    "Rank",
    "SliceSource",
    "Spectrum",
    "TensorSlices",
    "Tucker",
    "Weights",
    "decompose",
    "nested_chain",
    "spectrum",
]


def decompose(x: Tensor, method: Method, weights: Weights | None = None) -> Factors:
    """Decompose a plain tensor.

    ``x[s] ≈ factors.slice(s)``

    Args:
        x: (S, inner, hidden), or (inner, hidden) for a stack of one; any real floating dtype of at least 16 bits.
        method: ``CP(rank=64)``, ``Tucker(rank=64)``, ``Tucker(rank=(r0, r1, r2))`` or ``SVD(rank=64)``.
        weights: second moments that weigh the error; without them every entry counts alike.
    Returns: factors in float32, float64 for a float64 x; ``factors.slice(s)`` is (inner, hidden).
    Raises: ShapeError: x is not 2-D or 3-D, has an empty axis, is not of a floating dtype, or holds NaN or Inf.
        RankError: the rank is below 1 or above what the method allows.
    Cost: that of ``method.decompose``, and one read of x.
    """
    if x.dim() not in (2, 3) or 0 in x.shape:
        raise ShapeError(f"tensor has shape {tuple(x.shape)}; expected (inner, hidden) or (S, inner, hidden)")
    if not x.is_floating_point() or x.element_size() < 2:
        raise ShapeError(
            f"tensor of shape {tuple(x.shape)} is {x.dtype}; expected float16, bfloat16, float32 or float64"
        )
    return method.decompose(TensorSlices(x.detach() if x.dim() == 3 else x.detach()[None]), weights=weights)
