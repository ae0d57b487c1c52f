"""The plug-in through which transformers' ``from_pretrained`` and ``save_pretrained`` know factored checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from trawl.checkpoint import DTYPES, TensorInfo, read_shard
from trawl.descriptor import METHOD, DescribedStack, Descriptor
from trawl.descriptor_reader import parse_descriptor
from trawl.errors import CheckpointError, LoadError
from trawl.hf.embedding import FactoredEmbedding
from trawl.hf.linear import FactoredLinear
from trawl.hf.narrowing import narrow_modules, widen_modules
from trawl.hf.replacement import Locate, check_loaded, install, lay_out, multiply_out, set_loading, stacks_of

LOADED_MARK = "_is_hf_initialized"  # transformers sets it on every parameter that it has loaded
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TrawlConfig(QuantizationConfigMixin):  # type: ignore[misc]  # transformers is not analysed
    """The ``quantization_config`` of a factored checkpoint."""

    def __init__(self, **fields: Any) -> None:
        self.quant_method = METHOD
        self.descriptor = parse_descriptor(fields, "config.json")

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Read the parsed JSON."""
        config = cls.__new__(cls)
        config.quant_method = METHOD
        config.descriptor = parse_descriptor(config_dict, "config.json")
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """Return the parsed JSON again."""
        return self.descriptor.to_json()


class TrawlQuantizer(HfQuantizer):  # type: ignore[misc]  # transformers is not analysed
    """Puts factored modules into the empty model before its weights are loaded, and checks them afterwards."""

    requires_calibration = False

    def validate_environment(self, *_args: Any, **_kwargs: Any) -> None:
        """Refuse what is no factored checkpoint: factors are made by trawl, not while a model is loaded."""
        if not self.pre_quantized:
            raise LoadError("quant_method trawl is for checkpoints that trawl has factored; run trawl compress first")

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, *, checkpoint_files: Sequence[str] | None = None, **_kwargs: Any
    ) -> None:
        """Compare descriptor and shards, then replace modules while the model is on the meta device."""
        descriptor = self.quantization_config.descriptor
        if checkpoint_files:
            descriptor.check_tensors(read_tensors(checkpoint_files), str(Path(checkpoint_files[0]).parent))
        locate = make_locate(model)
        narrow_modules(model, descriptor.narrow, locate)
        install(model, descriptor, locate)
        set_loading(model, True)
        _spare_owners(model)
        _check_names(model)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_kwargs: Any) -> PreTrainedModel:
        """Check that every factor has arrived.

        The weights are plain floats, so the model is not marked as quantized: ``.half()``, ``.float()`` and training
        stay open.
        """
        check_loaded(model, LOADED_MARK)
        set_loading(model, False)
        lay_out(model)
        model.is_quantized = False
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict[str, str]]:
        """Bring the descriptor up to date before the model is saved: names of its class, dtype of its factors."""
        config = model.config.quantization_config
        config.descriptor = current_descriptor(model, config.descriptor)
        return None, {}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        """Multiply every factored module out and drop the factors, and pad every narrow one."""
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype  # a saved model's config has its name
        widen_modules(model, self.quantization_config.descriptor.narrow, make_locate(model))
        multiply_out(model)
        return model if dtype is None else model.to(dtype)

    def is_serializable(self) -> bool:
        """Tell that ``save_pretrained`` works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Tell that factors have gradients."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Tell that ``generate`` may compile the model."""
        return True


def register() -> None:
    """Make transformers know factored checkpoints; once is enough, twice does no harm."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(TrawlConfig)
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(TrawlQuantizer)


def read_tensors(files: Sequence[str | Path]) -> dict[str, TensorInfo]:
    """Return every tensor of some shards from their headers.

    Raises: LoadError: a shard is truncated or unreadable.
    """
    try:
        return {info.name: info for file in files for info in read_shard(Path(file)).tensors}
    except (CheckpointError, OSError) as e:
        raise LoadError(str(e)) from e


def make_locate(model: PreTrainedModel) -> Locate:
    """Return transformers' own mapping from checkpoint names to the names of this model, base or with a head."""
    transforms = get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    state = model.state_dict()

    def locate(name: str) -> str:
        found, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if found not in state and name in state:
            found, pattern = rename_source_key(name, [], [], model.base_model_prefix, state)
        if pattern is not None:
            raise LoadError(
                f"tensor {name} is factored, but {type(model).__name__} merges it with others into {found}; "
                "write the checkpoint with --write dense"
            )
        return str(found)

    return locate


def _spare_owners(model: PreTrainedModel) -> None:
    """Mark as loaded what owns factored modules and nothing of its own to fill.

    Its class may have an initialization that reads its modules' weights, as BltMLP's does, and they are empty by now.
    """
    for module in model.modules():
        own = isinstance(module, PreTrainedModel) or [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if not own and any(isinstance(child, FactoredLinear) for child in module.children()):
            setattr(module, LOADED_MARK, True)


def _check_names(model: PreTrainedModel) -> None:
    """Require that transformers will load each factor to where it stands."""
    locate = make_locate(model)
    for path, stack in stacks_of(model).items():
        for factor, name in stack.description.factor_names.items():
            if locate(name) != f"{path}.{factor}":
                raise LoadError(f"{type(model).__name__} has no place for tensor {name} (expected at {path}.{factor})")


def current_descriptor(model: PreTrainedModel, before: Descriptor) -> Descriptor:
    """Describe a loaded model's stacks by the names and the dtype that ``save_pretrained`` gives them now.

    A base model saves its tensors without the prefix that a model with a head gives them, and ``.to(dtype)`` may have
    changed the factors.
    """
    stacks = stacks_of(model)
    keys = [f"{path}.left" for path in stacks]
    paths: dict[tuple[str, int], str] = {}
    embeddings_last = sorted(model.named_modules(), key=lambda item: isinstance(item[1], FactoredEmbedding))
    for path, module in embeddings_last:  # a tied head is saved as the embeddings
        if isinstance(module, FactoredLinear):
            paths |= {(part.stack.description.name, part.index): f"{path}.weight" for part in module.parts}
    locate = make_locate(model)
    narrow = {part: locate(part.tensor) for part in before.narrow}
    keys += [*dict.fromkeys(paths.values()), *narrow.values()]
    numbered = {key: torch.tensor(number) for number, key in enumerate(keys)}
    reverted = revert_weight_conversion(model, dict(numbered))
    names = {keys[int(number)]: name for name, number in reverted.items()}
    renewed: dict[str, DescribedStack] = {}
    for path, stack in stacks.items():
        name = stack.description.name
        slices = tuple(
            replace(part, tensor=names[paths[name, index]]) for index, part in enumerate(stack.description.slices)
        )
        prefix = names[f"{path}.left"].removesuffix(".left")
        renewed[name] = replace(stack.description, dtype=DTYPE_NAMES[stack.left.dtype], factors=prefix, slices=slices)
    shorter = tuple(replace(part, tensor=names[path]) for part, path in narrow.items())
    return Descriptor(tuple(renewed[stack.name] for stack in before.stacks), shorter)
