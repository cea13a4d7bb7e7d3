"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from llm_runtime.actors.ingress.exchange import DONE, Exchange
from llm_runtime.actors.ingress.ledger import Entry
from llm_runtime.actors.ingress.openai.choices import ChatChoice
from llm_runtime.actors.ingress.openai.protocol import ChunkFrame, usage
from llm_runtime.actors.ingress.openai.requests import ChatRequest
from llm_runtime.actors.ingress.openai.turn import open_turn
from llm_runtime.actors.ingress.service import Service

_encode = msgspec.json.encode


async def chat_completions(service: Service, request: ChatRequest, exchange: Exchange) -> None:
    """Answers a chat request, as one document or as a stream of chunks."""
    turn = await open_turn(service, request, exchange)
    drawn = exchange.work.identity
    names = [(name, output.entry) for name in request.names for output in turn.outputs]
    with turn.generation as generation, service.known_as(names):
        identity, created, model = f"chatcmpl-{drawn.rid}", drawn.created, turn.model
        choices = [ChatChoice(output, turn.top, request) for output in turn.outputs]
        if request.stream:
            frame = ChunkFrame("chat.completion.chunk", identity, created, model, request.stream_options)

            def events(entries: Sequence[Entry]) -> bytes:
                chunks: list[bytes] = []
                for entry in entries:
                    choices[entry.index].add_chunks(chunks, frame, generation)
                return chunks[0] if len(chunks) == 1 else b"".join(chunks)

            await generation.stream(exchange, events)
            await exchange.end(frame.last(generation) + DONE)
            return
        await generation.progress()
        document = {
            "id": identity,
            "object": "chat.completion",
            "created": created,
            "model": model,
            "choices": [choice.document() for choice in choices],
            "usage": usage(generation),
            "system_fingerprint": None,
        }
        if request.return_token_ids:
            document["prompt_token_ids"] = turn.outputs[0].entry.prompt_ids
        await exchange.answer(_encode(document))
