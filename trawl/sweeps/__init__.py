"""Sweeps: the search for the rank reduction that makes a model better."""

from trawl.errors import PlanError

try:
    from trawl.sweeps.sweeping import SweepResult, sweep
except ModuleNotFoundError as e:
    if e.name != "optuna":
        raise
    raise PlanError("a sweep needs Optuna; install it with: pip install 'trawl-llm[sweep]'") from e

__all__ = ["SweepResult", "sweep"]
