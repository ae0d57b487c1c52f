"""Loading a checkpoint, factored or dense, checked from its headers before anything is allocated."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedModel

from trawl.checkpoint import read_json, shard_names
from trawl.descriptor import METHOD, Descriptor, looks_like_factor
from trawl.descriptor_reader import parse_descriptor
from trawl.errors import CheckpointError, LoadError
from trawl.hf.quantizer import read_tensors
from trawl.models import OWN_CODE, model_class, own_code_refused
from trawl.untrusted import own_file


def load(path: str | Path, auto_class: Any = None, **arguments: Any) -> PreTrainedModel:
    """Load a model from a checkpoint that trawl or anyone else wrote.

        model = trawl.load("out", dtype=torch.bfloat16, device_map="cpu")

    Args:
        path: a local folder, factored or dense, or a hub id.
        auto_class: the class to load with, or its name in transformers, such as ``AutoModelForMaskedLM``; by default
            the one that config.json names under ``architectures``.
        arguments: passed to ``from_pretrained``; with ``trust_remote_code=True`` code that the checkpoint brings is
            run, also where transformers has code of its own for the model.
    Returns: the model in evaluation mode, with FactoredLinear modules where it is factored.
    Raises: LoadError: the folder is incomplete, its shards, config.json and descriptor contradict each other, the
        described stacks do not fit the model, or it needs code of its own, which runs with ``trust_remote_code=True``
        only; never is a partly loaded model returned.
    Cost: memory of the stored tensors; a replaced matrix is never formed.
    """
    arguments = {OWN_CODE: False, **arguments}  # else transformers asks on a terminal
    with own_code_refused(path):
        return _load(path, auto_class, arguments)


def _load(path: str | Path, auto_class: Any, arguments: dict[str, Any]) -> Any:
    """Check a folder and load its model, or that of a hub id."""
    folder = Path(path)
    if folder.is_dir():
        check_folder(folder)
        config = read_json(folder / "config.json", "model configuration")
        own_code = _own_code(config.get("auto_map"), arguments)
        return model_class(config.get("architectures"), auto_class, own_code).from_pretrained(folder, **arguments)
    if folder.is_absolute() or len(folder.parts) > 2:
        raise LoadError(f"no such folder: {folder}; expected a checkpoint folder, or a hub id of the form org/name")
    names = ("revision", "token", "cache_dir", "local_files_only", OWN_CODE, "subfolder")
    described = AutoConfig.from_pretrained(str(path), **{name: arguments[name] for name in names if name in arguments})
    own_code = _own_code(getattr(described, "auto_map", None), arguments)
    return model_class(described.architectures, auto_class, own_code).from_pretrained(str(path), **arguments)


def _own_code(auto_map: Any, arguments: dict[str, Any]) -> Collection[str]:
    """Return the Auto classes for which a checkpoint brings code, where that may run."""
    return tuple(auto_map) if arguments[OWN_CODE] and isinstance(auto_map, dict) else ()


def check_folder(folder: Path) -> Descriptor | None:
    """Check a checkpoint folder from its headers alone.

    Args:
        folder: holds config.json and safetensors shards.
    Returns: its descriptor; None for a dense checkpoint.
    Raises: LoadError: a shard is missing or truncated, or the descriptor contradicts itself or the shards.
    Cost: reads config.json, the index and the shard headers.
    """
    try:
        config = read_json(folder / "config.json", "model configuration")
        files = [own_file(folder, name) for name in shard_names(folder)]
    except (CheckpointError, OSError) as e:
        raise LoadError(str(e)) from e
    tensors = read_tensors(files)
    quantization = config.get("quantization_config")
    if isinstance(quantization, dict) and quantization.get("quant_method") == METHOD:
        descriptor = parse_descriptor(quantization, str(folder / "config.json"))
        descriptor.check_tensors(tensors, str(folder))
        return descriptor
    if stray := next((name for name in tensors if looks_like_factor(name)), None):
        raise LoadError(
            f"{folder} holds the factor {stray}, but its config.json has no quantization_config of quant_method "
            f"{METHOD}; restore the config.json that was written with it"
        )
    return None
