"""Curves: what each size of a piece loses, by the weighted error that its decomposition minimizes.

Losses of one piece's SVDs, joint, shared or single, are in one unit, E‖e‖² of its outputs as gradients weigh them, and
compare. Those of narrow FCs have a floor under the same weights in place of SVD's damping, and ridges, and those of
Tucker and CP are shares of the whole: each compares with its own kind only.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from trawl.budget.pieces import RANK_STEP, SMALLEST, TRIAL_SHARES, Form, Piece, Structure
from trawl.calibration import Moment, Moments
from trawl.calibration.weights import stack_weights
from trawl.checkpoint import Checkpoint
from trawl.decompose import SVD
from trawl.factors import Factors
from trawl.narrowing import Cut, Elimination, eliminate_units, narrow_stack, padded_tensors
from trawl.stacking import Stack, StoredSlices
from trawl.writing import DenseWriter, SquaredErrors

TRIAL_STEPS = 20  # shares of a piece that Tucker and CP are offered at
TINY = 1e-9  # relative error that no loss is taken to be under


@dataclass(frozen=True)
class Point:
    """A form with what it loses."""

    form: Form
    loss: float

    def to_json(self) -> dict[str, Any]:
        """Return the point as JSON-able values."""
        return {
            "structure": self.form.structure,
            "sizes": list(self.form.sizes),
            "parameters": self.form.parameters,
            "loss": self.loss,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Point:
        """Read back what :meth:`to_json` gave."""
        return cls(Form(values["structure"], tuple(values["sizes"]), values["parameters"]), values["loss"])


@dataclass(frozen=True, eq=False)
class Workshop:
    """Makes forms of pieces, and says what they lose.

    Attributes:
        checkpoint: the source.
        moments: that weigh the error.
        device: where to compute.
    """

    checkpoint: Checkpoint
    moments: Moments
    device: torch.device
    _fitted: dict[tuple[str, Form], dict[str, Factors]] = field(default_factory=dict, init=False)  # until they are used

    def curve(self, piece: Piece, structure: Structure, elimination: Elimination | None) -> list[Point]:
        """Return the sizes of a structure, ascending, each with its loss.

        Args:
            piece: the piece.
            structure: one of its structures.
            elimination: of its units, for ``narrow``.
        Cost: eigenvalues of one matrix of each stack's input, or nothing; of ``tucker`` and ``cp`` a decomposition for
            each of ``TRIAL_SHARES``.
        """
        if structure in ("tucker", "cp"):
            return self._fitted_curve(piece, structure)
        if structure != "narrow":
            return self._svd_curve(piece, structure)
        assert elimination is not None
        lost = elimination.costs.cumsum(0).tolist()
        return [Point(piece.narrow(width), lost[elimination.count - width - 1]) for width in piece.widths()]

    def elimination(self, piece: Piece) -> Elimination:
        """Return the order in which an FC's units are best removed, down to the smallest width.

        Cost: as :func:`trawl.narrowing.eliminate_units`.
        """
        assert piece.cut is not None
        cut = replace(piece.cut, keep=min(piece.widths()))
        return eliminate_units(self.checkpoint, cut, self._moment(cut), self.device, self._outputs(cut))

    def _moment(self, cut: Cut) -> Moment:
        """Return the moment of what an FC's units are read as."""
        moment = self.moments.input(cut.reader)
        assert moment is not None  # no piece has experts
        return moment

    def _outputs(self, cut: Cut) -> Tensor | None:
        """Return what weighs the outputs of an FC."""
        return self.moments.outputs.matrix(cut.reader) if self.moments.outputs else None

    def _svd_curve(self, piece: Piece, structure: Structure) -> list[Point]:
        """Give rank to the stack that gains most for its parameters, step by step, until it is dense at break-even."""
        stacks = piece.stacks(structure)
        spectra = [self._spectrum(stack) for stack in stacks]
        ranks = [min(RANK_STEP, len(spectrum)) for spectrum in spectra]

        def tail(number: int, rank: int) -> float:
            return float(spectra[number][rank:].sum()) if rank else 0.0

        def entries(number: int, rank: int) -> int:
            return SVD(rank).parameters(stacks[number].shape) if rank else stacks[number].parameters

        def following(number: int) -> int:
            rank = ranks[number] + RANK_STEP
            whole = rank > len(spectra[number]) or entries(number, rank) >= stacks[number].parameters
            return 0 if whole else rank

        def gain(number: int) -> tuple[float, int]:
            rank = following(number)
            cost = entries(number, rank) - entries(number, ranks[number])
            return (tail(number, rank) - tail(number, ranks[number])) / max(cost, 1), number

        queue = [gain(number) for number in range(len(stacks))]
        heapq.heapify(queue)
        points = []
        while queue:
            form = piece.decomposed(structure, ranks)
            if SMALLEST * piece.parameters <= form.parameters < piece.parameters:
                loss = sum(tail(number, rank) for number, rank in enumerate(ranks))
                points.append(Point(form, loss))
            _, number = heapq.heappop(queue)
            ranks[number] = following(number)
            if ranks[number]:
                heapq.heappush(queue, gain(number))
        return points

    def _fitted_curve(self, piece: Piece, structure: Structure) -> list[Point]:
        """Decompose to a few sizes; between them and beyond, the logarithm of the loss goes with the share kept."""
        known = []
        for share in TRIAL_SHARES[structure]:
            form = piece.of_share(structure, share)
            factors = self._fitted[piece.name, form] = self._factors(piece, form)
            (error,) = (each.weighted_error for each in factors.values())
            assert error is not None
            known.append((share, form, math.log(max(error, TINY)) * 2))
        (low, _, most), (high, _, least) = known[0], known[-1]
        slope = min((least - most) / (high - low), 0.0)
        points = [Point(form, math.exp(loss)) for _, form, loss in known]
        taken = {point.form.parameters for point in points}
        for step in range(math.ceil(SMALLEST * TRIAL_STEPS), TRIAL_STEPS):
            form = piece.of_share(structure, step / TRIAL_STEPS)
            if form.parameters not in taken and form.parameters < piece.parameters:
                taken.add(form.parameters)
                points.append(Point(form, math.exp(most + slope * (step / TRIAL_STEPS - low))))
        return sorted(points, key=lambda point: point.form.parameters)

    def _factors(self, piece: Piece, form: Form) -> dict[str, Factors]:
        """Decompose the stacks of a form."""
        found = {}
        for stack, method in piece.methods(form):
            if method:
                source = StoredSlices(self.checkpoint, stack, 1.0, self.device)
                made = method.decompose(source, weights=stack_weights(self.moments, stack))
                found[stack.name] = made.to(device="cpu")
        return found

    def _spectrum(self, stack: Stack) -> Tensor:
        """Return the squared weighted singular values of a matrix, descending, float64."""
        weights = stack_weights(self.moments, stack)
        matrix = next(StoredSlices(self.checkpoint, stack, 1.0, self.device).slices()).double()
        inner, hidden = weights.inner[0], weights.hidden[0]
        if matrix.shape[0] < matrix.shape[1]:
            matrix, inner, hidden = matrix.T, hidden, inner
        weighted = _times(inner, matrix)
        gram = matrix.T @ weighted
        root = _root(hidden, matrix)
        values = torch.linalg.eigvalsh(root.T @ ((gram + gram.T) / 2) @ root)
        found: Tensor = values.clamp_min_(0.0).flip(0).cpu()
        return found

    def tensors(self, piece: Piece, form: Form, elimination: Elimination | None) -> dict[str, Tensor]:
        """Return the stored tensors of a piece as a form computes them, in their old shapes.

        Args:
            piece: the piece.
            form: its form; units that are left out have zeros in what reads them.
            elimination: of its units, for ``narrow``.
        Cost: that of its decompositions.
        """
        if form.structure == "dense":
            return {}
        if form.structure == "narrow":
            return self._narrowed(piece, form.sizes[0], elimination)
        factors = self._fitted.pop((piece.name, form), None) or self._factors(piece, form)
        ones = dict.fromkeys(factors, 1.0)
        changed = tuple(stack for stack in piece.stacks(form.structure) if stack.name in factors)
        writer = DenseWriter(self.checkpoint, changed, factors.__getitem__, ones)
        names = dict.fromkeys(name for stack in changed for name in stack.tensors)
        return {name: writer.replaced(name, SquaredErrors()) for name in names}

    def _narrowed(self, piece: Piece, width: int, elimination: Elimination | None) -> dict[str, Tensor]:
        """Return the reader of an FC with zeros where units are left out, and its bias."""
        assert piece.cut is not None
        cut = replace(piece.cut, keep=width)
        found = narrow_stack(
            self.checkpoint,
            cut,
            self._moment(cut),
            self.device,
            outputs=self._outputs(cut),
            elimination=elimination,
        )
        return padded_tensors(self.checkpoint, cut, found)


def _times(metric: Tensor | None, matrix: Tensor) -> Tensor:
    """Multiply by a moment, its diagonal, or the identity."""
    if metric is None:
        return matrix
    metric = metric.to(matrix)
    return metric[:, None] * matrix if metric.dim() == 1 else metric @ matrix


def _root(metric: Tensor | None, matrix: Tensor) -> Tensor:
    """Return R with R Rᵀ = the moment of a matrix's columns."""
    if metric is None:
        return torch.eye(matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
    metric = metric.to(matrix)
    if metric.dim() == 1:
        return torch.diag(metric.clamp_min(0.0).sqrt())
    values, vectors = torch.linalg.eigh((metric + metric.T) / 2)
    root: Tensor = vectors * values.clamp_min(0.0).sqrt()
    return root
