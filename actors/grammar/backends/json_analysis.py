"""What must be known of a schema as a whole: which schemas exclude each other, and whether its answers have an end.

Where schemas exclude each other, `oneOf` says the same as `anyOf`. llguidance finds that out for schemas in one place,
and does not follow references, of which unions with a discriminator are made.
"""

from __future__ import annotations

import json
from itertools import combinations
from typing import Any
from urllib.parse import unquote

_TYPES = frozenset(("null", "boolean", "number", "integer", "string", "array", "object"))
_MAX_DEPTH = 16


class Analysis:
    """Args:
    root: the schema that references are relative to.
    """

    def __init__(self, root: Any) -> None:
        self._root = root

    def disjoint(self, schemas: list[Any]) -> bool:
        """Whether no value is allowed by two of the schemas, as far as is known."""
        return all(self._excludes(one, other, 0) for one, other in combinations(schemas, 2))

    def ends(self) -> bool:
        """Whether some value that the schema allows has an end: none has if what it describes always holds itself."""
        return self._ends(self._root, frozenset(), 0)

    def _ends(self, schema: Any, way: frozenset[str], depth: int) -> bool:
        if not isinstance(schema, dict) or depth > 4 * _MAX_DEPTH:
            return True
        reference = schema.get("$ref")
        if isinstance(reference, str):
            if reference in way:
                return False
            if not self._ends(self._at(reference), way | {reference}, depth + 1):
                return False
        for name in ("anyOf", "oneOf"):
            parts = schema.get(name)
            if isinstance(parts, list) and parts and not any(self._ends(each, way, depth + 1) for each in parts):
                return False
        parts = schema.get("allOf")
        if isinstance(parts, list) and not all(self._ends(each, way, depth + 1) for each in parts):
            return False
        types = _types(schema)
        if types == {"object"}:
            return all(self._ends(_property(schema, name), way, depth + 1) for name in _required(schema))
        if types == {"array"} and isinstance(schema.get("minItems"), int) and schema["minItems"] > 0:
            return "prefixItems" in schema or self._ends(schema.get("items"), way, depth + 1)
        return True

    def _excludes(self, one: Any, other: Any, depth: int) -> bool:
        one, other = self._resolved(one), self._resolved(other)
        if one is False or other is False:
            return True
        if not isinstance(one, dict) or not isinstance(other, dict) or depth > _MAX_DEPTH:
            return False
        for first, second in ((one, other), (other, one)):
            for name in ("anyOf", "oneOf"):
                parts = first.get(name)
                if isinstance(parts, list) and parts and all(self._excludes(each, second, depth + 1) for each in parts):
                    return True
            parts = first.get("allOf")
            if isinstance(parts, list) and any(self._excludes(each, second, depth + 1) for each in parts):
                return True
        if not _types(one) & _types(other):
            return True
        values, others = _values(one), _values(other)
        if values is not None and others is not None:
            return not values & others
        if _types(one) != {"object"} or _types(other) != {"object"}:
            return False
        return any(
            self._excludes(_property(one, name), _property(other, name), depth + 1)
            for name in {*_required(one), *_required(other)}
        )

    def _resolved(self, schema: Any) -> Any:
        """What a reference stands for, if nothing stands beside it."""
        for _ in range(_MAX_DEPTH):
            if not isinstance(schema, dict) or not isinstance(schema.get("$ref"), str):
                break
            target = self._at(schema["$ref"])
            if target is None:
                break
            schema = target
        return schema

    def _at(self, reference: str) -> Any:
        place = self._root
        if reference != "#" and not reference.startswith("#/"):
            return None
        for part in reference.split("/")[1:]:
            name = unquote(part).replace("~1", "/").replace("~0", "~")
            if isinstance(place, dict):
                place = place.get(name)
            elif isinstance(place, list) and name.isdigit() and int(name) < len(place):
                place = place[int(name)]
            else:
                return None
        return place


def _types(schema: dict[str, Any]) -> set[str]:
    """The types of values that a schema may allow; every integer is a number."""
    given = schema.get("type")
    named = _TYPES if given is None else given if isinstance(given, list) else [given]
    types = {each for each in named if isinstance(each, str)}
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if isinstance(values, list):
        types &= {kind for value in values for kind in _kinds(value)}
    return types | {"integer"} if "number" in types else types


def _kinds(value: Any) -> set[str]:
    match value:
        case None:
            return {"null"}
        case bool():
            return {"boolean"}
        case int() | float():
            return {"number", "integer"}
        case str():
            return {"string"}
        case list():
            return {"array"}
        case _:
            return {"object"}


def _values(schema: dict[str, Any]) -> set[str] | None:
    """The values of a schema that lists them."""
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if not isinstance(values, list):
        return None
    return {json.dumps(float(each) if type(each) is int else each, sort_keys=True) for each in values}


def _required(schema: dict[str, Any]) -> list[str]:
    required = schema.get("required")
    return [name for name in required if isinstance(name, str)] if isinstance(required, list) else []


def _property(schema: dict[str, Any], name: str) -> Any:
    properties = schema.get("properties")
    if isinstance(properties, dict) and name in properties:
        return properties[name]
    return schema.get("additionalProperties", True) if "patternProperties" not in schema else True
