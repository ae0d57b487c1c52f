"""GGUF files: de-quantized once, through transformers' own reader, into a normal checkpoint folder."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from trawl.errors import CheckpointError
from trawl.shards import sync_folder, sync_tree

LOG = logging.getLogger("trawl.gguf")
SAMPLED_BYTES = 1 << 20


def cache_folder() -> Path:
    """Return where converted checkpoints are kept: ``$TRAWL_CACHE``, or ``trawl`` under the user's cache folder."""
    if cache := os.environ.get("TRAWL_CACHE"):
        return Path(cache)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trawl"


def converted(path: Path) -> Path:
    """Return the checkpoint folder of a GGUF file, converting it the first time.

    Args:
        path: the ``.gguf`` file.
    Returns: a folder in the cache; the same file gives the same folder, without converting it again.
    Raises: CheckpointError: see :func:`convert`.
    Cost: the first time, one model in float32 in memory and on disk.
    """
    if not path.is_file():
        raise CheckpointError(f"no such file: {path}")
    size = path.stat().st_size
    with path.open("rb") as file:
        digest = hashlib.sha256(size.to_bytes(8, "little") + file.read(SAMPLED_BYTES))
        file.seek(max(size - SAMPLED_BYTES, 0))
        digest.update(file.read(SAMPLED_BYTES))
    folder = cache_folder() / "gguf" / f"{path.stem}-{digest.hexdigest()[:16]}"
    return folder if (folder / "config.json").is_file() else convert(path, folder)


def convert(path: Path, out: Path) -> Path:
    """De-quantize a GGUF file into a checkpoint folder of float32 weights, with its tokenizer.

    Transformers reads the file; since it marks the model as quantized and then refuses to save it, the model is
    rebuilt from its state dict and its configuration without ``quantization_config``.

    Args:
        path: the ``.gguf`` file.
        out: the folder to make; it appears whole, by rename.
    Returns: ``out``.
    Raises: CheckpointError: the extra ``gguf`` is not installed, or transformers cannot read the file.
    Cost: about twice the float32 model in memory.
    """
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise CheckpointError(f"reading {path} needs {' and '.join(missing)}: pip install 'trawl-llm[gguf]'")
    out.parent.mkdir(parents=True, exist_ok=True)
    private = Path(tempfile.mkdtemp(prefix=f"{out.name}.", suffix=".partial", dir=out.parent))
    try:
        partial = private / out.name  # as the umask says, while the folder around it is the user's alone
        partial.mkdir()
        _convert_into(path, partial)
        sync_tree(partial, files=True)
        if out.exists():  # another process was faster
            return out
        partial.rename(out)
        sync_folder(out.parent)
    finally:
        shutil.rmtree(private, ignore_errors=True)
    return out


def _convert_into(path: Path, folder: Path) -> None:
    """Write the de-quantized model and its tokenizer into an existing folder."""
    from transformers import (  # noqa: PLC0415 (0.7 s that no other path of the library needs)
        AutoConfig,
        AutoModelForCausalLM,
        AutoTokenizer,
    )

    source, name = str(path.parent), path.name
    LOG.info("de-quantizing %s into %s, once", path, folder.parent)
    try:
        own: dict[str, Any] = {"gguf_file": name, "trust_remote_code": False}  # else transformers asks on a terminal
        quantized = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **own)
        tokenizer = AutoTokenizer.from_pretrained(source, **own)
        config = AutoConfig.from_pretrained(source, **own)
    except (OSError, ValueError, KeyError, RuntimeError) as e:
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        if "trust_remote_code" in str(e):
            reason = f"files beside it ask for code, which is not run; move {name} into a folder of its own"
        raise CheckpointError(f"transformers cannot read {path}: {reason}") from e
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    state = quantized.state_dict()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    if quantized.generation_config is not None:
        model.generation_config = quantized.generation_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
