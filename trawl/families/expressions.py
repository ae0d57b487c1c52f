"""Expressions: the small arithmetic by which a family file derives sizes from config fields.

Names, integers, ``+ - * //`` and brackets; nothing else is accepted, so a family file cannot run code.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from trawl.errors import FamilyError

OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


def evaluate(expression: str, names: Mapping[str, Any]) -> int | None:
    """Return the value of an expression, or None where a name in it is absent or null.

    Args:
        expression: e.g. ``"hidden_size // num_attention_heads"``.
        names: config fields and sizes already known.
    Returns: the integer, or None.
    Raises: FamilyError: the expression is malformed, a name stands for something else than an integer, or it divides
        by zero.
    """
    try:
        return _value(_parsed(expression), names)
    except ZeroDivisionError as e:
        raise FamilyError(f"size {expression!r} divides by zero; a config field in it is 0") from e


@lru_cache(maxsize=256)
def _parsed(expression: str) -> ast.expr:
    """Parse an expression once and refuse anything but its small grammar."""
    try:
        body = ast.parse(expression, mode="eval").body
    except (SyntaxError, ValueError) as e:
        raise FamilyError(f"size {expression!r} is not an expression; use names, integers and + - * //") from e
    _check(body, expression)
    return body


def check(expression: str) -> None:
    """Raise FamilyError unless the expression is well formed."""
    _parsed(expression)


def _check(node: ast.expr, expression: str) -> None:
    """Refuse every node that is not a name, an integer or one of the four operators."""
    match node:
        case ast.Name():
            return
        case ast.Constant(value=int() as value) if not isinstance(value, bool):
            return
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            _check(left, expression)
            _check(right, expression)
        case _:
            raise FamilyError(f"size {expression!r} may hold only names, integers, brackets and + - * //")


def _value(node: ast.expr, names: Mapping[str, Any]) -> int | None:
    """Evaluate a checked expression."""
    if isinstance(node, ast.Constant):
        return int(node.value)  # type: ignore[arg-type]  # _check let integers through only
    if isinstance(node, ast.Name):
        value = names.get(node.id)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise FamilyError(f"config field {node.id!r} is {value!r}; expected an integer")
        return value
    assert isinstance(node, ast.BinOp)
    left, right = _value(node.left, names), _value(node.right, names)
    if left is None or right is None:
        return None
    return int(OPERATORS[type(node.op)](left, right))
