"""The model under evaluation with its tokenizer, and what the two can do together."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer

from trawl import gguf
from trawl.errors import LoadError, PlanError, suggestion
from trawl.evaluation.tasks import PairsTask, Task
from trawl.hf.load import check_folder, load
from trawl.models import OWN_CODE, no_bars, own_code_refused
from trawl.options import pick_device
from trawl.tokens import encode_plain, position_limit, prefix_tokens

DTYPES = {
    "auto": "auto",
    "float32": torch.float32,
    "f32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "f16": torch.float16,
}
ROLES = {
    "decoder": "a causal language model",
    "encoder": "an encoder, which predicts no next token",
    "encoder-decoder": "an encoder-decoder model",
}


@dataclass(frozen=True, eq=False)
class Subject:
    """A model and its tokenizer as one thing that reads text.

    Attributes:
        model: any transformers model.
        tokenizer: its tokenizer.
        context: the most tokens that the model may be fed at once; None where neither model nor tokenizer has a limit.
        batch_tokens: padded tokens in one batch; a longer text is a batch of its own.
    """

    model: Any
    tokenizer: Any
    context: int | None
    batch_tokens: int

    @cached_property
    def prefix(self) -> tuple[int, ...]:
        """Tokens that the tokenizer puts before every text, such as a beginning-of-sequence token."""
        return prefix_tokens(self.tokenizer)

    @cached_property
    def start(self) -> tuple[int, ...]:
        """Tokens that stand before a text of which the first token is scored.

        The prefix; without one the beginning-of-sequence or the end-of-sequence token, as lm-eval does; else nothing.
        """
        if self.prefix:
            return self.prefix
        tokens = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        return next(((token,) for token in tokens if token is not None), ())

    @cached_property
    def padding(self) -> int:
        """A token to fill batches with; never attended to."""
        token = getattr(self.model.config.get_text_config(), "pad_token_id", None)
        return token if isinstance(token, int) and 0 <= token < self._vocabulary else 0

    @cached_property
    def _vocabulary(self) -> int:
        return int(self.model.get_input_embeddings().weight.shape[0])

    @cached_property
    def _parameters(self) -> frozenset[str]:
        return frozenset(inspect.signature(self.model.forward).parameters)

    def takes(self, name: str) -> bool:
        """Whether the model can be called with an argument, such as ``logits_to_keep``."""
        return name in self._parameters

    @property
    def device(self) -> torch.device:
        """Where the model takes its input."""
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device

    def encode(self, text: str) -> list[int]:
        """Return a text's tokens behind the prefix, without what the tokenizer appends."""
        ids = self.encode_plain(text)
        return ids if self.prefix and tuple(ids[: len(self.prefix)]) == self.prefix else [*self.prefix, *ids]

    def encode_plain(self, text: str) -> list[int]:
        """Return a text's tokens without any that the tokenizer adds."""
        return encode_plain(self.tokenizer, text, self._vocabulary)

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the tokens of a context and of what continues it.

        Both are tokenised as one text and cut where the context's own tokens end, so that tokens have their usual
        place in a running text; blanks that end the context move to the continuation first. That is lm-eval's way.
        """
        kept = context.rstrip()
        continuation = context[len(kept) :] + continuation
        if not kept:
            if not self.start:
                raise PlanError("an empty prompt needs a tokenizer with a beginning- or end-of-sequence token")
            return list(self.start), self.encode_plain(continuation)
        before = self.encode(kept)
        return before, self.encode(kept + continuation)[len(before) :]


def open_subject(
    model: Any,
    tasks: Sequence[Task],
    *,
    tokenizer: Any = None,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    context: int | None = None,
    batch_tokens: int,
    trust_remote_code: bool = False,
) -> Subject:
    """Load the model, unless it is loaded, and check that it can do every task.

    Args: as those of :func:`trawl.evaluate`.
    Returns: the subject.

    Raises:
        PlanError: a task needs another kind of model, or the context is beyond the model's positions.
        LoadError: there is no such model or no tokenizer with it.
    """
    if isinstance(model, str | Path):
        pinned = _pinned(revision, trust_remote_code=trust_remote_code)
        model, tokenizer = _load(model, tasks, tokenizer, pinned, dtype=dtype, device=device)
    else:
        if tokenizer is None:
            raise PlanError("a loaded model needs its tokenizer; pass tokenizer=")
        if (dtype, device, revision, trust_remote_code) != ("auto", "auto", None, False):
            raise PlanError(
                "dtype, device, revision and trust_remote_code go with a path or hub id; convert a loaded model itself"
            )
        check_role(_role(model, model.config), tasks)
    limit = position_limit(model, tokenizer)
    if context is not None and limit is not None and context > limit:
        raise PlanError(f"context {context} is longer than the model's {limit} positions; pass at most {limit}")
    return Subject(model, tokenizer, context or limit, batch_tokens)


def check_loadable(path: Path, tasks: Sequence[Task], *, dtype: str, trust_remote_code: bool) -> None:
    """Raise before any weight is read what :func:`open_subject` of a folder is known to raise by then."""
    _check_dtype(dtype)
    _describe(path, path, tasks, None, _pinned(None, trust_remote_code=trust_remote_code))


def _pinned(revision: str | None, *, trust_remote_code: bool) -> dict[str, Any]:
    """Return the arguments of every call of transformers; where none says False, it asks on a terminal."""
    return {OWN_CODE: trust_remote_code} | ({} if revision is None else {"revision": revision})


def _check_dtype(dtype: str) -> None:
    """Raise for a dtype that no model can be loaded in."""
    if dtype not in DTYPES:
        raise PlanError(f"unknown dtype {dtype!r}{suggestion(dtype, DTYPES)}; expected {', '.join(DTYPES)}")


def _load(
    name: str | Path, tasks: Sequence[Task], tokenizer: Any, pinned: Mapping[str, Any], *, dtype: str, device: str
) -> tuple[Any, Any]:
    """Load model and tokenizer; what the configuration tells is checked before any weight is read."""
    _check_dtype(dtype)
    chosen = pick_device(device)
    path = Path(name)
    if path.suffix == ".gguf":
        path = gguf.converted(path)
    elif "revision" in pinned and path.exists():
        raise LoadError(f"revision {pinned['revision']} goes with a hub id; {name} is a local path")
    tokenizer = _describe(name, path, tasks, tokenizer, pinned)
    with no_bars():
        model: Any = load(path, dtype=DTYPES[dtype], **pinned)
    model.to(chosen).eval()
    check_role(_role(model, model.config), tasks)
    return model, tokenizer


def _describe(name: str | Path, path: Path, tasks: Sequence[Task], tokenizer: Any, pinned: Mapping[str, Any]) -> Any:
    """Check the configuration, and return the tokenizer."""
    config = _read_config(path, pinned)
    named = getattr(transformers, (config.architectures or [""])[0], None)
    if named is not None:
        check_role(_role(named, config), tasks)
    if tokenizer is not None:
        return tokenizer
    try:
        with own_code_refused(path):
            return AutoTokenizer.from_pretrained(str(path), **pinned)
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise LoadError(f"{name} has no usable tokenizer ({str(e).splitlines()[0]}); pass one in Python") from e


def _read_config(path: Path, pinned: Mapping[str, Any]) -> Any:
    """Read a folder's or a hub id's configuration, or say in one line why there is none."""
    if path.is_dir():
        check_folder(path)
    elif path.is_absolute() or len(path.parts) > 2 or path.exists():
        raise LoadError(f"no such folder: {path}; expected a checkpoint folder, a hub id, or a .gguf file")
    try:
        with own_code_refused(path):
            return AutoConfig.from_pretrained(str(path), **pinned)
    except (OSError, ValueError) as e:
        raise LoadError(
            f"{path} is no folder, and as a hub id gives no configuration: {str(e).strip().splitlines()[0]}"
            if not path.is_dir()
            else f"{path / 'config.json'}: {str(e).strip().splitlines()[0]}"
        ) from e


def _role(model: Any, config: Any) -> str:
    """Return what a model, or its class, is: decoder, encoder, or encoder-decoder."""
    if getattr(config, "is_encoder_decoder", False):
        return "encoder-decoder"
    return "decoder" if model.can_generate() else "encoder"


def check_role(role: str, tasks: Sequence[Task]) -> None:
    """Raise PlanError for a task that the model class cannot do."""
    for task in tasks:
        needed = "encoder" if isinstance(task, PairsTask) else "decoder"
        if role != needed:
            other = "ppl, qa, choice or lm" if role == "decoder" else "pairs"
            fix = "" if role == "encoder-decoder" else f"; this model can do {other} tasks"
            wanted = "an encoder" if needed == "encoder" else "a causal language model"
            raise PlanError(f"task {task.spec}: {task.kind} needs {wanted}, but the model is {ROLES[role]}{fix}")
