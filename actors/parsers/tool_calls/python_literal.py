"""Python's literals as JSON. Nothing is run: the syntax tree is read, and only constants and displays are known."""

from __future__ import annotations

import ast
import json
import keyword
import math
import re
import warnings
from typing import Any

MAX_DEPTH = 64
MAX_CHARACTERS = 2**16
"""Python's parser takes a microsecond and some hundred bytes a character."""

_MENDED = re.compile(
    r"(?P<string>'''(?:\\.|[^\\])*?'''|\"\"\"(?:\\.|[^\\])*?\"\"\"|'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\")"
    r"|(?P<key>\b\w+)(?=\s*=)|(?<![\w.])0+(?=[1-9])",
    re.DOTALL,
)
_KEYWORD = "_python_keyword"
_CONTROLS = {ord("\n"): "\\n", ord("\r"): "\\r", ord("\t"): "\\t", 0: "\\x00"}


def json_of_python(text: str) -> str | None:
    """JSON of a literal such as `{'a': (1, True, None)}`; None if the text is none."""
    tree = _parse(text)
    if tree is None:
        return None
    try:
        return json.dumps(_value(tree, 0), ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError, RecursionError, OverflowError):
        return None


def keywords_of_call(text: str, schema: Any = None) -> str | None:
    """JSON object of the arguments of a call such as `f(a=1, b='x')`; None if the text is none or has other arguments
    than literals. Line breaks in strings, keywords of Python as names, and leading zeros are taken as they are meant.

    Args:
        schema: of the parameters, whose order names arguments without a name.
    """
    tree = _parse(text) or _parse(_MENDED.sub(_mend, text))
    if not isinstance(tree, ast.Call):
        return None
    properties = schema.get("properties") if isinstance(schema, dict) else None
    names = list(properties) if isinstance(properties, dict) else []
    if len(tree.args) > len(names):
        return None
    try:
        arguments = {name: _value(each, 0) for name, each in zip(names, tree.args, strict=False)}
        for argument in tree.keywords:
            if argument.arg is None:
                return None
            arguments[argument.arg.removesuffix(_KEYWORD)] = _value(argument.value, 0)
        return json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError, RecursionError, OverflowError):
        return None


def _mend(match: re.Match[str]) -> str:
    if match["string"] is not None:
        return match["string"].translate(_CONTROLS)
    if match["key"] is not None:
        return match["key"] + (_KEYWORD if keyword.iskeyword(match["key"]) else "")
    return ""


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
