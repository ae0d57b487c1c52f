"""The same decomposition for a model in memory, dense or factored, without a checkpoint folder."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trawl.checkpoint import DTYPES, Checkpoint, Shard, TensorInfo
from trawl.decompose import Method
from trawl.errors import PlanError
from trawl.factors import Factors
from trawl.hf.quantizer import TrawlConfig, TrawlQuantizer
from trawl.hf.replacement import install, lay_out
from trawl.observers import Observer, silent, slice_counter
from trawl.planned import Plan
from trawl.planning import make_plan
from trawl.recipe import Recipe
from trawl.records import StackReport, report_stack
from trawl.stacking import StoredSlices, scan
from trawl.writing import DenseWriter, SquaredErrors, measure_stack

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def apply(model: PreTrainedModel, recipe: Recipe, *, observer: Observer = silent) -> tuple[StackReport, ...]:
    """Decompose a loaded model's weights in place.

    With ``write="dense"`` the weights change and the modules stay; with ``write="factored"`` linear modules are
    replaced by FactoredLinear, and ``save_pretrained`` writes a factored folder. Either gives what ``trawl.compress``
    of the model's checkpoint gives when that is loaded.

    Args:
        model: any transformers model of a known family, on one device; unchanged if an error is raised.
        recipe: what to decompose and how; factors have the model's dtype.
        observer: told of progress, in slices read.
    Returns: one report per stack.
    Raises: TrawlError: the family is unknown, the recipe does not fit, a weight holds NaN or Inf.
    Cost: that of the decompositions; memory for all factors, and dense for the new weights of one module.
    """
    if recipe.anchored:
        raise PlanError("an anchored recipe fits stacks on a text; use trawl.compress with calibrate")
    if recipe.output_weighting != "none":
        raise PlanError("output_weighting takes gradients on a text; use trawl.compress with calibrate")
    if recipe.factor_dtype is not None:
        raise PlanError("factor_dtype goes with a checkpoint on disk; in memory factors have the model's dtype")
    method = recipe.decomposition()
    tied = model.all_tied_weights_keys
    state = {name: tensor.detach() for name, tensor in model.state_dict().items() if name not in tied}
    planned = make_plan(in_memory(model, state), recipe)
    absmax = {
        item.stack.name: max(scan(planned.checkpoint, name) for name in item.stack.tensors) for item in planned.stacks
    }
    factors, seconds = _decompose(planned, method, absmax, observer)
    errors = SquaredErrors()
    if planned.descriptor:
        _replace_modules(model, planned, factors, absmax, errors)
    else:
        stacks = tuple(item.stack for item in planned.stacks)
        writer = DenseWriter(planned.checkpoint, stacks, factors.__getitem__, absmax)
        for name in planned.changed_tensors:
            state[name].copy_(writer.replaced(name, errors))
    return tuple(
        report_stack(item, factors[item.stack.name], errors, seconds[item.stack.name]) for item in planned.stacks
    )


def in_memory(model: PreTrainedModel, state: dict[str, Tensor]) -> Checkpoint:
    """Describe a loaded model as a checkpoint of one shard."""
    infos = [
        TensorInfo(
            name, DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape), "memory", 0, tensor.nbytes
        )
        for name, tensor in state.items()
    ]
    shard = Shard("memory", b"", tuple(infos), sum(tensor.nbytes for tensor in state.values()))
    return Checkpoint(Path(), model.config.to_dict(), (shard,), origin=type(model).__name__, loaded=state)


def _decompose(
    planned: Plan, method: Method, absmax: dict[str, float], observer: Observer
) -> tuple[dict[str, Factors], dict[str, float]]:
    """Return factors, as a checkpoint stores them, and seconds by stack."""
    factors, seconds = {}, {}
    for item in planned.stacks:
        name = item.stack.name
        device = planned.checkpoint.read(item.stack.tensors[0]).device
        started = time.perf_counter()
        count = slice_counter(f"decomposing {name}", observer)
        source = StoredSlices(planned.checkpoint, item.stack, absmax[name], device, count)
        factors[name] = method.decompose(source).balanced().interpolated()
        seconds[name] = time.perf_counter() - started
    return factors, seconds


def _replace_modules(
    model: PreTrainedModel, planned: Plan, factors: dict[str, Factors], absmax: dict[str, float], errors: SquaredErrors
) -> None:
    """Put factored modules in place, fill them, and make ``save_pretrained`` know them."""
    assert planned.descriptor is not None
    rounded = {}
    for item, described in zip(planned.stacks, planned.descriptor.stacks, strict=True):
        name = item.stack.name
        rounded[name] = factors[name].to(dtype=DTYPES[described.dtype])
        measure_stack(planned.checkpoint, item.stack, rounded[name], factors[name], absmax[name], errors=errors)
    for name, stack in install(model, planned.descriptor).items():
        with torch.no_grad():
            for factor, tensor in rounded[name].stored().items():
                getattr(stack, factor).copy_(tensor)
    lay_out(model)
    config = TrawlConfig(**planned.descriptor.to_json())
    model.config.quantization_config = config
    model.hf_quantizer = TrawlQuantizer(config)
