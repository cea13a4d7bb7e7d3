"""POST /v1/embeddings."""

from __future__ import annotations

import base64
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import Meta, Struct

from llm_runtime.actors.ingress.errors import invalid
from llm_runtime.actors.ingress.exchange import Exchange
from llm_runtime.actors.ingress.pooling.inputs import Truncate, vectors_of_texts
from llm_runtime.actors.ingress.service import Prompt, Service
from llm_runtime.actors.messages import TextPrompt


class EmbeddingsRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """Body of POST /v1/embeddings. `truncate_prompt_tokens` and `add_special_tokens` are vLLM's."""

    input: str | list[str | int | list[int]]
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Meta(ge=1, lt=2**31)] | None = None
    user: str | None = None
    truncate_prompt_tokens: Truncate | None = None
    add_special_tokens: bool = True


async def embeddings(service: Service, request: EmbeddingsRequest, exchange: Exchange) -> None:
    """Answers with a vector for each input."""
    model = service.check_model(request.model)
    check_dimensions(service, request.dimensions)
    prompts = _prompts(request)
    vectors, tokens = await vectors_of_texts(service, exchange, prompts, "input", request.truncate_prompt_tokens)
    vectors = [shortened(vector, request.dimensions) for vector in vectors]
    encode = _base64 if request.encoding_format == "base64" else floats
    document = {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": encode(vector)} for index, vector in enumerate(vectors)
        ],
        "model": model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
    await exchange.answer(msgspec.json.encode(document))


def _prompts(request: EmbeddingsRequest) -> list[Prompt]:
    given = request.input
    if isinstance(given, str):
        return [TextPrompt(given, request.add_special_tokens)]
    texts = [each for each in given if isinstance(each, str)]
    ids = [each for each in given if isinstance(each, int)]
    lists = [each for each in given if isinstance(each, list)]
    if len(texts) == len(given):
        return [TextPrompt(text, request.add_special_tokens) for text in texts]
    if len(ids) == len(given):
        return [ids]
    if len(lists) == len(given):
        return list(lists)
    raise invalid("'input' must hold only texts, only token ids, or only lists of token ids.", "input", "invalid_value")


def check_dimensions(service: Service, dimensions: int | None) -> None:
    """Raises ApiError for more numbers than the model's vectors have."""
    size = service.model.vector_size
    if dimensions is not None and dimensions > size:
        raise invalid(
            f"'dimensions' is {dimensions}, and the model's vectors have {size}.", "dimensions", "invalid_value"
        )


def shortened(vector: bytes, dimensions: int | None) -> bytes:
    """The first numbers of a vector, made a vector of length 1 again; the vector itself if all are wanted."""
    if dimensions is None or 4 * dimensions >= len(vector):
        return vector
    short = np.frombuffer(vector, "<f4")[:dimensions]
    return (short / max(float(np.linalg.norm(short)), 1e-12)).astype("<f4").tobytes()


def floats(vector: bytes) -> list[float]:
    """A vector's numbers."""
    numbers: list[float] = np.frombuffer(vector, "<f4").tolist()
    return numbers


def _base64(vector: bytes) -> Any:
    return base64.b64encode(vector).decode()
