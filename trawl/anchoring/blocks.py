"""One block on its way into the compressed model."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from trawl.anchoring.drift import Drift, observe
from trawl.anchoring.fitting import fit, make_target, refit
from trawl.calibration import Moment
from trawl.calibration.block import Batch, Block
from trawl.calibration.moments import expert_of
from trawl.calibration.streaming import BlockChain
from trawl.errors import CheckpointError, PlanError
from trawl.factors import Factors
from trawl.families import Placement
from trawl.narrowing import Cut, Narrowing, narrow_stack
from trawl.narrowing.cuts import bias_of
from trawl.planned import Plan, PlannedStack
from trawl.stacking import READ_INNER, StoredSlices
from trawl.writing import fill, slice_of

STAGES = (  # in the order of the computation
    ("q", "k", "v", "q_a", "kv_a"),
    ("q_b", "kv_b"),
    ("o",),
    ("gate", "up", "expert_gate", "expert_up"),
    ("down",),
    ("expert_down",),
)


@dataclass(eq=False)
class AnchoredBlock:
    """One block, its stacks, and what stands in the compressed model so far.

    Attributes:
        planned: the whole plan.
        chain: its model.
        number: of the block, counted from 0.
        items: its stacks.
        paths: by stack where its file is to lie.
        absmax: by stack the largest magnitude of any entry.
        adds: by role whether its output is added to the residual stream as it is; filled by the first block that asks.
        changed: stored tensors of the compressed model.
    """

    planned: Plan
    chain: BlockChain
    number: int
    items: Sequence[PlannedStack]
    paths: Mapping[str, Path]
    absmax: Mapping[str, float]
    adds: dict[str, bool]
    changed: dict[str, Tensor] = field(default_factory=dict)
    _factors: dict[str, Factors] = field(default_factory=dict)
    _drifts: dict[str, list[Drift | None]] = field(default_factory=dict)  # of stacks that are not sealed yet

    @property
    def stages(self) -> list[tuple[str, ...]]:
        """Stages in which stacks have slices."""
        return [roles for roles in STAGES if any(self._slices(item, roles) for item in self.items)]

    def unfinished(self, roles: Sequence[str]) -> list[PlannedStack]:
        """Return the stacks of a stage that have no sealed file."""
        return [item for item in self.items if self._slices(item, roles) and not self.paths[item.stack.name].exists()]

    def find(self, roles: Sequence[str], original: Sequence[Batch], compressed: Sequence[Batch]) -> dict[str, float]:
        """Find the factors of a stage's unfinished stacks, or refit those found at an earlier stage; return seconds.

        Args:
            roles: of the stage; those of earlier stages have been :meth:`put`.
            original: what enters the block in the original model.
            compressed: what enters it in the compressed one.
        """
        items = self.unfinished(roles)
        chosen = {  # at first sight all slices of a stack, then those of the stage
            item.stack.name: self._slices(item, roles if item.stack.name in self._drifts else item.stack.roles)
            for item in items
        }
        parts = [item.stack.slices[s] for item in items for s in chosen[item.stack.name]]
        drifts = self._observe(roles, parts, original, compressed)
        seconds = {}
        for item in items:
            started = time.perf_counter()
            known = {s: drifts[item.stack.slices[s]] for s in chosen[item.stack.name]}
            if self.planned.narrowed:
                self._narrow(item, known)
            else:
                self._find(item, roles, known)
            seconds[item.stack.name] = time.perf_counter() - started
        return seconds

    def _find(self, item: PlannedStack, roles: Sequence[str], drifts: Mapping[int, Drift | None]) -> None:
        """Find or refit the factors of one stack, and seal them at the last stage that it has slices in."""
        stack, name = item.stack, item.stack.name
        source = StoredSlices(self.planned.checkpoint, stack, self.absmax[name], self.chain.device)
        if name in self._drifts:
            known = self._drifts[name] = [drifts.get(s, drift) for s, drift in enumerate(self._drifts[name])]
            factors = refit(self._factors[name], stack, source, known, sorted(drifts))
        else:
            self._drifts[name] = [drifts[s] for s in range(len(stack.slices))]
            assert item.method is not None
            factors = fit(item.method, stack, source, self._drifts[name])
        self._factors[name] = factors = factors.to(device="cpu").balanced()
        if not self._slices(item, _later(roles)):
            factors.save(self.paths[name], {"stack": item.to_json()})
            del self._drifts[name]

    def _narrow(self, item: PlannedStack, drifts: Mapping[int, Drift | None]) -> None:
        """Choose the units of one stack that stay, and seal them."""
        (drift,) = drifts.values()
        cut = self._cut(item)
        if drift is None:
            raise PlanError(
                f"the calibration text never passed through {cut.reader.tensor}; give a longer one, or leave layer "
                f"{self.number} out of --layers"
            )
        checkpoint, moment = self.planned.checkpoint, Moment(drift.seen, drift.mean, drift.tokens)
        matrix = cut.reader.view.apply(checkpoint.read(cut.reader.tensor)).double()
        target = make_target(matrix, drift, reads_inner=True)
        found = narrow_stack(checkpoint, cut, moment, self.chain.device, target=target)
        found.save(self.paths[item.stack.name], {"stack": item.to_json()})

    def put(self, roles: Sequence[str]) -> None:
        """Put a stage's slices, as they will be written, into the compressed model."""
        for item in self.items:
            name = item.stack.name
            slices = self._slices(item, roles)
            if slices and self.planned.narrowed:
                self._put_narrowed(item)
                continue
            if slices and name not in self._factors:
                self._factors[name] = Factors.load(self.paths[name])[0]
            for s in slices:
                part = item.stack.slices[s]
                with slice_of(self._own(self.changed, part.tensor), part.view) as written:
                    fill(self._factors[name], item.stack.places[s], written)

    def _put_narrowed(self, item: PlannedStack) -> None:
        """Put a refitted reader in place, with zeros for the units that are left out: the same function."""
        cut, found = self._cut(item), Narrowing.load(self.paths[item.stack.name])
        with slice_of(self._own(self.changed, cut.reader.tensor), cut.reader.view) as written:
            written.zero_()[cut.rows(cut.reader, found.kept)] = found.reader
        if found.bias is not None and (name := bias_of(self.planned.checkpoint, cut.reader.tensor)):
            self.changed[name] = found.bias

    def leave(self, original: Sequence[Batch], compressed: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
        """Run both models' batches through the block.

        Raises: CheckpointError: NaN or Inf comes up.
        """
        with self.chain.loaded(self.number) as block:
            left = [block.run(batch) for batch in original]
        if compressed is original and not self.changed:
            return left, left
        with self.chain.loaded(self.number, self.changed) as block:
            arrived = [block.run(batch) for batch in compressed]
        if not all(torch.isfinite(batch.hidden.sum()) for batch in (*left, *arrived)):
            raise CheckpointError(
                f"layer {self.number} gives NaN or Inf on the calibration text, as it is or with its new weights; "
                "check its weights, or choose a larger rank"
            )
        return left, arrived

    def _observe(
        self,
        roles: Sequence[str],
        parts: Sequence[Placement],
        original: Sequence[Batch],
        compressed: Sequence[Batch],
    ) -> dict[Placement, Drift | None]:
        """Return the drift of what slices read, None for an expert without tokens."""
        stream = self._adds_to_stream(roles, compressed[0])
        silent = self._zeroed(_later(roles)) if stream else {}
        with self.chain.loaded(self.number, silent) as block:
            names = {part: self._name(part) for part in parts}
            reference = _twin(block)
        with self.chain.loaded(self.number, {**self.changed, **silent}) as block:
            found = observe((reference, original), (block, compressed), set(names.values()), stream=stream)
        return {part: found.get(name) for part, name in names.items()}

    def _adds_to_stream(self, roles: Sequence[str], batch: Batch) -> bool:
        """Whether a stage's one matrix gives what is added to the residual stream as it is, as one batch shows."""
        role = roles[0]
        parts = [part for part in self.planned.match.placements if (part.layer, part.role) == (self.number, role)]
        if role not in READ_INNER or len(parts) > 1:  # of several experts no one repairs the stream alone
            return False
        if role not in self.adds:
            matrix = parts[0].view.apply(self.planned.checkpoint.read(parts[0].tensor))
            silent, without = self._zeroed(_later(roles)), self._zeroed(roles)
            name = self._name(parts[0])
            self.adds[role] = self.chain.adds(self.number, batch, (name, matrix), without, silent)
        return self.adds[role]

    def _slices(self, item: PlannedStack, roles: Sequence[str]) -> list[int]:
        """Return the numbers of a stack's slices of some roles that are fitted: of a narrowed one, what reads units."""
        return [
            s
            for s, part in enumerate(item.stack.slices)
            if part.role in roles and (self.planned.narrowed is None or part.role in READ_INNER)
        ]

    def _cut(self, item: PlannedStack) -> Cut:
        """Return what narrowing does to a stack."""
        assert self.planned.narrowed is not None
        return next(cut for cut in self.planned.narrowed.cuts if cut.stack.name == item.stack.name)

    def _zeroed(self, roles: Sequence[str]) -> dict[str, Tensor]:
        """Return stored tensors with the slices of some roles set to zero."""
        found: dict[str, Tensor] = {}
        for part in self.planned.match.placements:
            if part.layer == self.number and part.role in roles:
                with slice_of(self._own(found, part.tensor), part.view) as written:
                    written.zero_()
        return found

    def _own(self, tensors: dict[str, Tensor], name: str) -> Tensor:
        """Return a tensor of a collection, first copied into it from the checkpoint."""
        if name not in tensors:
            tensors[name] = self.planned.checkpoint.read(name).clone()
        return tensors[name]

    def _name(self, part: Placement) -> str:
        """Return the name under which the loaded block tells what a slice reads."""
        names = self.chain.weights_of(self.number)[part.tensor]
        return names[0] if len(names) == 1 else names[expert_of(part)]


def _later(roles: Sequence[str]) -> list[str]:
    """Return the roles of all stages behind one."""
    return [role for stage in STAGES[STAGES.index(tuple(roles)) + 1 :] for role in stage]


def _twin(block: Block) -> Block:
    """Return a block of the same weights that keeps them when others are loaded in their place."""
    weights = {id(tensor): tensor for tensor in (*block.layer.parameters(), *block.layer.buffers())}
    return replace(block, layer=deepcopy(block.layer, weights))
