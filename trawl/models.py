"""Transformers models as modules: their class, an empty one to be filled piece by piece, and their layers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import logging

from trawl.errors import FamilyError, LoadError
from trawl.families import FamilyMatch

OWN_CODE = "trust_remote_code"  # as transformers calls it, in its arguments and in its refusals
HEADS = ("ForCausalLM", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")

Forward = Callable[..., Any]


def model_class(architectures: Any, auto_class: Any = None, own_code: Collection[str] = ()) -> Any:
    """Return the class to load a checkpoint with.

    Args:
        architectures: what config.json says under that name.
        auto_class: a class, or its name in transformers, to use in place of what config.json says.
        own_code: Auto classes for which the checkpoint brings code of its own that may run.
    Raises: LoadError: neither says which, or transformers has no such class.
    """
    if auto_class is not None and not isinstance(auto_class, str):
        return auto_class
    name = auto_class or (str(architectures[0]) if isinstance(architectures, list) and architectures else None)
    if name is None:
        raise LoadError("config.json names no architectures; pass auto_class, such as AutoModelForCausalLM")
    found = getattr(transformers, name, None)
    auto = f"AutoModel{next((head for head in HEADS if name.endswith(head)), '')}"  # where an auto_map is looked up
    if hasattr(found, "from_pretrained") and (auto_class is not None or auto not in own_code):
        return found
    if auto_class is not None:
        raise LoadError(f"transformers {transformers.__version__} has no model class {auto_class}")
    return getattr(transformers, auto)


def empty_model(folder: Path, config: Mapping[str, Any], device: torch.device) -> PreTrainedModel:
    """Build a checkpoint's model in evaluation mode with every weight on the meta device.

    Buffers that no checkpoint holds, such as rotary frequencies, are real and filled.

    Args:
        folder: holds config.json.
        config: what it says.
        device: of those buffers.
    Raises: LoadError: transformers does not know the model.
    """
    try:
        found = model_class(config.get("architectures") or ["AutoModel"])
        loaded = getattr(found, "config_class", None)
        described = (loaded or AutoConfig).from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            if loaded:
                model = found(described)
            else:
                model = found.from_config(described, dtype=torch.float32, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise LoadError(
            f"transformers {transformers.__version__} cannot build the model of {folder}: {calibration_reason(e)}"
        ) from e
    model.set_experts_implementation("eager")  # the one that multiplies expert by expert
    for name, buffer in list(model.named_non_persistent_buffers()):
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, torch.empty_like(buffer, device=device))
    model.initialize_weights()  # on the meta device that costs nothing
    return model.eval()


def calibration_reason(e: Exception) -> str:
    """Return transformers' reason on one line, with advice that holds for a calibration."""
    reason = " ".join(str(e).split())
    if OWN_CODE not in reason:
        return reason
    return "it needs code of its own, which a calibration never runs; leave out --calibrate, --anchored, --keep, --size"


def find_layers(model: PreTrainedModel, match: FamilyMatch) -> tuple[nn.Module, ...]:
    """Return a model's layers in order, such as the modules ``model.layers.0``, ``model.layers.1`` and so on.

    Args:
        model: the model.
        match: its family, matched on its own state dict, in which names of tensors begin with paths of modules.
    Raises: FamilyError: the tensors of a layer do not lie in one module with the layer's number.
    """
    paths = [(part.layer, part.tensor.split(".")) for part in match.placements]
    depth = min(len(path) for _, path in paths)
    numbered = (place for place in range(depth) if all(path[place] == str(layer) for layer, path in paths))
    place = next(numbered, None)
    if place is None:
        raise FamilyError(
            f"the layer's number is not at one place in names like {match.placements[0].tensor}; "
            "expected names such as model.layers.0.mlp.up_proj.weight"
        )
    names = {layer: ".".join(path[: place + 1]) for layer, path in paths}
    try:
        return tuple(model.get_submodule(names[layer]) for layer in range(match.layers))
    except AttributeError as e:
        raise FamilyError(
            f"{type(model).__name__} has no module {names[0]}; expected a match of the model's own state dict"
        ) from e


@contextmanager
def around(module: nn.Module, run: Callable[[Forward, tuple[Any, ...], dict[str, Any]], Any]) -> Iterator[None]:
    """Let ``run`` stand in front of a module's forward function."""
    own, original = vars(module).get("forward"), module.forward

    @wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return run(original, args, kwargs)

    vars(module)["forward"] = forward
    try:
        yield
    finally:
        del vars(module)["forward"]
        if own is not None:
            vars(module)["forward"] = own


@contextmanager
def own_code_refused(path: str | Path) -> Iterator[None]:
    """Say in one line what to do where transformers refuses to run a checkpoint's own code."""
    try:
        yield
    except ValueError as e:
        if OWN_CODE not in str(e):
            raise
        raise LoadError(
            f"{path} needs code of its own, which is not run; read it, then pass --trust-remote-code to trawl eval or "
            "trawl sweep, or trust_remote_code=True in Python"
        ) from e


@contextmanager
def no_bars() -> Iterator[None]:
    """Keep transformers from drawing its own bar, which standard error of a script or of ``--json`` has no use for."""
    drawn = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if drawn:
            logging.enable_progress_bar()


@contextmanager
def fast_products() -> Iterator[None]:
    """Let float32 products round their factors to the processor's fast format in a ``with`` block."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
