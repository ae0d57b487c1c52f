"""The calibration pass: second moments of the input of every linear layer, block by block, into a folder."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import save as serialize
from torch import Tensor

from trawl.calibration.block import Batch, Block
from trawl.calibration.moments import HEAD, TOKENS, MomentInfo, block_name
from trawl.calibration.streaming import BlockChain
from trawl.errors import CheckpointError
from trawl.observers import Observer, silent
from trawl.shards import sealed

LOG = logging.getLogger("trawl.calibration")
BATCH_TOKENS = 4096
PANEL = 192  # columns; only the lower triangle of blocks this wide is multiplied


@dataclass(eq=False)
class MomentSum:
    """Σ x xᵀ and Σ x over tokens: products of each batch in float32, their sums in float64.

    Attributes:
        panels: rows of the lower triangle, (rows, columns up to their last) each.
        total: Σ x, (n,).
        tokens: how many.
    """

    panels: list[Tensor]
    total: Tensor
    tokens: int = 0

    @classmethod
    def of_width(cls, width: int, device: torch.device) -> MomentSum:
        """Return the sum of no tokens."""
        panels = [torch.zeros(b - a, b, dtype=torch.float64, device=device) for a, b in _panels(width)]
        return cls(panels, torch.zeros(width, dtype=torch.float64, device=device))

    def add(self, x: Tensor) -> None:
        """Add the rows of x, (tokens, n).

        Cost: a little over tokens · n² operations, half of the whole product's.
        """
        for panel, (a, b) in zip(self.panels, _panels(x.shape[1]), strict=True):
            panel.add_(x[:, a:b].T @ x[:, :b])
        self.total += x.sum(0)
        self.tokens += len(x)

    def matrix(self, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Tensor:
        """Return E[x xᵀ] whole, (n, n), and free the sums; zeros without tokens."""
        width = len(self.total)
        whole = torch.empty(width, width, dtype=dtype, device=device)
        for a, b in reversed(_panels(width)):
            rows = self.panels.pop() / max(self.tokens, 1)
            whole[a:b, :b] = rows
            whole[:b, a:b] = rows.T
        return whole

    def mean(self) -> Tensor:
        """Return E[x], (n,) in float64."""
        return self.total.cpu() / max(self.tokens, 1)


@dataclass(eq=False)
class Gathering:
    """What the weights of one block are given, summed up; weights that are given the same tensor share one sum.

    Attributes:
        sums: by the name of the first weight that was given a tensor.
        first: by a weight's name, the name of that first one.
    """

    sums: dict[str, MomentSum] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)
    _given: dict[tuple[int, int, torch.Size], tuple[str, Tensor]] = field(default_factory=dict)  # in the current run

    def run(self, block: Block, batch: Batch) -> Batch:
        """Run a batch through a block and add what its weights are given.

        Raises: CheckpointError: something that is not finite enters a weight or leaves the block.
        """
        batch = block.run(batch, self._see)
        self._given.clear()
        if not torch.isfinite(batch.hidden.sum()):
            raise CheckpointError(
                f"layer {block.number} gives NaN or Inf for a calibration text of finite input; check its weights"
            )
        return batch

    def _see(self, name: str, x: Tensor) -> None:
        """Take the input of one product."""
        rows = x.reshape(-1, x.shape[-1])
        key = x.data_ptr(), x._version, rows.shape  # noqa: SLF001 (torch has no public name for a tensor's changes)
        same, _ = self._given.setdefault(key, (name, x))  # x is kept, so that no other tensor gets its address
        first = self.first.setdefault(name, same)
        if first == name:
            self.sums.setdefault(name, MomentSum.of_width(rows.shape[1], rows.device)).add(rows.float())

    def check(self, layer: int) -> None:
        """Raise CheckpointError for a sum that is not finite."""
        for name, found in self.sums.items():
            if not torch.isfinite(found.total).all() or not all(panel.isfinite().all() for panel in found.panels):
                raise CheckpointError(
                    f"layer {layer}: the input of {name} holds NaN or Inf on the calibration text; expected finite "
                    "activations. Check the weights before it"
                )


def gather(
    chain: BlockChain, windows: Tensor, folder: Path, observer: Observer = silent
) -> tuple[dict[str, MomentInfo], dict[str, tuple[str, ...]]]:
    """Run windows through a model and write the moments of each block into a sealed file.

    E[x xᵀ] = (1 / tokens) Σ x xᵀ over all tokens that a weight was given, not centred; E[x] beside it.

    Args:
        chain: the model.
        windows: token ids, (windows, length).
        folder: made if absent; block files in it are replaced.
        observer: told of progress, in batches times blocks.
    Returns: the moments by name, and the names of moments by stored tensor: one, or one an expert.
    Raises: CheckpointError: a weight is given NaN or Inf; the message names layer and weight. PlanError: the model
        cannot be run block by block.
    Cost: a forward pass without the head, and tokens · n² operations for each input of width n. Memory: one block in
        float32, its moments in float64 (half of each), the hidden states of all windows in float32.
    """
    folder.mkdir(parents=True, exist_ok=True)
    per_batch = max(BATCH_TOKENS // windows.shape[1], 1)
    batches = chain.enter([windows[first : first + per_batch] for first in range(0, len(windows), per_batch)])
    moments: dict[str, MomentInfo] = {}
    inputs: dict[str, tuple[str, ...]] = {}
    for number in range(len(chain)):
        gathering = Gathering()
        with chain.loaded(number) as block:
            for place, batch in enumerate(batches):
                batches[place] = gathering.run(block, batch)
                observer("calibrating", number * len(batches) + place + 1, len(chain) * len(batches))
            weights = chain.weights_of(number)
        gathering.check(number)
        for name, found in gathering.sums.items():
            moments[f"{number}.{name}"] = MomentInfo(number, name, len(found.total), found.tokens)
        inputs |= _inputs(number, weights, gathering.first)
        _write(folder / block_name(number), gathering.sums)
    _warn(moments, windows.numel())
    outside = _gather_outside(chain, batches, windows, folder)
    return moments | outside[0], inputs | outside[1]


def _gather_outside(
    chain: BlockChain, batches: Sequence[Batch], windows: Tensor, folder: Path
) -> tuple[dict[str, MomentInfo], dict[str, tuple[str, ...]]]:
    """Write the moments of what stands around the blocks: how often each token occurs, and the input of the head."""
    number, embeddings, head = len(chain), chain.model.get_input_embeddings(), chain.model.get_output_embeddings()
    counts = torch.bincount(windows.flatten(), minlength=embeddings.num_embeddings).double()
    shares = counts / windows.numel()
    tensors = {f"{TOKENS}.matrix": shares.float(), f"{TOKENS}.mean": shares}
    moments = {f"{number}.{TOKENS}": MomentInfo(number, TOKENS, len(shares), windows.numel(), diagonal=True)}
    inputs: dict[str | None, tuple[str, ...]] = {chain.stored_weight(embeddings): (f"{number}.{TOKENS}",)}
    if head is not None:
        with chain.outer_weights(without=head):
            given = [chain.head_input(batch).flatten(0, -2) for batch in batches]
        total = MomentSum.of_width(given[0].shape[1], given[0].device)
        for rows in given:
            total.add(rows)
        moments[f"{number}.{HEAD}"] = MomentInfo(number, HEAD, len(total.total), total.tokens)
        tensors |= {f"{HEAD}.mean": total.mean(), f"{HEAD}.matrix": total.matrix()}
        inputs[chain.stored_weight(head)] = (f"{number}.{TOKENS}", f"{number}.{HEAD}")
    with sealed(folder / block_name(number)) as file:
        file.write(serialize(tensors))
    return moments, {tensor: names for tensor, names in inputs.items() if tensor is not None}


def _inputs(
    number: int, weights: Mapping[str, tuple[str, ...]], first: Mapping[str, str]
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield by stored tensor the names of the moments of its inputs; an expert without tokens has an empty name."""
    for tensor, names in weights.items():
        if any(name in first for name in names):
            yield tensor, tuple(f"{number}.{first[name]}" if name in first else "" for name in names)


