"""What clients say of the form of an answer, under the names of OpenAI, vLLM and SGLang, as one `Constraint`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from llm_runtime.actors.ingress.decoding import asks_for_nothing
from llm_runtime.actors.ingress.errors import ApiError, invalid, unsupported
from llm_runtime.actors.messages import MAX_CONSTRAINT, Constraint

Reader = Callable[[Any, str], Constraint | None]


def constraint_of(fields: Mapping[str, Any]) -> Constraint | None:
    """The constraint that a request's fields ask for.

    Args:
        fields: by the clients' names for them, those of `FIELDS` only; None for what was not sent.

    Raises ApiError for more than one constraint, and for fields that are not what they should be.
    """
    found: dict[str, Constraint] = {}
    for name, value in fields.items():
        if value is not None:
            constraint = FIELDS[name](value, name)
            if constraint is not None:
                found[name] = constraint
    if len(found) > 1:
        raise invalid(
            f"Only one constraint is allowed, and there are {' and '.join(found)}: send one.", next(iter(found))
        )
    return next(iter(found.values()), None)


def schema_constraint(schema: Any, param: str) -> Constraint:
    """JSON that a schema allows; it is an object, or a text that holds one. Raises ApiError."""
    if isinstance(schema, str):
        try:
            schema = msgspec.json.decode(schema)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise _wrong(param, f"it is not valid JSON ({error})") from None
    if not isinstance(schema, dict | bool):
        raise _wrong(param, "expected a JSON schema")
    return _made("json_schema", _json(schema), param)


def either(constraint: Constraint, schema: dict[str, Any], param: str) -> Constraint:
    """What a constraint allows, or JSON that a schema allows. Raises ApiError."""
    match constraint.kind:
        case "json":
            form: dict[str, Any] = {"type": "json_schema", "json_schema": {"type": "object"}}
        case "json_schema":
            form = {"type": "json_schema", "json_schema": msgspec.json.decode(constraint.text)}
        case "regex":
            form = {"type": "regex", "pattern": constraint.text}
        case "choice":
            texts = msgspec.json.decode(constraint.text)
            form = {"type": "or", "elements": [{"type": "const_string", "value": text} for text in texts]}
        case _:
            raise invalid(
                "A grammar or a structural tag cannot be combined with tools that may be called: leave out one of "
                "them, or set tool_choice to none or required.",
                param,
            )
    other = {"type": "json_schema", "json_schema": schema}
    return _made("structural_tag", _json({"format": {"type": "or", "elements": [form, other]}}), param)


def _text(kind: Any) -> Reader:
    def read(value: Any, param: str) -> Constraint:
        if not isinstance(value, str) or not value:
            raise _wrong(param, "expected a string that is not empty")
        return _made(kind, value, param)

    return read


def _choice(value: Any, param: str) -> Constraint:
    if not isinstance(value, list) or not value or not all(isinstance(each, str) and each for each in value):
        raise _wrong(param, "expected a list of strings that are not empty")
    return _made("choice", _json(value), param)


def _structural_tag(value: Any, param: str) -> Constraint:
    if isinstance(value, str):
        try:
            value = msgspec.json.decode(value)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise _wrong(param, f"it is not valid JSON ({error})") from None
    if not isinstance(value, dict) or not ("format" in value or "structures" in value):
        raise _wrong(param, "expected an object with 'format', or with 'structures' and 'triggers'")
    return _made("structural_tag", _json(value), param)


def _response_format(value: Any, param: str) -> Constraint | None:
    """OpenAI's."""
    kind = value.get("type") if isinstance(value, dict) else None
    match kind:
        case "text":
            _only(value, param, "type")
            return None
        case "json_object":
            _only(value, param, "type", "schema")  # llama.cpp's way to give a schema
            schema = value.get("schema")
            return (
                Constraint("json") if schema is None or schema == {} else schema_constraint(schema, f"{param}.schema")
            )
        case "json_schema" if not value.get("json_schema") and isinstance(value.get("schema"), dict | bool):
            _only(value, param, "type", "schema")  # llama.cpp's and Together's way
            return schema_constraint(value["schema"], f"{param}.schema")
        case "json_schema":
            _only(value, param, "type", "json_schema")
            inner, where = value.get("json_schema"), f"{param}.json_schema"
            if not isinstance(inner, dict) or "schema" not in inner:
                raise _wrong(where, "expected an object with 'name' and 'schema'")
            _only(inner, where, "name", "description", "schema", "strict")
            return schema_constraint(inner["schema"], f"{where}.schema")
        case "structural_tag":
            return _structural_tag(value, param)
        case _:
            raise _wrong(param, "its 'type' must be text, json_object, json_schema or structural_tag")


def _structured_outputs(value: Any, param: str) -> Constraint | None:
    """vLLM's."""
    if not isinstance(value, dict):
        raise _wrong(param, f"expected an object with one of {', '.join(_STRUCTURED)}")
    given = {
        key: each
        for key, each in value.items()
        if each not in (None, False) and (key in _STRUCTURED or not asks_for_nothing(each))
    }
    _only(given, param, *_STRUCTURED)
    if len(given) != 1:
        raise _wrong(param, f"expected exactly one of {', '.join(_STRUCTURED)}")
    ((key, each),) = given.items()
    return _STRUCTURED[key](each, f"{param}.{key}")


def _json_object(value: Any, param: str) -> Constraint:
    if value is not True:
        raise _wrong(param, "expected true")
    return Constraint("json")


_STRUCTURED: dict[str, Reader] = {
    "json": schema_constraint,
    "regex": _text("regex"),
    "choice": _choice,
    "grammar": _text("ebnf"),
    "json_object": _json_object,
    "structural_tag": _structural_tag,
}
FIELDS: dict[str, Reader] = {
    "response_format": _response_format,
    "structured_outputs": _structured_outputs,
    "guided_json": schema_constraint,
    "guided_regex": _text("regex"),
    "guided_choice": _choice,
    "guided_grammar": _text("ebnf"),
    "json_schema": schema_constraint,
    "regex": _text("regex"),
    "ebnf": _text("ebnf"),
    "structural_tag": _structural_tag,
}
"""Fields of requests that constrain the answer."""


def _made(kind: Any, text: str, param: str) -> Constraint:
    if len(text) > MAX_CONSTRAINT:
        raise _wrong(param, f"it has {len(text)} characters, and {MAX_CONSTRAINT} are allowed")
    return Constraint(kind, text)


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _only(value: dict[str, Any], param: str, *names: str) -> None:
    for key, each in value.items():
        if key not in names and not asks_for_nothing(each):
            raise unsupported(f"{param}.{key}")


def _wrong(param: str, what: str) -> ApiError:
    return invalid(f"Invalid value for '{param}': {what}.", param, "invalid_value")
