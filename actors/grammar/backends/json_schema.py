"""JSON schemas as llguidance keeps them.

llguidance refuses the keywords that it does not implement. Here they are refused by name, or rewritten where other
keywords say the same. What it takes too loosely (dates, integers that a double does not hold) is made exact.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from itertools import combinations
from typing import Any

from llm_runtime.actors.grammar.backends.ecmascript import library_pattern
from llm_runtime.actors.grammar.backends.json_analysis import Analysis
from llm_runtime.actors.grammar.errors import BadGrammar

MAX_DEPTH = 128
MAX_EXACT = 2**53
"""Integers up to which a double holds them all."""
MAX_INTEGER = 2**63 - 1024
"""Of integers without bounds, whose digits small models draw for ever; the largest double below 2**63."""
MAX_SET = 6
"""Values of which a list without repetition may be made: each choice of them is told, in their order."""
_REFUSED = (
    *("if", "then", "else", "contains", "minContains", "maxContains"),
    *("$dynamicRef", "$recursiveRef", "$vocabulary"),
)
_MAPS = ("$defs", "definitions", "properties", "patternProperties", "dependentSchemas")
_SCHEMAS = ("items", "additionalItems", "additionalProperties")
_LISTS = ("prefixItems", "items", "anyOf", "oneOf", "allOf")
_COUNTS = ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties")
_IN_PLACE = ("$ref", "anyOf", "oneOf", "allOf", "not", "dependentSchemas", "dependencies", "if")
TYPES = ("null", "boolean", "number", "integer", "string", "array", "object")

_TIME = "([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\\.[0-9]{1,9})?([Zz]|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
_DATE = (
    "([1-9][0-9]{3}-((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)|02-(0[1-9]|1[0-9]|2[0-8]))"
    "|([1-9][0-9](0[48]|[2468][048]|[13579][26])|([2468][048]|[13579][26])00)-02-29)"
)
_LABEL = "[A-Za-z0-9]{1,20}(-[A-Za-z0-9]{1,20}){0,2}"
_NAME = "[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]"
FORMATS = {
    "time": f"^{_TIME}$",
    "date-time": f"^{_DATE}[Tt]{_TIME}$",
    "date": f"^{_DATE}$",
    "email": f"^{_NAME}{{1,40}}(\\.{_NAME}{{1,20}}){{0,3}}@{_LABEL}(\\.{_LABEL}){{1,3}}$",
    "hostname": f"^{_LABEL}(\\.{_LABEL}){{0,3}}$",
    "json-pointer": "^(/([^~/]|~[01])*)*$",
    "relative-json-pointer": "^(0|[1-9][0-9]*)(#|(/([^~/]|~[01])*)*)$",
}
"""Formats as patterns, without days that there are not, and with an end."""
_LIBRARY_FORMATS = ("duration", "ipv4", "ipv6", "uuid", "uri")
_UNKEPT_FORMATS = (
    *("idn-email", "idn-hostname", "uri-reference", "iri", "iri-reference"),
    *("uri-template", "regex"),
)
"""Of JSON Schema's own. Any other name is an annotation, as the specification has it."""
_COMMENTS = ("title", "description", "$comment")
_NOT_ONLY = re.compile(r"^\^\(\?!\^\[([^\]^][^\]]*)\]\*\$\)")
"""Pydantic's Decimal begins with this lookahead: not all characters are of a class."""
_LITERAL = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\\\]])*\]", re.DOTALL)
"""Parts of a pattern in which no assertion begins."""


def prepared(schema: Any) -> Any:
    """A schema that allows only what the given one does. Raises BadGrammar for what cannot be kept."""
    analysis = Analysis(schema)
    result = _Preparation(analysis).schema(schema, 0)
    if not analysis.ends():
        raise BadGrammar("The JSON schema allows no answer that ends: what it describes holds itself, always.")
    return result


