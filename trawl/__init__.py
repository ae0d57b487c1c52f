"""TRAWL: shrink or denoise trained transformer checkpoints by tensor decomposition, without retraining."""

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from trawl.decompose import CP, SVD, Tucker, decompose
from trawl.densifying import densify
from trawl.errors import TrawlError
from trawl.factors import Factors
from trawl.pipeline import compress, find_recipe, plan
from trawl.planned import Plan
from trawl.recipe import Recipe
from trawl.records import Report
from trawl.registration import register_when_needed

if TYPE_CHECKING:
    from trawl.evaluation import evaluate
    from trawl.hf.apply import apply
    from trawl.hf.load import load
    from trawl.sampling import sample
    from trawl.sweeps import SweepResult, sweep

__all__ = [
    "CP",
    "SVD",
    "Factors",
    "Plan",
    "Recipe",
    "Report",
    "SweepResult",
    "TrawlError",
    "Tucker",
    "apply",
    "compress",
    "decompose",
    "densify",
    "evaluate",
    "find_recipe",
    "load",
    "plan",
    "sample",
    "sweep",
]

__version__ = version("trawl-llm")

register_when_needed()


def __getattr__(name: str) -> Any:
    """Import what needs transformers' model code when it is first asked for."""
    if name == "load":
        from trawl.hf.load import load  # noqa: PLC0415 (seconds that plan and compress need not pay)

        return load
    if name == "apply":
        from trawl.hf.apply import apply  # noqa: PLC0415 (likewise)

        return apply
    if name == "evaluate":
        from trawl.evaluation import evaluate  # noqa: PLC0415 (likewise)

        return evaluate
    if name == "sample":
        from trawl.sampling import sample  # noqa: PLC0415 (likewise)

        return sample
    if name in ("sweep", "SweepResult"):
        from trawl import sweeps  # noqa: PLC0415 (Optuna too)

        return getattr(sweeps, name)
    raise AttributeError(f"module 'trawl' has no attribute {name!r}")
