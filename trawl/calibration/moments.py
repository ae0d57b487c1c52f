"""Moments: E[x xᵀ] of what enters each linear layer, as they lie in a folder; read on demand, no model code.

The folder holds one safetensors file a block, sealed, with ``NAME.matrix`` (n, n) float32 and ``NAME.mean`` (n,)
float64; one more with the moment of what the head multiplies and, as a diagonal (n,), how often each token occurs; and
``moments.json``, which is written last: without it there are no moments.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trawl.calibration.outputs import OutputMoments
from trawl.checkpoint import Checkpoint, read_shard
from trawl.errors import CheckpointError, LoadError, PlanError
from trawl.families import Placement
from trawl.recipe import Compute, OutputWeighting
from trawl.shards import sealed
from trawl.views import parse

FORMAT_VERSION = 1
RECORD = "moments.json"
TOKENS, HEAD = "tokens", "head"  # moments of what the embeddings and the head are multiplied by, in a file of their own


def expert_of(placement: Placement) -> int:
    """Return which expert of a tensor that holds them all, on its first axis, a slice is."""
    experts = parse(placement.view.stored)[0][0]
    return next(start for axis, start, _ in placement.view.take if axis == experts)


def block_name(number: int) -> str:
    """Name the file of one block."""
    return f"block-{number:04d}.safetensors"


@dataclass(frozen=True)
class Identity:
    """What moments were made of.

    Attributes:
        model: fingerprint of the checkpoint.
        text: what the text was called.
        text_sha256: digest of the text.
        tokens_sha256: digest of the windows' token ids, which text and tokenizer decide.
        windows: how many.
        length: tokens of each.
        compute: what products were formed in.
    """

    model: str
    text: str
    text_sha256: str
    tokens_sha256: str
    windows: int
    length: int
    compute: Compute = "float32"

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides the moments but the text's name."""
        values = {**asdict(self), "text": "", "format_version": FORMAT_VERSION}
        if self.compute == "float32":
            del values["compute"]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    def difference(self, other: Identity) -> str:
        """Say in words in what another identity differs; empty where it does not."""
        if self.model != other.model:
            return "another model"
        if self.text_sha256 != other.text_sha256:
            return f"another text ({self.text}, not {other.text})"
        if (self.windows, self.length) != (other.windows, other.length):
            return f"{self.windows} windows of {self.length} tokens, not {other.windows} of {other.length}"
        if self.compute != other.compute:
            return f"products in {self.compute}, not {other.compute}"
        return "another tokenizer" if self.tokens_sha256 != other.tokens_sha256 else ""


@dataclass(frozen=True)
class MomentInfo:
    """Where one moment lies.

    Attributes:
        block: counted from 0.
        name: of the weight that was first given this input, in the block.
        width: n.
        tokens: that were seen.
        diagonal: whether only the diagonal is kept, all other entries being zero.
    """

    block: int
    name: str
    width: int
    tokens: int
    diagonal: bool = False


@dataclass(frozen=True, eq=False)
class Moment:
    """Moments of one input, mean over tokens and not centred.

    Attributes:
        matrix: E[x xᵀ], (n, n) symmetric, float32; its diagonal (n,) for tokens.
        mean: E[x], (n,) float64.
        tokens: that were seen; an expert sees those that are routed to it.
    """

    matrix: Tensor
    mean: Tensor
    tokens: int