class _Preparation:
    def __init__(self, analysis: Analysis) -> None:
        self._analysis = analysis

    def schema(self, schema: Any, depth: int) -> Any:
        if not isinstance(schema, dict):
            return schema
        if depth > MAX_DEPTH:
            raise BadGrammar(f"The JSON schema is nested deeper than {MAX_DEPTH} levels.")
        for keyword in _REFUSED:
            if keyword in schema:
                raise _unsupported(keyword)
        result = {name: value for name, value in schema.items() if name != "x-guidance"}
        _unevaluated(result)
        for name in _MAPS:
            if isinstance(result.get(name), dict):
                result[name] = {key: self.schema(each, depth + 1) for key, each in result[name].items()}
        for name in _SCHEMAS:
            if name in result and not isinstance(result[name], list):
                result[name] = self.schema(result[name], depth + 1)
        for name in _LISTS:
            if isinstance(result.get(name), list):
                if not result[name] and name in ("anyOf", "oneOf", "allOf"):
                    raise BadGrammar(f"The JSON schema's keyword '{name}' must be a list that is not empty.")
                result[name] = [self.schema(each, depth + 1) for each in result[name]]
        if isinstance(schema.get("oneOf"), list) and self._analysis.disjoint(schema["oneOf"]):
            result = {"anyOf" if name == "oneOf" else name: value for name, value in _without_any_of(result).items()}
        _values(result)
        _counts(result)
        _numbers(result)
        _strings(result)
        _lists(result)
        self._objects(result, depth)
        if "not" in result:
            _also(result, self.schema(_complement(result.pop("not")), depth + 1))
        return result

    def _objects(self, schema: dict[str, Any], depth: int) -> None:
        dependencies = schema.pop("dependencies", {})
        for name in ("dependentRequired", "dependentSchemas"):
            each = schema.pop(name, {})
            if isinstance(dependencies, dict) and isinstance(each, dict):
                dependencies = {**dependencies, **each}
        if isinstance(dependencies, dict):
            for name, needed in dependencies.items():
                wanted = {"required": needed} if isinstance(needed, list) else self.schema(needed, depth + 1)
                _also(schema, {"anyOf": [{"properties": {name: False}}, wanted]})
        names = schema.pop("propertyNames", True)
        if names is not True:
            _property_names(schema, names)


def _unsupported(keyword: str, what: str = "") -> BadGrammar:
    return BadGrammar(f"The JSON schema's keyword '{keyword}' is not supported{what}.")


def _also(schema: dict[str, Any], other: Any) -> None:
    """Adds what must hold, too."""
    schema["allOf"] = [*schema.get("allOf", []), other]


def _without_any_of(schema: dict[str, Any]) -> dict[str, Any]:
    """Makes room for another `anyOf`."""
    result = dict(schema)
    if "anyOf" in result:
        _also(result, {"anyOf": result.pop("anyOf")})
    return result


def _unevaluated(schema: dict[str, Any]) -> None:
    """Without other schemas for the same value, what is unevaluated is what is additional."""
    for name, beside, same in (
        ("unevaluatedProperties", ("additionalProperties",), "additionalProperties"),
        ("unevaluatedItems", ("items", "additionalItems"), "items"),
    ):
        if name not in schema:
            continue
        value = schema.pop(name)
        evaluated = any(isinstance(schema.get(each), dict | bool) for each in beside)
        if value is True or value == {} or evaluated:
            continue
        if any(keyword in schema for keyword in _IN_PLACE) or isinstance(schema.get("items"), list):
            raise _unsupported(name, " beside other schemas of the same value: use 'additionalProperties'")
        schema[same] = value


def _values(schema: dict[str, Any]) -> None:
    for name in ("enum", "const"):
        if name in schema and not _is_exact(schema[name]):
            raise BadGrammar(f"The JSON schema's '{name}' has an integer of more than 53 bits, which is not supported.")


