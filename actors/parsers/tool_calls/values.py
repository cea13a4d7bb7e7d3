"""Values that a format writes without quotes: JSON of the type that the tool's schema asks for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from llm_runtime.actors.parsers.json_text import is_json, json_number, quoted, repaired
from llm_runtime.actors.parsers.tool_calls.python_literal import json_of_python

_MAX_REFERENCES = 16
_MAX_BRANCHES = 256
_ALL = frozenset(("string", "integer", "number", "boolean", "null", "object", "array"))
_SPELLED = {
    **dict.fromkeys(("str", "text", "varchar", "char", "enum"), "string"),
    **dict.fromkeys(("int", "long"), "integer"),
    **dict.fromkeys(("float", "double"), "number"),
    **dict.fromkeys(("list", "tuple"), "array"),
    **dict.fromkeys(("dict", "map"), "object"),
    "bool": "boolean",
}
"""Types of other languages that clients write in schemas."""


class Kind(NamedTuple):
    """What a parameter may be: JSON Schema types, and the values if these are listed. `unknown`: the schema does not
    know the parameter."""

    types: frozenset[str]
    values: tuple[Any, ...] | None = None
    unknown: bool = False


ANYTHING = Kind(_ALL)
TEXT = Kind(frozenset(("string",)))


def parameter_kind(schema: Any, name: str, given: Mapping[str, str] | None = None) -> tuple[Kind, bool]:
    """What a parameter of a tool may be, and whether that is certain: of alternatives at the root of the schema,
    parameters that are given later may tell which it is.

    Args:
        given: the other parameters, as they are written.
    """
    kinds: list[Kind] = []
    excluded = False
    for properties in _alternatives(schema, schema, _MAX_REFERENCES):
        fits = all(_fits(properties, key, text, schema) for key, text in (given or {}).items() if key != name)
        if name in properties and fits:
            kinds.append(_kind(properties[name], schema, 0))
        excluded = excluded or (name in properties and not fits)
    if not kinds:
        return (TEXT if excluded else Kind(_ALL, unknown=True)), True
    united = Kind(
        frozenset().union(*(kind.types for kind in kinds)),
        None
        if any(kind.values is None for kind in kinds)
        else tuple(value for kind in kinds for value in kind.values or ()),
    )
    return united, len({kind.types for kind in kinds}) == 1


def value_json(text: str, kind: Kind) -> str:
    """JSON of a value. What is of none of the types stays a string, so that nothing of it is lost."""
    types, values = kind.types, kind.values
    if values is not None:
        listed = _listed(text, values)
        if listed is not None:
            return listed
    found = _typed(text.strip(), types)
    if found is not None:
        return found
    if types != TEXT.types:
        inner = _unquoted(text.strip())
        if inner is not None:
            found = _typed(inner.strip(), types)
            if found is not None and "string" not in types:
                return found
            if found is not None:  # the quotes say that it is none of the other types
                return quoted(inner)
            if "string" not in types and is_json(text.strip()):
                return text.strip()
    return quoted(text)


def _typed(plain: str, types: frozenset[str]) -> str | None:
    """JSON of a value if it is of one of the types that are not strings."""
    lower = plain.lower()
    if "null" in types and lower in ("null", "none"):
        return "null"
    if "boolean" in types and lower in ("true", "false"):
        return lower
    if types & {"integer", "number"} and len(plain) < 4096 and (number := json_number(plain)):
        if "number" in types:
            return number
        if re.fullmatch(r"-?[0-9]+(?:\.0+)?", number):
            return number.partition(".")[0]
        if _whole(number):
            return number
    if ("object" in types and plain[:1] == "{") or ("array" in types and plain[:1] == "["):
        if is_json(plain):
            return plain
        found = json_of_python(plain) or repaired(plain)
        return repaired(plain.replace('\\"', '"')) if found is None and '\\"' in plain else found
    return None


def _whole(number: str) -> bool:
    """Whether a number such as 1.25e2 is one."""
    try:
        return float(number).is_integer()
    except OverflowError:
        return False


def _unquoted(plain: str) -> str | None:
    """What stands between quotes, which may be escaped."""
    if len(plain) > 4 and plain.startswith('\\"') and plain.endswith('\\"'):
        return plain[2:-2]
    if len(plain) > 1 and plain[0] == plain[-1] == '"' and is_json(plain):
        inner = json.loads(plain)
        return str(inner)
    return None


def _listed(text: str, values: tuple[Any, ...]) -> str | None:
    """The value of a list that a text stands for."""
    if text in values or text.strip() in values:
        return quoted(text if text in values else text.strip())
    types = frozenset(type_of(value) for value in values) - {"string"}
    if "integer" in types:
        types |= {"number"}
    for plain in (text.strip(), _unquoted(text.strip())):
        found = None if plain is None else _typed(plain, types)
        if found is not None and any(_same(json.loads(found), value) for value in values):
            return found
    return None


def _same(one: Any, other: Any) -> bool:
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


def _alternatives(schema: Any, root: Any, depth: int) -> list[dict[str, Any]]:
    """Properties of the objects that a tool's schema allows, one dictionary for each alternative."""
    if not isinstance(schema, dict) or depth < 0:
        return [{}]
    own = schema.get("properties")
    found = [dict(own) if isinstance(own, dict) else {}]
    if isinstance(schema.get("$ref"), str):
        found = _both(found, _alternatives(_resolve(schema["$ref"], root), root, depth - 1))
    for part in _branches(schema, "allOf"):
        found = _both(found, _alternatives(part, root, depth - 1))
    for key in ("anyOf", "oneOf"):
        branches = _branches(schema, key)
        if branches:
            united = [each for branch in branches for each in _alternatives(branch, root, depth - 1)]
            found = _both(found, united)
    return found


