"""POST /v1/rerank in the shape of Jina and Cohere as vLLM serves it, and /v1/score in vLLM's.

A cross encoder, a classifier of one class, reads the two texts together. An embedding model reads each by itself, and
the score is the cosine of the angle between the vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta, Struct

from llm_runtime.actors.ingress.errors import invalid
from llm_runtime.actors.ingress.exchange import Exchange
from llm_runtime.actors.ingress.pooling.classify import activated
from llm_runtime.actors.ingress.pooling.inputs import Truncate, vectors_of_pairs, vectors_of_texts
from llm_runtime.actors.ingress.service import Service
from llm_runtime.actors.messages import TextPrompt


class Document(Struct):
    """A document as Jina has it."""

    text: str


class RerankRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """Body of POST /v1/rerank. Without `top_n`, or with 0, all documents are answered."""

    query: str
    documents: list[str | Document]
    model: str | None = None
    top_n: Annotated[int, Meta(ge=0, lt=2**31)] | None = None
    return_documents: bool = True
    truncate_prompt_tokens: Truncate | None = None
    user: str | None = None


class ScoreRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """Body of POST /v1/score: one text against each of some, or each of some against its counterpart."""

    text_1: str | list[str]
    text_2: str | list[str]
    model: str | None = None
    truncate_prompt_tokens: Truncate | None = None
    user: str | None = None


async def rerank(service: Service, request: RerankRequest, exchange: Exchange) -> None:
    """Answers with the documents, those that fit the query best first."""
    model = service.check_model(request.model)
    texts = [each if isinstance(each, str) else each.text for each in request.documents]
    scores, tokens = await _scores(
        service, exchange, [request.query] * len(texts), texts, "documents", request.truncate_prompt_tokens
    )
    order = sorted(range(len(texts)), key=lambda index: -scores[index])[: request.top_n or len(texts)]
    document = {
        "id": f"rerank-{exchange.work.identity.rid}",
        "model": model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        "results": [
            {
                "index": index,
                **({"document": {"text": texts[index]}} if request.return_documents else {}),
                "relevance_score": scores[index],
            }
            for index in order
        ],
    }
    await exchange.answer(msgspec.json.encode(document))


async def score(service: Service, request: ScoreRequest, exchange: Exchange) -> None:
    """Answers with the score of each pair."""
    model = service.check_model(request.model)
    first = [request.text_1] if isinstance(request.text_1, str) else request.text_1
    second = [request.text_2] if isinstance(request.text_2, str) else request.text_2
    if len(first) == 1:
        first = first * len(second)
    if len(first) != len(second):
        raise invalid(
            f"'text_1' has {len(first)} texts and 'text_2' has {len(second)}: send as many, or one 'text_1'.",
            "text_1",
            "invalid_value",
        )
    scores, tokens = await _scores(service, exchange, first, second, "text_2", request.truncate_prompt_tokens)
    document = {
        "id": f"score-{exchange.work.identity.rid}",
        "object": "list",
        "created": exchange.work.identity.created,
        "model": model,
        "data": [{"index": index, "object": "score", "score": value} for index, value in enumerate(scores)],
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
    await exchange.answer(msgspec.json.encode(document))


async def _scores(
    service: Service,
    exchange: Exchange,
    first: Sequence[str],
    second: Sequence[str],
    param: str,
    truncate: int | None,
) -> tuple[list[float], int]:
    """The score of each pair, and how many tokens were read."""
    model = service.model
    if model.task == "embed":
        # Each text once, however often it is compared.
        texts = list(dict.fromkeys((*first, *second)))
        vectors, tokens = await vectors_of_texts(
            service, exchange, [TextPrompt(each) for each in texts], param, truncate
        )
        units = {text: _unit(vector) for text, vector in zip(texts, vectors, strict=True)}
        return [float(units[one] @ units[other]) for one, other in zip(first, second, strict=True)], tokens
    if len(model.labels) != 1:
        raise invalid(
            f"The model '{model.name}' has {len(model.labels)} classes, and scores come from a "
            "model with one: use /v1/classify.",
            "model",
            "unsupported_model",
        )
    vectors, tokens = await vectors_of_pairs(service, exchange, list(zip(first, second, strict=True)), param, truncate)
    return [activated(model.activation, vector)[0] for vector in vectors], tokens


def _unit(vector: bytes) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    numbers = np.frombuffer(vector, "<f4").astype(np.float64)
    return np.asarray(numbers / max(float(np.linalg.norm(numbers)), 1e-12))
