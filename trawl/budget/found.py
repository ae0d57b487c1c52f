"""What a search came to, and what ``search.json`` says of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from trawl.budget.ledger import FORMAT_VERSION
from trawl.budget.pieces import Form, Piece
from trawl.recipe import Recipe


@dataclass(frozen=True)
class Found:
    """What a search came to.

    Attributes:
        recipe: with parts, or plain.
        chosen: the form of each piece, with its predicted damage where there was a choice.
        real: damage of all together, as measured, nats a token.
        stderr: of that, over windows.
    """

    recipe: Recipe
    chosen: tuple[tuple[Piece, Form, float | None], ...]
    real: float = math.nan
    stderr: float = math.nan

    @property
    def predicted(self) -> float | None:
        """Damage of all together: the sum of the pieces'; None where nothing was predicted."""
        known = [damage for *_, damage in self.chosen if damage is not None]
        return sum(known) if len(known) == len(self.chosen) else None

    @property
    def kept(self) -> float:
        """Share of the pieces' parameters that stays."""
        after = sum(form.parameters for _, form, _ in self.chosen)
        return after / sum(piece.parameters for piece, _, _ in self.chosen)

    def to_json(self) -> dict[str, Any]:
        """Return what ``search.json`` says."""
        return {
            "format_version": FORMAT_VERSION,
            "predicted_damage": self.predicted,
            "real_damage": self.real,
            "real_damage_stderr": self.stderr,
            "kept": self.kept,
            "pieces": [entry for chosen in self.chosen for entry in _entries(*chosen)],
        }


def _entries(piece: Piece, form: Form, damage: float | None) -> list[dict[str, Any]]:
    """Return what ``search.json`` says of a piece: an entry for each layer, with equal shares of what is common."""
    count = len(piece.covers)
    return [
        {
            "name": name,
            "layer": layer,
            "roles": list(dict.fromkeys(part.role for part in piece.slices)),
            "structure": form.structure,
            "sizes": list(form.sizes),
            "parameters_before": piece.parameters // count,
            "parameters_after": form.parameters // count + (number < form.parameters % count),
            "predicted_damage": None if damage is None else damage / count,
        }
        for number, (name, layer) in enumerate(zip(piece.covers, piece.layers, strict=True))
    ]
