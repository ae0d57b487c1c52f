"""Spectra of a checkpoint's matrices: where low rank costs little, as a table and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trawl.checkpoint import Checkpoint
from trawl.decompose import Spectrum, spectrum
from trawl.errors import PlanError
from trawl.families import ROLES, Placement
from trawl.observers import Observer, silent
from trawl.stacking import Stack, StoredSlices, scan

RANKS = (16, 64, 256)


@dataclass(frozen=True, eq=False)
class MatrixSpectrum:
    """The spectrum of one slice."""

    layer: int
    role: str
    shape: tuple[int, int]
    spectrum: Spectrum

    def to_json(self) -> dict[str, Any]:
        """Return the figures as JSON-able values."""
        return {
            "layer": self.layer,
            "role": self.role,
            "shape": list(self.shape),
            "stable_rank": self.spectrum.stable_rank,
            "effective_rank": self.spectrum.effective_rank,
            "energy": {str(rank): self.spectrum.energy_at(rank) for rank in RANKS},
            "singular_values": [float(value) for value in self.spectrum.values[: max(RANKS)]],
        }


def spectra(
    checkpoint: Checkpoint, placements: Sequence[Placement], *, seed: int = 0, observer: Observer = silent
) -> list[MatrixSpectrum]:
    """Measure the spectrum of every given slice, one at a time.

    Args:
        checkpoint: where they are stored.
        placements: which they are.
        seed: of the randomized sketch.
        observer: told of progress, in bytes.
    Returns: one entry per slice, in the given order.
    Raises: CheckpointError: a tensor holds NaN or Inf, or cannot be read.
    Cost: four reads of each matrix and O(inner hidden 256) time; memory for one sketch, (inner + hidden) 256 entries.
    """
    found = []
    total = sum(checkpoint.tensors[part.tensor].nbytes for part in placements)
    done = 0
    for part in placements:
        stack = Stack(f"{part.role}.{part.layer}", (part,))
        source = StoredSlices(checkpoint, stack, scan(checkpoint, part.tensor), torch.device("cpu"))
        found.append(MatrixSpectrum(part.layer, part.role, part.shape, spectrum(source, max(RANKS), seed)))
        done += checkpoint.tensors[part.tensor].nbytes
        observer("measuring spectra", done, total)
    return found


def plot(found: Sequence[MatrixSpectrum], path: Path, title: str) -> None:
    """Draw the decay of singular values per role, and the energy at rank 64 per layer and role.

    Args:
        found: what :func:`spectra` returned.
        path: the PNG to write.
        title: the model's name.
    Raises: PlanError: the extra ``plot`` is not installed.
    """
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 (an optional extra, probed where it is needed)
    except ImportError as e:
        raise PlanError("drawing spectra needs the extra: pip install 'trawl-llm[plot]'") from e
    roles = [role for role in ROLES if any(item.role == role for item in found)]
    layers = sorted({item.layer for item in found})
    figure = Figure(figsize=(13, 4.8), layout="constrained")
    decay, heat = figure.subplots(1, 2, width_ratios=(1, 1.25))
    for number, role in enumerate(roles):
        for item in (item for item in found if item.role == role):
            values = item.spectrum.values[: max(RANKS)]
            label = role if item.layer == layers[len(layers) // 2] else None
            width, alpha = (1.6, 1.0) if label else (0.5, 0.18)
            ranks = range(1, len(values) + 1)
            decay.plot(ranks, values / values[0], color=f"C{number}", linewidth=width, alpha=alpha, label=label)
    decay.set(xscale="log", yscale="log", xlabel="index", ylabel="singular value / largest")
    decay.set_title("decay (bold: the middle layer)")
    decay.legend(frameon=False, ncols=2)
    by_place = {(item.role, item.layer): item.spectrum.energy_at(64) for item in found}
    grid = [[by_place.get((role, layer), float("nan")) for layer in layers] for role in roles]
    image = heat.imshow(grid, aspect="auto", cmap="viridis", vmin=0, vmax=1)
    heat.set_yticks(range(len(roles)), roles)
    shown = range(0, len(layers), max(1, len(layers) // 16))
    heat.set_xticks(shown, [str(layers[n]) for n in shown])
    heat.set(xlabel="layer", title="share of energy at rank 64")
    figure.colorbar(image, ax=heat)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
