"""Editing a loaded model's weights for the length of a trial, and putting back the exact bits."""

from __future__ import annotations

import hashlib
import json
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from trawl.checkpoint import Checkpoint
from trawl.errors import PlanError, TrawlError
from trawl.factors import Factors
from trawl.families import FamilyMatch
from trawl.hf.apply import in_memory
from trawl.planned import Plan, PlannedStack
from trawl.planning import make_plan, match_checkpoint
from trawl.recipe import Recipe
from trawl.shards import tensor_bytes
from trawl.stacking import Stack, scan
from trawl.views import View
from trawl.writing import DenseWriter, SquaredErrors

FACTORS_IN_HAND = 4  # a fused tensor holds slices of a few stacks, which its writing asks for in turn
CONFIG_OF_A_COPY = ("_name_or_path", "architectures", "dtype", "transformers_version")  # set by loading and saving

FactorsFor = Callable[[PlannedStack], Factors]


@dataclass(frozen=True, eq=False)
class WeightEditor:
    """Puts factors into a model's own parameters, and the exact weights back.

        editor = WeightEditor(model)
        planned = editor.plan(Recipe(rank=8, layers="28")).stacks
        with editor.applied(planned, library) as errors:
            score(model)

    A digest of every tensor is taken when the editor is made; what is put back is checked against it, and
    :meth:`verify` checks the whole model.

    Attributes:
        model: a dense model of a known family; it must not be changed by anything else.
        family_file: a YAML family description to use in place of the built-in ones.
    """

    model: PreTrainedModel
    family_file: Path | None = None
    _originals: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)  # of what is changed now
    _digests: dict[str, bytes] = field(default_factory=dict, init=False, repr=False)
    _plans: dict[Recipe, Plan] = field(default_factory=dict, init=False, repr=False)
    _largest: dict[str, float] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if getattr(self.model, "hf_quantizer", None) is not None:
            raise PlanError(
                f"{self.checkpoint.origin} is factored or quantized; weights are edited in a dense model: "
                "load the original, or make it dense with trawl densify"
            )
        self._digests.update(self._digest_all())

    @cached_property
    def _state(self) -> dict[str, Tensor]:
        """The model's own tensors by name; writing to one changes the model."""
        return {name: tensor.detach() for name, tensor in self.model.state_dict().items()}

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The model described as a checkpoint; it holds the original weights, also while some are edited."""
        return replace(in_memory(self.model, self._state), loaded=ChainMap(self._originals, self._state))

    @cached_property
    def match(self) -> FamilyMatch:
        """The model's family with the place of every role."""
        return match_checkpoint(self.checkpoint, self.family_file)

    @cached_property
    def fingerprint(self) -> str:
        """Digest of configuration and weights; equal for equal models wherever they were loaded from."""
        config = {key: value for key, value in self.checkpoint.config.items() if key not in CONFIG_OF_A_COPY}
        digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
        for name, of_tensor in sorted(self._digests.items()):
            info = self.checkpoint.tensors[name]
            digest.update(f"{name} {info.dtype} {info.shape} ".encode() + of_tensor)
        return digest.hexdigest()

    def plan(self, recipe: Recipe) -> Plan:
        """Return what a recipe means for the model; the same plan for the same recipe.

        Args:
            recipe: with ``write="dense"``.
        Raises: TrawlError: as :func:`trawl.planning.make_plan`; PlanError also for a factored recipe.
        Cost: headers only, and nothing the second time.
        """
        if recipe.write != "dense":
            raise PlanError(f"write is {recipe.write!r}; in a model's own parameters only write='dense' can be applied")
        if recipe not in self._plans:
            self._plans[recipe] = make_plan(self.checkpoint, recipe, self.family_file)
        return self._plans[recipe]

    def absmax(self, stack: Stack) -> float:
        """Return the largest magnitude in a stack's tensors; each tensor is read once in the editor's life.

        Raises: CheckpointError: a tensor holds NaN or Inf, or is of a dtype that cannot be decomposed.
        """
        for name in stack.tensors:
            if name not in self._largest:
                self._largest[name] = scan(self.checkpoint, name)
        return max(self._largest[name] for name in stack.tensors)

    @contextmanager
    def applied(self, planned: Sequence[PlannedStack], factors: FactorsFor) -> Iterator[tuple[float, ...]]:
        """Put stacks' factors, multiplied out, in place of their weights for the length of a ``with`` block.

        The weights are those that ``trawl compress`` writes for the same factors, bit for bit.

        Args:
            planned: stacks of one plan or of several together; no slice in two of them.
            factors: gives the factors of a stack, on any device; asked as the writing goes on, with a few kept, so that
                all need not be in memory. It may decompose the editor's own checkpoint.
        Yields: ‖T − T̂‖_F / ‖T‖_F of each stack as written, in the order of ``planned``.
        Raises: PlanError: two stacks share a slice, or other stacks are applied already. CheckpointError: a weight
            holds NaN or Inf. TrawlError: after the block, a tensor is not what it was before.
        Cost: for each slice one matrix product of its size times the rank, and its norms; on leaving, one copy and
            one digest of the changed tensors. Memory for their originals and for one changed tensor.
        """
        if self._originals:
            raise PlanError(
                f"{next(iter(self._originals))} and {len(self._originals) - 1} other tensor(s) are edited already; "
                "leave that block first, or call restore()"
            )
        self._check_apart(planned)
        stacks = tuple(replace(item.stack, name=str(number)) for number, item in enumerate(planned))
        absmax = {stack.name: self.absmax(stack) for stack in stacks}

        @lru_cache(maxsize=FACTORS_IN_HAND)
        def of_stack(name: str) -> Factors:
            return factors(planned[int(name)]).to(device="cpu")

        writer = DenseWriter(self.checkpoint, stacks, of_stack, absmax)
        errors = SquaredErrors()
        try:
            for name in dict.fromkeys(name for stack in stacks for name in stack.tensors):
                self._originals[name] = self._state[name].to(device="cpu", copy=True)
                self._state[name].copy_(writer.replaced(name, errors))
            yield tuple(errors.relative(stack.name) for stack in stacks)
        finally:
            self.restore()

    def restore(self) -> None:
        """Put the original weights back; nothing happens where none is edited.

        Needed by hand only when leaving :meth:`applied` was itself interrupted.

        Raises: TrawlError: a tensor that was put back is not, to the bit, what it was when the editor was made.
        """
        names = tuple(self._originals)
        for name, original in self._originals.items():
            self._state[name].copy_(original)
        self._refuse_changed(name for name in names if digest_of(self._state[name]) != self._digests[name])
        self._originals.clear()

    def verify(self) -> None:
        """Check every tensor of the model, bit for bit, against what it was when the editor was made.

        Raises: TrawlError: some differ; the message names them.
        Cost: one read and digest of the whole model.
        """
        found = self._digest_all()
        self._refuse_changed(name for name, digest in self._digests.items() if found[name] != digest)

    def _refuse_changed(self, names: Iterable[str]) -> None:
        """Raise if there are any names."""
        changed = tuple(names)
        if changed:
            more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            raise TrawlError(
                f"tensor {changed[0]}{more} of {self.checkpoint.origin} is not what it was when the editor was made; "
                "expected the same bits. Something else writes to the model: load it again"
            )

    def _check_apart(self, planned: Sequence[PlannedStack]) -> None:
        """Require that no slice is in two stacks, and no changed tensor is another by a second name."""
        seen: dict[tuple[str, View], Stack] = {}
        stored: dict[int, str] = {}
        for stack in (item.stack for item in planned):
            for part in stack.slices:
                place = (part.tensor, part.view)
                if place in seen:  # by the same stack given twice, too
                    other = seen[place]
                    raise PlanError(
                        f"stacks {other.name} and {stack.name} both hold role {part.role} of layer {part.layer}; "
                        "apply one of them, or choose other layers or roles"
                    )
                seen[place] = stack
                first = stored.setdefault(self._state[part.tensor].data_ptr(), part.tensor)
                if first != part.tensor:
                    raise PlanError(f"{first} and {part.tensor} are one tied tensor; select the layer of one of them")

    def _digest_all(self) -> dict[str, bytes]:
        """Return the digest of every tensor; a tied tensor is read once."""
        known: dict[tuple[int, object, tuple[int, ...]], bytes] = {}
        found = {}
        for name, tensor in self._state.items():
            key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape))
            if key not in known or not tensor.numel():
                known[key] = digest_of(tensor)
            found[name] = known[key]
        return found


def digest_of(tensor: Tensor) -> bytes:
    """Return a digest of a tensor's bytes, the same on every device."""
    return hashlib.sha256(tensor_bytes(tensor.cpu())).digest()
