"""Dense output: source shards with some tensors multiplied out from factors, streamed, and measured as written."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from trawl.checkpoint import Checkpoint, Shard
from trawl.factors import Factors
from trawl.families import Placement
from trawl.shards import FileRange, copy_file, write_shard
from trawl.stacking import Stack

BLOCK_ENTRIES = 1 << 20  # entries of one block of the writing loop; its float32 buffers stay in cache

Advance = Callable[[int], None]


@dataclass
class SquaredErrors:
    """Sums of squares per stack, in float64 and in units of the stack's largest magnitude.

    Attributes:
        error: ‖T − T̂‖² of what was written.
        norm: ‖T‖².
    """

    error: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    norm: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, other: SquaredErrors) -> None:
        """Add the sums of another part of the output."""
        for name, value in other.error.items():
            self.error[name] += value
            self.norm[name] += other.norm[name]

    def relative(self, name: str) -> float:
        """Return ‖T − T̂‖_F / ‖T‖_F of a stack; zero for an all-zero stack."""
        return float((self.error[name] / self.norm[name]) ** 0.5) if self.norm[name] else 0.0


@dataclass(frozen=True, eq=False)
class DenseWriter:
    """Writes the shards of a denoised checkpoint.

    Attributes:
        checkpoint: the source.
        stacks: all that were decomposed.
        factors: reads the factors of a stack by its name.
        absmax: largest magnitude of each stack, which keeps squares within float32.
    """

    checkpoint: Checkpoint
    stacks: tuple[Stack, ...]
    factors: Callable[[str], Factors]
    absmax: Mapping[str, float]

    def write(self, shard: Shard, path: Path, advance: Advance) -> SquaredErrors:
        """Write one shard: the source's header and bytes, with the stacks' tensors replaced.

        Args:
            shard: the source shard.
            path: the file to create; it appears whole, by rename.
            advance: called with the number of bytes done.
        Returns: squared errors of the slices in this shard.
        Raises: OSError: disk full or unreadable source.
        Cost: a shard without changed tensors is copied by the kernel. Otherwise its bytes once, one matrix product
            of the slice's size times the rank per slice, and one stored tensor plus a few blocks in memory.
        """
        source = self.checkpoint.folder / shard.name
        errors = SquaredErrors()
        slices = self._slices_by_tensor()
        if not any(info.name in slices for info in shard.tensors):
            copy_file(source, path)
            advance(shard.nbytes)
            return errors

        def parts() -> Iterator[FileRange | Tensor]:
            for info in shard.tensors:
                if info.name in slices:
                    yield self._replaced(info.name, slices[info.name], errors)
                else:
                    yield FileRange(source, info.start, info.stop)
                advance(info.nbytes)

        write_shard(path, shard.header, parts())
        return errors

    def _slices_by_tensor(self) -> dict[str, list[tuple[Stack, int, Placement]]]:
        """Return, per stored tensor, the slices that it holds."""
        found: dict[str, list[tuple[Stack, int, Placement]]] = defaultdict(list)
        for stack in self.stacks:
            for number, part in enumerate(stack.slices):
                found[part.tensor].append((stack, number, part))
        return found

    def _replaced(self, name: str, slices: list[tuple[Stack, int, Placement]], errors: SquaredErrors) -> Tensor:
        """Return a stored tensor with its slices multiplied out; parts of it in no stack keep their bytes."""
        original = self.checkpoint.read(name)
        whole = len(slices) == 1 and slices[0][2].view.whole
        target = torch.empty(original.shape, dtype=original.dtype) if whole else original.clone()
        for stack, number, part in slices:
            canonical = part.view.apply(original)
            written = part.view.apply(target)
            shares = written.untyped_storage().data_ptr() == target.untyped_storage().data_ptr()
            if not shares:  # no strides express this slice: fill a copy of it, then scatter it back
                written = torch.empty_like(canonical)
            scale = self.absmax[stack.name] or 1.0
            error, norm = multiply_out(self.factors(stack.name), number, canonical, written, scale)
            errors.error[stack.name] += error
            errors.norm[stack.name] += norm
            if not shares:
                part.view.scatter(written, target)
        return target


def multiply_out(factors: Factors, s: int, original: Tensor, out: Tensor, scale: float) -> tuple[float, float]:
    """Write slice s of the factors into ``out``, block by block, and measure it against the original.

    Args:
        factors: in the dtype to compute in, float32 or float64.
        s: slice number.
        original: (inner, hidden) as stored.
        out: (inner, hidden) to fill; rounded once to its dtype.
        scale: a magnitude that the entries are divided by before they are squared.
    Returns: squared error of what was written, and squared norm of the original, both divided by scale².
    Cost: O(inner · hidden · rank) operations; memory for a few blocks of ``BLOCK_ENTRIES`` entries.
    """
    middle = factors.middle(s)
    right = (factors.right * middle if middle.dim() == 1 else factors.right @ middle.T).T  # (r1, hidden)
    rows = max(1, BLOCK_ENTRIES // right.shape[1])
    transposed = out.stride(0) < out.stride(1)  # stored as (hidden, inner): form blocks in that order
    error = norm = 0.0
    for first in range(0, out.shape[0], rows):
        block = slice(first, first + rows)
        product = (right.T @ factors.left[block].T).T if transposed else factors.left[block] @ right
        out[block] = product
        before = original[block].to(product.dtype)
        error += squared_norm((out[block] - before).div_(scale))
        norm += squared_norm(before / scale)
    return error, norm


def squared_norm(block: Tensor) -> float:
    """Return ‖block‖² with its partial sums added in float64."""
    rows = block if block.stride(-1) == 1 else block.T
    return float(torch.linalg.vector_norm(rows, dim=1).double().square().sum())
