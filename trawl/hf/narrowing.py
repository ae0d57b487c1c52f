"""Narrower modules in place of a model's own, where one layer's width is not another's."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from trawl.errors import LoadError
from trawl.hf.replacement import Locate, multiplies, out_axis_of
from trawl.narrow_tensor import NarrowTensor


def narrow_modules(model: nn.Module, narrow: Iterable[NarrowTensor], locate: Locate) -> None:
    """Give modules the widths that a checkpoint holds; their parameters are allocated but not filled.

    Args:
        model: on any device; on the meta device nothing is allocated.
        narrow: checked against the checkpoint already.
        locate: from a described name to the model's own.
    Raises: LoadError: a described tensor has no linear module in the model, or one of another shape; the model is
        unchanged then.
    """
    found = [(part, *_find(model, part, locate)) for part in narrow]
    for part, module, leaf in found:
        _put(module, leaf, nn.Parameter(part.shrink(module.get_parameter(leaf))))


def widen_modules(model: nn.Module, narrow: Iterable[NarrowTensor], locate: Locate) -> None:
    """Pad narrow modules of a loaded model with zeros to the width of its class."""
    for part in narrow:
        path, _, leaf = locate(part.tensor).rpartition(".")
        module = model.get_submodule(path)
        _put(module, leaf, nn.Parameter(part.pad(module.get_parameter(leaf).detach())))


def _find(model: nn.Module, part: NarrowTensor, locate: Locate) -> tuple[nn.Module, str]:
    """Return the module and the name of its parameter that a described tensor belongs to."""
    name = locate(part.tensor)
    path, _, leaf = name.rpartition(".")
    what = f"config.json describes a narrow tensor {part.tensor}"
    try:
        module = model.get_submodule(path)
        shape = tuple(module.get_parameter(leaf).shape)
    except AttributeError as e:
        raise LoadError(
            f"{what}, but {type(model).__name__} has no parameter {name}; load it with the class that config.json "
            "names under architectures"
        ) from e
    if not multiplies(module) or shape != part.full:
        raise LoadError(
            f"{what} in place of {part.full}, but {name} of {type(model).__name__} is {shape} in a "
            f"{type(module).__name__}; expected that shape in nn.Linear or Conv1D"
        )
    return module, leaf


def _put(module: nn.Module, leaf: str, parameter: nn.Parameter) -> None:
    """Replace a parameter, and what a linear module says of its own sizes."""
    parameter.requires_grad_(module.get_parameter(leaf).requires_grad)
    module.register_parameter(leaf, parameter)
    if leaf == "weight":
        out, into = parameter.shape if out_axis_of(module) == 0 else parameter.shape[::-1]
        names = ("out_features", "in_features") if isinstance(module, nn.Linear) else ("nf", "nx")
        for name, size in zip(names, (out, into), strict=True):
            setattr(module, name, size)
