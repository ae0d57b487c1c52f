"""Checkpoints as they lie on disk: headers, configuration, lazy reads. Nothing here knows about models."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trawl.errors import CheckpointError, shown
from trawl.untrusted import own_file, parse_json

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format itself
MAX_AXES = 64  # torch's
LONGEST_NAME = 1000
LARGEST_COUNT = 1 << 63
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
RECORD = "trawl.json"
FOREIGN_WEIGHT_SUFFIXES = (*PICKLE_SUFFIXES, ".gguf", ".h5", ".msgpack", ".onnx", ".tflite", ".ot")
SAMPLED_BLOCKS = 64
SAMPLED_BYTES = 4096

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
BITS: Mapping[str, int] = {
    **{name: dtype.itemsize * 8 for name, dtype in DTYPES.items()},
    "U64": 64,
    "U32": 32,
    "U16": 16,
    "C64": 64,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
}
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class TensorInfo:
    """Where one stored tensor lies.

    Attributes:
        name: name inside the checkpoint.
        dtype: safetensors' name of the dtype, such as ``BF16``.
        shape: axes as stored.
        shard: file name of the shard that holds it.
        start: first byte in that file, counted from the file's beginning.
        stop: first byte after it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    start: int
    stop: int

    @property
    def parameters(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size on disk in bytes."""
        return self.stop - self.start


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its header as found, and the tensors in the order of their bytes."""

    name: str
    header: bytes  # the eight length bytes and the JSON, verbatim
    tensors: tuple[TensorInfo, ...]
    nbytes: int

    @cached_property
    def metadata(self) -> dict[str, str]:
        """The header's free metadata, such as ``{"format": "pt"}``."""
        found: dict[str, str] | None = json.loads(self.header[8:]).get("__metadata__") if self.header else None
        return found or {}


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A safetensors checkpoint: headers and configuration in memory, weights read on demand.

    Attributes:
        folder: where it lies.
        config: the parsed config.json.
        shards: in index order.
        revision: commit hash of a hub snapshot, None for a local folder.
        origin: what the user called it: a folder, a hub id, or a .gguf file.
        loaded: tensors by name, for a model that is in memory and has no folder.
    """

    folder: Path
    config: Mapping[str, Any]
    shards: tuple[Shard, ...]
    revision: str | None = None
    origin: str = ""
    loaded: Mapping[str, Tensor] | None = None
    _handles: dict[str, Any] = field(default_factory=dict, repr=False)

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """All stored tensors by name."""
        return {info.name: info for shard in self.shards for info in shard.tensors}

    @property
    def nbytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def parameters(self) -> int:
        """Entries of all tensors."""
        return sum(info.parameters for info in self.tensors.values())

    def read(self, name: str) -> Tensor:
        """Return a stored tensor as a memory-mapped, file-backed tensor.

        Args:
            name: name inside the checkpoint.
        Returns: the tensor in its stored shape and dtype; it must not be written to.
        Raises: CheckpointError: the shard cannot be opened any more.
        Cost: no bytes are read until they are used, and none of them count as anonymous memory.
        """
        if self.loaded is not None:
            return self.loaded[name]
        shard = self.tensors[name].shard
        try:
            if shard not in self._handles:
                self._handles[shard] = safe_open(self.folder / shard, framework="pt")
            tensor: Tensor = self._handles[shard].get_tensor(name)
        except (OSError, SafetensorError, RuntimeError) as e:  # RuntimeError: no room in memory to map the file
            raise CheckpointError(f"{self.folder / shard}: cannot read {name}: {e}") from e
        return tensor

    def prefetch(self, name: str) -> None:
        """Ask the kernel to start reading a tensor's bytes; returns at once."""
        if self.loaded is not None:
            return
        info = self.tensors[name]
        descriptor = os.open(self.folder / info.shard, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, info.start, info.nbytes, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over config.json, every shard's header and size, and 64 sampled 4 KiB blocks of each shard's data.

        It tells one checkpoint from another in milliseconds at any size. It is a fingerprint, not a proof: a change
        that misses every sampled block goes unseen.
        """
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for shard in self.shards:
            digest.update(shard.name.encode() + shard.header + str(shard.nbytes).encode())
            with (self.folder / shard.name).open("rb") as file:
                span = max(shard.nbytes - len(shard.header) - SAMPLED_BYTES, 0)
                for block in range(SAMPLED_BLOCKS):
                    file.seek(len(shard.header) + span * block // (SAMPLED_BLOCKS - 1))
                    digest.update(file.read(SAMPLED_BYTES))
        return digest.hexdigest()

    def state(self) -> dict[str, list[int]]:
        """Return size and time of change, in nanoseconds, of every file that an output is made of.

        Raises: CheckpointError: one of them is gone, or is a link to a place outside the folder.
        """
        cards = [name for name in ("README.md", RECORD) if os.path.lexists(self.folder / name)]
        names = (*(shard.name for shard in self.shards), *map(str, self.side_files), *cards)
        found = {name: own_file(self.folder, name).stat() for name in names}
        return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in found.items()}

    @cached_property
    def side_files(self) -> tuple[Path, ...]:
        """Files beside the weights that belong to the checkpoint, relative to the folder.

        Weights in other formats, hidden files, and the products of an earlier TRAWL run are left out.

        Raises: CheckpointError: one of them is a link to a place outside the folder.
        """
        shards = {shard.name for shard in self.shards}
        own = {"README.md", RECORD}
        if (self.folder / RECORD).exists():  # else a folder of that name is somebody's
            own |= {"report.html", "report"}
        found = []
        for path in sorted(self.folder.rglob("*")):
            relative = path.relative_to(self.folder)
            if not path.is_file() or any(part.startswith(".") for part in relative.parts):
                continue
            if path.suffix in FOREIGN_WEIGHT_SUFFIXES or path.suffix == ".safetensors":
                continue
            if str(relative) in shards or relative.parts[0] in own:
                continue
            own_file(self.folder, relative)
            found.append(relative)
        return tuple(found)


def open_folder(folder: Path, *, origin: str = "", revision: str | None = None, factored: bool = False) -> Checkpoint:
    """Open a local checkpoint folder from its headers alone.

    Args:
        folder: holds config.json and ``model.safetensors`` or an index with its shards.
        origin: what to call it in messages and records; the folder itself by default.
        revision: commit hash, where the folder is a hub snapshot.
        factored: whether a checkpoint that trawl factored is expected, in place of a dense one.
    Returns: the checkpoint; no weights are read.
    Raises: CheckpointError: something is missing, truncated, pickled, quantized, or contradicts itself.
    Cost: reads config.json, the index and the shard headers.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; expected a checkpoint folder, a hub id, or a .gguf file")
    config = read_json(folder / "config.json", "model configuration")
    refuse_quantized(config, folder, factored=factored)
    try:
        shards = tuple(read_shard(own_file(folder, name)) for name in shard_names(folder))
    except OSError as e:
        raise CheckpointError(f"{e.filename or folder} cannot be read: {e.strerror}") from e
    checkpoint = Checkpoint(folder, config, shards, revision, origin or str(folder))
    check_index(checkpoint)
    return checkpoint


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON object, or say in one line why there is none."""
    if not os.path.lexists(path):
        raise CheckpointError(f"{path.parent} has no {path.name} ({what}); is it a transformers checkpoint?")
    try:
        value = parse_json(own_file(path.parent, path.name).read_bytes())
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{path} is not readable JSON: {e}") from e
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}; expected an object")
    return value


def refuse_quantized(config: Mapping[str, Any], folder: Path, *, factored: bool = False) -> None:
    """Raise for a checkpoint whose weights are packed: there is no plain matrix to decompose."""
    quantization = config.get("quantization_config") or config.get("compression_config")
    if not quantization:
        return
    method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
    if method == "trawl" and factored:
        return
    if method == "trawl":
        raise CheckpointError(
            f"{folder} is factored by trawl already; start from the dense checkpoint it was made of, "
            f"or make it dense again: trawl densify {folder}"
        )
    raise CheckpointError(
        f"{folder / 'config.json'}: the weights are quantized (quant_method {method!r}); expected float weights. "
        "Start from the unquantized checkpoint, or de-quantize it with transformers first"
    )


def shard_names(folder: Path) -> list[str]:
    """Return the names of the shards, in index order, or say what is there instead."""
    index_path = folder / INDEX_NAME
    if index_path.is_file():
        return index_shards(index_path)
    if (folder / SINGLE_NAME).is_file():
        return [SINGLE_NAME]
    parts = sorted(path.name for path in folder.glob("*.safetensors"))
    if len(parts) == 1:
        return parts
    if parts:
        raise CheckpointError(
            f"{folder} has {len(parts)} safetensors files ({parts[0]}, ...) but no {INDEX_NAME}; "
            "load and save_pretrained it once with transformers to write the index"
        )
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if pickled:
        raise CheckpointError(
            f"{folder} holds only pickled weights ({pickled[0]}), which can run code when opened; convert it once with "
            'python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{folder}').save_pretrained('{folder}-safetensors')\""
        )
    raise CheckpointError(f"{folder} has no weights: expected {SINGLE_NAME} or {INDEX_NAME} with its shards")


def index_shards(index_path: Path) -> list[str]:
    """Return the shard names that an index gives, each checked to be a plain file beside it."""
    weight_map = read_json(index_path, "shard index").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index_path} has no weight_map; expected tensor names with their shards")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{index_path} names the shard {shown(name)}; expected a plain file name that ends in .safetensors"
            )
    names = list(dict.fromkeys(weight_map.values()))
    for name in names:
        try:
            own_file(index_path.parent, name)
        except CheckpointError as e:
            raise CheckpointError(
                f"{index_path} names the shard {name[:80]}, which is not in {index_path.parent}: {e}"
            ) from e
    return names


def read_shard(path: Path) -> Shard:
    """Read and check one shard's header; sizes from the file are compared with its real size before they are used."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise CheckpointError(
                f"{path} is truncated or not a safetensors file: its header claims {length} bytes, the file has {size}"
            )
        raw = file.read(length)
    return Shard(path.name, length.to_bytes(8, "little") + raw, parse_header(path, raw, size), size)


def parse_header(path: Path, raw: bytes, size: int) -> tuple[TensorInfo, ...]:
    """Turn the header's JSON into tensors in byte order, checking that they tile the data exactly."""
    try:
        entries = parse_json(raw, unique=True)
        _check_metadata(entries.pop("__metadata__", None) or {})
        infos = [_tensor_info(name, entry, path.name, 8 + len(raw)) for name, entry in entries.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise CheckpointError(f"{path}: unreadable safetensors header: {type(e).__name__}: {str(e)[:200]}") from e
    infos.sort(key=lambda info: (info.start, info.stop))
    end = 8 + len(raw)
    for info in infos:
        if info.start != end or info.nbytes * 8 != info.parameters * BITS[info.dtype]:
            raise CheckpointError(
                f"{path}: tensor {info.name} {info.shape} {info.dtype} claims bytes {info.start} to {info.stop}; "
                f"expected {info.parameters * BITS[info.dtype] // 8} bytes from {end}"
            )
        end = info.stop
    if end != size:
        raise CheckpointError(f"{path} is truncated: its header needs {end} bytes, the file has {size}; fetch it again")
    return tuple(infos)


def _check_metadata(metadata: Any) -> None:
    """Refuse free metadata that safetensors does not read back."""
    if not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("__metadata__ holds something else than texts")


def _tensor_info(name: str, entry: Any, shard: str, base: int) -> TensorInfo:
    """Read one entry of a header; every number in it is checked before anything is computed from it."""
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    what = f"tensor {name[:80]}"
    if len(name) > LONGEST_NAME:
        raise ValueError(f"{what}... has a name of {len(name)} characters; expected at most {LONGEST_NAME}")
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"{what} has the unknown dtype {shown(dtype)}")
    for field_name, numbers in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < LARGEST_COUNT for n in numbers):
            raise ValueError(f"{what} has the {field_name} {shown(numbers)}; expected counts")
    if len(shape) > MAX_AXES or len(offsets) != 2:
        raise ValueError(f"{what} has {len(shape)} axes and {len(offsets)} offsets; expected at most {MAX_AXES}, and 2")
    return TensorInfo(name, dtype, tuple(shape), shard, base + offsets[0], base + offsets[1])


def check_index(checkpoint: Checkpoint) -> None:
    """Check that the index and the shards tell the same story, and that no tensor stands in two shards."""
    count = sum(len(shard.tensors) for shard in checkpoint.shards)
    if count != len(checkpoint.tensors):
        raise CheckpointError(f"{checkpoint.folder}: {count - len(checkpoint.tensors)} tensors stand in two shards")
    index_path = checkpoint.folder / INDEX_NAME
    if not index_path.is_file():
        return
    for name, shard in read_json(index_path, "shard index")["weight_map"].items():
        info = checkpoint.tensors.get(name)
        if info is None or info.shard != shard:
            where = "nowhere" if info is None else f"in {info.shard}"
            raise CheckpointError(f"{index_path} places tensor {name} in {shard}, but it is {where}")
