"""TRAWL: shrink or denoise trained transformer checkpoints by tensor decomposition, without retraining."""

from importlib.metadata import version

from trawl.decompose import CP, SVD, Tucker, decompose
from trawl.errors import TrawlError
from trawl.factors import Factors
from trawl.pipeline import compress, plan
from trawl.planning import Plan
from trawl.recipe import Recipe
from trawl.records import Report

__version__ = version("trawl-llm")

__all__ = ["CP", "SVD", "Factors", "Plan", "Recipe", "Report", "TrawlError", "Tucker", "compress", "decompose", "plan"]
