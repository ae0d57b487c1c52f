"""Narrowing one stack, and its sealed file: which units stay, and the matrix that reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from trawl.calibration import Moment
from trawl.checkpoint import Checkpoint
from trawl.errors import CheckpointError, LoadError
from trawl.narrowing.cuts import Cut, bias_of
from trawl.narrowing.selection import Elimination, Problem, eliminate, make_problem, select_groups, weigh_outputs
from trawl.shards import sealed

FORMAT_VERSION = 3
WRITER = "writer."  # before the role, in names of tensors


@dataclass(frozen=True, eq=False)
class Narrowing:
    """What narrowing one stack came to.

    Attributes:
        kept: units, ascending.
        reader: what reads them, canonical (rows, hidden), in the stored dtype.
        bias: the new bias of the reader's outputs; None where the model has none.
        relative_error: √(E‖y − ŷ‖² / E‖y‖²) of the reader's outputs, of what is stored here.
        rounding_error: how far rounding to the stored dtype moved the reader, ‖R − R̂‖ / ‖R‖.
        writers: by role, rows of the kept units that are not those of the source, (kept, hidden), in the stored dtype.
    """

    kept: Tensor
    reader: Tensor
    bias: Tensor | None
    relative_error: float
    rounding_error: float
    writers: Mapping[str, Tensor] = field(default_factory=dict)

    def save(self, path: Path, metadata: Mapping[str, Any]) -> None:
        """Write one sealed file: it appears under ``path`` whole, by rename, or not at all."""
        header = {
            "format_version": FORMAT_VERSION,
            "relative_error": self.relative_error,
            "rounding_error": self.rounding_error,
            "metadata": dict(metadata),
        }
        tensors = {"kept": self.kept, "reader": self.reader.contiguous()}
        tensors |= {f"{WRITER}{role}": rows.contiguous() for role, rows in self.writers.items()}
        if self.bias is not None:
            tensors["bias"] = self.bias
        with sealed(path) as file:
            file.write(serialize(tensors, metadata={"trawl": json.dumps(header, sort_keys=True)}))

    @classmethod
    def load(cls, path: Path) -> Narrowing:
        """Read a file written by :meth:`save`.

        Raises: LoadError: the file is absent, truncated, or of another kind or format version.
        """
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {})["trawl"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            errors = float(header["relative_error"]), float(header["rounding_error"])
            writers = {name.removeprefix(WRITER): rows for name, rows in tensors.items() if name.startswith(WRITER)}
            found = cls(tensors["kept"], tensors["reader"], tensors.get("bias"), *errors, writers)
        except (OSError, SafetensorError, KeyError, ValueError) as e:
            raise LoadError(f"{path} is not a readable file of kept units: {e}; delete it and narrow again") from e
        if header.get("format_version") != FORMAT_VERSION:
            raise LoadError(
                f"{path} has format version {header['format_version']!r}; this trawl reads {FORMAT_VERSION}"
            )
        return found


def narrow_stack(
    checkpoint: Checkpoint,
    cut: Cut,
    moment: Moment,
    device: torch.device,
    *,
    target: Tensor | None = None,
    outputs: Tensor | None = None,
    elimination: Elimination | None = None,
) -> Narrowing:
    """Choose the units of one stack that stay, and refit what reads them.

    Args:
        checkpoint: the source.
        cut: the stack.
        moment: of what its reader reads.
        device: where to compute.
        target: a matrix (rows, hidden) whose outputs are wanted in place of the stored one's.
        outputs: what weighs the reader's outputs where units are chosen, (hidden, hidden) or its diagonal.
        elimination: the order in which single units are removed, where it is known already.
    Returns: the result, on the CPU; its errors are of what the stored matrix gives.
    Raises: CheckpointError: the refitted matrix does not fit the stored dtype.
    Cost: as :func:`trawl.narrowing.selection.eliminate`.
    """
    reader = cut.reader
    stored = checkpoint.read(reader.tensor)
    bias_name = bias_of(checkpoint, reader.tensor)
    problem = _problem(checkpoint, cut, moment, device)
    aim = problem.stored if target is None else target.to(device)
    wanted = replace(problem, cross=problem.second @ aim)
    groups = cut.units < reader.shape[0]
    judged = wanted if outputs is None else weigh_outputs(wanted, outputs.to(device))
    if groups:
        kept = select_groups(judged, cut.units, cut.keep)
    else:
        kept = (elimination or eliminate(judged, cut.keep)).kept(cut.keep)
    rows = cut.rows(reader, kept.cpu()).to(device)
    exact = wanted.solve(rows)
    written = exact.to(stored.dtype)
    if not torch.isfinite(written).all():
        raise CheckpointError(
            f"stack {cut.stack.name}: the refitted {reader.tensor} does not fit its stored dtype {stored.dtype}; keep "
            "more units, or start from a checkpoint stored in bfloat16 or float32"
        )
    bias = None
    if bias_name:
        old = checkpoint.read(bias_name)
        mean = moment.mean.to(device)
        change = aim.T @ mean - written.double().T @ mean[rows]
        bias = (old.double() + change.cpu()).to(old.dtype)
    norm = float(exact.norm())
    rounding = float((written.double() - exact).norm()) / norm if norm else 0.0
    error = problem.error(rows, written.double())
    return Narrowing(kept.cpu(), written.cpu(), bias, error, rounding)


def eliminate_units(
    checkpoint: Checkpoint, cut: Cut, moment: Moment, device: torch.device, outputs: Tensor | None = None
) -> Elimination:
    """Return the order in which the units of one stack are best removed, down to what the cut keeps.

    Args:
        checkpoint: the source.
        cut: the stack; single neurons are its units.
        moment: of what its reader reads.
        device: where to compute.
        outputs: what weighs the reader's outputs, (hidden, hidden) or its diagonal.
    Cost: as :func:`trawl.narrowing.selection.eliminate`.
    """
    problem = _problem(checkpoint, cut, moment, device)
    return eliminate(problem if outputs is None else weigh_outputs(problem, outputs.to(device)), cut.keep)


def padded_tensors(checkpoint: Checkpoint, cut: Cut, found: Narrowing) -> dict[str, Tensor]:
    """Return what changes of a stack in its old shapes, by stored name: zeros in the reader for units left out.

    With all else as it was, the layer computes what the narrow one does.
    """
    changed: dict[str, Tensor] = {}
    for part in cut.stack.slices:
        values = found.reader if part is cut.reader else found.writers.get(part.role)
        if values is None:
            continue
        stored = changed.setdefault(part.tensor, checkpoint.read(part.tensor).clone())
        canonical = part.view.apply(stored).clone()
        if part is cut.reader:
            canonical.zero_()
        canonical[cut.rows(part, found.kept)] = values
        part.view.scatter(canonical, stored)
    name = bias_of(checkpoint, cut.reader.tensor)
    return changed | ({name: found.bias} if name and found.bias is not None else {})


def _problem(checkpoint: Checkpoint, cut: Cut, moment: Moment, device: torch.device) -> Problem:
    """Return the least-squares problem of what a stack's reader puts out, centred where it has a bias."""
    reader = cut.reader
    matrix = reader.view.apply(checkpoint.read(reader.tensor)).to(device)
    mean = moment.mean.to(device) if bias_of(checkpoint, reader.tensor) else None
    return make_problem(matrix, moment.matrix.to(device), mean=mean)
