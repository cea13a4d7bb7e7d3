"""Calls that a grammar has forced, in a form that does not depend on the model."""

from __future__ import annotations

from actors.parsers.tool_calls.json_calls import JSONCalls


class JSONListCalls(JSONCalls):
    """[{"name": "f", "parameters": {…}}, …], which is the whole output; see `forced_calls`."""

    MARKERS = ("[",)
    PLAIN = ()
