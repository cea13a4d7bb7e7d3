"""The description of the HTTP API: that it is complete, and true."""

from __future__ import annotations

from typing import Any
from unittest.mock import MagicMock

import pytest
from jsonschema import Draft202012Validator

from llm_runtime.actors.ingress.app import create_app

from .conftest import Serve, Served

SAID = {"role": "user", "content": "a"}


@pytest.fixture(scope="module")
def document(shared: Served) -> Any:
    return shared.client.get("/openapi.json").json()


def test_every_route_is_described(document: Any) -> None:
    described = {(path, method) for path, operations in document["paths"].items() for method in operations}
    routes = {
        (route.path.replace(":path", ""), method.lower())  # type: ignore[attr-defined]
        for route in create_app(MagicMock()).routes
        for method in route.methods - {"HEAD"}  # type: ignore[attr-defined]
    }
    assert described == routes
    for operations in document["paths"].values():
        for operation in operations.values():
            assert operation["summary"], operation
            assert operation["responses"].keys() == {"200", "default"}
    identities = [each["operationId"] for operations in document["paths"].values() for each in operations.values()]
    assert len(identities) == len(set(identities))


def test_every_reference_leads_somewhere(document: Any) -> None:
    def references(value: Any) -> list[str]:
        if isinstance(value, list):
            return [found for each in value for found in references(each)]
        if not isinstance(value, dict):
            return []
        own = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
        return own + [found for each in value.values() for found in references(each)]

    schemas = document["components"]["schemas"]
    assert {each.rpartition("/")[2] for each in references(document)} <= schemas.keys()
    for schema in schemas.values():
        Draft202012Validator.check_schema(schema)
    assert all(name.isalnum() for name in schemas)


@pytest.mark.parametrize(
    ("path", "base"),
    [
        ("/api/generate", {"model": "fake", "prompt": "a"}),
        ("/generate", {"text": "a"}),
        ("/v1/chat/completions", {"messages": [SAID]}),
        ("/v1/messages", {"model": "fake", "max_tokens": 1, "messages": [SAID]}),
        ("/v1/messages/count_tokens", {"model": "fake", "messages": [SAID]}),
    ],
)
def test_what_is_left_out_is_refused(document: Any, shared: Served, path: str, base: dict[str, Any]) -> None:
    (body,) = {
        route.endpoint.body  # type: ignore[attr-defined]
        for route in create_app(MagicMock()).routes
        if route.path == path  # type: ignore[attr-defined]
    }
    assert body.unsupported
    for name in body.unsupported:
        assert name not in document["components"]["schemas"][body.__name__]["properties"]
        response = shared.client.post(path, json={**base, name: {"a": 1}})
        assert response.status_code == 400, name
        assert "not supported" in response.text, (name, response.text)


def test_a_key_is_described_where_it_is_asked_for(serve: Serve) -> None:
    document = serve(api_key="secret").client.get("/openapi.json").json()
    assert "security" in document["paths"]["/v1/chat/completions"]["post"]
    assert "security" not in document["paths"]["/health"]["get"]
    assert set(document["components"]["securitySchemes"]) == {"bearer", "key"}
