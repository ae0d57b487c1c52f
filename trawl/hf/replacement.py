"""Putting factors in place of linear modules and embeddings, on whatever device a model is; nothing is loaded here."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from trawl.descriptor import METHOD, Descriptor, stack_id
from trawl.errors import LoadError, ShapeError
from trawl.hf.embedding import FactoredEmbedding, embeds
from trawl.hf.factor_stack import FactorStack
from trawl.hf.linear import FactoredLinear, Part, make_part, with_neighbours
from trawl.interpolation import check_order

OUT_AXIS = {nn.Linear: 0, Conv1D: 1}  # the stored axis of each kind of module that is its output
PLAIN_LINEAR = "FalconLinear"  # a subclass that computes the same, and is imported only where a model has it

Module = nn.Linear | nn.Embedding  # Conv1D has the same attributes as nn.Linear

Locate = Callable[[str], str]
"""From a tensor's name in the checkpoint to its name in the model's state dict."""


def same_name(name: str) -> str:
    """Locate a tensor of a checkpoint that has the model's own names."""
    return name


def install(model: nn.Module, descriptor: Descriptor, locate: Locate = same_name) -> dict[str, FactorStack]:
    """Replace a model's linear modules by factored ones, whose factors are allocated but not filled.

    Args:
        model: any model that holds the described modules; on the meta device nothing is allocated.
        descriptor: checked against the checkpoint already.
        locate: from a described name to the model's own.
    Returns: the FactorStacks by stack name; each stands in its block as ``<block>.trawl.<stack id>``.
    Raises: LoadError: a described tensor has no module in the model, one of another shape, or one that is not a linear
        module; the model is unchanged then.
    Cost: memory of the factors.
    """
    found = {tensor: _find(model, descriptor, tensor, locate) for tensor in descriptor.slices}
    stacks: dict[str, FactorStack] = {}
    for described in descriptor.stacks:
        weight = found[described.slices[0].tensor][1].weight
        stacks[described.name] = FactorStack(described, weight.dtype, weight.device)
    heads = _tied_heads(model, descriptor, found, stacks)
    replacements = _replacements(descriptor, found, stacks) | heads
    for described in descriptor.stacks:
        path = found[described.slices[0].tensor][0]
        _attach(model, block_of(path, described.factors), described.name, stacks[described.name])
    for path, replacement in replacements.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, replacement.train(model.training))
    for path in heads:
        _tied_weights(model).pop(f"{path}.weight")  # by their factors now
    return stacks


def _replacements(
    descriptor: Descriptor, found: Mapping[str, tuple[str, Module]], stacks: Mapping[str, FactorStack]
) -> dict[str, FactoredLinear]:
    """Build the modules to put in place, by path."""
    by_parent: dict[str, list[tuple[str, Part]]] = {}
    for tensor, slices in descriptor.slices.items():
        path, module = found[tensor]
        try:
            made = [make_part(stacks[stack.name], index, out_axis_of(module)) for stack, index in slices]
        except ShapeError as e:
            raise LoadError(f"tensor {tensor}: {e}") from e
        by_parent.setdefault(path.rpartition(".")[0], []).extend((tensor, part) for part in made)
    parts: dict[str, list[Part]] = {}
    for entries in by_parent.values():
        joined = with_neighbours([part for _, part in entries])
        for (tensor, _), part in zip(entries, joined, strict=True):
            parts.setdefault(tensor, []).append(part)
    return {
        path: FactoredEmbedding(parts[tensor][0], module)
        if isinstance(module, nn.Embedding)
        else FactoredLinear(parts[tensor], out_axis_of(module), module.bias)
        for tensor, (path, module) in found.items()
    }


def _tied_heads(
    model: nn.Module, descriptor: Descriptor, found: Mapping[str, tuple[str, Module]], stacks: Mapping[str, FactorStack]
) -> dict[str, FactoredLinear]:
    """Build the linear modules whose weight is that of an embedding, by path: they multiply by the same factors."""
    heads = {}
    for tensor, (path, module) in found.items():
        targets = [target for target, source in _tied_weights(model).items() if source == f"{path}.weight"]
        for head in (target.removesuffix(".weight") for target in targets if isinstance(module, nn.Embedding)):
            stack, index = descriptor.slices[tensor][0]
            bias = model.get_submodule(head).bias
            part = make_part(stacks[stack.name], index, 0)
            heads[head] = FactoredLinear([part], 0, bias, tied=True)  # type: ignore[arg-type]
    return heads


def _tied_weights(model: nn.Module) -> dict[str, str]:
    """Return transformers' own record of which weight is another one."""
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    return tied


def out_axis_of(module: nn.Module) -> int:
    """Return the stored axis of a module's weight that is its output."""
    return 1 if isinstance(module, nn.Embedding) else OUT_AXIS.get(type(module), OUT_AXIS[nn.Linear])


def multiplies(module: nn.Module) -> bool:
    """Whether a module multiplies by its weight, and does nothing else but add a bias."""
    return type(module) in OUT_AXIS or (isinstance(module, nn.Linear) and type(module).__name__ == PLAIN_LINEAR)