@dataclass(frozen=True, eq=False)
class Moments:
    """An opened folder of moments.

    Attributes:
        path: the folder.
        identity: what they were made of.
        infos: moments by name.
        inputs: names of moments by stored tensor: one, or one an expert, empty for an expert that saw no token.
        outputs: moments of gradients, where the outputs are to be weighted by them.
    """

    path: Path
    identity: Identity
    infos: Mapping[str, MomentInfo]
    inputs: Mapping[str, tuple[str, ...]]
    outputs: OutputMoments | None = None
    _files: dict[int, Any] = field(default_factory=dict, repr=False)

    @property
    def fingerprint(self) -> str:
        """What the moments depend on."""
        return self.identity.fingerprint

    @property
    def tokens(self) -> int:
        """Tokens of the calibration text."""
        return self.identity.windows * self.identity.length

    @classmethod
    def open(cls, path: Path | str, checkpoint: Checkpoint, output_weighting: OutputWeighting = "none") -> Moments:
        """Open the moments of a checkpoint.

        Args:
            path: a folder that a calibration made.
            checkpoint: the model that they are to be of.
            output_weighting: which moments of gradients are to be there beside those of the inputs.
        Raises: PlanError: there are none, or they are of another model. LoadError: a file is damaged, or of another
            version of the format.
        Cost: reads headers.
        """
        moments = cls.read(Path(path))
        if moments.identity.model != checkpoint.fingerprint:
            raise PlanError(
                f"the moments in {path} are of another model than {checkpoint.origin} (fingerprint "
                f"{moments.identity.model[:12]}, not {checkpoint.fingerprint[:12]}); make its own with --calibrate TEXT"
            )
        if output_weighting == "none":
            return moments
        outputs = OutputMoments.read(moments.path, output_weighting)
        if outputs is None or outputs.identity != asdict(moments.identity):
            raise PlanError(
                f"the moments in {path} have none of gradients, which output weighting {output_weighting!r} needs; add "
                f"them with --calibrate and the text that they were made of ({moments.identity.text}), or leave "
                "--output-weighting out"
            )
        return replace(moments, outputs=outputs)

    @classmethod
    def read(cls, path: Path) -> Moments:
        """Open moments of whatever model.

        Raises: PlanError: there are none. LoadError: as :meth:`open`.
        """
        try:
            record = json.loads((path / RECORD).read_bytes())
            if record["format_version"] != FORMAT_VERSION:
                raise LoadError(
                    f"{path} has moments of format version {record['format_version']!r}; this trawl reads "
                    f"{FORMAT_VERSION}. Make them again with --calibrate TEXT"
                )
            moments = cls(
                path,
                Identity(**record["identity"]),
                {name: MomentInfo(**info) for name, info in record["moments"].items()},
                {tensor: tuple(names) for tensor, names in record["inputs"].items()},
            )
            for block in sorted({info.block for info in moments.infos.values()}):
                moments._check(read_shard(path / block_name(block)).tensors, block)
        except FileNotFoundError as e:
            if Path(e.filename).name != RECORD:
                raise LoadError(
                    f"{path} is incomplete: no {Path(e.filename).name}; delete it and calibrate again"
                ) from e
            raise PlanError(f"{path} holds no moments (no {RECORD}); make them with --calibrate TEXT") from e
        except (OSError, ValueError, KeyError, TypeError, AttributeError, CheckpointError) as e:
            raise LoadError(f"{path} has damaged moments: {e}; delete it and calibrate again") from e
        return moments

    def _check(self, tensors: Any, block: int) -> None:
        """Compare a block's file with what the record says."""
        shapes = {info.name: (info.dtype, info.shape) for info in tensors}
        for info in self.infos.values():
            shape = (info.width,) if info.diagonal else (info.width, info.width)
            wanted = (("F32", shape), ("F64", (info.width,)))
            found = tuple(shapes.get(f"{info.name}.{part}") for part in ("matrix", "mean"))
            if info.block == block and found != wanted:
                raise ValueError(f"{block_name(block)} has {found} for {info.name}; expected {wanted}")

    def key(self, placement: Placement) -> str:
        """Return the name of the moment of what a slice is multiplied by; empty for an expert that saw no token.

        Raises: PlanError: nothing was ever multiplied by its tensor.
        """
        names = self.names(placement)
        return names[0] if len(names) == 1 else names[expert_of(placement)]

    def names(self, placement: Placement) -> tuple[str, ...]:
        """Return the names of all moments of what a stored tensor is multiplied by.

        Raises: PlanError: nothing was ever multiplied by it.
        """
        if placement.tensor not in self.inputs:
            layer = f" of layer {placement.layer}" if placement.layer >= 0 else ""
            raise PlanError(
                f"the moments in {self.path} know nothing of {placement.tensor} (role {placement.role}{layer}): the "
                "calibration text never passed through it; leave it out of --roles or --layers"
            )
        return self.inputs[placement.tensor]

    def moment(self, key: str) -> Moment:
        """Return a moment by its name, mapped from its file.

        Raises: LoadError: the file cannot be read any more.
        """
        info = self.infos[key]
        try:
            if info.block not in self._files:
                self._files[info.block] = safe_open(self.path / block_name(info.block), framework="pt")
            file = self._files[info.block]
            return Moment(file.get_tensor(f"{info.name}.matrix"), file.get_tensor(f"{info.name}.mean"), info.tokens)
        except (OSError, SafetensorError) as e:
            raise LoadError(f"{self.path / block_name(info.block)}: cannot read the moment of {info.name}: {e}") from e

    def input(self, placement: Placement) -> Moment | None:
        """Return the moment of what a slice is multiplied by; None for an expert that saw no token.

        Raises: PlanError: nothing was ever multiplied by its tensor. LoadError: a file cannot be read any more.
        """
        key = self.key(placement)
        return self.moment(key) if key else None

    def __str__(self) -> str:
        """Say what they are, for a plan."""
        kinds = f" and gradients ({self.outputs.kind})" if self.outputs else ""
        text = f"{self.tokens:,} tokens of {self.identity.text}"
        return f"the error is weighed by moments{kinds} of {text}, from {self.path}"

    def to_json(self) -> dict[str, Any]:
        """Return what a record of a run says of them."""
        kind = self.outputs.kind if self.outputs else "none"
        return {
            **asdict(self.identity),
            "fingerprint": self.fingerprint,
            "tokens": self.tokens,
            "output_weighting": kind,
        }


def write_record(
    path: Path, identity: Identity, infos: Mapping[str, MomentInfo], inputs: Mapping[str, tuple[str, ...]]
) -> None:
    """Make a folder of block files one of moments."""
    record = {
        "format_version": FORMAT_VERSION,
        "versions": {"trawl": version("trawl-llm"), "torch": torch.__version__},
        "identity": asdict(identity),
        "moments": {name: asdict(info) for name, info in infos.items()},
        "inputs": inputs,
    }
    with sealed(path / RECORD) as file:
        file.write((json.dumps(record, indent=1) + "\n").encode())
