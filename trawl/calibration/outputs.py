"""Output moments: how much a loss depends on what each linear layer gives, beside the moments of what it reads.

A folder of moments may hold, for each kind, one safetensors file a block, sealed, with one tensor a slice, and
``KIND.json``, which is written last. With δ the gradient of the summed next-token cross-entropy of one window by the
layer's output, and W the slice as (outputs, inputs):

- ``kronecker``: E[δ δᵀ] over tokens, (n, n): the output factor of a Kronecker-factored Fisher matrix.
- ``fisher``: Σ_j E[(∂L/∂W_ij)²] over windows, (n,): the diagonal of the Fisher matrix, summed over each output's row.

Reference: Martens & Grosse 2015, arXiv:1503.05671; Hsu et al. 2022 (FWSVD), arXiv:2207.00112
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trawl.checkpoint import read_shard
from trawl.errors import CheckpointError, LoadError
from trawl.families import Placement
from trawl.recipe import OutputWeighting
from trawl.shards import sealed

FORMAT_VERSION = 1


def slice_name(placement: Placement) -> str:
    """Name a slice: its stored tensor, and the view that cuts it out."""
    return f"{placement.tensor}: {placement.view}"


def output_file(kind: OutputWeighting, block: int) -> str:
    """Name the file of one block."""
    return f"{kind}-{block:04d}.safetensors"


@dataclass(frozen=True, eq=False)
class OutputMoments:
    """Opened output moments of one kind.

    Attributes:
        path: the folder of moments.
        kind: ``fisher`` or ``kronecker``.
        identity: what they were made of, as the moments of the inputs say it.
        blocks: block by name of slice.
    """

    path: Path
    kind: OutputWeighting
    identity: Mapping[str, Any]
    blocks: Mapping[str, int]
    _files: dict[int, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def read(cls, path: Path, kind: OutputWeighting) -> OutputMoments | None:
        """Open a folder's output moments of one kind; None where it has none.

        Raises: LoadError: a file is damaged, or of another version of the format.
        Cost: reads headers.
        """
        record_file = path / f"{kind}.json"
        if not record_file.exists():
            return None
        try:
            record = json.loads(record_file.read_bytes())
            if record["format_version"] != FORMAT_VERSION:
                raise LoadError(
                    f"{record_file} is of format version {record['format_version']!r}; this trawl reads "
                    f"{FORMAT_VERSION}. Delete it and calibrate again"
                )
            blocks: dict[str, int] = record["blocks"]
            for block in set(blocks.values()):
                found = {info.name for info in read_shard(path / output_file(kind, block)).tensors}
                _check(found, {name for name, where in blocks.items() if where == block}, output_file(kind, block))
            return cls(path, kind, record["identity"], blocks)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, CheckpointError) as e:
            raise LoadError(f"{record_file} has damaged moments: {e}; delete it and calibrate again") from e

    def matrix(self, placement: Placement) -> Tensor | None:
        """Return what weighs the outputs of a slice in float32, (n, n) or its diagonal (n,); None without gradients.

        Raises: LoadError: a file cannot be read any more.
        """
        name = slice_name(placement)
        if name not in self.blocks:
            return None
        path = self.path / output_file(self.kind, self.blocks[name])
        try:
            if self.blocks[name] not in self._files:
                self._files[self.blocks[name]] = safe_open(path, framework="pt")
            found: Tensor = self._files[self.blocks[name]].get_tensor(name)
        except (OSError, SafetensorError) as e:
            raise LoadError(f"{path}: cannot read the moment of {name}: {e}") from e
        return found


def _check(found: set[str], wanted: set[str], file: str) -> None:
    """Raise ValueError unless a file holds what the record says."""
    if missing := sorted(wanted - found):
        raise ValueError(f"{file} has no moment of {missing[0]}")


def write_output_record(
    path: Path, kind: OutputWeighting, identity: Mapping[str, Any], blocks: Mapping[str, int]
) -> None:
    """Make block files in a folder of moments its output moments of one kind."""
    record = {
        "format_version": FORMAT_VERSION,
        "versions": {"trawl": version("trawl-llm"), "torch": torch.__version__},
        "identity": identity,
        "blocks": blocks,
    }
    with sealed(path / f"{kind}.json") as file:
        file.write((json.dumps(record, indent=1) + "\n").encode())
