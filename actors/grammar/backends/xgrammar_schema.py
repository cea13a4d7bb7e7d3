"""JSON schemas as the compiler keeps them.

xgrammar ignores keywords that it does not know, or not at their place; a client would get what its schema forbids. So a
schema is gone through first: what would be ignored is refused, and what can be said in words that are kept is.
"""

from __future__ import annotations

import re
from typing import Any

from llm_runtime.actors.grammar.backends.json_analysis import Analysis
from llm_runtime.actors.grammar.errors import BadGrammar

MAX_DEPTH = 64
MAX_INTEGER = 2**63 - 1
"""Of integers without bounds, whose digits small models draw for ever."""
MAX_MULTIPLE = 1024
"""Of `multipleOf`; the compiler ignores a larger one."""
_UNKNOWN = (
    *("not", "if", "then", "else"),
    *("contains", "minContains", "maxContains", "unevaluatedItems", "unevaluatedProperties"),
    *("dependentRequired", "dependentSchemas", "dependencies"),
    *("$dynamicRef", "$recursiveRef"),
)
_OF_TYPE = {
    "string": {"minLength", "maxLength", "pattern", "format"},
    "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"},
    "array": {"items", "prefixItems", "minItems", "maxItems", "uniqueItems"},
    "object": {
        "properties",
        "required",
        "additionalProperties",
        "unevaluatedProperties",
        "patternProperties",
        "propertyNames",
        "minProperties",
        "maxProperties",
    },
}
_VALIDATING = {"type"}.union(*_OF_TYPE.values())
_WHOLE = ("$ref", "anyOf", "oneOf", "allOf", "enum", "const")
"""Each of these says all there is to say, to the compiler: what stands beside it would be ignored."""
_TIME = "([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\\.[0-9]{1,9})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
_DATE = (
    "([1-9][0-9]{3}-((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)|02-(0[1-9]|1[0-9]|2[0-8]))"
    "|[1-9][0-9](0[48]|[2468][048]|[13579][26])-02-29)"
)
_LABEL = "[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?"
_BOUNDED = {
    "time": f"^{_TIME}$",
    "date-time": f"^{_DATE}T{_TIME}$",
    "date": f"^{_DATE}$",
    "email": f"^[A-Za-z0-9_+-]{{1,20}}(\\.[A-Za-z0-9_+-]{{1,20}}){{0,2}}@{_LABEL}(\\.{_LABEL}){{1,3}}$",
    "hostname": f"^{_LABEL}(\\.{_LABEL}){{0,3}}$",
}
"""Formats as patterns, without days that there are not, and with an end: the compiler's own allow digits and letters
without number, which small models draw for ever."""
_MAX_COUNTED = 128
_CHARACTER = '[^"\\\\\\x00-\\x1f]'
"""Of strings whose length is told; without escapes, as the compiler has it. As a pattern of up to so many its masks are
made many times faster; beyond, slower."""
_PLAIN = re.compile(r"\^(?:[A-Za-z0-9_ @:/,#=+*?{}()|-]|\\[.d+*?()/-]|\[[A-Za-z0-9_ .@:/+-]+\])*\$")
"""Patterns that xgrammar keeps. It takes them for whole texts, and writes what they allow into JSON as it is."""
_PYTHON = {
    "string": str,
    "number": int | float,
    "integer": int,
    "boolean": bool,
    "array": list,
    "object": dict,
    "null": type(None),
}


def prepared(schema: Any, depth: int = 0) -> Any:
    """A schema that allows only what the given one does, in the keywords that the compiler keeps.

    Raises BadGrammar for what it would not keep.
    """
    if not isinstance(schema, dict):
        return schema
    if depth > MAX_DEPTH:
        raise BadGrammar(f"The JSON schema is nested deeper than {MAX_DEPTH} levels.")
    if depth == 0:
        analysis = Analysis(schema)
        if not analysis.ends():
            raise BadGrammar("The JSON schema allows no answer that ends: what it describes holds itself, always.")
    if isinstance(schema.get("oneOf"), list) and not Analysis(schema).disjoint(schema["oneOf"]):
        raise BadGrammar("The JSON schema's keyword 'oneOf' is supported where its schemas exclude each other.")
    for keyword in _UNKNOWN:
        if keyword in schema:
            raise BadGrammar(f"The JSON schema's keyword '{keyword}' is not supported.")
    result = dict(schema)
    for name in ("$defs", "definitions", "properties", "patternProperties"):
        if isinstance(schema.get(name), dict):
            result[name] = {key: prepared(each, depth + 1) for key, each in schema[name].items()}
    for name in ("items", "additionalProperties", "unevaluatedProperties", "propertyNames"):
        if name in schema:
            result[name] = prepared(schema[name], depth + 1)
    for name in ("prefixItems", "anyOf", "oneOf", "allOf"):
        if schema.get(name) == [] and name != "prefixItems":
            raise BadGrammar(f"The JSON schema's keyword '{name}' must be a list that is not empty.")
        if isinstance(schema.get(name), list):
            result[name] = [prepared(each, depth + 1) for each in schema[name]]
    _check_patterns(schema)
    whole = [name for name in _WHOLE if name in schema]
    return _only(result, whole[0]) if whole else _of_types(result)


