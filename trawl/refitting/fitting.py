"""One narrowed FC: its tokens, and the rows and the reader that give its outputs best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from trawl.calibration.streaming import Batch
from trawl.checkpoint import Checkpoint
from trawl.errors import CheckpointError
from trawl.families import Placement
from trawl.narrowing import Narrowing
from trawl.narrowing.cuts import bias_of, positions
from trawl.narrowing.selection import make_problem
from trawl.refitting.inner import InnerFunction
from trawl.refitting.solving import Tokens, find_change

JUDGED = 8  # every so manieth batch is not fitted to, but says whether what was fitted is better
SAMPLE = 64  # tokens on which units are shown to stand alone


@dataclass(frozen=True, eq=False)
class Weights:
    """What a narrowed FC computes with.

    Attributes:
        rows: of each writer, those of the units that stay, (k, hidden) float64 of values that the stored dtype has.
        reader: D, (k, hidden), likewise.
        shift: what the reader's bias grows by, (hidden,) float64; zero where the FC has none.
    """

    rows: Mapping[Placement, Tensor]
    reader: Tensor
    shift: Tensor


@dataclass(eq=False)
class Refit:
    """One FC that is refitted.

    Attributes:
        checkpoint: the source.
        inner: its code, in a block that is in memory.
        dtype: what products are formed in.
        root: R with R Rᵀ = G, what a miss of its outputs counts by; None for all alike.
    """

    checkpoint: Checkpoint
    inner: InnerFunction
    dtype: torch.dtype
    root: Tensor | None
    fitted: Tokens = field(init=False)
    judged: Tokens = field(init=False)

    def read(self, batches: Sequence[Batch]) -> list[Batch]:
        """Run batches through the block, keep what the FC reads and gives, and return what leaves the block."""
        names, reader = self.inner.names, self.inner.reader
        matrix = self._stored(reader).to(self.dtype)
        seen: dict[str, Tensor] = {}
        parts: list[tuple[Tensor, Tensor]] = []
        left: list[Batch] = []
        for batch in batches:
            left.append(self.inner.run(batch, seen.__setitem__))
            x, units = (_flat(seen[names[part]]).to(self.dtype) for part in (self.inner.writers[0], reader))
            parts.append((x, units @ matrix))
            seen.clear()
        chosen = [part for number, part in enumerate(parts) if number % JUDGED != JUDGED - 1]
        others = [part for number, part in enumerate(parts) if number % JUDGED == JUDGED - 1]
        self.fitted, self.judged = (
            Tokens(*(torch.cat(each) for each in zip(*some, strict=True))) for some in (chosen, others or chosen)
        )
        if not all(bool(torch.isfinite(tokens.y).all()) for tokens in (self.fitted, self.judged)):
            raise CheckpointError(
                f"layer {self.inner.block.number} gives NaN or Inf on the calibration text; check its weights"
            )
        return left

    def solve(self, found: Narrowing) -> Narrowing:
        """Return a narrowing whose writers and reader give this FC's outputs better, or as it is where none does."""
        kept = found.kept
        old = self._bias(self.inner.reader)
        zero = torch.zeros(self.fitted.y.shape[1], dtype=torch.float64)
        shift = zero if found.bias is None or old is None else found.bias.double() - old.double()
        rows = {part: self._stored(part)[kept].double() for part in self.inner.writers}
        sample = self._pre({part: self._stored(part).double() for part in rows}, self.fitted.x[:SAMPLE], None)
        self.inner.check(sample, kept)
        best = Weights(rows, found.reader.double(), shift)
        lowest = self.error(best, self.judged, kept)
        for part in self.inner.writers:
            tried = self._improved(best, part, kept)
            error = self.error(tried, self.judged, kept)
            if error < lowest:
                best, lowest = tried, error
        return self._narrowing(found, best)

    def _improved(self, weights: Weights, part: Placement, kept: Tensor) -> Weights:
        """Return weights with one writer's rows changed, and a reader that goes with them."""
        tokens, low = self.fitted, weights.reader.to(self.dtype)
        slope, missing = tokens.x.new_empty(len(tokens), len(kept)), torch.empty_like(tokens.y)
        for at in tokens.chunks():
            pre = self._pre(weights.rows, tokens.x[at], kept)
            slope[at] = self.inner.slope(pre, part)
            missing[at] = tokens.y[at] - self.inner(pre) @ low - weights.shift.to(self.dtype)
        change = find_change(tokens, slope, missing, weights.reader, self.root)
        rows = {**weights.rows, part: self._rounded(weights.rows[part] + change, part)}
        return self._with_reader(rows, weights.reader, kept)

    def _with_reader(self, rows: Mapping[Placement, Tensor], reader: Tensor, kept: Tensor) -> Weights:
        """Return weights of some rows with the reader that gives the outputs best, by a ridge towards another."""
        tokens, k = self.fitted, len(kept)
        second, cross = reader.new_zeros(k, k), torch.zeros_like(reader)
        total = reader.new_zeros(k)
        for at in tokens.chunks():
            units = self.inner(self._pre(rows, tokens.x[at], kept))
            second += (units.T @ units).double() / len(tokens)
            cross += (units.T @ tokens.y[at]).double() / len(tokens)
            total += units.double().sum(0)
        mean, energy = total / len(tokens), tokens.energy
        wanted = tokens.y.double().mean(0)
        if self._bias(self.inner.reader) is None:
            problem = make_problem(reader, second, cross, energy)
        else:
            cross = cross - torch.outer(mean, wanted)
            problem = make_problem(reader, second, cross, energy - float(wanted.square().sum()), mean)
        solved = self._rounded(problem.solve(torch.arange(k)), self.inner.reader)
        shift = torch.zeros_like(wanted) if self._bias(self.inner.reader) is None else wanted - solved.T @ mean
        return Weights(rows, solved, shift)

    def error(self, weights: Weights, tokens: Tokens, kept: Tensor) -> float:
        """Return E‖y − ŷ‖² / E‖y‖²."""
        low, shift = weights.reader.to(self.dtype), weights.shift.to(self.dtype)
        missed = 0.0
        for at in tokens.chunks():
            given = self.inner(self._pre(weights.rows, tokens.x[at], kept)) @ low + shift
            missed += float((tokens.y[at] - given).double().square().sum())
        return missed / len(tokens) / tokens.energy if tokens.energy else 0.0

    def _narrowing(self, found: Narrowing, weights: Weights) -> Narrowing:
        """Return what is stored of some weights; nothing changes where no writer did."""
        stored = {part: self._stored(part)[found.kept].double() for part in weights.rows}
        writers = {part.role: rows for part, rows in weights.rows.items() if not torch.equal(rows, stored[part])}
        if not writers:
            return replace(found, refitted=True)
        dtypes = {part.role: self._stored(part).dtype for part in self.inner.parts}
        bias = self._bias(self.inner.reader)
        whole = len(self.fitted) + len(self.judged)
        error = sum(
            self.error(weights, tokens, found.kept) * len(tokens) / whole for tokens in (self.fitted, self.judged)
        )
        return replace(
            found,
            reader=weights.reader.to(dtypes[self.inner.reader.role]),
            bias=None if bias is None else (bias.double() + weights.shift).to(bias.dtype),
            relative_error=error**0.5,
            writers={role: rows.to(dtypes[role]) for role, rows in writers.items()},
            refitted=True,
        )

    def _pre(self, rows: Mapping[Placement, Tensor], x: Tensor, kept: Tensor | None) -> dict[Placement, Tensor]:
        """Return the pre-activations of each writer, (tokens, k): of all units, or of those that are kept."""
        found = {}
        for part, values in rows.items():
            bias = self._bias(part)
            pre = x @ values.T.to(x.dtype)
            found[part] = pre if bias is None else pre + (bias if kept is None else bias[kept]).to(x.dtype)
        return found

    def _stored(self, part: Placement) -> Tensor:
        """Return a slice as it is stored, canonical (inner, hidden)."""
        return part.view.apply(self.checkpoint.read(part.tensor))

    def _bias(self, part: Placement) -> Tensor | None:
        """Return what is added to a slice's outputs: to units by a writer, (inner,), to the stream by the reader."""
        name = bias_of(self.checkpoint, part.tensor)
        if name is None:
            return None
        bias = self.checkpoint.read(name)
        return bias if part is self.inner.reader else bias[positions(part.view, self.inner.shapes[part])]

    def _rounded(self, matrix: Tensor, part: Placement) -> Tensor:
        """Return the values that the stored dtype of a slice's tensor has for these.

        Raises: CheckpointError: some are too large for it.
        """
        dtype = self.checkpoint.read(part.tensor).dtype
        rounded = matrix.to(dtype)
        if not torch.isfinite(rounded).all():
            raise CheckpointError(
                f"layer {self.inner.block.number}: the refitted {part.tensor} does not fit its stored dtype {dtype}; "
                "keep more units, or leave --refit out"
            )
        return rounded.double()


def _flat(rows: Tensor) -> Tensor:
    """Return inputs as (tokens, width)."""
    return rows.reshape(-1, rows.shape[-1])