def _is_exact(value: Any) -> bool:
    if isinstance(value, list | dict):
        return all(_is_exact(each) for each in (value.values() if isinstance(value, dict) else value))
    return not isinstance(value, int) or -MAX_EXACT <= value <= MAX_EXACT


def _counts(schema: dict[str, Any]) -> None:
    for name in _COUNTS:
        value = schema.get(name)
        if isinstance(value, float) and value.is_integer():
            schema[name] = int(value)


def _types(schema: dict[str, Any]) -> list[Any]:
    types = schema.get("type", [])
    return types if isinstance(types, list) else [types]


def _numbers(schema: dict[str, Any]) -> None:
    for name, towards in (("minimum", math.inf), ("exclusiveMinimum", math.inf)):
        _inwards(schema, name, towards)
    for name, towards in (("maximum", -math.inf), ("exclusiveMaximum", -math.inf)):
        _inwards(schema, name, towards)
    if "integer" in _types(schema) and "number" not in _types(schema):
        if schema.get("multipleOf") == 1:
            del schema["multipleOf"]
        for name, other, value in (
            ("minimum", "exclusiveMinimum", -MAX_INTEGER),
            ("maximum", "exclusiveMaximum", MAX_INTEGER),
        ):
            bound = schema.get(name, schema.get(other))
            if bound is None or (
                isinstance(bound, int | float) and not isinstance(bound, bool) and abs(bound) > abs(value)
            ):
                schema.pop(other, None)
                schema[name] = value


def _inwards(schema: dict[str, Any], name: str, towards: float) -> None:
    """A bound that no double holds becomes the next one that allows less."""
    value = schema.get(name)
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > MAX_EXACT:
        try:
            double = float(value)
        except OverflowError:
            raise BadGrammar(f"The JSON schema's '{name}' is too large.") from None
        if (double < value) if towards > 0 else (double > value):
            double = math.nextafter(double, towards)
        schema[name] = int(double)  # the library reads integers exactly


def _strings(schema: dict[str, Any]) -> None:
    names = schema.get("patternProperties")
    pattern = schema.get("pattern")
    if isinstance(pattern, str) and (begun := _NOT_ONLY.match(pattern)):
        schema["pattern"] = "^" + pattern[begun.end() :]
        _also(schema, {"pattern": f"[^{begun[1]}]"})
    for pattern in (schema.get("pattern"), *(names if isinstance(names, dict) else ())):
        if isinstance(pattern, str) and re.search(r"\(\?<?[=!]", _LITERAL.sub("", pattern)):
            raise BadGrammar("The JSON schema has a pattern with a lookahead or lookbehind, which is not supported.")
    if isinstance(schema.get("pattern"), str):
        schema["pattern"] = library_pattern(schema["pattern"])
    if isinstance(names, dict):
        schema["patternProperties"] = {library_pattern(name): each for name, each in names.items()}
    form = schema.get("format")
    if form is None or form in _LIBRARY_FORMATS:
        return
    if form in _UNKEPT_FORMATS and _types(schema) in ([], ["string"]):
        raise BadGrammar(f"The JSON schema's format '{form}' is not supported.")
    del schema["format"]
    if form in FORMATS:
        if "pattern" in schema:
            _also(schema, {"pattern": FORMATS[form]})
        else:
            schema["pattern"] = FORMATS[form]


def _lists(schema: dict[str, Any]) -> None:
    if schema.get("uniqueItems") and schema.get("maxItems", 2) > 1:
        items = schema.get("items")
        values = items.get("enum") if isinstance(items, dict) else None
        if isinstance(values, list) and len(values) <= MAX_SET and "prefixItems" not in schema:
            least, most = schema.get("minItems", 0), min(schema.get("maxItems", len(values)), len(values))
            chosen = [list(each) for count in range(least, most + 1) for each in combinations(values, count)]
            _also(schema, {"enum": chosen} if chosen else False)
            del schema["uniqueItems"]
            return
        raise _unsupported("uniqueItems", ", unless 'maxItems' is 1: leave it out, and drop repeated items yourself")
    schema.pop("uniqueItems", None)


