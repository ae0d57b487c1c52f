"""Where a run's moments come from: a text, a folder, or a text whose moments a folder keeps."""

from __future__ import annotations

import hashlib
import math
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from trawl.calibration.moments import RECORD, Identity, Moments, write_record
from trawl.calibration.outputs import write_output_record
from trawl.calibration.text import RANDOM_TOKENS, Specs, Text, cut_windows, random_windows, read_texts, specs_of
from trawl.checkpoint import Checkpoint
from trawl.errors import LoadError, PlanError
from trawl.families import FamilyMatch
from trawl.observers import Observer, silent
from trawl.processor import multiplies_bfloat16
from trawl.recipe import Compute, OutputWeighting
from trawl.stacking import READ_ALIKE, READ_INNER
from trawl.tokens import encode_plain, position_limit, prefix_tokens

WINDOW = 1024
DEFAULT_TOKENS = 128 * WINDOW
GRADIENT_WINDOWS = 32  # at most, spread over the text: what weighs the outputs needs fewer than what is fitted to
CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class Calibration:
    """A text that a model is to be calibrated on.

    Attributes:
        checkpoint: the model; dense.
        match: its family.
        text: the text, or several.
        tokens: of each to run through the model, at most.
        device: where to compute.
        output_weighting: which moments of gradients are made beside those of the inputs.
        compute: what products are formed in.
    """

    checkpoint: Checkpoint
    match: FamilyMatch
    text: Text
    tokens: int
    device: torch.device
    output_weighting: OutputWeighting = "none"
    compute: Compute = "float32"

    @cached_property
    def chain(self) -> Any:
        """The model as a chain of blocks, a :class:`trawl.calibration.streaming.BlockChain`."""
        from trawl.calibration.streaming import open_chain  # noqa: PLC0415 (transformers' model code: a second)

        return open_chain(self.checkpoint, self.match, self.device)

    @property
    def _quick_chain(self) -> Any:
        """The same with blocks that multiply in bfloat16, where that is asked for and the device has units for it."""
        return replace(self.chain, low=self.compute == "bf16" and multiplies_bfloat16(self.device))

    @cached_property
    def windows(self) -> torch.Tensor:
        """Token ids, (windows, length).

        Raises: PlanError: the text is too short, or the tokenizer is of another model. LoadError: there is none.
        """
        model = self.chain.model
        if self.text is RANDOM_TOKENS:
            length = min(WINDOW, self.tokens, position_limit(model, None) or WINDOW)
            return random_windows(self.tokens // length, length, model.get_input_embeddings().weight.shape[0])
        tokenizer = _load_tokenizer(self.checkpoint)
        length = min(WINDOW, self.tokens, position_limit(model, tokenizer) or WINDOW)
        vocabulary, prefix = model.get_input_embeddings().weight.shape[0], prefix_tokens(tokenizer)
        cut = [
            cut_windows(encode_plain(tokenizer, text, vocabulary), prefix, length, self.tokens // length, name)
            for name, text in zip(self.text.names, self.text.parts, strict=True)
        ]
        return torch.cat(cut)

    @cached_property
    def identity(self) -> Identity:
        """What the moments will depend on."""
        digest = hashlib.sha256(self.windows.numpy().tobytes()).hexdigest()
        text, (windows, length) = self.text, self.windows.shape
        return Identity(self.checkpoint.fingerprint, text.name, text.sha256, digest, windows, length, self.compute)

    @property
    def fingerprint(self) -> str:
        """What the moments will depend on, as they will say themselves."""
        return self.identity.fingerprint

    @property
    def most_tokens(self) -> int:
        """How many tokens there are at most, of all texts."""
        return self.tokens * len(self.text.parts)

    @property
    def nbytes(self) -> int:
        """About how much disk the moments will take, with what lies beside them while they are made."""
        inputs = 4 * sum(width**2 for width in self._widths.values())
        if self.output_weighting == "none":
            return inputs
        parts = self.match.placements
        widths = (part.shape[part.role in READ_INNER] for part in parts)
        outputs = sum(width**2 if self.output_weighting == "kronecker" else width for width in widths)
        streams = self.match.layers * min(self.most_tokens, GRADIENT_WINDOWS * WINDOW) * parts[0].shape[1]
        return inputs + 4 * (outputs + streams)

    @property
    def memory(self) -> int:
        """About how much of its own memory the pass takes: a block, its moments, and all hidden states twice."""
        parts = [part for part in self.match.placements if part.layer == 0]
        block = sum(math.prod(part.shape) for part in parts)
        moments = sum(width**2 for (layer, *_), width in self._widths.items() if layer == 0)
        return 4 * (block + 2 * moments + 2 * self.most_tokens * parts[0].shape[1])

    @property
    def _widths(self) -> dict[tuple[int, str, int], int]:
        """Width of every input, by layer, by what reads it, and by expert."""
        return {
            (part.layer, READ_ALIKE.get(part.role, part.role), part.expert): part.shape[part.role not in READ_INNER]
            for part in self.match.placements
        }

    def __str__(self) -> str:
        """Say what will be done, for a plan."""
        kinds = "" if self.output_weighting == "none" else f" and gradients ({self.output_weighting})"
        return (
            f"the error is weighed by moments{kinds} of up to {self.most_tokens:,} tokens of {self.text.name}: about "
            f"{self.nbytes / 1e9:.1f} GB of work files, and {self.memory / 1e9:.1f} GB of memory while they are made"
        )

    def to_json(self) -> dict[str, Any]:
        """Return what a record of a run says of the text."""
        return {**asdict(self.identity), "fingerprint": self.fingerprint, "tokens": self.windows.numel()}

    def check(self, folder: Path | None, advice: str) -> None:
        """Raise PlanError for a folder that keeps other moments, with advice, or a model that has none of the kind."""
        if self.output_weighting != "none":
            from trawl.calibration.gradients import check_causal  # noqa: PLC0415 (transformers' model code: a second)

            check_causal(self.chain.model)
        if (
            folder
            and (folder / RECORD).exists()
            and (difference := Moments.read(folder).identity.difference(self.identity))
        ):
            raise PlanError(f"{folder} holds moments of {difference}; {advice}")

    def make(self, folder: Path, observer: Observer = silent) -> Moments:
        """Return the moments, making them in a folder unless they are there.

        Args:
            folder: made if absent; moments of anything else that it keeps are replaced.
            observer: told of progress.
        Raises: CheckpointError: NaN or Inf comes up. PlanError: the model cannot be run block by block.
        Cost: as :func:`trawl.calibration.gathering.gather`, and with output weighting as
            :func:`trawl.calibration.gradients.gather_gradients` too.
        """
        from trawl.models import fast_products  # noqa: PLC0415 (transformers' model code: a second)

        with fast_products() if self.compute == "bf16" else nullcontext():
            moments = self._make_inputs(folder, observer)
            return moments if self.output_weighting == "none" else self._make_outputs(folder, observer)

    def _make_outputs(self, folder: Path, observer: Observer) -> Moments:
        """Return moments whose inputs are there, making those of gradients unless they are there too."""
        from trawl.calibration.gradients import gather_gradients  # noqa: PLC0415 (likewise)

        kind = self.output_weighting
        try:
            return Moments.open(folder, self.checkpoint, kind)
        except (PlanError, LoadError):
            pass  # none, of another text, or damaged: made anew
        (folder / f"{kind}.json").unlink(missing_ok=True)
        places = torch.linspace(0, len(self.windows) - 1, min(GRADIENT_WINDOWS, len(self.windows))).round().long()
        windows = self.windows[places]
        blocks = gather_gradients(self._quick_chain, windows, self.match.placements, folder, kind, observer=observer)
        write_output_record(folder, kind, asdict(Moments.read(folder).identity), blocks)
        return Moments.open(folder, self.checkpoint, kind)

    def _make_inputs(self, folder: Path, observer: Observer) -> Moments:
        """Return the moments of the inputs, making them unless they are there."""
        from trawl.calibration.gathering import gather  # noqa: PLC0415 (transformers' model code: a second)

        try:
            there = Moments.read(folder)
            if not there.identity.difference(self.identity):
                return there
        except (PlanError, LoadError):
            pass  # none, or unusable: made anew
        (folder / RECORD).unlink(missing_ok=True)
        write_record(folder, self.identity, *gather(self._quick_chain, self.windows, folder, observer))
        return Moments.open(folder, self.checkpoint)


def open_moments(
    checkpoint: Checkpoint,
    match: FamilyMatch,
    texts: Specs | None = None,
    tokens: int = DEFAULT_TOKENS,
    *,
    folder: Path | None = None,
    device: torch.device = CPU,
    output_weighting: OutputWeighting = "none",
    compute: Compute = "float32",
    advice: str = "leave --calibrate out to use them as they are, or give another --moments folder",
) -> Calibration | Moments | None:
    """Find out where a run's moments come from, as far as that is cheap.

    Args:
        checkpoint: the model.
        match: its family.
        texts: ``FILE.txt``, ``FILE.jsonl`` or ``hub:DATASET/SPLIT/FIELD``, or several of them, see
            :func:`trawl.calibration.text.read_text`.
        tokens: of each text, at most.
        folder: that keeps moments.
        device: where to compute.
        output_weighting: which moments of gradients are wanted beside those of the inputs.
        compute: what products are formed in.
        advice: what to do where the folder keeps moments of something else.
    Returns: a text to calibrate on, or the moments of a folder where no text is given; None where neither is.
    Raises: PlanError: there is no such text or folder, it is empty, binary or too short, or the folder keeps moments of
        something else. LoadError: the folder is damaged.
    Cost: tokenises the text; reads no weight but for the model's fingerprint.
    """
    specs = specs_of(texts)
    if not specs and folder is None and output_weighting != "none":
        raise PlanError(
            f"output weighting {output_weighting!r} takes gradients on a text; give it with --calibrate TEXT, or "
            "--moments with a folder that has them"
        )
    if not specs:
        return Moments.open(folder, checkpoint, output_weighting) if folder else None
    if tokens < 1:
        raise PlanError(f"calibration tokens are {tokens}; expected a number from 1, such as {DEFAULT_TOKENS}")
    calibration = Calibration(checkpoint, match, read_texts(specs, tokens), tokens, device, output_weighting, compute)
    calibration.check(folder, advice)
    return calibration


def random_calibration(
    checkpoint: Checkpoint, match: FamilyMatch, tokens: int = DEFAULT_TOKENS, device: torch.device = CPU
) -> Calibration:
    """Return a calibration on random tokens, so that moments come from the weights alone."""
    return Calibration(checkpoint, match, RANDOM_TOKENS, tokens, device)


def make_moments(source: Calibration | Moments | None, folder: Path, observer: Observer = silent) -> Moments | None:
    """Return moments, running the model over a text first where that is where they come from.

    Args:
        source: as :func:`open_moments` found it.
        folder: where to keep what is made.
        observer: told of progress.
    """
    return source.make(folder, observer) if isinstance(source, Calibration) else source


def _load_tokenizer(checkpoint: Checkpoint) -> Any:
    """Load the tokenizer that lies with a checkpoint."""
    from transformers import AutoTokenizer  # noqa: PLC0415 (a second)

    from trawl.models import calibration_reason  # noqa: PLC0415 (likewise)

    try:
        return AutoTokenizer.from_pretrained(checkpoint.folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise LoadError(
            f"{checkpoint.origin} has no usable tokenizer, which calibration needs: {calibration_reason(e)}; put its "
            "tokenizer files into the folder, or pass --moments that were made elsewhere"
        ) from e
