"""What is known of pieces: losses of all forms, damages of those that were measured, and where both are kept."""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize

from trawl.budget.curves import Point, Workshop
from trawl.budget.pieces import TRIAL_SHARES, Form, Piece, Structure
from trawl.calibration import Moments
from trawl.calibration.weights import DAMPING
from trawl.narrowing import Elimination
from trawl.shards import sealed

FORMAT_VERSION = 2  # the first counted whole factors
NOISE = 1e-6  # nats a token that no damage is taken to be under
UNKNOWN = 10.0  # nats a token, where no size that loses anything was measured: taken only if there is no other way
SLOPES = (0.5, 2.0)  # powers of the loss that damage is believed to go with
DENSE: Structure = "dense"

Key = tuple[Structure, tuple[int, ...]]


@dataclass(eq=False)
class Measured:
    """What is known of one piece.

    Attributes:
        piece: the piece.
        points: every form but the dense one, with its loss.
        damages: of the forms that were measured: mean and standard error, nats a token.
        probed: whether two sizes of each structure are measured, and not one.
        powers: of the loss that damage goes with, by structure, where one size was measured.
    """

    piece: Piece
    points: list[Point]
    damages: dict[Key, tuple[float, float]] = field(default_factory=dict)
    probed: bool = True
    powers: Mapping[Structure, float] = field(default_factory=dict)

    def only(self, structures: Container[Structure]) -> Measured:
        """Return what a search goes by: some structures, and the damages of their reference sizes.

        What other budgets had measured beside these stays out: what a search finds is not to depend on them.
        """
        order = [each for each in (*self.piece.structures, *self.piece.trials) if each in structures]
        points = [point for each in order for point in self.points if point.form.structure == each]
        part = Measured(self.piece, points, probed=self.probed, powers=self.powers)
        keys = {(point.form.structure, point.form.sizes) for point in part.references()}
        part.damages.update((key, damage) for key, damage in self.damages.items() if key in keys)
        return part

    def options(self) -> list[tuple[Form, float]]:
        """Return all forms with their predicted damages, the dense one first; a piece of two layers has none."""
        dense = [] if self.piece.members else [(Form(DENSE, (), self.piece.parameters), 0.0)]
        return [*dense, *((point.form, self.predict(point)) for point in self.points)]

    def predict(self, point: Point) -> float:
        """Return the damage of a form: as measured, or carried over from the measured sizes by its loss.

        Between measured sizes, and beyond them, damage goes with a power of the loss. A structure none of whose sizes
        was measured borrows from one whose loss is in the same unit.
        """
        form = point.form
        if (form.structure, form.sizes) in self.damages:
            return max(self.damages[form.structure, form.sizes][0], NOISE)
        structure = form.structure if self._known(form.structure) else "joint"
        return _carry(self._known(structure), point.loss, self.powers.get(structure, 1.0))

    def power(self, structure: Structure) -> float | None:
        """Return the power of the loss that damage goes with between measured sizes; None of one size or none."""
        known = self._known(structure)
        return _power(known[0], known[-1]) if len(known) > 1 else None

    def _known(self, structure: Structure) -> list[tuple[float, float]]:
        """Return losses and damages of a structure's measured sizes, by loss."""
        losses = {(point.form.structure, point.form.sizes): point.loss for point in self.points}
        found = [
            (losses[key], max(mean, NOISE))
            for key, (mean, _) in self.damages.items()
            if key[0] == structure and losses[key] > 0
        ]
        return sorted(found)

    def references(self) -> list[Point]:
        """Return the points that are measured: one size of each structure, where it might be chosen, or two."""
        found: list[Point] = []
        for structure in (*self.piece.structures, *self.piece.trials):
            points = [point for point in self.points if point.form.structure == structure]
            if not points or (structure == "single" and "joint" in self.piece.structures):
                continue
            shares = TRIAL_SHARES.get(structure, (0.85, 0.5) if self.probed else (0.7,))
            nearest = [_nearest(points, share * self.piece.parameters) for share in shares]
            found += {id(point): point for point in nearest}.values()
        return found


def _nearest(points: Sequence[Point], parameters: float) -> Point:
    return min(points, key=lambda point: abs(point.form.parameters - parameters))