def _only(schema: dict[str, Any], whole: str) -> dict[str, Any]:
    """A schema with one of the keywords that say it all."""
    if whole in ("enum", "const") and not _is_exact(schema[whole]):
        raise BadGrammar(f"The JSON schema's '{whole}' has an integer of more than 64 bits, which is not supported.")
    beside = [name for name in schema if name != whole and (name in _VALIDATING or name in _WHOLE)]
    if whole in ("enum", "const") and beside == ["type"]:
        values = schema["enum"] if whole == "enum" else [schema["const"]]
        if isinstance(values, list):
            fitting = [value for value in values if _fits(value, schema["type"])]
            if not fitting:
                raise BadGrammar(f"The JSON schema's '{whole}' has no value of type {schema['type']}.")
            return {"enum": fitting}
    elif beside:
        raise BadGrammar(f"The JSON schema's keyword '{beside[0]}' is not supported beside '{whole}'.")
    if whole == "allOf" and len(schema["allOf"]) != 1:
        raise BadGrammar("The JSON schema's keyword 'allOf' is supported with one schema only.")
    if whole == "$ref" and schema["$ref"] != "#" and not str(schema["$ref"]).startswith("#/"):
        raise BadGrammar("The JSON schema's keyword '$ref' is supported with '#' and '#/…' only.")
    return schema


def _is_exact(value: Any) -> bool:
    """Whether the compiler, for which larger integers are floating point numbers, writes a value as it is."""
    if isinstance(value, list | dict):
        return all(_is_exact(each) for each in (value.values() if isinstance(value, dict) else value))
    return not isinstance(value, int) or -MAX_INTEGER <= value <= MAX_INTEGER


def _of_types(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema that says what its types are like."""
    kinds = [kind for kind, keywords in _OF_TYPE.items() if not keywords.isdisjoint(schema)]
    if "type" not in schema:
        if len(kinds) > 1:
            raise BadGrammar("The JSON schema has keywords of several types and needs a 'type'.")
        if kinds:
            schema["type"] = kinds[0]
    types = schema.get("type", [])
    types = types if isinstance(types, list) else [types]
    if "string" in types and "pattern" in schema and not {"minLength", "maxLength", "format"}.isdisjoint(schema):
        raise BadGrammar("The JSON schema's keyword 'pattern' is not supported beside minLength, maxLength or format.")
    if "string" in types and "format" in schema and not {"minLength", "maxLength"}.isdisjoint(schema):
        raise BadGrammar("The JSON schema's keyword 'format' is not supported beside minLength or maxLength.")
    if "string" in types and schema.get("format") in _BOUNDED:
        schema["pattern"] = _BOUNDED[schema.pop("format")]
    if types == ["string"] and "pattern" not in schema and schema.get("maxLength", _MAX_COUNTED + 1) <= _MAX_COUNTED:
        least, most = schema.pop("minLength", 0), schema.pop("maxLength")
        schema["pattern"] = f"^{_CHARACTER}{{{least},{most}}}$"
    if "number" in types and "multipleOf" in schema:
        raise BadGrammar("The JSON schema's keyword 'multipleOf' is supported for integers only.")
    if "integer" in types and "multipleOf" in schema:
        _check_multiple(schema)
    if types == ["integer"] and "multipleOf" not in schema:
        if not {"minimum", "exclusiveMinimum"} & schema.keys():
            schema["minimum"] = -MAX_INTEGER
        if not {"maximum", "exclusiveMaximum"} & schema.keys():
            schema["maximum"] = MAX_INTEGER
    if "array" in types:
        if schema.get("uniqueItems"):
            raise BadGrammar("The JSON schema's keyword 'uniqueItems' is not supported.")
        if "items" not in schema and "prefixItems" not in schema:
            schema["items"] = True
    if "object" in types:
        _object(schema)
    return schema


def _check_multiple(schema: dict[str, Any]) -> None:
    multiple = schema["multipleOf"]
    if multiple == 1:
        del schema["multipleOf"]
        return
    if not isinstance(multiple, int) or not 1 <= multiple <= MAX_MULTIPLE:
        raise BadGrammar(f"The JSON schema's keyword 'multipleOf' must be an integer from 1 to {MAX_MULTIPLE}.")
    beside = sorted(schema.keys() & (_OF_TYPE["number"] - {"multipleOf"}))
    if beside:
        raise BadGrammar(f"The JSON schema's keyword 'multipleOf' is not supported beside '{beside[0]}'.")


def _check_patterns(schema: dict[str, Any]) -> None:
    """The compiler refuses what else it does not keep of a pattern."""
    names = schema.get("patternProperties")
    if isinstance(names, dict) and len(names) > 1:
        raise BadGrammar("The JSON schema's keyword 'patternProperties' is supported with one pattern only.")
    for pattern in (schema.get("pattern"), *(names if isinstance(names, dict) else ())):
        if isinstance(pattern, str) and not _PLAIN.fullmatch(pattern):
            raise BadGrammar(
                f"The JSON schema's pattern {pattern!r} is not supported by xgrammar: patterns must begin with ^, end "
                "with $, and be made of plain characters and classes of these."
            )


def _object(schema: dict[str, Any]) -> None:
    properties = schema.get("properties", {})
    if not any(name in schema for name in ("properties", "patternProperties", "propertyNames")):
        schema.setdefault("additionalProperties", True)
    required = schema.get("required", [])
    if isinstance(properties, dict) and isinstance(required, list):
        missing = [name for name in required if isinstance(name, str) and name not in properties]
        if missing and schema.get("additionalProperties") is False:
            raise BadGrammar(f"The JSON schema requires the property '{missing[0]}' and does not allow it.")
        if missing:
            rest = schema.get("additionalProperties", True)
            schema["properties"] = {**properties, **dict.fromkeys(missing, rest)}


def _fits(value: Any, types: Any) -> bool:
    names = types if isinstance(types, list) else [types]
    for name in names:
        kind = _PYTHON.get(name, object) if isinstance(name, str) else object
        if isinstance(value, kind) and (not isinstance(value, bool) or name in ("boolean",) or kind is object):
            return True
        if name == "integer" and isinstance(value, float) and value.is_integer():
            return True
    return False
