"""Sweeps: the search for the rank reduction that makes a model better."""

from trawl.sweeps.sweeping import SweepResult, sweep

__all__ = ["SweepResult", "sweep"]
