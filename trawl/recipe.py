"""Recipe: what the user asked for, checked at the edge."""

from __future__ import annotations

import re
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from trawl.decompose import CP, SVD, Method, Tucker
from trawl.errors import PlanError, RankError, shown, suggestion
from trawl.families import KINDS, OUTSIDE, ROLES
from trawl.stacking import Share, format_layers

METHODS = ("cp", "tucker", "svd", "narrow", "mixed")
OutputWeighting = Literal["none", "fisher", "kronecker"]
Compute = Literal["float32", "bf16"]
ROLE_GROUPS = {**KINDS, "all": ROLES}
IN_COMMON = (
    "write",
    "factor_dtype",
    "allow_larger",
    "output_weighting",
    "refit",
    "seed",
    "n_iter_max",
    "tol",
    "compute",
    "engine",
)  # of all parts
OWN = ("layers", "roles", "group_layers", "share")  # of each part
CHOSEN = ("group_layers", "share", "n_iter_max", "tol", "engine")  # by a budget
OF_FACTORS = ("factor_dtype", "allow_larger", "n_iter_max", "tol", "engine")  # narrow makes none


class Recipe(BaseModel):
    """What to decompose, how, and what to write.

    Attributes:
        method: ``cp``, ``tucker`` or ``svd`` (each matrix by itself, as LASER does); ``narrow`` leaves out inner units;
            ``mixed`` has a method and a size for each of its parts, given or found for a budget.
        rank: one integer, or for Tucker a triple (stack, inner, hidden); None for ``narrow``.
        width: inner width that ``narrow`` leaves of every FC: a number of units, a share of them that is rounded to a
            multiple of 64 (of the largest power of two that divides the width, where 64 does not), or a number for
            each selected layer.
        kv_heads: key-value heads that ``narrow`` leaves, with the query heads that share them.
        keep: budget of a ``mixed`` recipe whose parts are to be found: the share of the selected matrices' parameters
            that the output holds at most.
        size: likewise, the bytes that all shards of the output have at most.
        plain: whether only an ordinary checkpoint will do for a budget, one that loads without this package.
        parts: recipes of a ``mixed`` one, for matrices that no two of them share; each has its own method, size,
            layers, roles, ``group_layers`` and ``share``, and everything else from the whole.
        layers: ``"all"`` or a list such as ``"20-30,35"``, counted from 0.
        roles: ``"fc"``, ``"attn"``, ``"experts"``, ``"all"``, or a comma-separated list of q, k, v, o, gate, up, down
            and the others in docs/families.md, and of embed and lm_head, which lie outside the layers.
        group_layers: layers stacked together: ``"all"`` or how many consecutive selected layers; 1 is layer by layer,
            the default of a recipe that shares, or is anchored.
        share: which matrices an ``svd`` gives one right factor: none, those of the grouped layers that read the same
            ``"input"`` (q, k and v; gate and up), or those of one ``"role"``; o and down always stay single.
        anchored: whether a calibrated run goes block by block, each stack fitted to what the original model computes
            from the inputs that the compressed model gives it; stacks lie within one layer then.
        refit: whether what writes the units that ``narrow`` keeps of an FC takes over what was left out there, and half
            of what was lost before, on the calibration text; without it they stay as they are, and only what reads
            them is refitted. A plain budget with a text does it.
        output_weighting: how a calibrated run weighs what a matrix gives, beside what it reads: not at all, or by the
            loss's gradients, row by row (``"fisher"``) or by their second moment (``"kronecker"``).
        write: ``"dense"`` (same tensors and shapes) or ``"factored"`` (factors in place of matrices).
        factor_dtype: of stored factors; None takes the source's.
        allow_larger: whether a stack may be factored into more parameters than its matrices have.
        seed: of every random choice.
        n_iter_max: cap on sweeps; None takes the method's own.
        tol: change of fit under which sweeps stop; None takes the method's own.
        compute: ``"bf16"`` lets the range finder, and the model on a calibration text, multiply in bfloat16, where the
            processor has units for it; the default of a budget.
        engine: ``"streaming"``, or ``"tensorly"`` for the whole stack in memory, the reference.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Literal["cp", "tucker", "svd", "narrow", "mixed"] = "cp"
    rank: int | tuple[int, int, int] | None = None
    width: int | float | tuple[int, ...] | None = None
    kv_heads: int | None = None
    keep: float | None = Field(default=None, gt=0, lt=1)
    size: int | None = Field(default=None, ge=1)
    plain: bool = False
    parts: tuple[Recipe, ...] = ()
    layers: str = "all"
    roles: str = "all"
    group_layers: Literal["all"] | int = "all"
    share: Share = "none"
    anchored: bool = False
    refit: bool = False
    output_weighting: OutputWeighting = "none"
    write: Literal["dense", "factored"] = "dense"
    factor_dtype: Literal["float32", "float16", "bfloat16"] | None = None
    allow_larger: bool = False
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    n_iter_max: int | None = Field(default=None, ge=1)
    tol: float | None = Field(default=None, ge=0)
    compute: Compute = "float32"
    engine: Literal["streaming", "tensorly"] = "streaming"

    @field_validator("layers", mode="before")
    @classmethod
    def _layers_as_text(cls, value: Any) -> Any:
        """Take a list of integers, or one integer, as well as text."""
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if isinstance(value, (list, tuple, range)) and all(isinstance(n, int) for n in value):
            return format_layers(sorted(set(value)))
        return value

    @field_validator("roles", mode="before")
    @classmethod
    def _roles_as_text(cls, value: Any) -> Any:
        return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else value

    @model_validator(mode="before")
    @classmethod
    def _of_budget(cls, values: Any) -> Any:
        """Make a budget a mixed recipe, weighed by gradients: factored, or plain."""
        if not isinstance(values, dict) or (values.get("keep") is None and values.get("size") is None):
            return values
        if values.get("method", "mixed") != "mixed":
            raise PlanError(
                f"method is {values['method']!r}, and a budget chooses a method for every matrix; leave --method out, "
                "or give a --rank or --width in place of the budget"
            )
        return {
            "method": "mixed",
            "write": "dense" if values.get("plain") else "factored",
            "output_weighting": "kronecker",
            "compute": "bf16",
            **values,
        }

    @model_validator(mode="after")
    def _refit_of_plain(self) -> Recipe:
        """Let a plain budget refit unless told otherwise; ``model_fields_set`` still says whether it was told."""
        if self.budget and self.plain and "refit" not in self.model_fields_set:
            self.__dict__["refit"] = True
        return self

    @model_validator(mode="before")
    @classmethod
    def _within_layers(cls, values: Any) -> Any:
        if isinstance(values, dict) and (values.get("share", "none") != "none" or values.get("anchored")):
            return {"group_layers": 1, **values}
        return values

    @model_validator(mode="after")
    def _check_sizes(self) -> Recipe:
        """Raise PlanError unless the sizes are those that the method takes."""
        narrow = self.method == "narrow"
        given = [name for name in ("width", "kv_heads") if getattr(self, name) is not None]
        if given and self.budget:
            raise PlanError(f"{given[0]} is for method narrow, and a budget chooses widths; leave one of the two out")
        if given and not narrow:
            raise PlanError(f"{given[0]} goes with method narrow, and the method is {self.method}; pass --rank INT")
        if narrow and self.rank is not None:
            raise PlanError(f"rank is {self.rank}, and method narrow takes none; pass --width or --kv-heads instead")
        if narrow and not given:
            raise PlanError("method narrow needs a size; pass --width 0.75, --width 1152, or --kv-heads N")
        if self.method == "mixed":
            return self._check_mixed()
        if self.plain or self.parts:
            name = "plain" if self.plain else "parts"
            raise PlanError(f"{name} goes with a budget, and this is method {self.method}; leave {name} out")
        if not narrow and self.rank is None:
            raise PlanError("no rank given; pass --rank INT (for tucker also --rank R0,R1,R2)")
        return self

    @model_validator(mode="after")
    def _check_factors(self) -> Recipe:
        """Raise PlanError for options of factors where none are stored, or none are made."""
        if self.write == "dense" and self.factor_dtype is not None:
            raise PlanError(
                f"factor_dtype is {self.factor_dtype!r}, and a dense output stores no factors; pass --write factored, "
                "or leave it out"
            )
        for name in OF_FACTORS if self.method == "narrow" or self.plain else ():
            if getattr(self, name) != type(self).model_fields[name].default:
                raise PlanError(
                    f"{name} is {getattr(self, name)!r}, and narrow selects units and makes no factors; leave it out"
                )
        return self

    def _check_mixed(self) -> Recipe:
        """Raise PlanError unless a mixed recipe has either parts or a budget."""
        if self.rank is not None:
            raise PlanError(f"rank is {self.rank}, and a budget chooses every rank; leave one of the two out")
        sizes = [name for name in ("keep", "size", "parts") if getattr(self, name)]
        if len(sizes) != 1:
            found = " and ".join(sizes) or "none"
            raise PlanError(f"a mixed recipe takes one of keep, size and parts, and this one has {found}")
        if self.anchored:
            raise PlanError(
                "an anchored run has one method for all stacks, and a budget chooses; leave one of them out"
            )
        for name in CHOSEN if self.budget else ():
            if getattr(self, name) != type(self).model_fields[name].default:
                raise PlanError(
                    f"{name} is {getattr(self, name)!r}, and a budget chooses how matrices are stacked and decomposed; "
                    "leave one of the two out"
                )
        if self.write == "dense" and not self.plain:
            raise PlanError(
                "a dense output with everything in place is as large as before, and a budget is to make it smaller; "
                "pass --write factored, or --plain for an ordinary checkpoint with narrower layers"
            )
        if self.plain and (self.write == "factored" or self.parts):
            raise PlanError(
                "plain is for a budget's ordinary checkpoint, which is written dense; leave one of them out"
            )
        if self.parts:
            _check_parts(self)
        return self

    @property
    def budget(self) -> bool:
        """Whether parts are still to be found."""
        return self.keep is not None or self.size is not None

    def members(self) -> tuple[Recipe, ...]:
        """Return the parts of a mixed recipe, each a whole recipe with what they have in common; else itself."""
        common = {name: getattr(self, name) for name in IN_COMMON}
        return tuple(part.model_copy(update=common) for part in self.parts) or (self,)

    @model_validator(mode="after")
    def _check_share(self) -> Recipe:
        """Raise PlanError for matrices that cannot be shared so."""
        if self.share != "none" and self.method != "svd":
            raise PlanError(
                f"share {self.share!r} joins matrices for an SVD, and the method is {self.method}; pass --method svd, "
                "or leave --share out"
            )
        if self.share == "role" and self.group_layers == 1:
            raise PlanError(
                "share 'role' joins the matrices of one role over layers, and group_layers is 1; pass --group-layers "
                "with a larger number or all, or --share input"
            )
        return self

    @model_validator(mode="after")
    def _check_anchored(self) -> Recipe:
        """Raise PlanError for a weighting that an anchored run has no moments of."""
        if self.anchored and self.output_weighting != "none":
            raise PlanError(
                f"output_weighting {self.output_weighting!r} takes gradients of the original model, and an anchored "
                "run knows none of the compressed one; leave one of the two out"
            )
        return self

    @model_validator(mode="after")
    def _check_refit(self) -> Recipe:
        """Raise PlanError where there is nothing to refit, or nothing to refit it to."""
        if self.refit and self.method not in ("narrow", "mixed"):
            raise PlanError(f"refit is for units that narrow keeps, and the method is {self.method}; leave it out")
        if self.refit and self.anchored:
            raise PlanError(
                "refit fits to what the original model computes, and an anchored run to inputs of the compressed one; "
                "leave one of the two out"
            )
        return self

    def to_yaml(self) -> str:
        """Return the recipe as YAML that :func:`trawl.recipe_reader.read_recipe` takes back."""
        values = self.model_dump(mode="json", exclude={"parts"})
        if self.parts:
            values["parts"] = [part.model_dump(mode="json", exclude_defaults=True) for part in self.parts]
        return yaml.safe_dump(values, sort_keys=False)

    def decomposition(self) -> Method:
        """Return the method with its hyper-parameters.

        Raises: RankError: the rank has the wrong form for the method.
        """
        compute = "bfloat16" if self.compute == "bf16" else self.compute
        options: dict[str, Any] = {"seed": self.seed, "engine": self.engine, "compute": compute}
        if self.n_iter_max is not None:
            options["n_iter_max"] = self.n_iter_max
        if self.tol is not None:
            options["tol"] = self.tol
        if self.method == "mixed":
            raise PlanError(
                "a mixed recipe has a method for each of its parts; use trawl compress for it, or one method here"
            )
        if self.method == "narrow":
            raise PlanError(
                "method narrow selects units and makes no factors; use trawl compress for it, or another method here"
            )
        if self.method == "tucker":
            assert self.rank is not None
            return Tucker(rank=self.rank, **options)
        if not isinstance(self.rank, int):
            assert self.rank is not None
            raise RankError(f"rank {','.join(map(str, self.rank))} is a triple; {self.method} takes one integer")
        return CP(rank=self.rank, **options) if self.method == "cp" else SVD(rank=self.rank, **options)

    def selected_roles(self, present: tuple[str, ...]) -> tuple[str, ...]:
        """Expand ``roles`` to those that the model has.

        Args:
            present: roles that the model has, in canonical order.
        Raises: PlanError: a role is unknown, or none of those asked for is in the model.
        """
        wanted: list[str] = []
        for word in filter(None, re.split(r"[,\s]+", self.roles.strip())):
            if word in ROLE_GROUPS:
                wanted += ROLE_GROUPS[word]
            elif word in (*ROLE_GROUPS["all"], *OUTSIDE):
                if word not in present:
                    raise PlanError(f"the model has no {word!r} matrices; it has {', '.join(present)}")
                wanted.append(word)
            else:
                known = (*ROLE_GROUPS, *ROLE_GROUPS["all"], *OUTSIDE)
                raise PlanError(f"unknown role {word!r}{suggestion(word, known)} (known: {', '.join(known)})")
        chosen = tuple(role for role in present if role in wanted)
        if not chosen:
            raise PlanError(f"roles {self.roles!r} select nothing; the model has {', '.join(present)}")
        return chosen

    def selected_layers(self, count: int) -> tuple[int, ...]:
        """Expand ``layers`` for a model of ``count`` layers.

        Raises: PlanError: a range is malformed, reversed, or outside the model.
        """
        if self.layers.strip() == "all":
            return tuple(range(count))
        chosen: set[int] = set()
        for part in filter(None, (piece.strip() for piece in self.layers.split(","))):
            match = re.fullmatch("([0-9]{1,9})(?:-([0-9]{1,9}))?", part)
            if not match:
                raise PlanError(
                    f"layers {shown(self.layers)}: cannot read {shown(part)}; "
                    "expected forms are 'all', '28', '20-30,35'"
                )
            first, last = int(match[1]), int(match[2] or match[1])
            if first > last:
                raise PlanError(f"layers {self.layers!r}: the range {part} is reversed; write {last}-{first}")
            if last >= count:
                raise PlanError(f"layers {self.layers!r}: the model has layers 0-{count - 1}, so {part} is outside it")
            chosen.update(range(first, last + 1))
        if not chosen:
            raise PlanError(f"layers {self.layers!r} select nothing; the model has layers 0-{count - 1}")
        return tuple(sorted(chosen))

    @property
    def layers_per_stack(self) -> int | None:
        """Layers in one stack, None for all."""
        return None if self.group_layers == "all" else self.group_layers


def _check_parts(recipe: Recipe) -> None:
    """Raise PlanError where parts of a mixed recipe, or the whole, have what the other is to have."""
    fields = Recipe.model_fields
    for name in OWN:
        if getattr(recipe, name) != fields[name].default:
            raise PlanError(f"{name} is {getattr(recipe, name)!r}, and each part of a mixed recipe has its own")
    for part in recipe.parts:
        if part.method == "mixed":
            raise PlanError("a part of a mixed recipe has one method: cp, tucker, svd or narrow")
        if part.method == "narrow" and (part.width is None or part.kv_heads is not None or part.roles != "all"):
            raise PlanError("a narrow part of a mixed recipe takes a width, and neither kv_heads nor roles")
        for name in (*IN_COMMON, "anchored"):
            if getattr(part, name) != fields[name].default:
                raise PlanError(f"{name} of a part is {getattr(part, name)!r}; give it to the mixed recipe as a whole")
