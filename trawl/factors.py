"""Factors: the one result of every decomposition, and its file.

A stack of S matrices W_s, each (inner, hidden), is approximated slice by slice as ``W_s = L · M_s · Rᵀ``. CP keeps a
diagonal M_s, Tucker a full one, and an SVD is a stack of one slice. This module knows nothing of how factors are found.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from trawl.errors import LoadError, ShapeError, shown
from trawl.interpolation import ORDER, interpolate, interpolated_sides
from trawl.shards import sealed
from trawl.untrusted import parse_json

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Factors:
    """A stack of matrices in factored form, ``W_s = left · M_s · rightᵀ``.

    ``M_s`` is ``diag(core[s])`` where ``core`` is 2-D (CP, SVD) and ``core[s]`` where it is 3-D (Tucker). With
    ``stack`` given (a compressed stack mode), ``core`` is mixed first: ``M_s = Σ_a stack[s, a] core[a]``.

    Attributes:
        left: (inner, r1).
        right: (hidden, r2).
        core: (A, r) with r1 = r2 = r, or (A, r1, r2); A = S unless ``stack`` is given.
        stack: (S, A), or None for the identity.
        relative_error: ‖T − T̂‖_F / ‖T‖_F, dimensionless, of these factors before any rounding on write.
        iterations: sweeps that the method made.
        converged: whether the change of fit fell under the method's tolerance before its cap on sweeps.
        weighted_error: the relative error as second moments weigh it; None where nothing weighed it.
        left_order: (inner,), where left is in interpolative form: the rows that are the identity's, then the others.
        right_order: (hidden,), likewise.
    """

    left: Tensor
    right: Tensor
    core: Tensor
    stack: Tensor | None = None
    relative_error: float = float("nan")
    iterations: int = 0
    converged: bool = True
    weighted_error: float | None = None
    left_order: Tensor | None = None
    right_order: Tensor | None = None

    def __post_init__(self) -> None:
        for name, tensor, ranks in (
            ("left", self.left, (2,)),
            ("right", self.right, (2,)),
            ("core", self.core, (2, 3)),
        ):
            if tensor.dim() not in ranks:
                raise ShapeError(f"factor {name} has {tensor.dim()} axes {tuple(tensor.shape)}; expected {ranks}")
        r1, r2 = self.core.shape[1], self.core.shape[-1]
        if (self.left.shape[1], self.right.shape[1]) != (r1, r2):
            raise ShapeError(
                f"factors do not fit together: left {tuple(self.left.shape)}, right {tuple(self.right.shape)}, "
                f"core {tuple(self.core.shape)}; left needs {r1} columns and right {r2}"
            )
        if self.stack is not None and (self.stack.dim() != 2 or self.stack.shape[1] != self.core.shape[0]):
            raise ShapeError(
                f"stack factor {tuple(self.stack.shape)} does not fit core {tuple(self.core.shape)}; "
                f"expected (S, {self.core.shape[0]})"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (S, inner, hidden) of the stack that these factors stand for."""
        size = self.core.shape[0] if self.stack is None else self.stack.shape[0]
        return size, self.left.shape[0], self.right.shape[0]

    @property
    def rank(self) -> tuple[int, int, int]:
        """Ranks (stack, inner, hidden); the two last are equal for CP and SVD."""
        return self.core.shape[0], self.core.shape[1], self.core.shape[-1]

    @property
    def parameters(self) -> int:
        """Number of entries that are stored in a checkpoint: see :meth:`stored`."""
        return sum(part.numel() for part in self.stored().values())

    @property
    def kept_energy(self) -> float:
        """Share of ‖T‖² that the approximation keeps, 1 − relative_error²."""
        return 1.0 - self.relative_error**2

    def middle(self, s: int) -> Tensor:
        """Return M_s, (r,) where it is diagonal and (r1, r2) where it is not."""
        if self.stack is None:
            return self.core[s]
        mixed: Tensor = torch.tensordot(self.stack[s], self.core, dims=1)
        return mixed

    def slice(self, s: int) -> Tensor:
        """Multiply out slice s.

        ``W_s = left · M_s · rightᵀ``

        Args:
            s: index along the stack mode, 0 ≤ s < S.
        Returns: (inner, hidden), in the factors' dtype and on their device.
        Raises: IndexError: s is outside the stack.
        Cost: O(inner · r1 · hidden) time, one (inner, hidden) matrix of memory.
        """
        if not 0 <= s < self.shape[0]:
            raise IndexError(f"slice {s} of a stack of {self.shape[0]}")
        middle = self.middle(s)
        if middle.dim() == 1:
            return (self.left * middle) @ self.right.T
        if middle.shape[0] <= middle.shape[1]:  # the longer product is formed over the smaller of the two ranks
            return self.left @ (middle @ self.right.T)
        return (self.left @ middle) @ self.right.T

    def dense(self) -> Tensor:
        """Return all slices multiplied out, (S, inner, hidden)."""
        return torch.stack([self.slice(s) for s in range(self.shape[0])])

    def to(self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Factors:
        """Return the same factors on another device or in another dtype."""
        moved = {name: tensor.to(device=device, dtype=dtype) for name, tensor in self.tensors().items()}
        return replace(self, **moved)  # type: ignore[arg-type]

    def balanced(self) -> Factors:
        """Return the same factors with entries of like magnitude, so that a narrow dtype holds all of them.

        Columns of left and right and the core are multiplied by powers of two whose product is 1: every slice keeps
        its value to the last bit.
        """
        axes = (0,) if self.core.dim() == 2 else None
        left, right, core = (_exponents(part, axes) for part in (self.left, self.right, self.core))
        mean = torch.floor((left + right + core) / 3)
        down, across = mean - left, mean - right
        return replace(
            self,
            left=torch.ldexp(self.left, down),
            right=torch.ldexp(self.right, across),
            core=torch.ldexp(self.core, -down - across),
        )

    def interpolated(self) -> Factors:
        """Return the same factors in interpolative form, where that is smaller; no longer to be cut to a lower rank.

        Cost: O((inner + hidden) r²) operations; a few copies of the factors in float64.
        Reference: see :mod:`trawl.interpolation`.
        """
        full = self.core.dim() == 3
        left, right, core = self.left.double(), self.right.double(), self.core.double()
        orders: dict[str, Tensor] = {}
        for side in interpolated_sides(self.shape, self.rank, full=full):
            if side == "left":
                left, square, orders[side + ORDER] = interpolate(left)
                core = square @ core
            else:
                right, square, orders[side + ORDER] = interpolate(right)
                if full:
                    core = core @ square.T
                else:
                    left, core = (left * core[0]) @ square.T, torch.ones_like(core)
        dtype = self.left.dtype
        return replace(self, left=left.to(dtype), right=right.to(dtype), core=core.to(dtype), **orders)  # type: ignore[arg-type]

    def stored(self) -> dict[str, Tensor]:
        """Return what a checkpoint stores, by name: of factors in interpolative form other rows and the order."""
        parts = self.tensors()
        for side, order in (("left", self.left_order), ("right", self.right_order)):
            if order is not None:
                parts |= {side: parts[side][order[parts[side].shape[1] :]], side + ORDER: order}
        return parts

    def tensors(self) -> dict[str, Tensor]:
        """Return the stored tensors by name: left, right, core, and stack where the stack mode is compressed."""
        parts = {"left": self.left, "right": self.right, "core": self.core}
        if self.stack is not None:
            parts["stack"] = self.stack
        return parts

    def save(self, path: Path, metadata: Mapping[str, Any]) -> None:
        """Write one sealed factor file: it appears under ``path`` whole, by rename, or not at all.

        Args:
            path: the file to create; its folder exists.
            metadata: JSON-able description of the stack (what it was computed from), kept beside the factors.
        Raises: OSError: the disk is full or the folder is not writable.
        Cost: ``parameters`` times the element size in bytes written, then one fsync.
        """
        header = {
            "format_version": FORMAT_VERSION,
            "relative_error": self.relative_error,
            "iterations": self.iterations,
            "converged": self.converged,
            "metadata": dict(metadata),
        } | ({} if self.weighted_error is None else {"weighted_error": self.weighted_error})
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors().items()}
        with sealed(path) as file:
            file.write(serialize(tensors, metadata={"trawl": json.dumps(header, sort_keys=True)}))

    @classmethod
    def load(cls, path: Path) -> tuple[Factors, dict[str, Any]]:
        """Read a factor file written by :meth:`save`.

        Returns: the factors, and the metadata that was saved with them.
        Raises: LoadError: the file is absent, truncated, or not a factor file of this format version.
        """
        try:
            with safe_open(path, framework="pt") as file:
                header = parse_json((file.metadata() or {})["trawl"].encode())
                # Copies, since the last bits of a product may depend on where in memory its factors begin.
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (OSError, SafetensorError, KeyError, ValueError) as e:
            raise LoadError(f"{path} is not a readable factor file: {e}; delete it and decompose again") from e
        if not isinstance(header, dict):
            raise LoadError(f"{path} is not a factor file: its header is {shown(header)}")
        if header.get("format_version") != FORMAT_VERSION:
            raise LoadError(
                f"{path} has factor format version {shown(header.get('format_version'))}; "
                f"this trawl reads {FORMAT_VERSION}"
            )
        try:
            factors = cls(
                left=tensors["left"],
                right=tensors["right"],
                core=tensors["core"],
                stack=tensors.get("stack"),
                relative_error=float(header["relative_error"]),
                iterations=int(header["iterations"]),
                converged=bool(header["converged"]),
                weighted_error=header.get("weighted_error"),
            )
        except (KeyError, TypeError, ValueError, OverflowError, ShapeError) as e:
            raise LoadError(f"{path} does not hold one set of factors: {e}; delete it and decompose again") from e
        if not all(tensor.is_floating_point() for tensor in tensors.values()):
            raise LoadError(f"{path} holds factors that are no floating-point numbers; delete it and decompose again")
        return factors, header.get("metadata") or {}


def _exponents(part: Tensor, axes: tuple[int, ...] | None) -> Tensor:
    """Return the binary exponent of the largest magnitude, per column or, without axes, of the whole; 0 for zeros."""
    largest = part.abs().amax(axes) if axes else part.abs().amax()
    return torch.frexp(largest)[1].to(part.dtype)
