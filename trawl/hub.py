"""MODEL as the user gives it: a local folder, a hub id, or a .gguf file, resolved to a checkpoint."""

from __future__ import annotations

import os
import re
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    NotASafetensorsRepoError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    SafetensorsParsingError,
)

from trawl import gguf
from trawl.checkpoint import (
    FOREIGN_WEIGHT_SUFFIXES,
    INDEX_NAME,
    SINGLE_NAME,
    Checkpoint,
    Shard,
    TensorInfo,
    open_folder,
    read_json,
    refuse_quantized,
)
from trawl.errors import CheckpointError, shown

HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]  # of whichever client the library is built on
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # "./model" is a path
NOT_WEIGHTS = [*(f"*{suffix}" for suffix in FOREIGN_WEIGHT_SUFFIXES), "original/*", "onnx/*", "openvino/*", "coreml/*"]


def open_checkpoint(model: str | Path, revision: str | None = None, *, weights: bool = True) -> Checkpoint:
    """Open MODEL: a local folder, a ``.gguf`` file, or a hub id.

    Args:
        model: local paths win over hub ids of the same spelling.
        revision: branch, tag or commit; hub ids only.
        weights: whether weights will be read. Without, a hub checkpoint's headers are read over the network and no
            shard is downloaded.
    Returns: the checkpoint. ``HF_HUB_OFFLINE`` and the hub cache are honoured.
    Raises: CheckpointError: there is no such model, it cannot be reached, or it is not usable.
    Cost: headers only for local folders; a download of the needed files for hub ids; a conversion for GGUF.
    """
    path = Path(model)
    if path.suffix == ".gguf":
        return open_folder(gguf.converted(path), origin=str(model))
    if path.exists():
        if revision is not None:
            raise CheckpointError(f"--revision {revision} goes with a hub id; {model} is a local path")
        return open_folder(path)
    if not HUB_ID.fullmatch(str(model)):
        raise CheckpointError(f"no such folder: {model} (and not a hub id of the form org/name)")
    return _open_hub(str(model), revision, weights=weights)


def _open_hub(model: str, revision: str | None, *, weights: bool) -> Checkpoint:
    """Download what is needed of a hub checkpoint, and say plainly what stood in the way."""
    name = model if revision is None else f"{model} at {revision}"
    try:
        if weights or _is_cached(model, revision):
            return _open_snapshot(model, revision)
        return _open_headers(model, revision)
    except GatedRepoError as e:
        raise CheckpointError(f"{name} is gated: accept its terms on the hub, then run: hf auth login") from e
    except RevisionNotFoundError as e:
        raise CheckpointError(f"{model} has no revision {revision!r} on the hub") from e
    except RepositoryNotFoundError as e:
        raise CheckpointError(
            f"no such folder, and no such model on the hub: {name} (private ones need hf auth login)"
        ) from e
    except NotASafetensorsRepoError as e:
        raise CheckpointError(
            f"{name} has no safetensors weights on the hub; convert it with transformers first"
        ) from e
    except (HFValidationError, SafetensorsParsingError) as e:
        raise CheckpointError(f"{name}: {str(e).splitlines()[0]}") from e
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, HTTP_ERROR, OSError) as e:
        reason = "HF_HUB_OFFLINE is set" if _offline() else f"the hub cannot be reached ({type(e).__name__})"
        raise CheckpointError(
            f"no such folder: {model}; as a hub id it is not in the local cache and {reason}. "
            "Connect, or give a local folder; a download goes on where it broke off"
        ) from e


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _is_cached(model: str, revision: str | None) -> bool:
    """Whether a snapshot with weights already lies in the hub cache."""
    return any(isinstance(try_to_load_from_cache(model, n, revision=revision), str) for n in (INDEX_NAME, SINGLE_NAME))


def _open_snapshot(model: str, revision: str | None) -> Checkpoint:
    folder = Path(snapshot_download(model, revision=revision, ignore_patterns=NOT_WEIGHTS))
    return open_folder(folder, origin=model, revision=folder.name)


def _open_headers(model: str, revision: str | None) -> Checkpoint:
    """Open a hub checkpoint from its small files and the headers of its shards, read by range requests."""
    folder = Path(snapshot_download(model, revision=revision, allow_patterns=["*.json"]))
    config = read_json(folder / "config.json", "model configuration")
    refuse_quantized(config, folder)
    metadata = HfApi().get_safetensors_metadata(model, revision=folder.name)
    sizes = {entry.path: getattr(entry, "size", 0) for entry in HfApi().list_repo_tree(model, revision=folder.name)}
    shards = []
    for shard, file in metadata.files_metadata.items():
        if shard not in sizes:
            raise CheckpointError(f"{model}: the index names the shard {shown(shard)}, which the repository has not")
        tensors = tuple(
            TensorInfo(name, tensor.dtype, tuple(tensor.shape), shard, *tensor.data_offsets)
            for name, tensor in sorted(file.tensors.items(), key=lambda item: item[1].data_offsets)
        )
        shards.append(Shard(shard, b"", tensors, sizes[shard]))
    return Checkpoint(folder, config, tuple(shards), folder.name, model)
