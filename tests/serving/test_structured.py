"""Structured output of a served model, under the names of OpenAI, vLLM and SGLang."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
from support import MODEL, Node

SCHEMAS: dict[str, Any] = json.loads(Path(__file__).with_name("schemas.json").read_text())


def ask(node: Node, text: str = "Give an example.", max_tokens: int = 100, **fields: Any) -> Any:
    return node.client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": text}],
        max_tokens=max_tokens,
        temperature=1.0,
        seed=4,
        extra_body=fields,
    ).choices[0]


def test_answers_are_valid_for_twenty_schemas(node: Node) -> None:
    """All at once, at temperature 1; what goes on for ever is closed where its room ends."""

    def one(schema: Any) -> str:
        asked = {"type": "json_schema", "json_schema": {"name": "example", "schema": schema, "strict": True}}
        choice = ask(node, response_format=asked)
        assert choice.finish_reason == "stop", choice
        return str(choice.message.content)

    assert len(SCHEMAS) == 20
    with ThreadPoolExecutor(len(SCHEMAS)) as pool:
        answers = list(pool.map(one, SCHEMAS.values()))
    for schema, answer in zip(SCHEMAS.values(), answers, strict=True):
        value = json.loads(answer)
        jsonschema.validate(value, schema, format_checker=jsonschema.FormatChecker())


def test_all_names_of_a_constraint(node: Node) -> None:
    person = SCHEMAS["person"]
    jsonschema.validate(json.loads(ask(node, guided_json=person).message.content), person)
    jsonschema.validate(json.loads(ask(node, json_schema=json.dumps(person)).message.content), person)
    assert re.fullmatch("[0-9]{3}", ask(node, regex="[0-9]{3}").message.content)
    assert re.fullmatch("[a-c]{2}", ask(node, structured_outputs={"regex": "[a-c]{2}"}).message.content)
    assert ask(node, guided_choice=["yes", "no"]).message.content in ("yes", "no")
    assert re.fullmatch("ab+", ask(node, ebnf='root ::= "a" "b"{1,3}').message.content)
    tag = {"begin": "<n>", "content": {"type": "json_schema", "json_schema": {"type": "boolean"}}, "end": "</n>"}
    asked = {"type": "structural_tag", "format": {"type": "tag", **tag}}
    assert re.fullmatch("<n>(true|false)</n>", ask(node, response_format=asked).message.content)
    params = {"regex": "[a-f]{4}", "temperature": 0}
    assert re.fullmatch("[a-f]{4}", node.post("/generate", {"text": "The", "sampling_params": params})["text"])
    streamed = node.client.completions.create(
        model=MODEL, prompt="Answer:", stream=True, max_tokens=9, n=2, extra_body={"guided_choice": ["maybe", "never"]}
    )
    texts = ["", ""]
    for chunk in streamed:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert set(texts) <= {"maybe", "never"}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"guided_json": {"type": "nope"}}, "Invalid type: nope"),
        ({"guided_json": {"type": "array", "uniqueItems": True}}, "'uniqueItems' is not supported"),
        ({"ebnf": "root ::= root"}, "allows no text at all"),
        ({"regex": "(", "guided_choice": ["a"]}, "Only one constraint is allowed"),
    ],
)
def test_what_cannot_be_kept_is_an_error_400(node: Node, fields: dict[str, Any], reason: str) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match=reason):
            ask(node, stream=stream, **fields)
