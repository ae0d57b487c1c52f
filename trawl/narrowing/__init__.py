"""Narrow checkpoints: units of a layer's inner side are left out, and what reads them is refitted in closed form.

Importing this package loads no model code.
"""

from trawl.narrowing.cuts import Cut, Narrowed, Width, fc_widths, narrow
from trawl.narrowing.selection import Elimination
from trawl.narrowing.solving import Narrowing, eliminate_units, narrow_stack, padded_tensors
from trawl.narrowing.writing import NarrowedTensors

__all__ = [
    "Cut",
    "Elimination",
    "Narrowed",
    "NarrowedTensors",
    "Narrowing",
    "Width",
    "eliminate_units",
    "fc_widths",
    "narrow",
    "narrow_stack",
    "padded_tensors",
]
