"""POST /api/embed, and /api/embeddings, its former form."""

from __future__ import annotations

import msgspec

from llm_runtime.actors.ingress.exchange import Exchange
from llm_runtime.actors.ingress.ollama.conversion import served_name
from llm_runtime.actors.ingress.ollama.protocol import EmbedBody, EmbeddingsBody
from llm_runtime.actors.ingress.openai.embeddings import check_dimensions, floats, shortened
from llm_runtime.actors.ingress.pooling.inputs import vectors_of_texts
from llm_runtime.actors.ingress.service import Service
from llm_runtime.actors.messages import TextPrompt

_encode = msgspec.json.encode

_ALL_THAT_FITS = -1


async def embed(service: Service, body: EmbedBody, exchange: Exchange) -> None:
    """Answers with a vector for each text. What is too long is cut, unless `truncate` is false."""
    served_name(service, body.model)
    check_dimensions(service, body.dimensions)
    texts = [body.input] if isinstance(body.input, str) else body.input
    truncate = None if body.truncate is False else _ALL_THAT_FITS
    vectors: list[bytes] = []
    tokens = 0
    if texts:
        prompts = [TextPrompt(text) for text in texts]
        vectors, tokens = await vectors_of_texts(service, exchange, prompts, "input", truncate)
    vectors = [shortened(vector, body.dimensions) for vector in vectors]
    document = {
        "model": body.model,
        "embeddings": [floats(vector) for vector in vectors],
        "prompt_eval_count": tokens,
    }
    await exchange.answer(_encode(document))


async def embeddings(service: Service, body: EmbeddingsBody, exchange: Exchange) -> None:
    """Answers with the vector of one text."""
    served_name(service, body.model)
    vector: list[float] = []
    if body.prompt:
        prompts = [TextPrompt(body.prompt)]
        (packed,), _ = await vectors_of_texts(service, exchange, prompts, "prompt", _ALL_THAT_FITS)
        vector = floats(packed)
    await exchange.answer(_encode({"embedding": vector}))