def _branches(schema: dict[str, Any], key: str) -> list[Any]:
    branches = schema.get(key)
    return branches if isinstance(branches, list) else []


def _both(some: list[dict[str, Any]], others: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each with each. What stands in a branch is more exact than what stands beside it."""
    pairs: Iterator[dict[str, Any]] = (
        {**one, **{key: value for key, value in other.items() if value != {}}} for one in some for other in others
    )
    return [pair for pair, _ in zip(pairs, range(_MAX_BRANCHES), strict=False)]


def _fits(properties: Mapping[str, Any], name: str, text: str, root: Any) -> bool:
    """Whether a parameter may have a value, as far as values are listed."""
    values = _kind(properties[name], root, 0).values if name in properties else None
    return values is None or _listed(text, values) is not None


def _kind(schema: Any, root: Any, depth: int) -> Kind:
    if not isinstance(schema, dict) or depth > _MAX_REFERENCES:
        return ANYTHING
    if isinstance(schema.get("$ref"), str):
        return _kind(_resolve(schema["$ref"], root), root, depth + 1)
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    listed = tuple(values) if isinstance(values, list) and values else None
    named = schema.get("type")
    names = [named] if isinstance(named, str) else named if isinstance(named, list) else []
    types = frozenset(_SPELLED.get(each.lower(), each.lower()) for each in names if isinstance(each, str)) & _ALL
    if types:
        return Kind(types, listed)
    if listed is not None:
        return Kind(frozenset(type_of(value) for value in listed), listed)
    for key in ("anyOf", "oneOf", "allOf"):
        found = [_kind(branch, root, depth + 1) for branch in _branches(schema, key)]
        if found and key == "allOf":
            return Kind(
                frozenset.intersection(*(kind.types for kind in found)) or _ALL,
                next((kind.values for kind in found if kind.values is not None), None),
            )
        if found:
            every = [kind.values for kind in found]
            return Kind(
                frozenset().union(*(kind.types for kind in found)),
                None if None in every else tuple(value for each in every for value in each or ()),
            )
    return ANYTHING


def type_of(value: Any) -> str:
    """JSON Schema type of a value."""
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


def required_parameters(schema: Any) -> list[str]:
    """Names of the parameters that a tool must be given, as far as the root of its schema says it."""
    if isinstance(schema, dict) and isinstance(schema.get("$ref"), str):
        schema = _resolve(schema["$ref"], schema)
    names = schema.get("required") if isinstance(schema, dict) else None
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
