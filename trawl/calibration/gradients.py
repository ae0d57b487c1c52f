"""The gradient pass: how a loss on the calibration text depends on each slice's outputs, block by block."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save as serialize
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from trawl.calibration.block import Batch
from trawl.calibration.gathering import MomentSum
from trawl.calibration.moments import block_name
from trawl.calibration.outputs import output_file, slice_name
from trawl.calibration.products import expert_name
from trawl.calibration.streaming import BlockChain
from trawl.errors import CheckpointError, PlanError
from trawl.families import Placement
from trawl.observers import Observer, silent
from trawl.recipe import OutputWeighting
from trawl.shards import sealed
from trawl.stacking import READ_INNER

SCRATCH = "hidden"  # folder of the hidden states that enter each block, while the pass runs


@dataclass(eq=False)
class GradientSum:
    """Sums over the gradients of one block's products, split by slice.

    Attributes:
        kind: what is summed: δ δᵀ, or the squares of each row of the weight's gradient.
        slices: by product, the slices with the places of their outputs among the product's.
        moments: sums of ``kronecker`` by slice.
        rows: sums of ``fisher`` by slice, in float64.
    """

    kind: OutputWeighting
    slices: Mapping[str, Mapping[str, Tensor]]
    moments: dict[str, MomentSum] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)

    def see(self, product: str, x: Tensor, gradient: Tensor) -> None:
        """Take the input and the gradient of the output of one product, of one window."""
        x, gradient = x.flatten(0, -2).float(), gradient.flatten(0, -2).float()
        for name, places in self.slices.get(product, {}).items():
            part = gradient[:, places]  # (tokens, n)
            if self.kind == "kronecker":
                self.moments.setdefault(name, MomentSum.of_width(len(places), part.device)).add(part)
            else:
                squares = (part.T @ x).square().sum(1, dtype=torch.float64)
                self.rows[name] = self.rows[name].add_(squares) if name in self.rows else squares

    def means(self, layer: int, windows: int) -> dict[str, Tensor]:
        """Return the means in float32, over tokens or over windows, freeing the sums.

        Raises: CheckpointError: one is not finite.
        """
        means = {name: (total / windows).float().cpu() for name, total in self.rows.items()}
        means |= {name: self.moments.pop(name).matrix() for name in list(self.moments)}
        for name, mean in means.items():
            if not torch.isfinite(mean.sum()):
                raise CheckpointError(
                    f"layer {layer}: the gradient of the loss on the calibration text by the output of {name} is not "
                    "finite; check the weights from there on, or leave --output-weighting out"
                )
        return means


def gather_gradients(
    chain: BlockChain,
    windows: Tensor,
    placements: Sequence[Placement],
    folder: Path,
    kind: OutputWeighting,
    *,
    observer: Observer = silent,
) -> dict[str, int]:
    """Go forward and back through a model and write the output moments of each block into a sealed file.

    The loss is the next-token cross-entropy, summed over each window. The hidden states that enter each block wait on
    disk until the way back; the gradients of all windows are carried on from block to block.

    Args:
        chain: the model.
        windows: token ids, (windows, length).
        placements: the slices of the model.
        folder: made if absent; block files of this kind in it are replaced.
        kind: ``fisher`` or ``kronecker``, see :mod:`trawl.calibration.outputs`.
        observer: told of progress, in windows times blocks, both ways.
    Returns: block by name of slice.
    Raises: PlanError: the model predicts no next tokens, or the disk is too small. CheckpointError: the loss or a
        gradient is not finite; the message names the layer.
    Cost: about four forward passes and the head's product, and tokens · n² operations a slice. Memory: one block in
        float32 with the activations of one window, its sums, the gradients of all windows, and the head with one
        window's logits. Disk: blocks · tokens · hidden floats while it runs.
    """
    check_causal(chain.model)
    total = 2 * len(chain) * len(windows)
    with _scratch(folder, chain, windows) as scratch:
        batches = chain.enter(list(windows[:, None]))
        for number in range(len(chain)):
            batches = _forward(chain, number, batches, scratch / block_name(number))
            observer("calibrating outputs", (number + 1) * len(windows), total)
        gradients = _loss_gradients(chain, batches, windows)
        blocks: dict[str, int] = {}
        for number in reversed(range(len(chain))):
            members = [part for part in placements if part.layer == number]
            sums = GradientSum(kind, _slices_of_products(chain, number, members))
            gradients = _back(chain, number, batches, scratch / block_name(number), gradients, sums)
            means = sums.means(number, len(windows))
            with sealed(folder / output_file(kind, number)) as file:
                file.write(serialize(means))
            blocks |= dict.fromkeys(means, number)
            observer("calibrating outputs", total - number * len(windows), total)
    return blocks


def scratch_bytes(blocks: int, tokens: int, hidden: int) -> int:
    """Return the bytes of the hidden states that wait on disk."""
    return 4 * blocks * tokens * hidden


def check_causal(model: PreTrainedModel) -> None:
    """Raise PlanError for a model that does not predict the next token."""
    name = type(model).__name__
    if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise PlanError(
            f"{name} predicts no next token, whose loss weighs a layer's outputs; pass --output-weighting none"
        )


@contextmanager
def _scratch(folder: Path, chain: BlockChain, windows: Tensor) -> Iterator[Path]:
    """Hold a folder for hidden states.

    Raises: PlanError: the disk is too small for them.
    """
    scratch = folder / SCRATCH
    shutil.rmtree(scratch, ignore_errors=True)  # of a pass that was killed
    folder.mkdir(parents=True, exist_ok=True)
    scratch.mkdir(mode=0o700)
    try:
        needed = scratch_bytes(len(chain), windows.numel(), chain.model.config.get_text_config().hidden_size)
        if (free := shutil.disk_usage(scratch).free) < needed:
            raise PlanError(
                f"output weighting keeps {needed / 1e9:.1f} GB of hidden states in {folder} while it runs, and "
                f"{free / 1e9:.1f} GB are free there; lower --calibration-tokens, or give a --moments folder elsewhere"
            )
        yield scratch
    finally:
        shutil.rmtree(scratch)


def _forward(chain: BlockChain, number: int, batches: Sequence[Batch], entered: Path) -> list[Batch]:
    """Run batches through a block, leaving the hidden states that enter it in a file."""
    save_file({str(place): batch.hidden.contiguous() for place, batch in enumerate(batches)}, entered)
    with chain.loaded(number) as block:
        return [block.run(batch) for batch in batches]


def _back(  # noqa: PLR0917 (all that one block needs)
    chain: BlockChain, number: int, batches: Sequence[Batch], entered: Path, gradients: list[Tensor], sums: GradientSum
) -> list[Tensor]:
    """Return the gradients by the hidden states that enter a block, from those by the ones that leave it."""
    with safe_open(entered, framework="pt", device=str(chain.device)) as hidden, chain.loaded(number) as block:
        entering = (replace(batch, hidden=hidden.get_tensor(str(place))) for place, batch in enumerate(batches))
        gradients = [block.back(batch, gradient, sums.see) for batch, gradient in zip(entering, gradients, strict=True)]
    entered.unlink()
    return gradients


def _loss_gradients(chain: BlockChain, batches: Sequence[Batch], windows: Tensor) -> list[Tensor]:
    """Return the gradients of each window's loss by the hidden states that leave the last block."""
    gradients: list[Tensor] = []
    with chain.outer_weights():
        for batch, ids in zip(batches, windows.to(chain.device), strict=True):
            hidden = batch.hidden.detach().requires_grad_()
            logits = chain.leave(replace(batch, hidden=hidden)).logits[0]
            loss = functional.cross_entropy(logits[:-1].float(), ids[1:], reduction="sum")
            if not torch.isfinite(loss):
                raise CheckpointError(
                    f"{chain.checkpoint.folder}: the loss on the calibration text is {loss.item()}; expected a finite "
                    "one. Check the weights of the final norm and the head"
                )
            gradients += torch.autograd.grad(loss, hidden)
    return gradients


