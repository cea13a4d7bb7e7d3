"""Values that a format writes without quotes: JSON of the type that the tool's schema asks for."""

from __future__ import annotations

import re
from typing import Any

from actors.ingress.parsers.json_text import is_json, quoted
from actors.ingress.parsers.tool_calls.python_literal import json_of_python

_MAX_REFERENCES = 16
_INTEGER = re.compile(r"[-+]?[0-9]+(?:\.0+)?")
_NUMBER = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
_ALL = frozenset(("string", "integer", "number", "boolean", "null", "object", "array"))


def parameter_types(schema: Any, name: str) -> frozenset[str]:
    """JSON Schema types that a parameter of a tool may have; all if its schema does not say."""
    properties = schema.get("properties") if isinstance(schema, dict) else None
    if not isinstance(properties, dict) or name not in properties:
        return _ALL
    return _types(properties[name], schema, 0)


def value_json(text: str, types: frozenset[str]) -> str:
    """JSON of a value. What is of none of the types stays a string, so that nothing of it is lost."""
    plain = text.strip()
    lower = plain.lower()
    if "null" in types and lower in ("null", "none"):
        return "null"
    if "boolean" in types and lower in ("true", "false"):
        return lower
    if "integer" in types and len(plain) < 4096 and _INTEGER.fullmatch(plain):
        return _number(plain.partition(".")[0])
    if "number" in types and len(plain) < 4096 and _NUMBER.fullmatch(plain):
        return _number(plain)
    if ("object" in types and plain[:1] == "{") or ("array" in types and plain[:1] == "["):
        found = plain if is_json(plain) else json_of_python(plain)
        if found is not None:
            return found
    if "string" not in types and plain[:1] == '"' and is_json(plain):
        return plain
    return quoted(text)


def _number(text: str) -> str:
    """A number that may be written as JSON does not allow it: +1, 007, .5, 1."""
    text = text.removeprefix("+")
    if is_json(text):
        return text
    sign, digits = ("-", text[1:]) if text.startswith("-") else ("", text)
    digits = digits.lstrip("0")
    if not digits[:1].isdigit():
        digits = "0" + digits
    found = re.sub(r"\.(?![0-9])", "", sign + digits)
    return found if is_json(found) else quoted(text)


def _types(schema: Any, root: Any, depth: int) -> frozenset[str]:
    if not isinstance(schema, dict) or depth > _MAX_REFERENCES:
        return _ALL
    if isinstance(schema.get("$ref"), str):
        return _types(_resolve(schema["$ref"], root), root, depth + 1)
    named = schema.get("type")
    if isinstance(named, str):
        return frozenset((named,)) if named in _ALL else _ALL
    if isinstance(named, list):
        return frozenset(each for each in named if isinstance(each, str)) & _ALL or _ALL
    for key in ("anyOf", "oneOf", "allOf"):
        branches = schema.get(key)
        if isinstance(branches, list) and branches:
            found = [_types(branch, root, depth + 1) for branch in branches]
            return frozenset.intersection(*found) or _ALL if key == "allOf" else frozenset().union(*found)
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(values, list) and values:
        return frozenset(_type_of(value) for value in values)
    return _ALL


def _type_of(value: Any) -> str:
    names = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object"}
    return names.get(type(value), "null")


def _resolve(reference: str, root: Any) -> Any:
    """What `#/$defs/Name` stands for; None if there is no such place."""
    if not reference.startswith("#"):
        return None
    place = root
    for part in reference[1:].split("/")[1:]:
        place = place.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(place, dict) else None
    return place
