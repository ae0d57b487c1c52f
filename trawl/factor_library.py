"""A folder of factor files that many runs share, made at most once each and found again by what they depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from trawl.checkpoint import SAMPLED_BLOCKS, SAMPLED_BYTES
from trawl.decompose import Method, Rank, nested_chain
from trawl.errors import LoadError, PlanError
from trawl.factors import Factors
from trawl.locks import locked
from trawl.observers import Observer, silent, slice_counter
from trawl.planned import Plan, PlannedStack
from trawl.shards import sealed, tensor_bytes
from trawl.stacking import StoredSlices, scan

RECORD = "library.json"
DIGITS = 16  # of a file's digest, in its name
NAME_LENGTH = 80  # of a stack, in a file's name: file systems take 255 bytes


@dataclass(frozen=True)
class FactorLibrary:
    """A folder of sealed factor files whose ranks nest.

    Within one stack and method each rank starts from others of the ladder (:func:`trawl.decompose.nested_chain`). The
    ladder alone says from which, so that a file's bytes do not depend on what was made before it, or by whom; therefore
    a folder has one ladder, recorded in its library.json. As everywhere, the same bytes take the same thread count and
    device: the file that is there first stays, and all who come later use it.

    Attributes:
        folder: where the files lie; may be shared by processes and machines.
        ladder: ranks that may be asked for, ascending. CP makes all smaller ones first, so keep it sparse.
    """

    folder: Path
    ladder: tuple[Rank, ...]

    @classmethod
    def create(cls, folder: Path, ladder: Sequence[Rank]) -> FactorLibrary:
        """Make a library, or open the one that is there.

        Args:
            folder: made if absent.
            ladder: the ranks that will be asked for, in any order.
        Raises: PlanError: the ladder is empty, or the folder is a library of another one. LoadError: the folder's
            library.json cannot be read.
        """
        if not ladder:
            raise PlanError(f"factor library {folder}: the ladder of ranks is empty; give at least one rank")
        wanted = tuple(sorted(set(ladder), key=lambda rank: (rank,) if isinstance(rank, int) else rank))
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / "locks" / "library"):
            if not (folder / RECORD).exists():
                with sealed(folder / RECORD) as file:
                    file.write((json.dumps({"ladder": wanted}) + "\n").encode())
        there = cls.open(folder)
        if there.ladder != wanted:
            raise PlanError(
                f"factor library {folder} is for ranks {_listed(there.ladder)}, not {_listed(wanted)}; ranks start "
                "from one another, so that each set of them needs a folder of its own"
            )
        return there

    @classmethod
    def open(cls, folder: Path) -> FactorLibrary:
        """Open a library that is there.

        Raises: PlanError: the folder is none. LoadError: its library.json cannot be read.
        """
        try:
            ladder = json.loads((folder / RECORD).read_bytes())["ladder"]
            return cls(folder, tuple(tuple(rank) if isinstance(rank, list) else int(rank) for rank in ladder))
        except FileNotFoundError as e:
            raise PlanError(f"{folder} has no {RECORD}; expected a factor library, as trawl sweep makes one") from e
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise LoadError(f"{folder / RECORD} is not a readable factor library record: {e!r}") from e

    def fetch(
        self,
        planned: Plan,
        item: PlannedStack,
        *,
        device: torch.device | None = None,
        max_memory: int = 0,
        observer: Observer = silent,
    ) -> Factors:
        """Return a stack's factors, decomposing it only if nobody has.

        Args:
            planned: the plan of a recipe whose rank is on the ladder.
            item: one of its stacks.
            device: where to decompose; the CPU by default.
            max_memory: bytes of slices to keep between passes.
            observer: told of progress, in slices read.
        Returns: balanced factors on the CPU, exactly as they lie in their file; dense or factored makes no difference.
        Raises: PlanError: the rank is not on the ladder. LoadError: a file is damaged; it is named, and made again once
            it is deleted. CheckpointError: a weight is NaN or Inf.
        Cost: one small file where it is there. Otherwise the decomposition, after those that it starts from; another
            process that asks for the same file waits for it.
        """
        chain = self._chain(planned, item)
        weights = _sampled(planned, item)
        identities = [_identity(weights, item, chain[: number + 1]) for number in range(len(chain))]
        paths = [self._path(identity, item) for identity in identities]
        made = max((number for number, path in enumerate(paths) if path.exists()), default=-1)
        factors = self.load(paths[made]) if made >= 0 else None
        for method, identity, path in list(zip(chain, identities, paths, strict=True))[made + 1 :]:
            with locked(self.folder / "locks" / path.stem):
                if not path.exists():
                    absmax = max(scan(planned.checkpoint, name) for name in item.stack.tensors)
                    count = slice_counter(f"decomposing {item.stack.name}", observer)
                    where = device or torch.device("cpu")
                    slices = StoredSlices(planned.checkpoint, item.stack, absmax, where, count, max_memory)
                    found = method.decompose(slices, factors).to(device="cpu").balanced()
                    found.save(path, {"stack": item.stack.name, "identity": identity, "sha256": digest(found)})
            factors = self.load(path)
        assert factors is not None
        return factors

    def find(self, planned: Plan, item: PlannedStack) -> Path:
        """Return the file of a stack's factors.

        Args: as for :meth:`fetch`.
        Raises: PlanError: there is none; the message says what there is.
        """
        identity = _identity(_sampled(planned, item), item, self._chain(planned, item))
        path = self._path(identity, item)
        if not path.exists():
            raise PlanError(
                f"factor library {self.folder} has no factors of stack {item.stack.name} for {_described(identity)}; "
                f"{self._nearest(identity, item)}. Repeat the options that they were made with, or leave out --factors"
            )
        return path

    def load(self, path: Path) -> Factors:
        """Return the factors of a file that :meth:`find` gave.

        Raises: LoadError: the file is damaged.
        """
        factors, metadata = Factors.load(path)
        if metadata.get("sha256") != digest(factors):
            raise LoadError(
                f"{path} is damaged: its factors are not those that were written; delete it to make it again"
            )
        return factors

    def _chain(self, planned: Plan, item: PlannedStack) -> tuple[Method, ...]:
        """Return the decompositions that lead to the plan's rank."""
        rank = planned.recipe.rank
        if rank not in self.ladder:
            raise PlanError(
                f"factor library {self.folder} has no factors of stack {item.stack.name} for {planned.recipe.method} "
                f"rank {rank}: it is for ranks {_listed(self.ladder)}; use one of those"
            )
        return nested_chain(planned.recipe.decomposition(), item.stack.shape, self.ladder)

    def _path(self, identity: Mapping[str, Any], item: PlannedStack) -> Path:
        """Name the file of an identity: readable in front, unique at the end."""
        text = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:DIGITS]
        method = identity["method"]
        rank = method["rank"] if isinstance(method["rank"], int) else "x".join(map(str, method["rank"]))
        return self.folder / f"{item.stack.name[:NAME_LENGTH]}-{method['name']}-r{rank}-{text}.safetensors"

    def _nearest(self, identity: Mapping[str, Any], item: PlannedStack) -> str:
        """Say what the folder holds of a stack, and how the nearest file differs."""
        there = []
        for path in sorted(self.folder.glob("*.safetensors")):
            metadata = Factors.load(path)[1]
            if metadata.get("stack") == item.stack.name:
                there.append(metadata["identity"])
        if not there:
            count = len(list(self.folder.glob("*.safetensors")))
            return f"of its {count} files none is of that stack"
        wanted = _flat(json.loads(json.dumps(identity)))
        differing = min(
            ([key for key, value in _flat(other).items() if wanted.get(key) != value] for other in there), key=len
        )
        held = ", ".join(dict.fromkeys(map(_described, there)))
        return f"it has that stack for {held}, of which the nearest differs in {', '.join(differing)}"


