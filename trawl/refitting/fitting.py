"""One narrowed FC: its tokens, the units that stay, and the rows and the reader that give its outputs best."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial

import torch
from torch import Tensor

from trawl.calibration.block import Batch, importance
from trawl.calibration.gathering import MomentSum
from trawl.checkpoint import Checkpoint
from trawl.errors import CheckpointError
from trawl.families import Placement
from trawl.narrowing import Cut, Narrowing
from trawl.narrowing.cuts import bias_of, positions
from trawl.narrowing.selection import RIDGE, Problem, eliminate, make_problem, root_of, weigh_outputs
from trawl.refitting.inner import InnerFunction
from trawl.refitting.solving import Linearised, Tokens

JUDGED = 16  # one batch in so many is not fitted to, but says whether what was fitted is better
SAMPLE = 64  # tokens on which units are shown to stand alone
RIDGES = (RIDGE, 0.1, 0.3, 1.0)  # of the reader, of which the tokens that judge choose
REPAIRED = 0.5  # share of what the stream misses that an FC is to give on top: more of it follows noise


def judging(batches: int) -> set[int]:
    """Return which of some batches judge: one in sixteen, the last one at least."""
    return set(range(JUDGED - 1, batches, JUDGED)) or {batches - 1}


@dataclass(frozen=True, eq=False)
class Sums:
    """Over some tokens by their weights, float64: Σ a aᵀ, Σ a yᵀ, Σ a, Σ y, Σ ‖y‖² and Σ 1 of units a and outputs y."""

    second: Tensor
    cross: Tensor
    units: Tensor
    outputs: Tensor
    energy: float
    count: float

    def __add__(self, other: Sums) -> Sums:
        return Sums(*(getattr(self, item.name) + getattr(other, item.name) for item in fields(self)))

    def problem(self, reader: Tensor, ridge: float, *, centred: bool) -> Problem:
        """Return the least-squares problem of the reader, whose ridge draws to another one."""
        second, cross, energy = self.second / self.count, self.cross / self.count, self.energy / self.count
        if not centred:
            return make_problem(reader, second, cross, energy, ridge=ridge)
        units, outputs = self.units / self.count, self.outputs / self.count
        cross, energy = cross - torch.outer(units, outputs), energy - float(outputs.square().sum())
        return make_problem(reader, second, cross, energy, units, ridge=ridge)


@dataclass(frozen=True, eq=False)
class Weights:
    """What a narrowed FC computes with.

    Attributes:
        rows: of each writer, those of the units that stay, (k, hidden) float64 of values that the stored dtype has.
        sums: of the units that these rows give, over the tokens that are fitted to.
        reader: D, (k, hidden) float64, likewise.
        shift: what the reader's bias grows by, (hidden,) float64; zero where the FC has none.
        towards: the reader that a ridge draws to, (k, hidden) float64.
        ridge: how much, of each unit's own second moment.
        error: E‖y − ŷ‖² / E‖y‖² over the tokens that judge.
    """

    rows: Mapping[Placement, Tensor]
    sums: Sums
    reader: Tensor
    shift: Tensor
    towards: Tensor
    ridge: float
    error: float


@dataclass(eq=False)
class Refit:
    """One FC that is narrowed and refitted.

    Attributes:
        checkpoint: the source.
        cut: how much stays.
        inner: its code, in a block that is in memory.
        dtype: what products are formed in.
        outputs: G, what a miss of its outputs counts by, (hidden, hidden) or its diagonal; None for all alike.
    """

    checkpoint: Checkpoint
    cut: Cut
    inner: InnerFunction
    dtype: torch.dtype
    outputs: Tensor | None
    fitted: Tokens = field(init=False)
    judged: Tokens = field(init=False)
    second: Tensor = field(init=False)  # E[a aᵀ] of all units
    mean: Tensor = field(init=False)  # E[a]

    @torch.no_grad()
    def read(self, batches: Sequence[Batch], behind: Sequence[Batch] | None) -> None:
        """Run batches through the block, and keep what the FC reads and is to give.

        Args:
            batches: what enters the block.
            behind: what leaves it in the original model, for an FC whose outputs are added to that: it is to give half
                of what they miss of it on top, and a token counts by :func:`trawl.calibration.block.importance`.
        Raises: CheckpointError: NaN or Inf comes up.
        """
        names, reader = self.inner.names, self.inner.reader
        matrix = self._stored(reader).to(batches[0].hidden.device, self.dtype)
        sums, mean = MomentSum.of_width(len(matrix), matrix.device), matrix.new_zeros(len(matrix), dtype=torch.float64)
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        for number, batch in enumerate(batches):
            seen: dict[str, Tensor] = {}
            left = self.inner.run(batch, seen.__setitem__)
            x, units = (seen[names[part]].flatten(0, -2) for part in (self.inner.writers[0], reader))
            y, weight = units.to(self.dtype) @ matrix, x.new_ones(len(x), 1)
            if behind is not None:
                wanted = behind[number].hidden.flatten(0, -2)
                weight = importance(wanted)
                y = (y + REPAIRED * (wanted - left.hidden.flatten(0, -2))).to(self.dtype)
            sums.add(weight.sqrt() * units)
            mean += (weight * units).double().sum(0)
            parts.append((x.to(self.dtype), y, weight))
        judges = judging(len(parts))
        fitted = [part for number, part in enumerate(parts) if number not in judges]
        self.judged = _joined(part for number, part in enumerate(parts) if number in judges)
        self.fitted = _joined(fitted) if fitted else self.judged
        if not all(bool(torch.isfinite(tokens.y).all()) for tokens in (self.fitted, self.judged)):
            raise CheckpointError(
                f"layer {self.inner.block.number} gives NaN or Inf on the calibration text; check its weights"
            )
        count = sum(float(weight.double().sum()) for _, _, weight in parts)
        self.second, self.mean = sums.matrix() * (sums.tokens / count), mean / count

    @torch.no_grad()
    def solve(self) -> Narrowing:
        """Return the units that stay, with changed writers where these are better, and the reader that goes with them.

        Raises: CheckpointError: what was fitted does not fit the stored dtype. PlanError: units depend on one another.
        """
        stored = {part: self._stored(part).to(self.fitted.x.device, torch.float64) for part in self.inner.parts}
        kept = self._select(stored[self.inner.reader])
        writers = {part: stored[part] for part in self.inner.writers}
        sample = Tokens(*(each[:SAMPLE] for each in (self.fitted.x, self.fitted.y, self.fitted.weight)))
        for _, pre in self._pre(writers, sample, None):
            self.inner.check(pre, kept)
        rows = {part: values[kept] for part, values in writers.items()}
        best = self._with_reader(rows, stored[self.inner.reader][kept], kept)
        tried = self._improved(best, kept)
        if tried.error < best.error:
            best = tried
        return self._narrowing(best, kept, [part for part in rows if best.rows[part] is not rows[part]])

    def _select(self, reader: Tensor) -> Tensor:
        """Return the units that stay, by what the FC itself computes."""
        mean = self.mean if self._bias(self.inner.reader) is not None else None
        problem = make_problem(reader, self.second.to(reader.device), mean=mean)
        if self.outputs is not None:
            problem = weigh_outputs(problem, self.outputs.to(reader.device))
        return eliminate(problem, self.cut.keep).kept(self.cut.keep)

    def _improved(self, weights: Weights, kept: Tensor) -> Weights:
        """Return weights with the writers' rows changed, and a reader that goes with them."""
        tokens, low, shift = self.fitted, weights.reader.to(self.dtype), weights.shift.to(self.dtype)
        root = None if self.outputs is None else root_of(self.outputs.to(tokens.x.device))
        problem = Linearised(weights.reader, root, self.dtype)
        for at, pre in self._pre(weights.rows, tokens, kept):
            units, slopes = self.inner.slopes(pre)
            missing = (tokens.y[at] - units @ low - shift) * tokens.root[at]
            problem.add(tokens.x[at], [slope * tokens.root[at] for slope in slopes], missing)
        changed = zip(self.inner.writers, problem.changes(), strict=True)
        rows = {part: self._rounded(weights.rows[part] + change, part) for part, change in changed}
        return self._with_reader(rows, weights.reader, kept)

    def _with_reader(self, rows: Mapping[Placement, Tensor], reader: Tensor, kept: Tensor) -> Weights:
        """Return weights of some rows with the reader that gives the outputs best, by a ridge towards another.

        The reader is fitted to one part of the text, and of several ridges the one stays that is best on the other.
        """
        sums = self._sums(rows, self.fitted, kept)
        tried = []
        for ridge in RIDGES:
            solved = self._rounded(self._solved(sums, reader, ridge), self.inner.reader)
            shift = self._shift(sums, solved)
            error = self._error(rows, solved, shift, kept)
            tried.append(Weights(rows, sums, solved, shift, reader, ridge, error))
        return min(tried, key=lambda weights: weights.error)

    def _solved(self, sums: Sums, reader: Tensor, ridge: float) -> Tensor:
        """Return the reader that gives the outputs best."""
        problem = sums.problem(reader, ridge, centred=self._bias(self.inner.reader) is not None)
        return problem.solve(torch.arange(len(reader), device=reader.device))

    def _shift(self, sums: Sums, reader: Tensor) -> Tensor:
        """Return what the reader's bias grows by."""
        shift = (sums.outputs - reader.T @ sums.units) / sums.count
        return torch.zeros_like(shift) if self._bias(self.inner.reader) is None else shift

    def _sums(self, rows: Mapping[Placement, Tensor], tokens: Tokens, kept: Tensor) -> Sums:
        """Return the sums of the units that some rows give."""
        k, hidden = len(kept), tokens.y.shape[1]
        zeros = partial(torch.zeros, dtype=torch.float64, device=tokens.x.device)
        second = MomentSum.of_width(k, tokens.x.device)
        cross, units, outputs = zeros(k, hidden), zeros(k), zeros(hidden)
        for at, pre in self._pre(rows, tokens, kept):
            root = tokens.weight[at].sqrt()
            some = self.inner(pre).float() * root  # sums of less would be too rough to invert
            wanted = tokens.y[at].float() * root
            second.add(some)
            cross += (some.T @ wanted).double()
            units += (some * root).double().sum(0)
            outputs += (wanted * root).double().sum(0)
        whole = second.matrix(torch.float64, tokens.x.device) * second.tokens
        return Sums(whole, cross, units, outputs, tokens.energy * tokens.count, tokens.count)

    def _error(self, rows: Mapping[Placement, Tensor], reader: Tensor, shift: Tensor, kept: Tensor) -> float:
        """Return E‖y − ŷ‖² / E‖y‖² over the tokens that judge, all outputs alike."""
        tokens, low, added = self.judged, reader.to(self.dtype), shift.to(self.dtype)
        missed = 0.0
        for at, pre in self._pre(rows, tokens, kept):
            off = tokens.y[at] - (self.inner(pre) @ low + added)
            missed += float((tokens.weight[at] * off.float().square()).double().sum())
        return missed / tokens.count / tokens.energy if tokens.energy else 0.0

    def _narrowing(self, weights: Weights, kept: Tensor, changed: Sequence[Placement]) -> Narrowing:
        """Return what is stored of some weights, with a reader of all tokens."""
        sums = weights.sums
        if self.judged is not self.fitted:
            sums = sums + self._sums(weights.rows, self.judged, kept)
        exact = self._solved(sums, weights.towards, weights.ridge)
        reader, norm = self._rounded(exact, self.inner.reader), float(exact.norm())
        bias = self._bias(self.inner.reader)
        problem = sums.problem(reader, weights.ridge, centred=bias is not None)
        dtypes = {part: self._stored(part).dtype for part in self.inner.parts}
        return Narrowing(
            kept=kept.cpu(),
            reader=reader.to("cpu", dtypes[self.inner.reader]),
            bias=None if bias is None else (bias.double() + self._shift(sums, reader).cpu()).to(bias.dtype),
            relative_error=problem.error(torch.arange(len(reader), device=reader.device), reader),
            rounding_error=float((reader - exact).norm()) / norm if norm else 0.0,
            writers={part.role: weights.rows[part].to("cpu", dtypes[part]) for part in changed},
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
                "keep more units, or pass --no-refit"
            )
        return rounded.double()


def _joined(parts: Iterable[tuple[Tensor, Tensor, Tensor]]) -> Tokens:
    """Return the tokens of several batches as one."""
    return Tokens(*(torch.cat(each) for each in zip(*parts, strict=True)))
