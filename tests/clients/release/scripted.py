"""A server whose model does what agents wait for: it calls the tool that fits, reads its result, and fills in schemas.

Started as `python scripted.py DIRECTORY` with the tests on PYTHONPATH; prints its URL, and ends with standard input.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from ingress.conftest import one_ingress
from ingress.fakes import Fakes, unpacked

from llm_runtime.actors.messages import ChatPrompt, Generate

MAX_MODEL_LEN = 200_000
ANSWER = "It is sunny in Paris."


def example(schema: Any, root: dict[str, Any], depth: int = 0) -> Any:
    """A value that a schema of the usual kind allows."""
    if not isinstance(schema, dict) or depth > 20:
        return "x"
    if "$ref" in schema:
        place: Any = root
        for part in schema["$ref"].removeprefix("#/").split("/"):
            place = place[part]
        return example(place, root, depth + 1)
    if "const" in schema:
        return schema["const"]
    if schema.get("enum"):
        return schema["enum"][0]
    for key in ("anyOf", "oneOf", "allOf"):
        if schema.get(key):
            return example(schema[key][0], root, depth + 1)
    kind = schema.get("type")
    kind = kind[0] if isinstance(kind, list) else kind
    match kind:
        case "object":
            return {name: example(each, root, depth + 1) for name, each in schema.get("properties", {}).items()}
        case "array":
            return [example(schema.get("items", {}), root, depth + 1)] * max(1, schema.get("minItems", 1))
        case "integer":
            return max(7, schema.get("minimum", 7))
        case "number":
            return 7.5
        case "boolean":
            return True
        case "null":
            return None
    return "Paris"


class Model:
    """The scripted model."""

    def __init__(self, fakes: Fakes) -> None:
        self._fakes = fakes

    def says(self, generate: Generate) -> str:
        constraint = generate.sampling.constraint
        if constraint is not None and constraint.kind == "json_schema":
            schema = json.loads(constraint.text)
            return json.dumps(example(schema, schema))
        if constraint is not None and constraint.kind == "json":
            return '{"city": "Paris", "degrees": 7}'
        text = unpacked(generate.prompt)
        if "degrees" in text and "json" in text.lower():
            return '```json\n{"city": "Paris", "degrees": 7}\n```'
        tools = self._tools(text)
        asked = text.rpartition("\nuser:")[2] if "\nuser:" in text else text
        if not tools or "\ntool:" in asked or "weather" not in asked.lower():
            return "```python\nfinal_answer('sunny')\n```<end_code>" if "final_answer" in text and not tools else ANSWER
        tool = next((each for each in tools if "weather" in each["name"].lower()), tools[0])
        parameters = tool.get("parameters") or {}
        call = {"name": tool["name"], "arguments": example({"type": "object", **parameters}, parameters)}
        return f"<tool_call>\n{json.dumps(call)}\n</tool_call>"

    def _tools(self, text: str) -> list[dict[str, Any]]:
        for message in reversed(self._fakes.seen.tokenizes):
            prompt = message.prompt
            if isinstance(prompt, ChatPrompt) and prompt.tools:
                rendered = "".join(f"{each['role']}:{each['content']}\n" for each in json.loads(prompt.messages))
                if text.startswith(rendered):
                    return [each["function"] for each in json.loads(prompt.tools)]
        return []


def main() -> None:
    directory = Path(sys.argv[1])
    settings: dict[str, Any] = {
        "tool_call_parser": "qwen25",
        "reasoning_parser": "qwen3",
        "max_model_len": MAX_MODEL_LEN,
        "response_dir": str(directory / "responses"),
        "response_store_bytes": 2**24,
    }
    with one_ingress(directory, **settings) as served:
        served.fakes.per_step = 8
        served.fakes.script = Model(served.fakes).says
        print(served.url, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
