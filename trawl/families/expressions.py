"""Expressions: the small arithmetic by which a family file derives sizes from config fields.

Names, integers, ``+ - * // %``, brackets and ``a if b else c``; nothing else is accepted, so a family file cannot run
code. What ``if`` asks may be true or false in the config; where it is absent, the value is unknown.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from trawl.errors import FamilyError, shown

LONGEST = 200  # characters; nesting and the size of constants stay small with it
LARGEST = 1 << 63

OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
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
    except OverflowError as e:
        raise FamilyError(f"size {expression!r} is too large; a config field in it is no size") from e


@lru_cache(maxsize=256)
def _parsed(expression: str) -> ast.expr:
    """Parse an expression once and refuse anything but its small grammar."""
    if len(expression) > LONGEST:
        raise FamilyError(f"size {shown(expression)} has {len(expression)} characters; expected at most {LONGEST}")
    try:
        body = ast.parse(expression, mode="eval").body
    except (SyntaxError, ValueError) as e:
        raise FamilyError(f"size {expression!r} is not an expression; use names, integers and + - * // %") from e
    _check(body, expression)
    return body


def check(expression: str) -> None:
    """Raise FamilyError unless the expression is well formed."""
    _parsed(expression)


def _check(node: ast.expr, expression: str) -> None:
    """Refuse every node that is not a name, an integer, an operator or a choice by a name."""
    match node:
        case ast.Name():
            return
        case ast.IfExp(test=ast.Name(), body=body, orelse=orelse):
            _check(body, expression)
            _check(orelse, expression)
        case ast.Constant(value=int() as value) if not isinstance(value, bool):
            return
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            _check(left, expression)
            _check(right, expression)
        case _:
            raise FamilyError(
                f"size {expression!r} may hold only names, integers, brackets, + - * // % and a if b else c"
            )


def _value(node: ast.expr, names: Mapping[str, Any]) -> int | None:
    """Evaluate a checked expression."""
    if isinstance(node, ast.Constant):
        return int(node.value)  # type: ignore[arg-type]  # _check let integers through only
    if isinstance(node, ast.Name):
        value = names.get(node.id)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise FamilyError(f"config field {node.id!r} is {shown(value)}; expected an integer")
        return value
    if isinstance(node, ast.IfExp):
        assert isinstance(node.test, ast.Name)
        asked = names.get(node.test.id)
        return None if asked is None else _value(node.body if asked else node.orelse, names)
    assert isinstance(node, ast.BinOp)
    left, right = _value(node.left, names), _value(node.right, names)
    if left is None or right is None:
        return None
    value = int(OPERATORS[type(node.op)](left, right))
    if abs(value) > LARGEST:
        raise OverflowError
    return value
