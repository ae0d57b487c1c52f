"""What a run will do, before a weight is read: stacks with their ranks, sizes and costs."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from trawl.calibration import Calibration, Moments
from trawl.checkpoint import Checkpoint
from trawl.decompose import Method
from trawl.descriptor import Descriptor
from trawl.families import FC, FamilyMatch
from trawl.layout import ShardLayout, make_layout
from trawl.narrowing import Cut, Narrowed
from trawl.recipe import Recipe
from trawl.stacking import Stack

WRITE_BLOCK_BYTES = 64 << 20  # scratch of the writing loop, see trawl.writing
RUNTIME_BYTES = 350 << 20  # an interpreter with torch and transformers imported


@dataclass(frozen=True)
class PlannedStack:
    """One stack with what its decomposition will hold.

    Attributes:
        stack: the slices.
        rank: (stack, inner, hidden).
        parameters_after: entries that are stored of its factors.
        flops: floating-point operations of its decomposition, an estimate.
        memory: bytes of its decomposition's working set, an estimate.
        method: with its hyper-parameters; None where units are left out in place of a decomposition.
    """

    stack: Stack
    rank: tuple[int, int, int]
    parameters_after: int
    flops: int
    memory: int
    method: Method | None = None

    @property
    def file_entries(self) -> int:
        """Entries of its file while a run works: whole factors, or the units that stay."""
        if self.method is None:
            return self.parameters_after
        (size, inner, hidden), (mixed, r1, r2) = self.stack.shape, self.rank
        return inner * r1 + hidden * r2 + mixed * r1 * r2 + size * mixed

    def to_json(self) -> dict[str, Any]:
        """Return the stack as JSON-able values."""
        return {
            "name": self.stack.name,
            "shape": list(self.stack.shape),
            "layers": list(self.stack.layers),
            "roles": list(self.stack.roles),
            "tensors": list(self.stack.tensors),
            "rank": list(self.rank),
            "parameters_before": self.stack.parameters,
            "parameters_after": self.parameters_after,
            "gigaflops": round(self.flops / 1e9, 3),
        }


@dataclass(frozen=True, eq=False)
class Plan:
    """Everything that a run will do, before a weight is read."""

    checkpoint: Checkpoint
    match: FamilyMatch
    recipe: Recipe
    stacks: tuple[PlannedStack, ...]
    notes: tuple[str, ...]
    descriptor: Descriptor | None = None  # of a factored output
    narrowed: Narrowed | None = None  # what a narrow output leaves out
    moments: Moments | None = None  # that weigh the error
    anchor: Calibration | None = None  # the text of an anchored run
    refit: Calibration | None = None  # the text that narrowed FCs are refitted on

    @property
    def factored(self) -> tuple[PlannedStack, ...]:
        """Stacks that are decomposed; the others are narrowed."""
        return tuple(item for item in self.stacks if item.method)

    @property
    def refitted(self) -> tuple[Cut, ...]:
        """Narrowed FCs that are refitted."""
        cuts = self.narrowed.cuts if self.narrowed and self.refit else ()
        return tuple(cut for cut in cuts if cut.reader.role in FC and cut.keep < cut.units)

    @cached_property
    def layouts(self) -> tuple[ShardLayout, ...]:
        """Shards of an output whose tensors have other shapes: factored, narrow, or both."""
        if not self.descriptor and not self.narrowed:
            return ()
        shapes = self.narrowed.shapes if self.narrowed else {}
        return make_layout(self.checkpoint, self.descriptor or Descriptor(()), shapes)

    @property
    def changed_tensors(self) -> tuple[str, ...]:
        """Stored tensors that will be written anew."""
        return tuple(dict.fromkeys(name for planned in self.stacks for name in planned.stack.tensors))

    @property
    def output_bytes(self) -> int:
        """Bytes of the output's shards, exactly; dense output keeps every shape and dtype."""
        return sum(layout.nbytes for layout in self.layouts) if self.layouts else self.checkpoint.nbytes

    @property
    def output_parameters(self) -> int:
        """Entries of the output's tensors."""
        if not self.layouts:
            return self.checkpoint.parameters
        return sum(math.prod(entry.shape) for layout in self.layouts for entry in layout.entries)

    @property
    def work_bytes(self) -> int:
        """Bytes of the files of factors, or of units that stay, that stand beside the output while it is made."""
        return sum(planned.file_entries * 4 for planned in self.stacks)

    @property
    def memory(self) -> int:
        """Estimated peak of the process's own memory, in bytes."""
        tensors = self.checkpoint.tensors
        names = () if self.descriptor and not self.narrowed else self.changed_tensors
        written = max((tensors[name].nbytes for name in names), default=0)
        working = max((planned.memory for planned in self.stacks), default=0)
        return RUNTIME_BYTES + max(working, written + WRITE_BLOCK_BYTES)

    @property
    def flops(self) -> int:
        """Estimated floating-point operations of all decompositions."""
        return sum(planned.flops for planned in self.stacks)

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON-able values; the same headers and recipe give the same JSON."""
        return {
            "model": self.checkpoint.origin,
            "family": self.match.family,
            "assumed": list(self.match.assumed),
            "recipe": self.recipe.model_dump(mode="json"),
            "stacks": [planned.to_json() for planned in self.stacks],
            "notes": list(self.notes),
            "parameters_before": self.checkpoint.parameters,
            "parameters_after": self.output_parameters,
            "source_bytes": self.checkpoint.nbytes,
            "output_bytes": self.output_bytes,
            "memory_bytes": self.memory,
            "gigaflops": round(self.flops / 1e9, 3),
        }


def product_seconds(planned: Plan) -> float:
    """Estimate how long a plan's matrix products take on this machine's processor.

    Args:
        planned: the plan.
    Returns: its operations over the rate of a float32 product of two 1024 x 1024 matrices, measured now, in seconds.
        Reading, checking and writing the weights come on top.
    Cost: a few tens of milliseconds.
    """
    size = 1024
    matrix = torch.ones(size, size)
    best = float("inf")
    for _ in range(4):
        started = time.perf_counter()
        torch.mm(matrix, matrix)
        best = min(best, time.perf_counter() - started)
    return planned.flops * best / (2 * size**3)