def _property_names(schema: dict[str, Any], names: Any) -> None:
    """Rules for names become patterns of properties, and there are no others."""
    if not isinstance(names, dict) or "patternProperties" in schema or any(each in schema for each in _IN_PLACE):
        raise _unsupported("propertyNames", " here")
    rest = {key: value for key, value in names.items() if key not in _COMMENTS}
    if rest.get("type") == "string":
        del rest["type"]
    match list(rest):
        case []:
            return
        case ["pattern"] if isinstance(rest["pattern"], str):
            pattern = rest["pattern"]
            _strings({"pattern": pattern})
        case ["enum"] if isinstance(rest["enum"], list) and all(isinstance(each, str) for each in rest["enum"]):
            pattern = f"^({'|'.join(map(_quoted, rest['enum']))})$"
        case ["const"] if isinstance(rest["const"], str):
            pattern = f"^{_quoted(rest['const'])}$"
        case keys if set(keys) <= {"minLength", "maxLength"}:
            pattern = f"^[\\s\\S]{{{rest.get('minLength', 0)},{rest.get('maxLength', '')}}}$"
        case _:
            raise _unsupported("propertyNames", " but with 'pattern', 'enum', 'const', or lengths")
    known = schema.get("properties", {})
    if isinstance(known, dict) and known:
        schema["properties"] = {name: each if _matches(pattern, name) else False for name, each in known.items()}
    schema["patternProperties"] = {library_pattern(pattern): schema.get("additionalProperties", True)}
    schema["additionalProperties"] = False


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.search(pattern, name) is not None
    except re.error:
        raise _unsupported("propertyNames", f" with the pattern {pattern!r} beside 'properties'") from None


def _quoted(text: str) -> str:
    return "".join(each if each.isascii() and each.isalnum() else _hexadecimal(each) for each in text)


def _hexadecimal(character: str) -> str:
    return f"\\x{ord(character):02x}" if character.isascii() else character


def _complement(schema: Any) -> Any:
    """What is not allowed by a schema. Raises BadGrammar where no other keywords say it."""
    if isinstance(schema, bool):
        return not schema
    if not isinstance(schema, dict):
        raise _unsupported("not", " with this value")
    rest = {key: value for key, value in schema.items() if key not in _COMMENTS}
    match list(rest):
        case []:
            return False
        case ["not"]:
            return rest["not"]
        case ["anyOf"] if isinstance(rest["anyOf"], list):
            return {"allOf": [{"not": each} for each in rest["anyOf"]]}
        case ["allOf"] if isinstance(rest["allOf"], list):
            return {"anyOf": [{"not": each} for each in rest["allOf"]]}
        case ["type"]:
            types = set(_types(rest))
            if types <= set(TYPES) and "integer" not in types:
                others = [each for each in TYPES if each not in types and each != "integer"]
                return {"type": others} if others else False
        case ["required"] if isinstance(rest["required"], list):
            return {"type": "object", "anyOf": [{"properties": {name: False}} for name in rest["required"]] or [False]}
        case ["enum" | "const" as keyword]:
            return _other_values(rest["enum"] if keyword == "enum" else [rest["const"]])
        case _:
            pass
    raise _unsupported("not", f" with {' and '.join(repr(key) for key in rest)}")


def _other_values(values: Any) -> Any:
    """All but a few simple values."""
    kinds: dict[str, Callable[[Any], bool]] = {
        "null": lambda value: value is None,
        "boolean": lambda value: isinstance(value, bool),
    }
    if not isinstance(values, list) or not all(any(kind(each) for kind in kinds.values()) for each in values):
        raise _unsupported("not", " with values other than null, true and false")
    others: list[Any] = [{"type": ["number", "string", "array", "object"]}]
    others += [{"const": each} for each in (None, True, False) if not any(each is value for value in values)]
    return {"anyOf": others}
