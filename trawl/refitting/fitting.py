"""One narrowed FC: its tokens, and the rows and the reader that give its outputs best."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial

import torch
from torch import Tensor

from trawl.calibration.streaming import Batch
from trawl.checkpoint import Checkpoint
from trawl.errors import CheckpointError
from trawl.families import Placement
from trawl.narrowing import Narrowing
from trawl.narrowing.cuts import bias_of, positions
from trawl.narrowing.selection import Problem, make_problem
from trawl.refitting.inner import InnerFunction
from trawl.refitting.solving import Tokens, find_change

JUDGED = 16  # one batch in so many is not fitted to, but says whether what was fitted is better
SAMPLE = 64  # tokens on which units are shown to stand alone


@dataclass(frozen=True, eq=False)
class Sums:
    """Over some tokens, float64: Σ a aᵀ, Σ a yᵀ, Σ a, Σ y and Σ ‖y‖² of units a and wanted outputs y."""

    second: Tensor
    cross: Tensor
    units: Tensor
    outputs: Tensor
    energy: float
    tokens: int

    def __add__(self, other: Sums) -> Sums:
        return Sums(*(getattr(self, item.name) + getattr(other, item.name) for item in fields(self)))

    def problem(self, reader: Tensor, *, centred: bool) -> Problem:
        """Return the least-squares problem of the reader, whose ridge draws to another one."""
        second, cross, energy = self.second / self.tokens, self.cross / self.tokens, self.energy / self.tokens
        if not centred:
            return make_problem(reader, second, cross, energy)
        units, outputs = self.units / self.tokens, self.outputs / self.tokens
        cross, energy = cross - torch.outer(units, outputs), energy - float(outputs.square().sum())
        return make_problem(reader, second, cross, energy, units)


@dataclass(frozen=True, eq=False)
class Weights:
    """What a narrowed FC computes with.

    Attributes:
        rows: of each writer, those of the units that stay, (k, hidden) float64 of values that the stored dtype has.
        sums: of the units that these rows give, over the tokens that are fitted to.
        reader: D, (k, hidden) float64, likewise.
        shift: what the reader's bias grows by, (hidden,) float64; zero where the FC has none.
    """

    rows: Mapping[Placement, Tensor]
    sums: Sums
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
        matrix = self._stored(reader).to(batches[0].hidden.device, self.dtype)
        seen: dict[str, Tensor] = {}
        parts: list[tuple[Tensor, Tensor]] = []
        left: list[Batch] = []
        for batch in batches:
            left.append(self.inner.run(batch, seen.__setitem__))
            x, units = (_flat(seen[names[part]]).to(self.dtype) for part in (self.inner.writers[0], reader))
            parts.append((x, units @ matrix))
            seen.clear()
        judges = set(range(JUDGED - 1, len(parts), JUDGED)) or {len(parts) - 1}
        fitted = [part for number, part in enumerate(parts) if number not in judges]
        self.judged = _joined(part for number, part in enumerate(parts) if number in judges)
        self.fitted = _joined(fitted) if fitted else self.judged
        if not all(bool(torch.isfinite(tokens.y).all()) for tokens in (self.fitted, self.judged)):
            raise CheckpointError(
                f"layer {self.inner.block.number} gives NaN or Inf on the calibration text; check its weights"
            )
        return left

    @torch.no_grad()
    def solve(self, found: Narrowing) -> Narrowing:
        """Return a narrowing whose writers and reader give this FC's outputs better, or as it is where none does."""
        device = self.fitted.x.device
        kept, reader = found.kept.to(device), found.reader.to(device, torch.float64)
        stored = {part: self._stored(part).to(device, torch.float64) for part in self.inner.writers}
        sample = Tokens(self.fitted.x[:SAMPLE], self.fitted.y[:SAMPLE])
        for _, pre in self._pre(stored, sample, None):
            self.inner.check(pre, kept)
        start = self._with_reader({part: rows[kept] for part, rows in stored.items()}, reader, kept)
        best, lowest = start, self.error(start, self.judged, kept)
        for part in self.inner.writers:
            tried = self._improved(best, part, kept)
            error = self.error(tried, self.judged, kept)
            if error < lowest:
                best, lowest = tried, error
        return replace(found, refitted=True) if best is start else self._narrowing(found, best, kept)

    def _improved(self, weights: Weights, part: Placement, kept: Tensor) -> Weights:
        """Return weights with one writer's rows changed, and a reader that goes with them."""
        tokens, low = self.fitted, weights.reader.to(self.dtype)
        slope, missing = tokens.x.new_empty(len(tokens), len(kept)), torch.empty_like(tokens.y)
        for at, pre in self._pre(weights.rows, tokens, kept):
            slope[at] = self.inner.slope(pre, part)
            missing[at] = tokens.y[at] - self.inner(pre) @ low - weights.shift.to(self.dtype)
        change = find_change(tokens, slope, missing, weights.reader, self.root)
        rows = {**weights.rows, part: self._rounded(weights.rows[part] + change, part)}
        return self._with_reader(rows, weights.reader, kept)

    def _with_reader(self, rows: Mapping[Placement, Tensor], reader: Tensor, kept: Tensor) -> Weights:
        """Return weights of some rows with the reader that gives the outputs best, by a ridge towards another."""
        sums = self._sums(rows, self.fitted, kept)
        return Weights(rows, sums, *self._solved(sums, reader))

    def _solved(self, sums: Sums, reader: Tensor) -> tuple[Tensor, Tensor]:
        """Return the reader that gives the outputs best, and what its bias grows by."""
        centred = self._bias(self.inner.reader) is not None
        best = sums.problem(reader, centred=centred).solve(torch.arange(len(reader), device=reader.device))
        solved = self._rounded(best, self.inner.reader)
        shift = (sums.outputs - solved.T @ sums.units) / sums.tokens
        return solved, shift if centred else torch.zeros_like(shift)

    def _sums(self, rows: Mapping[Placement, Tensor], tokens: Tokens, kept: Tensor) -> Sums:
        """Return the sums of the units that some rows give."""
        k, hidden = len(kept), tokens.y.shape[1]
        zeros = partial(torch.zeros, dtype=torch.float64, device=tokens.x.device)
        second, cross, units, outputs = zeros(k, k), zeros(k, hidden), zeros(k), zeros(hidden)
        for at, pre in self._pre(rows, tokens, kept):
            some = self.inner(pre).float()  # sums of less would be too rough to invert
            wanted = tokens.y[at].float()
            second += (some.T @ some).double()
            cross += (some.T @ wanted).double()
            units += some.double().sum(0)
            outputs += wanted.double().sum(0)
        return Sums(second, cross, units, outputs, tokens.energy * len(tokens), len(tokens))

    def error(self, weights: Weights, tokens: Tokens, kept: Tensor) -> float:
        """Return E‖y − ŷ‖² / E‖y‖²."""
        low, shift = weights.reader.to(self.dtype), weights.shift.to(self.dtype)
        missed = 0.0
        for at, pre in self._pre(weights.rows, tokens, kept):
            given = self.inner(pre) @ low + shift
            missed += float((tokens.y[at] - given).double().square().sum())
        return missed / len(tokens) / tokens.energy if tokens.energy else 0.0

    def _narrowing(self, found: Narrowing, weights: Weights, kept: Tensor) -> Narrowing:
        """Return what is stored of some weights, with a reader of all tokens."""
        sums = weights.sums
        if self.judged is not self.fitted:
            sums = sums + self._sums(weights.rows, self.judged, kept)
        reader, shift = self._solved(sums, weights.reader)
        centred = self._bias(self.inner.reader) is not None
        problem = sums.problem(reader, centred=centred)
        dtypes = {part: self._stored(part).dtype for part in self.inner.parts}
        bias = self._bias(self.inner.reader)
        return replace(
            found,
            reader=reader.to("cpu", dtypes[self.inner.reader]),
            bias=None if bias is None else (bias.double() + shift.cpu()).to(bias.dtype),
            relative_error=problem.error(torch.arange(len(reader), device=reader.device), reader),
            writers={part.role: rows.to("cpu", dtypes[part]) for part, rows in weights.rows.items()},
            refitted=True,
        )

    def _pre(
        self, rows: Mapping[Placement, Tensor], tokens: Tokens, kept: Tensor | None
    ) -> Iterator[tuple[slice, dict[Placement, Tensor]]]:
        """Yield chunks of tokens with each writer's pre-activations, (chunk, k), of all units or of those kept."""
        low = {part: values.T.to(self.dtype) for part, values in rows.items()}
        every = slice(None) if kept is None else kept
        biases = {part: bias for part in rows if (bias := self._bias(part)) is not None}
        added = {part: bias.to(tokens.x)[every] for part, bias in biases.items()}
        for at in tokens.chunks():
            pre = {part: tokens.x[at] @ low[part] for part in rows}
            yield at, {part: values + added[part] if part in added else values for part, values in pre.items()}

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


def _joined(parts: Iterable[tuple[Tensor, Tensor]]) -> Tokens:
    """Return the tokens of several batches as one."""
    x, y = zip(*parts, strict=True)
    return Tokens(torch.cat(x), torch.cat(y))


def _flat(rows: Tensor) -> Tensor:
    """Return inputs as (tokens, width)."""
    return rows.reshape(-1, rows.shape[-1])
