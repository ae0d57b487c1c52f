"""A model run block by block: one block's weights in memory at a time, the hidden states of all windows carried on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from trawl.calibration.block import Batch, Block, Call
from trawl.calibration.products import expert_name
from trawl.checkpoint import Checkpoint
from trawl.errors import CheckpointError, PlanError
from trawl.families import FamilyMatch
from trawl.models import Forward, around, empty_model, find_layers, no_bars

WITHOUT = "give cp, tucker or svd a --rank without --calibrate, which runs no model"  # narrow and budgets always do
ADDED = 1e-3  # relative difference up to which an output counts as added to the residual stream
REFUSALS = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)


class _Entered(BaseException):
    """Raised where the last block would run: nothing after it is wanted. No model code catches it."""


@dataclass(frozen=True, eq=False)
class BlockChain:
    """A checkpoint's model as a chain of blocks.

        chain = open_chain(checkpoint, match)
        batches = chain.enter(windows)
        for number in range(len(chain)):
            with chain.loaded(number) as block:
                batches = [block.run(batch, see) for batch in batches]

    Two streams of batches may go through the same blocks, each with weights of its own.

    Attributes:
        checkpoint: where the weights are.
        model: on the meta device but for the block that is loaded.
        layers: its blocks, in order.
        paths: their names in the model.
        device: where to compute, in float32.
        low: whether its blocks multiply in bfloat16.
    """

    checkpoint: Checkpoint
    model: PreTrainedModel
    layers: tuple[nn.Module, ...]
    paths: tuple[str, ...]
    device: torch.device
    _places: Mapping[str, tuple[str, str | None]] = field(repr=False)  # of stored tensors in the model, see _locate
    low: bool = False

    def __len__(self) -> int:
        """Return the number of blocks."""
        return len(self.layers)

    def enter(self, windows: Sequence[Tensor]) -> list[Batch]:
        """Run what stands before the first block, and note how the model calls its blocks.

        The model's own forward function runs with blocks that hand on what they are given.

        Args:
            windows: token ids, (windows, length) each.
        Raises: PlanError: the model is not a chain of blocks that can be run one by one.
        """
        first_error: Exception | None = None
        for as_tuple in (False, True):  # what its blocks return is the model's own business
            try:
                with self.outer_weights():
                    known: list[Tensor] = []
                    return [self._enter(ids, as_tuple=as_tuple, known=known) for ids in windows]
            except REFUSALS as e:
                first_error = first_error or e
        raise PlanError(
            f"{type(self.model).__name__} cannot be run block by block, as calibration does: {first_error}; {WITHOUT}"
        ) from first_error

    @torch.no_grad()
    def _enter(self, ids: Tensor, *, as_tuple: bool, known: list[Tensor]) -> Batch:
        """Run one batch up to its first block."""
        calls: list[Call] = []
        latest: list[Tensor] = []
        last = len(self.layers) - 1

        def skip(number: int, _: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden, args, kwargs = _take_hidden(args, kwargs)
            if number != len(calls) or (latest and hidden is not latest[0]):
                raise ValueError(
                    f"something happens to the hidden states between its blocks {len(calls) - 1} and {number}"
                )
            latest[:] = [hidden]
            calls.append(Call(*tree_map_only(Tensor, partial(_shared, known), (args, kwargs))))
            if number == last:
                raise _Entered
            return (hidden,) if as_tuple else hidden

        with ExitStack() as stack:
            for number, layer in enumerate(self.layers):
                stack.enter_context(around(layer, partial(skip, number)))
            try:
                self.model(input_ids=ids.to(self.device))
            except _Entered:
                return Batch(latest[0].to(torch.float32), tuple(calls))
        raise ValueError(f"it runs {len(calls)} of its {len(self.layers)} blocks")

    def leave(self, batch: Batch) -> Any:
        """Run what stands after the last block, such as the final norm and the head; within ``outer_weights``.

        The model's own forward function runs with blocks that hand on what leaves the last one; its embeddings are not
        read.

        Returns: the model's output, such as one with ``logits``, differentiable by the batch's hidden states.
        """

        def hand_on(*_: Any) -> Any:
            return (batch.hidden,) if batch.as_tuple else batch.hidden

        width = self.model.get_input_embeddings().embedding_dim
        with ExitStack() as stack:
            for layer in self.layers:
                stack.enter_context(around(layer, hand_on))
            return self.model(inputs_embeds=batch.hidden.new_zeros(*batch.hidden.shape[:2], width))

    @torch.no_grad()
    def head_input(self, batch: Batch) -> Tensor:
        """Return what the head multiplies, (windows, length, n), without multiplying; within ``outer_weights``."""
        given: list[Tensor] = []

        def stop(_: Forward, args: tuple[Any, ...], __: Any) -> Any:
            given.append(args[0])
            raise _Entered

        with around(self.model.get_output_embeddings(), stop), suppress(_Entered):
            self.leave(batch)
        return given[0]

    def stored_weight(self, module: nn.Module) -> str | None:
        """Return the stored tensor that is the weight of a module around the blocks: its own, or one it is tied to."""
        weight = next(f"{path}.weight" for path, other in self.model.named_modules() if other is module)
        stored = {place: name for name, (place, _) in self._places.items()}
        return stored.get(weight) or stored.get(self.model.all_tied_weights_keys.get(weight, ""))

    def stored_parameters(self, module: nn.Module) -> dict[str, str]:
        """Return the stored tensors of a module around the blocks by its parameters' names, if stored as they are."""
        path = next(path for path, other in self.model.named_modules() if other is module)
        stored = {place: name for name, (place, pattern) in self._places.items() if pattern is None}
        named = {name: stored.get(f"{path}.{name}") for name, _ in module.named_parameters()}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @contextmanager
    def outer_weights(self, without: nn.Module | None = None) -> Iterator[None]:
        """Load what stands around the blocks, such as embeddings, when it is first used, and drop it afterwards."""
        inside = {without, *(module for layer in self.layers for module in layer.modules())}
        with ExitStack() as stack:
            for path, module in self.model.named_modules():
                if module in inside or not any(True for _ in module.parameters(recurse=False)):
                    continue
                names = [f"{path}.{name}" if path else name for name, _ in module.named_parameters(recurse=False)]

                def load(module: nn.Module, _: Any, names: Sequence[str] = names) -> None:
                    if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
                        stack.enter_context(_put_back(module, recurse=False))
                        stored = [name for name, (place, _) in self._places.items() if place in names]
                        copies = self._copies(names)
                        self._load([*stored, *copies], copies)
                        module.requires_grad_(requires_grad=False)
                        self._require(dict(module.named_parameters(recurse=False)), names[0].rpartition(".")[0])

                stack.callback(module.register_forward_pre_hook(load).remove)
            yield

    def _copies(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Read tied weights: those of these names in the model that are stored under another's name."""
        tied = self.model.all_tied_weights_keys
        stored = {place: name for name, (place, _) in self._places.items()}
        return {
            name: self.checkpoint.read(stored[tied[name]])
            for name in names
            if name not in stored and tied.get(name) in stored
        }

    @contextmanager
    def loaded(self, number: int, changed: Mapping[str, Tensor] | None = None) -> Iterator[Block]:
        """Hold one block's weights in memory in a ``with`` block.

        Args:
            number: which.
            changed: stored tensors by name to use in place of the checkpoint's; those of other blocks do no harm.
        Raises: CheckpointError: a tensor of the block is missing, or has another shape than the model.
        Cost: nothing for tensors that are stored in float32 and are used as they are: they stay mapped from the file.
        """
        layer, path = self.layers[number], self.paths[number]
        with _put_back(layer, recurse=True):
            self._load(self.tensors(number), changed or {})
            self._require(layer.state_dict(), path)
            yield Block(number, layer, self.low)

    def adds(
        self,
        number: int,
        batch: Batch,
        product: tuple[str, Tensor],
        without: Mapping[str, Tensor],
        silent: Mapping[str, Tensor] | None = None,
    ) -> bool:
        """Whether what a weight gives is added to the residual stream as it is, with no norm behind it.

        Taking the matrix away must take away just its output.

        Args:
            number: of the block.
            batch: any that the block can be run on.
            product: a weight's name, as :meth:`Block.run` tells it, and what its input is multiplied by, (in, hidden).
            without: stored tensors that take it away.
            silent: stored tensors that silence what reads the stream behind it.
        """
        name, matrix = product
        seen: dict[str, Tensor] = {}
        with self.loaded(number, silent) as block:
            whole = block.run(batch, seen.__setitem__)
        with self.loaded(number, {**(silent or {}), **without}) as block:
            rest = block.run(batch)
        added = seen[name].flatten(0, -2) @ matrix.to(seen[name])
        surplus = torch.linalg.vector_norm((whole.hidden - rest.hidden).flatten(0, -2) - added)
        return bool(surplus <= ADDED * torch.linalg.vector_norm(added))

    def tensors(self, number: int) -> list[str]:
        """Return the names of the stored tensors of one block."""
        return [name for name, (place, _) in self._places.items() if place.startswith(f"{self.paths[number]}.")]

    def weights_of(self, number: int) -> dict[str, tuple[str, ...]]:
        """Return the names, as :meth:`Block.run` tells them, of what each stored tensor of a loaded block became.

        One for most; one an expert for a tensor that holds all experts.
        """
        groups: dict[tuple[str, str | None], list[str]] = defaultdict(list)
        for name in sorted(self.tensors(number), key=dot_natural_key):  # the order in which experts are merged
            groups[self._places[name]].append(name)
        start = len(self.paths[number]) + 1
        found: dict[str, tuple[str, ...]] = {}
        for (place, _), names in groups.items():
            weight = self.model.get_parameter_or_buffer(place)
            if weight.dim() != 3:
                found |= dict.fromkeys(names, (place[start:],))
            elif len(names) == len(weight):
                found |= {name: (expert_name(place[start:], expert),) for expert, name in enumerate(names)}
            else:
                every = tuple(expert_name(place[start:], expert) for expert in range(len(weight)))
                found |= dict.fromkeys(names, every)
        return found

    def _require(self, weights: Mapping[str, Tensor], path: str) -> None:
        """Raise CheckpointError for a weight that the checkpoint does not have."""
        if missing := next((name for name, value in weights.items() if value.is_meta), None):
            raise CheckpointError(f"{self.checkpoint.folder} has no tensor for {path}.{missing} of the model")

    def _load(self, names: Iterable[str], changed: Mapping[str, Tensor]) -> None:
        """Put stored tensors into the model by transformers' own conversion."""
        tensors = {name: changed[name] if name in changed else self.checkpoint.read(name) for name in names}
        mapping = get_model_conversion_mapping(self.model)
        config = LoadStateDictConfig(device_map={"": self.device}, dtype=torch.float32, weight_mapping=mapping)
        with no_bars():
            info, _ = convert_and_load_state_dict_in_model(self.model, tensors, config)
        for name, found, expected in info.mismatched_keys:
            raise CheckpointError(
                f"{self.checkpoint.folder}: {name} is {tuple(found)}; {type(self.model).__name__} expects "
                f"{tuple(expected)}. Weights and config.json do not belong together"
            )
        for name, reason in info.conversion_errors.items():
            raise CheckpointError(f"{self.checkpoint.folder}: transformers cannot convert {name}: {reason}")


def open_chain(checkpoint: Checkpoint, match: FamilyMatch, device: torch.device) -> BlockChain:
    """Build a checkpoint's model without its weights.

    Args:
        checkpoint: dense; a folder on disk.
        match: its family.
        device: where to compute.
    Raises: PlanError: the model is no chain of blocks. LoadError: transformers does not know it. FamilyError: its
        layers are not where their tensors' names say.
    Cost: reads config.json.
    """
    model = empty_model(checkpoint.folder, checkpoint.config, device)
    if getattr(model.config, "is_encoder_decoder", False):
        raise PlanError(
            f"{type(model).__name__} is an encoder-decoder model: two chains of blocks, of which the second needs a "
            f"text of its own; calibration knows decoders and encoders only; {WITHOUT}"
        )
    if len(match.towers) > 1 or not isinstance(model.get_input_embeddings(), nn.Embedding):
        found = ", ".join(match.towers) if len(match.towers) > 1 else "layers that read no tokens"
        raise PlanError(
            f"{type(model).__name__} has {found}: calibration passes a text through one chain of blocks behind token "
            f"embeddings; {WITHOUT}"
        )
    model.config.get_text_config().use_cache = False
    places = _locate(model, checkpoint.tensors)
    placements = tuple(replace(part, tensor=places[part.tensor][0]) for part in match.placements)
    layers = find_layers(model, replace(match, placements=placements))
    paths = {module: path for path, module in model.named_modules()}
    return BlockChain(checkpoint, model, layers, tuple(paths[layer] for layer in layers), device, places)


def _locate(model: PreTrainedModel, names: Iterable[str]) -> dict[str, tuple[str, str | None]]:
    """Return where transformers puts stored tensors: the (first) name in the model, and by which conversion."""
    transforms = get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    state = model.state_dict()
    places = {}
    for name in names:
        place, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if place not in state and name in state:
            place, pattern = rename_source_key(name, [], [], model.base_model_prefix, state)
        places[name] = (str(place), pattern)
    return places


@contextmanager
def _put_back(module: nn.Module, *, recurse: bool) -> Iterator[None]:
    """Put a module's parameters and buffers back when a ``with`` block ends."""
    modules = list(module.modules()) if recurse else [module]
    before = [(each, dict(each._parameters), dict(each._buffers)) for each in modules]  # noqa: SLF001 (no public view)
    try:
        yield
    finally:
        for each, parameters, buffers in before:
            each._parameters.update(parameters)  # noqa: SLF001 (likewise)
            each._buffers.update(buffers)  # noqa: SLF001 (likewise)


def _take_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """Split the hidden states from a block's other arguments."""
    if args:
        return args[0], args[1:], kwargs
    return kwargs["hidden_states"], (), {name: value for name, value in kwargs.items() if name != "hidden_states"}


def _shared(known: list[Tensor], tensor: Tensor) -> Tensor:
    """Return an equal tensor that is kept already, or keep this one: batches have the same masks and positions."""
    for other in known:
        if other.dtype == tensor.dtype and other.shape == tensor.shape and torch.equal(other, tensor):
            return other
    known.append(tensor)
    return tensor