def common_powers(probed: Sequence[Measured]) -> dict[tuple[str, ...], dict[Structure, float]]:
    """Return the powers of the loss that damage goes with, by the roles of a piece and by structure.

    Args:
        probed: pieces of which two sizes were measured.
    Returns: medians.
    """
    found: dict[tuple[str, ...], dict[Structure, list[float]]] = defaultdict(lambda: defaultdict(list))
    for one in probed:
        for structure in (*one.piece.structures, *one.piece.trials):
            if (power := one.power(structure)) is not None:
                found[one.piece.roles][structure].append(power)
    return {roles: {name: median(powers) for name, powers in each.items()} for roles, each in found.items()}


def _power(near: tuple[float, float], far: tuple[float, float]) -> float:
    """Return the power of the loss that goes from one (loss, damage) to another, within what is believed."""
    if far[0] <= near[0]:
        return 1.0
    return min(max(math.log(far[1] / near[1]) / math.log(far[0] / near[0]), SLOPES[0]), SLOPES[1])


def _carry(known: Sequence[tuple[float, float]], loss: float, power: float) -> float:
    """Return a damage by a power law through measured (loss, damage), ascending; of one by that power."""
    if loss <= 0:
        return 0.0
    if not known:
        return UNKNOWN
    if len(known) > 1:
        place = next((i for i in range(1, len(known) - 1) if loss < known[i][0]), len(known) - 1)
        known = known[place - 1 : place + 1]
        power = _power(*known)
    base, damage = min(known, key=lambda each: abs(math.log(loss / each[0])))
    return float(damage * (loss / base) ** power)


@dataclass(frozen=True, eq=False)
class Ledger:
    """Sealed files of what was measured: ``damage-PIECE.json``, and ``order-PIECE.safetensors`` of eliminated units.

    Attributes:
        folder: where they lie.
        identity: what they depend on; files of anything else are made anew.
    """

    folder: Path
    identity: Mapping[str, Any]

    @classmethod
    def of(cls, folder: Path, moments: Moments, windows: torch.Tensor) -> Ledger:
        """Open the ledger of what is measured with some moments, on some windows."""
        kind = moments.outputs.kind if moments.outputs else "none"
        digest = hashlib.sha256(windows.numpy().tobytes()).hexdigest()
        values = {"moments": moments.fingerprint, "outputs": kind, "damping": DAMPING, "windows": digest}
        return cls(folder, {"format_version": FORMAT_VERSION, **values})

    def load(self, piece: Piece) -> Measured | None:
        """Return what is known of a piece; None where that is nothing."""
        try:
            record = json.loads(self._path(piece).read_bytes())
            if record["identity"] != self._of(piece):
                return None
            points = [Point.from_json(values) for values in record["points"]]
            damages = {(name, tuple(sizes)): (mean, stderr) for name, sizes, mean, stderr in record["damages"]}
        except (OSError, ValueError, KeyError, TypeError):
            return None  # none, or torn: made anew
        return Measured(piece, points, damages)

    def save(self, measured: Measured) -> None:
        """Seal what is known of a piece."""
        record = {
            "identity": self._of(measured.piece),
            "points": [point.to_json() for point in measured.points],
            "damages": [[name, list(sizes), *damage] for (name, sizes), damage in measured.damages.items()],
        }
        with sealed(self._path(measured.piece)) as file:
            file.write(json.dumps(record).encode())

    def elimination(self, piece: Piece, workshop: Workshop) -> Elimination | None:
        """Return the order in which a piece's units are removed, worked out at its first use; None without units."""
        if piece.cut is None:
            return None
        path = self.folder / f"order-{piece.name}.safetensors"
        name = hashlib.sha256(json.dumps(self._of(piece), sort_keys=True).encode()).hexdigest()
        try:
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("identity") == name:
                    return Elimination(file.get_tensor("order"), file.get_tensor("costs"), piece.cut.units)
        except (OSError, SafetensorError):
            pass  # none, or torn: made anew
        found = workshop.elimination(piece)
        tensors = {"order": found.order.cpu(), "costs": found.costs.cpu()}
        with sealed(path) as file:
            file.write(serialize(tensors, metadata={"identity": name}))
        return Elimination(tensors["order"], tensors["costs"], found.count)

    def _path(self, piece: Piece) -> Path:
        return self.folder / f"damage-{piece.name}.json"

    def _of(self, piece: Piece) -> dict[str, Any]:
        return {**self.identity, "slices": [part.identity for part in piece.slices], "units": bool(piece.cut)}
