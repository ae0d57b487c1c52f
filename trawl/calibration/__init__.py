"""Calibration: second moments of what each linear layer reads, from text, for decompositions that are weighted by them.

Importing this package loads no model code.
"""

from trawl.calibration.calibrating import DEFAULT_TOKENS, Calibration, make_moments, open_moments, random_calibration
from trawl.calibration.moments import Moment, Moments
from trawl.calibration.text import Specs, specs_of

__all__ = [
    "DEFAULT_TOKENS",
    "Calibration",
    "Moment",
    "Moments",
    "Specs",
    "make_moments",
    "open_moments",
    "random_calibration",
    "specs_of",
]
