"""Calls that a grammar has forced or allowed, in a form that does not depend on the model."""

from __future__ import annotations

from llm_runtime.actors.parsers.tool_calls.json_calls import JSONCalls


class JSONListCalls(JSONCalls):
    """[{"name": "f", "parameters": {…}}, …], which is the whole output; see `calls_schema`."""

    MARKERS = ("[",)


class ForcedCalls(JSONListCalls):
    """The same where the output can be nothing else, so that of one that is cut off nothing is content."""

    PLAIN = ()
