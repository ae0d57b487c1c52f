"""What a stack's error is weighed by: the moments of what each slice reads."""

from __future__ import annotations

import torch
from torch import Tensor

from trawl.calibration.moments import HEAD, TOKENS, Moments
from trawl.decompose import Weights
from trawl.families import Placement
from trawl.stacking import READ_INNER, Stack

UNSEEN = 0.1  # occurrences of every token that are added to those counted
EMBED_SHARE = 0.01  # of the error of tied embeddings as such, beside their error as the head
DAMPING = 0.1  # of a moment of gradients' mean eigenvalue, added to each


def stack_weights(moments: Moments, stack: Stack) -> Weights:
    """Return the second moments that weigh a stack's error: the mean squared error of its outputs.

    A slice of q, k, v, gate or up reads the residual stream, one of o or down the inner side. A joined stack is one
    matrix and gets the mean of its slices' moments, which for slices of one layer is the moment of each. The other
    side has the moments of gradients, where there are some: how much the loss depends on each output. Those of
    ``kronecker`` are damped: gradients speak of small errors, and a direction that none has seen would be given up.
    Outside the layers rows are weighed by how often their tokens occur.

    Args:
        moments: of the stack's checkpoint.
        stack: its slices; those of one input get the same tensor.
    Returns: one moment a slice and side; none for an expert that saw no token.
    Raises: PlanError: a slice has no moment. LoadError: a file cannot be read any more.
    Cost: nothing for moments of inputs, which stay mapped from their files, but one matrix for slices joined over
        layers; one of (n, n) for each slice with ``kronecker`` moments, and one of (Σ inner, Σ inner) where joined.
    """
    if stack.slices[0].layer < 0:
        return _outside_weights(moments, stack.slices[0])
    keys = [moments.key(part) for part in stack.slices]
    matrices = {key: moments.moment(key).matrix for key in dict.fromkeys(keys) if key}
    outputs = [_damped(moments.outputs.matrix(part)) if moments.outputs else None for part in stack.slices]
    if stack.joined:
        return Weights((_independent(outputs),), (_mean(list(matrices.values())),))
    sides = [
        (matrices.get(key), output) if part.role in READ_INNER else (output, matrices.get(key))
        for part, key, output in zip(stack.slices, keys, outputs, strict=True)
    ]
    weights = Weights(inner=tuple(inner for inner, _ in sides), hidden=tuple(hidden for _, hidden in sides))
    return weights if moments.outputs else weights.balanced()  # gradients know how much each output counts


def _outside_weights(moments: Moments, part: Placement) -> Weights:
    """Return the moments that weigh the error of token embeddings, or of the head.

    A row counts as often as its token occurs, and a little if it never does. The head's error is that of its products.
    That of a matrix which is both is the sum, to which the embeddings add little: see docs/compression.md.
    """
    found = {moments.infos[name].name: moments.moment(name) for name in moments.names(part)}
    tokens = found[TOKENS]
    rows = (tokens.mean * tokens.tokens + UNSEEN) / (tokens.tokens + UNSEEN * len(tokens.mean))
    if HEAD not in found:
        return Weights((rows,), (None,))
    head = found[HEAD].matrix
    if part.role == "embed":
        head = head / head.diagonal().mean() + EMBED_SHARE * torch.eye(len(head))
    return Weights((rows,), (head,))


def _damped(gradients: Tensor | None) -> Tensor | None:
    """Return a moment of gradients with a share of its mean eigenvalue added to each; a diagonal as it is.

    Reference: Martens & Grosse 2015, arXiv:1503.05671, section 6.
    """
    if gradients is None or gradients.dim() == 1:
        return gradients
    damped = gradients.clone()
    damped.diagonal().add_(DAMPING * float(gradients.diagonal().double().mean()))
    return damped


def _independent(outputs: list[Tensor | None]) -> Tensor | None:
    """Return one moment of the outputs of joined slices, which are taken for independent; None where there is none."""
    known = [matrix for matrix in outputs if matrix is not None]
    if len(known) < len(outputs):
        return None
    if all(matrix.dim() == 1 for matrix in known):
        return torch.cat(known)
    joined: Tensor = torch.block_diag(*known)  # type: ignore[no-untyped-call]
    return joined


def _mean(matrices: list[Tensor]) -> Tensor | None:
    """Return the mean of moments, summed in float64; None where there are none."""
    if len(matrices) < 2:
        return matrices[0] if matrices else None
    total = torch.zeros_like(matrices[0], dtype=torch.float64)
    for matrix in matrices:
        total += matrix
    return (total / len(matrices)).float()