def _slices_of_products(
    chain: BlockChain, number: int, placements: Sequence[Placement]
) -> dict[str, dict[str, Tensor]]:
    """Return by product of a block the slices that its outputs belong to, with the places of each slice's outputs.

    Stored tensors may be cut into slices in one way, and merged or turned by transformers in another. So they are
    filled with numbers, one an output of a slice, and loaded: the weights then say where each output went.
    """
    starts = list(accumulate((part.shape[part.role in READ_INNER] for part in placements), initial=0))
    numbered: dict[str, Tensor] = {}
    for part, start, stop in zip(placements, starts, starts[1:], strict=False):
        if part.tensor not in numbered:
            numbered[part.tensor] = torch.full(chain.checkpoint.tensors[part.tensor].shape, -1.0)
        numbers = torch.arange(float(start), float(stop))  # exact up to 2²⁴ outputs
        columns = numbers if part.role in READ_INNER else numbers[:, None]
        part.view.scatter(columns.expand(part.shape), numbered[part.tensor])
    weights = chain.weights_of(number)
    products = {name for tensor in numbered for name in weights[tensor]}
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    with chain.loaded(number, numbered) as block:
        for name, matrix in _matrices(block.layer.named_parameters()):
            if name not in products:
                continue
            column, row = matrix[:, 0], matrix[0]
            outputs = (column if (column != column[0]).any() else row).long()
            for part, start, stop in zip(placements, starts, starts[1:], strict=False):
                places = ((outputs >= start) & (outputs < stop)).nonzero()[:, 0]
                if len(places):
                    found[name][slice_name(part)] = places[outputs[places].argsort()]
    return found


def _matrices(weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield matrices as products tell them: those of 3-D weights expert by expert."""
    for name, weight in weights:
        if weight.dim() == 2:
            yield name, weight
        elif weight.dim() == 3:
            yield from ((expert_name(name, expert), part) for expert, part in enumerate(weight))
