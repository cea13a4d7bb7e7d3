"""Python's literals as JSON. Nothing is run: the syntax tree is read, and only constants and displays are known."""

from __future__ import annotations

import ast
import json
import math
import warnings
from typing import Any

MAX_DEPTH = 64
MAX_CHARACTERS = 2**16
"""Python's parser takes a microsecond and some hundred bytes a character."""


def json_of_python(text: str) -> str | None:
    """JSON of a literal such as `{'a': (1, True, None)}`; None if the text is none."""
    tree = _parse(text)
    if tree is None:
        return None
    try:
        return json.dumps(_value(tree, 0), ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError, RecursionError, OverflowError):
        return None


def keywords_of_call(text: str) -> str | None:
    """JSON object of the arguments of a call such as `f(a=1, b='x')`; None if the text is none or has other
    arguments than named literals."""
    tree = _parse(text)
    if not isinstance(tree, ast.Call) or tree.args:
        return None
    try:
        arguments = {}
        for keyword in tree.keywords:
            if keyword.arg is None:
                return None
            arguments[keyword.arg] = _value(keyword.value, 0)
        return json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError, RecursionError, OverflowError):
        return None


def _parse(text: str) -> ast.expr | None:
    if len(text) > MAX_CHARACTERS:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes that Python does not know
        try:
            return ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None


def _value(node: ast.expr, depth: int) -> Any:
    """What a literal stands for. Raises ValueError."""
    if depth > MAX_DEPTH:
        raise ValueError("nested too deeply")
    match node:
        case ast.Constant(value=value) if value is None or isinstance(value, str | int):
            if isinstance(value, str):
                value.encode()  # a lone surrogate cannot be sent
            return value
        case ast.Constant(value=float(value)) if math.isfinite(value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int(value) | float(value))):
            return -value
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_value(item, depth + 1) for item in items]
        case ast.Dict(keys=keys, values=values):
            return {_key(key): _value(value, depth + 1) for key, value in zip(keys, values, strict=True)}
        case ast.Name(id="true" | "false" | "null" as name):
            return {"true": True, "false": False, "null": None}[name]
    raise ValueError("not a literal")


def _key(node: ast.expr | None) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        node.value.encode()
        return node.value
    raise ValueError("not a key of JSON")