def _write(path: Path, sums: dict[str, MomentSum]) -> None:
    """Write one block's moments, freeing each sum when it is converted."""
    tensors: dict[str, Tensor] = {}
    for name in list(sums):
        found = sums.pop(name)
        tensors[f"{name}.mean"] = found.mean()
        tensors[f"{name}.matrix"] = found.matrix()
    with sealed(path) as file:
        file.write(serialize(tensors))


def _warn(moments: Mapping[str, MomentInfo], tokens: int) -> None:
    """Say of which inputs too few tokens were seen to know their moments, and how many would do."""
    few = [info for info in moments.values() if info.tokens < info.width]
    if few:
        worst = max(few, key=lambda info: info.width / info.tokens)
        LOG.warning(
            "%d of %d inputs have more features than they were given tokens; worst, layer %d %s has %s and was given "
            "%s. Their moments are rough; about %s --calibration-tokens are needed",
            len(few),
            len(moments),
            worst.block,
            worst.name,
            f"{worst.width:,}",
            f"{worst.tokens:,}",
            f"{-(-tokens * worst.width // worst.tokens):,}",
        )


def _panels(width: int) -> Sequence[tuple[int, int]]:
    """Return the rows that each panel covers."""
    return list(pairwise([*range(0, width, PANEL), width]))