def _find(model: nn.Module, descriptor: Descriptor, tensor: str, locate: Locate) -> tuple[str, Module]:
    """Return the path and the module that holds a described tensor; Conv1D has the same attributes as nn.Linear."""
    stack, index = descriptor.slices[tensor][0]
    what = f"stack {stack.name} names tensor {tensor}"
    path, _, leaf = locate(tensor).rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError as e:
        raise LoadError(
            f"{what}, but {type(model).__name__} has no module {path}; load it with the class that config.json names "
            "under architectures"
        ) from e
    if leaf != "weight" or not (multiplies(module) or embeds(module)):
        raise LoadError(
            f"{what}, which in {type(model).__name__} belongs to a {type(module).__name__} and not to nn.Linear, "
            "Conv1D or nn.Embedding; write the checkpoint with --write dense"
        )
    found, shape = tuple(module.get_parameter(leaf).shape), stack.slices[index].stored_shape
    if found != shape:
        raise LoadError(f"{what} of shape {shape}, but module {path} of {type(model).__name__} has a weight of {found}")
    return path, module  # type: ignore[return-value]


def block_of(path: str, factors: str) -> str:
    """Return the block of a module path: up to the number that ends the block in the checkpoint's own naming.

    For factors outside the blocks it is the module's parent.
    """
    count = len(re.findall(r"(?:^|\.)\d+(?=\.)", factors.rpartition(f".{METHOD}.")[0] + "."))
    ends = [number.end() for number in re.finditer(r"(?:^|\.)\d+(?=\.)", path)]
    if not count:
        return path.rpartition(".")[0]
    if count > len(ends):
        raise LoadError(f"factors {factors} stand in a numbered block, but module {path} lies in none")
    return path[: ends[count - 1]]


def _attach(model: nn.Module, block: str, name: str, stack: FactorStack) -> None:
    """Make a FactorStack a child of its block, under ``trawl``."""
    owner = model.get_submodule(block)
    if METHOD not in dict(owner.named_children()):
        owner.add_module(METHOD, nn.ModuleDict())
    group = owner.get_submodule(METHOD)
    if not isinstance(group, nn.ModuleDict) or stack_id(name) in group:
        raise LoadError(f"block {block} of {type(model).__name__} already has a child {METHOD}.{stack_id(name)}")
    group[stack_id(name)] = stack


def stacks_of(model: nn.Module) -> dict[str, FactorStack]:
    """Return the FactorStacks of a model by their place in it."""
    return {path: module for path, module in model.named_modules() if isinstance(module, FactorStack)}


def set_loading(model: nn.Module, loading: bool) -> None:
    """Tell every factored module whether a checkpoint is being loaded into the model."""
    for module in model.modules():
        if isinstance(module, FactoredLinear):
            module.loading = loading


def check_loaded(model: nn.Module, marked: str) -> None:
    """Require that every factor was loaded, and that all that belongs together is on one device.

    Args:
        model: with its factors in place.
        marked: attribute that the loader sets on each parameter that it has loaded.
    Raises: LoadError: a factor was not loaded, the order of its rows is none, or a module's factors are on another
        device than its stand-in.
    """
    for path, stack in stacks_of(model).items():
        for factor, tensor in (*stack.named_parameters(), *stack.named_buffers()):
            if tensor.device.type == "meta" or not getattr(tensor, marked, False):
                raise LoadError(f"factor {path}.{factor} of stack {stack.description.name} was not loaded")
        for order, rows in stack.named_buffers():
            check_order(rows, f"{path}.{order} of stack {stack.description.name}")
    for path, module in model.named_modules():
        if isinstance(module, FactoredLinear):
            devices = {parameter.device for part in module.parts for parameter in part.stack.parameters()}
            devices |= {parameter.device for parameter in module.parameters()}
            if len(devices) > 1 or torch.device("meta") in devices:
                names = ", ".join(sorted(map(str, devices)))
                raise LoadError(f"module {path} and its factors are on {names}; give a device_map with one device")


def lay_out(model: nn.Module) -> None:
    """Lay a loaded model's factors out for products with few rows, but those of embeddings, of which rows are read."""
    looked_up = {
        id(part.stack) for module in model.modules() if isinstance(module, FactoredEmbedding) for part in module.parts
    }
    for stack in stacks_of(model).values():
        if id(stack) not in looked_up:
            stack.lay_out()


def multiply_out(model: nn.Module) -> None:
    """Replace every factored module by a dense one of the kind that it stands in for, and drop the factors."""
    embeddings = any(isinstance(module, FactoredEmbedding) for module in model.modules())
    for path, module in list(model.named_modules()):
        if isinstance(module, FactoredLinear):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, _dense(module))
    for path in stacks_of(model):
        group = path.rpartition(".")[0]
        model.get_submodule(group).__delattr__(path.rpartition(".")[2])
        if not list(model.get_submodule(group).children()):
            model.get_submodule(group.rpartition(".")[0]).__delattr__(METHOD)
    if embeddings and isinstance(model, PreTrainedModel):
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
        model.tie_weights(recompute_mapping=False)


def _dense(module: FactoredLinear) -> nn.Module:
    """Return a dense module with the same outputs."""
    with torch.device("meta"):
        dense: nn.Module
        if isinstance(module, FactoredEmbedding):
            dense = module.dense()
        elif module.out_axis == OUT_AXIS[Conv1D]:
            dense = Conv1D(module.out_features, module.in_features)
        else:
            dense = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
    dense.register_parameter("weight", nn.Parameter(module.weight))
    if not isinstance(dense, nn.Embedding):
        dense.register_parameter("bias", module.bias)
    dense.train(module.training)
    return dense
