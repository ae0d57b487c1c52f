"""Compression to a budget: a structure and a size for every part of a model, by the damage that each does.

Importing this package loads no model code.
"""

from trawl.budget.choosing import Option, choose
from trawl.budget.finding import SEARCH_RECORD, Question, find
from trawl.budget.found import Found
from trawl.budget.pieces import Form, Piece, make_pieces

__all__ = [
    "SEARCH_RECORD",
    "Form",
    "Found",
    "Option",
    "Piece",
    "Question",
    "choose",
    "find",
    "make_pieces",
]
