"""GET /openapi.json: what the routes take and answer, for programs that make clients and tests of it.

Requests are described from the types that decode them, so that the description cannot fall behind. Fields that are
refused whenever they ask for anything are left out of it. Answers are described by their kind only.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, Protocol, cast

import msgspec
from starlette.routing import BaseRoute, Route

from llm_runtime.actors.ingress.exchange import Exchange
from llm_runtime.actors.ingress.service import Service
from llm_runtime.actors.ingress.wire import ANTHROPIC, OLLAMA, Wire

_REFERENCE = "#/components/schemas/"
_JSON = "application/json"


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


_STRING = {"type": "string"}
_ANSWERS = {"/": "text/html", "/flush_cache": "text/plain", "/metrics": "text/plain"}
"""Content types of answers that are not JSON."""
_TEXT = {"type": "string", "minLength": 1}
_SCHEMA = {"anyOf": [{"type": "object"}, {"type": "boolean"}, {"type": "string", "description": "a schema as text"}]}
_FORMS: dict[str, Any] = {
    "response_format": {
        "type": "object",
        "properties": {
            "type": {"enum": ["text", "json_object", "json_schema", "structural_tag"]},
            "json_schema": {"type": "object", "properties": {"name": {"type": "string"}, "schema": {"type": "object"}}},
        },
        "required": ["type"],
    },
    "structured_outputs": {"type": "object", "minProperties": 1, "maxProperties": 1},
    "guided_json": _SCHEMA,
    "json_schema": _SCHEMA,
    "guided_regex": _TEXT,
    "regex": _TEXT,
    "guided_grammar": _TEXT,
    "ebnf": _TEXT,
    "guided_choice": {"type": "array", "items": _TEXT, "minItems": 1},
    "structural_tag": {"type": "object"},
}
"""Of fields that are read by hand; see `constraints`."""
_MORE: dict[tuple[str, str], Any] = {
    ("ChatMessage", "content"): {
        "anyOf": [
            _STRING,
            {"type": "null"},
            {"type": "array", "items": _object(type={"const": "text"}, text=_STRING)},
        ]
    },
    ("ChatMessage", "role"): {"enum": ["system", "developer", "user", "assistant", "tool", "function"]},
    ("ChatRequest", "messages"): {"minItems": 1},
}
"""What is checked beyond the types, by type and field."""


_ERRORS = {
    "Error": _object(
        error=_object(
            message=_STRING, type=_STRING, param={"type": ["string", "null"]}, code={"type": ["string", "null"]}
        )
    ),
    "AnthropicError": _object(type={"const": "error"}, error=_object(type=_STRING, message=_STRING)),
    "OllamaError": _object(error=_STRING),
}


class Endpoint(Protocol):
    """What is known of a route's endpoint.

    Attributes:
        handle: its docstring says what the endpoint does.
        body: type of the JSON document that it takes; None if it takes none.
        default: the document that a request without one means; empty if there is none.
        public: no API key is asked for.
    """

    handle: Any
    body: type[Any] | None
    default: bytes
    public: bool
    wire: Wire


class Description:
    """Answers with the OpenAPI document of these routes.

    Args:
        routes: whose endpoints are each an `Endpoint`. What is added to the list later is described too.
    """

    def __init__(self, routes: Sequence[BaseRoute]) -> None:
        self._routes = routes
        self._document = b""

    async def __call__(self, service: Service, exchange: Exchange) -> None:
        """A description of this server for programs, in OpenAPI 3.1."""
        if not self._document:
            self._document = msgspec.json.encode(describe(self._routes, service.config.api_key is not None))
        await exchange.answer(self._document)


def describe(routes: Sequence[BaseRoute], locked: bool) -> dict[str, Any]:
    """An OpenAPI 3.1 document.

    Args:
        locked: an API key is asked for.
    """
    described = [route for route in routes if isinstance(route, Route)]
    endpoints = [cast(Endpoint, route.endpoint) for route in described]
    bodies = {endpoint.body: None for endpoint in endpoints if endpoint.body is not None}
    references, schemas = msgspec.json.schema_components(list(bodies), ref_template=_REFERENCE + "{name}")
    names = {name: _short(name) for name in schemas}
    told = dict(zip(bodies, (_renamed(each, names) for each in references), strict=True))
    components: dict[str, Any] = {
        "schemas": {names[name]: _accepted(name, _renamed(schema, names)) for name, schema in schemas.items()} | _ERRORS
    }
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "llm-runtime", "version": version("llm-runtime")},
        "paths": {},
        "components": components,
    }
    if locked:
        components["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
        }
    for route in described:
        operations = document["paths"].setdefault(route.path.replace(":path}", "}"), {})
        for method in sorted((route.methods or set()) - {"HEAD"}):
            operations[method.lower()] = _operation(route, method, told, locked)
    return document


def _operation(route: Route, method: str, told: dict[Any, Any], locked: bool) -> dict[str, Any]:
    endpoint = cast(Endpoint, route.endpoint)
    handle = endpoint.handle if inspect.isroutine(endpoint.handle) else type(endpoint.handle).__call__
    text = inspect.getdoc(handle) or ""
    answers: dict[str, Any] = {_ANSWERS.get(route.path, _JSON): {}}
    if endpoint.body is not None and "stream" in endpoint.body.__struct_fields__:
        answers[endpoint.wire.stream_headers[0][1].decode().partition(";")[0]] = {}
    kind = "AnthropicError" if endpoint.wire is ANTHROPIC else "OllamaError" if endpoint.wire is OLLAMA else "Error"
    words = [word.partition(":")[0].strip("{") for word in route.path.strip("/").split("/") if word]
    operation: dict[str, Any] = {
        "operationId": "_".join([method.lower(), *words]).replace("}", ""),
        "summary": text.partition(".")[0].replace("\n", " "),
        "responses": {
            "200": {"description": "The answer.", "content": answers},
            "default": {
                "description": "An error: what to do about it is in the message.",
                "headers": {"Retry-After": {"description": "In seconds.", "schema": {"type": "integer"}}},
                "content": {_JSON: {"schema": {"$ref": _REFERENCE + kind}}},
            },
        },
    }
    if endpoint.body is not None:
        operation["requestBody"] = {
            "required": not endpoint.default,
            "content": {_JSON: {"schema": told[endpoint.body]}},
        }
    parameters = [{"name": name, "in": "path", "required": True, "schema": _TEXT} for name in route.param_convertors]
    if parameters:
        operation["parameters"] = parameters
    if locked and not endpoint.public:
        operation["security"] = [{"bearer": []}, {"key": []}]
    return operation


def _short(name: str) -> str:
    """A schema's name; where several packages have one of the same name, with its package."""
    parts = name.strip("_").split(".")
    return parts[-1] if len(parts) == 1 else f"{parts[-3].capitalize()}{parts[-1]}"