def digest(factors: Factors) -> str:
    """Return the SHA-256 of the bytes of all factor matrices."""
    found = hashlib.sha256()
    for name, tensor in sorted(factors.tensors().items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor_bytes(tensor.cpu().contiguous()))
    return found.hexdigest()


_installed = cache(version)  # which reads the package's files, milliseconds each time


def versions() -> dict[str, str]:
    """Versions of the packages that decide the output's bytes."""
    return {"trawl": _installed("trawl-llm"), "torch": torch.__version__, "tensorly": _installed("tensorly")}


def _identity(weights: str, item: PlannedStack, chain: Sequence[Method]) -> dict[str, Any]:
    """Return what the bytes of a stack's factors depend on, beside threads and device."""
    method: Any = chain[-1]
    return {
        "weights": weights,
        "slices": [part.identity for part in item.stack.slices],
        "method": {"name": type(method).__name__.lower(), **asdict(method)},
        "from": [list(step.ranks(item.stack.shape)) for step in chain[:-1]],
        "versions": versions(),
    }


def _sampled(planned: Plan, item: PlannedStack) -> str:
    """Return SHA-256 over sampled blocks of the tensors of a stack, on disk or in memory.

    Of these tensors alone, so that other layers of the model may change: interventions are built one on another.
    """
    found = hashlib.sha256()
    for name in item.stack.tensors:
        tensor = planned.checkpoint.read(name).detach()
        data = tensor.reshape(-1).view(torch.uint8)
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        span = max(data.numel() - SAMPLED_BYTES, 0)
        for block in range(SAMPLED_BLOCKS):
            first = span * block // (SAMPLED_BLOCKS - 1)
            found.update(tensor_bytes(data[first : first + SAMPLED_BYTES].cpu()))
    return found.hexdigest()


def _described(identity: Mapping[str, Any]) -> str:
    """Name method and rank."""
    return f"{identity['method']['name']} rank {identity['method']['rank']}"


def _listed(ladder: Sequence[Rank]) -> str:
    return ", ".join(map(str, ladder))


def _flat(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return an identity with one level of keys."""
    flat: dict[str, Any] = {}
    for key, value in identity.items():
        flat |= {f"{key}.{inner}": part for inner, part in value.items()} if isinstance(value, dict) else {key: value}
    return flat
