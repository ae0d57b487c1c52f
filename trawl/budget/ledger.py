"""What is known of pieces: losses of all forms, damages of those that were measured, and where both are kept."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
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
    """

    piece: Piece
    points: list[Point]
    damages: dict[Key, tuple[float, float]] = field(default_factory=dict)

    def only(self, structures: Container[Structure]) -> Measured:
        """Return what a search goes by: some structures, and the damages of their reference sizes.

        What other budgets had measured beside these stays out: what a search finds is not to depend on them.
        """
        order = [each for each in (*self.piece.structures, *self.piece.trials) if each in structures]
        part = Measured(self.piece, [point for each in order for point in self.points if point.form.structure == each])
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
        known = self._known(form.structure) or self._known("joint")
        return _carry(known, point.loss)

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
        """Return the points that are measured: one or two sizes of each structure, where it might be chosen."""
        found: list[Point] = []
        for structure in (*self.piece.structures, *self.piece.trials):
            points = [point for point in self.points if point.form.structure == structure]
            if not points or (structure == "single" and "joint" in self.piece.structures):
                continue
            shares: tuple[float, ...] = (0.85, 0.5) if self.piece.cut is None or structure == "narrow" else (0.6,)
            shares = TRIAL_SHARES.get(structure, shares)
            nearest = [_nearest(points, share * self.piece.parameters) for share in shares]
            found += {id(point): point for point in nearest}.values()
        return found


def _nearest(points: Sequence[Point], parameters: float) -> Point:
    return min(points, key=lambda point: abs(point.form.parameters - parameters))


def _carry(known: Sequence[tuple[float, float]], loss: float) -> float:
    """Return a damage by a power law through measured (loss, damage), ascending."""
    if loss <= 0:
        return 0.0
    if not known:
        return UNKNOWN
    if len(known) == 1:
        return known[0][1] * loss / known[0][0]
    place = next((i for i in range(1, len(known) - 1) if loss < known[i][0]), len(known) - 1)
    (near, low), (far, high) = known[place - 1], known[place]
    power = math.log(high / low) / math.log(far / near) if far > near else 1.0
    power = min(max(power, SLOPES[0]), SLOPES[1])
    base, damage = (near, low) if abs(math.log(loss / near)) < abs(math.log(loss / far)) else (far, high)
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