def _renamed(schema: Any, names: dict[str, str]) -> Any:
    if isinstance(schema, list):
        return [_renamed(each, names) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: _renamed(each, names) for key, each in schema.items()}
    if isinstance(schema.get("$ref"), str):
        made["$ref"] = _REFERENCE + names[schema["$ref"].removeprefix(_REFERENCE)]
    if isinstance(schema.get("discriminator"), dict) and "mapping" in schema["discriminator"]:
        mapping: dict[str, str] = schema["discriminator"]["mapping"]
        made["discriminator"]["mapping"] = {
            kind: _REFERENCE + names[target.removeprefix(_REFERENCE)] for kind, target in mapping.items()
        }
    return made


def _accepted(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    """The schema without the fields that are refused, and with what is known of those that are read by hand."""
    properties = schema.get("properties", {})
    for (of, field), more in _MORE.items():
        if of == name:
            properties[field] |= more
    for field, form in _FORMS.items():
        if field in properties and not properties[field].keys() - {"default"}:
            properties[field] = {"anyOf": [form, {"type": "null"}], "default": None}
    for choice in properties.get("logit_bias", {}).get("anyOf", ()):
        if choice["type"] == "object":
            choice["propertyNames"] = {"pattern": "^[0-9]{1,6}$"}
    return schema
