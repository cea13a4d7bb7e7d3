"""Between the ingress workers of a node."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from llm_runtime.actors.messages.base import AnyMessage, NonNegInt32, Rid

MAX_LISTED = 200
"""Requests that a worker tells of, the oldest ones."""


class EndRequests(AnyMessage):
    """Ingress → ingress: a client of one worker wants requests to end that another may have; all of them if `name` is
    empty. No answer."""

    name: Annotated[str, Meta(max_length=4096)] = ""


class ListRequests(AnyMessage):
    """Ingress → ingress: which requests are in progress? Answered by `RequestsListed`; may be sent again."""

    rid: Rid


class RequestInfo(Struct, array_like=True, frozen=True, gc=False):
    """An HTTP request in progress.

    Attributes:
        rid: its identity, by which it can be ended.
        request_id: the client's own name for it, else the same.
        path: of the endpoint. model: empty where it is not known yet.
        age_s: since it arrived. quiet_s: since its last token, or since it arrived.
        prompt_tokens: summed over its choices that have been given to the ledger, as are `output_tokens`.
        engines: schedulers that have them. attempt: how often the unluckiest of them was handed on again.
    """

    rid: Rid
    request_id: str
    path: str
    model: str
    worker: str
    age_s: float
    quiet_s: float
    choices: NonNegInt32
    prompt_tokens: NonNegInt32
    output_tokens: NonNegInt32
    engines: list[str]
    attempt: NonNegInt32


class RequestsListed(AnyMessage):
    """Ingress → ingress: the oldest requests that are in progress in a worker, and how many there are."""

    rid: Rid
    total: NonNegInt32
    requests: Annotated[list[RequestInfo], Meta(max_length=MAX_LISTED)]
