"""Narrow checkpoints: units of a layer's inner side are left out, and what reads them is refitted in closed form.

Importing this package loads no model code.
"""

from trawl.narrowing.cuts import Cut, Narrowed, Width, narrow
from trawl.narrowing.solving import Narrowing, narrow_stack
from trawl.narrowing.writing import NarrowWriter

__all__ = ["Cut", "NarrowWriter", "Narrowed", "Narrowing", "Width", "narrow", "narrow_stack"]
