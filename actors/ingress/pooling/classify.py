"""POST /v1/classify, in vLLM's shape."""

from __future__ import annotations

import msgspec
import numpy as np
from msgspec import Struct

from llm_runtime.actors.ingress.exchange import Exchange
from llm_runtime.actors.ingress.pooling.inputs import Truncate, vectors_of_texts
from llm_runtime.actors.ingress.service import Service
from llm_runtime.actors.messages import TextPrompt


class ClassifyRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """Body of POST /v1/classify."""

    input: str | list[str]
    model: str | None = None
    truncate_prompt_tokens: Truncate | None = None
    user: str | None = None


async def classify(service: Service, request: ClassifyRequest, exchange: Exchange) -> None:
    """Answers with the probabilities of the classes of each input, and the most probable one."""
    model = service.check_model(request.model)
    texts = [request.input] if isinstance(request.input, str) else request.input
    vectors, tokens = await vectors_of_texts(
        service, exchange, [TextPrompt(text) for text in texts], "input", request.truncate_prompt_tokens
    )
    labels = service.model.labels
    probabilities = [activated(service.model.activation, vector) for vector in vectors]
    document = {
        "id": f"classify-{exchange.work.identity.rid}",
        "object": "list",
        "created": exchange.work.identity.created,
        "model": model,
        "data": [
            {"index": index, "label": labels[each.index(max(each))], "probs": each, "num_classes": len(labels)}
            for index, each in enumerate(probabilities)
        ],
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0},
    }
    await exchange.answer(msgspec.json.encode(document))


def activated(activation: str, vector: bytes) -> list[float]:
    """The scores that a classifier's numbers (f32) stand for."""
    numbers = np.frombuffer(vector, "<f4").astype(np.float64)
    if activation == "sigmoid":
        numbers = 1 / (1 + np.exp(-numbers))
    elif activation == "softmax":
        numbers = np.exp(numbers - numbers.max())
        numbers = numbers / numbers.sum()
    return [float(each) for each in numbers]
