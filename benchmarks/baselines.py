"""Other ways to make a model smaller, which the scoreboard sets trawl against: recipes, weights and rounded tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from transformers import PreTrainedModel

import trawl
from trawl.calibration import Moments
from trawl.calibration.weights import stack_weights
from trawl.checkpoint import BITS, Checkpoint
from trawl.decompose.weights import Weights
from trawl.interpolation import stored_entries, stored_shapes
from trawl.planned import Plan
from trawl.planning import make_plan, match_checkpoint
from trawl.stacking import Stack

Weigh = Callable[[Stack], Weights | None]


def ranks_of(stack: Stack, keep: float, *, interpolative: bool) -> int:
    """Return the rank at which a matrix's factors, whole or in interpolative form, hold a share of its parameters."""
    _, inner, hidden = stack.shape
    whole = max(1, int(keep * stack.parameters / (inner + hidden + 1)))
    if not interpolative:
        return whole
    fitting = (
        rank
        for rank in range(min(inner, hidden), whole, -1)
        if stored_entries(stack.shape, (1, rank, rank), full=False) <= keep * stack.parameters
    )
    return next(fitting, whole)


def whole_size(planned: Plan) -> tuple[int, int]:
    """Return parameters and bytes of a plan's output if none of its factors were in interpolative form."""
    assert planned.descriptor is not None
    parameters, nbytes = planned.output_parameters, planned.output_bytes
    for stack in planned.descriptor.stacks:
        bits = {name: BITS[stack.dtype_of(name)] for name in stack.factor_shapes}
        stored = {name: math.prod(shape) for name, shape in stack.factor_shapes.items()}
        whole = stored_shapes(stack.shape, stack.rank, full=stack.core == "full", sides=())
        entries = sum(math.prod(shape) for shape in whole.values())
        parameters += entries - sum(stored.values())
        nbytes += (entries * bits["left"] - sum(stored[name] * bits[name] for name in stored)) // 8
    return parameters, nbytes


def svd_recipe(
    checkpoint: Checkpoint, keep: float, share: str, group: int, *, interpolative: bool = False
) -> trawl.Recipe:
    """Return a factored recipe in which every matrix, joined or not, keeps the same share of its parameters."""
    base = trawl.Recipe(method="svd", rank=1, share=share, group_layers=group, write="factored")
    parts: dict[tuple[str, ...], list[Stack]] = {}
    for item in make_plan(checkpoint, base).stacks:
        parts.setdefault((*item.stack.roles, str(len(item.stack.layers))), []).append(item.stack)
    recipes = []
    for stacks in parts.values():
        layers = ",".join(str(layer) for stack in stacks for layer in stack.layers)
        joined = stacks[0].joined
        values = {"method": "svd", "rank": ranks_of(stacks[0], keep, interpolative=interpolative), "layers": layers}
        values["roles"] = ",".join(stacks[0].roles)
        recipes.append(trawl.Recipe(**values, share=share if joined else "none", group_layers=group if joined else 1))
    return trawl.Recipe(method="mixed", parts=tuple(recipes), write="factored")


def tucker_recipe(checkpoint: Checkpoint, keep: float) -> trawl.Recipe:
    """Return a factored recipe with {gate, up, down} of each layer by Tucker, and attention by joint SVDs."""
    attention = svd_recipe(checkpoint, keep, "input", 1).parts
    fc = make_plan(checkpoint, trawl.Recipe(method="tucker", rank=1, roles="fc", group_layers=1)).stacks[0].stack
    size, inner, hidden = fc.shape
    budget, sides = keep * fc.parameters, inner + hidden
    right = min(hidden, int((math.sqrt(sides**2 + 4 * size * budget) - sides) / (2 * size)))  # of size r² + sides · r
    left = min(inner, int((budget - hidden * right) / (size * right + inner)))
    parts = [part for part in attention if set(part.roles.split(",")) & {"q", "k", "v", "o"}]
    parts.append(trawl.Recipe(method="tucker", rank=(size, left, right), roles="fc", group_layers=1))
    return trawl.Recipe(method="mixed", parts=tuple(parts), write="factored")


def narrow_recipe(checkpoint: Checkpoint, keep: float) -> trawl.Recipe:
    """Return a recipe that narrows all FCs alike, to a share of all layers' weights."""
    match = match_checkpoint(checkpoint)
    total = sum(math.prod(part.shape) for part in match.placements)
    fc = [part for part in match.placements if part.role in ("gate", "up", "down")]
    of_fc = sum(math.prod(part.shape) for part in fc)
    units = fc[0].shape[0]
    return trawl.Recipe(method="narrow", width=int(units * (keep * total - (total - of_fc)) / of_fc))


def asvd_weights(moments: Moments) -> Weigh:
    """Return ASVD's scaling: each input by the root of its root mean square."""

    def weigh(stack: Stack) -> Weights:
        weights = stack_weights(replace(moments, outputs=None), stack)
        inner, hidden = (_root_of_diagonal(side[0]) for side in (weights.inner, weights.hidden))
        return Weights((inner,), (hidden,))

    return weigh


def _root_of_diagonal(moment: torch.Tensor | None) -> torch.Tensor | None:
    return None if moment is None else moment.diagonal().clamp_min(0).sqrt()


def int8(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return every matrix rounded to int8 with a scale for each row."""
    rounded = {}
    for name, tensor in model.state_dict().items():
        if tensor.dim() == 2:
            scale = tensor.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
            rounded[name] = (tensor / scale).round() * scale
    return rounded
