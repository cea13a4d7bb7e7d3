"""POST /v1/messages and /v1/messages/count_tokens, and what is said of batches."""

from __future__ import annotations

from typing import NoReturn

import msgspec
from msgspec import structs

from llm_runtime.actors.ingress.anthropic.answers import Answer
from llm_runtime.actors.ingress.anthropic.context import Edited, Messages, edited
from llm_runtime.actors.ingress.anthropic.conversion import chat_request
from llm_runtime.actors.ingress.anthropic.protocol import Compact, CountRequest, MessagesRequest, Thread
from llm_runtime.actors.ingress.errors import ApiError
from llm_runtime.actors.ingress.exchange import Exchange
from llm_runtime.actors.ingress.openai.requests import ChatRequest
from llm_runtime.actors.ingress.openai.tools import callable_tools
from llm_runtime.actors.ingress.openai.turn import conversation, open_turn
from llm_runtime.actors.ingress.output_deltas import new_rid
from llm_runtime.actors.ingress.service import Service
from llm_runtime.actors.messages import ChatPrompt, Tokenize

_TEMPLATE_TOKENS = 2048
"""More than any template adds to a conversation as a whole."""


async def messages(service: Service, request: MessagesRequest, exchange: Exchange) -> None:
    """Answers a conversation, as one document or as a stream of events."""
    _check_thread(request.thread)
    chat, edits = await _edited_chat(service, request, exchange)
    if service.model.reasoning_parser is None:
        chat.thinking_budget = None  # clients must send one to whatever model, and there is no thinking to tell apart
    turn = await open_turn(service, chat, exchange, cut_limit=True)
    with turn.generation as generation:
        answer = Answer(
            turn,
            exchange.work.identity.rid,
            turn.max_tokens < request.max_tokens,
            edits=None if edits is None else edits.applied,
            show_thinking=request.thinking is None or request.thinking.display != "omitted",
        )
        if request.stream:
            await generation.stream(exchange, lambda entries: answer.parts())
            await exchange.end(b"")
            return
        await generation.progress()
        await exchange.answer(answer.document())


async def count_tokens(service: Service, request: CountRequest, exchange: Exchange) -> None:
    """Answers with the length of a prompt."""
    chat, edits = await _edited_chat(service, request, exchange)
    service.check_model(request.model)
    (tokens,) = await service.tokenize(exchange, [_prompt(service, chat)])
    document: dict[str, object] = {"input_tokens": len(tokens) // 4}
    if edits is not None:
        original = document["input_tokens"] if edits.tokens is None else edits.tokens
        document["context_management"] = {"original_input_tokens": original}
    await exchange.answer(msgspec.json.encode(document))


async def batches(service: Service, exchange: Exchange) -> NoReturn:
    """Batches are not supported: there is no queue for requests that nobody waits for."""
    raise ApiError(
        404,
        "Message batches are not supported by this server: send each request to /v1/messages, as many at a time as you "
        "like.",
    )


def _check_thread(thread: Thread | None) -> None:
    """Raises ApiError for the continuation of a thread. To begin one is taken and does nothing: whoever continues it is
    told that it is not there, and sends the whole conversation, as after any loss of a thread."""
    if thread is not None and thread.type == "continue":
        raise ApiError(
            404,
            "This server keeps no threads: send the whole conversation, without 'thread'.",
            "thread",
            details={"error_code": "thread_not_found"},
        )


async def _edited_chat(
    service: Service, request: CountRequest, exchange: Exchange
) -> tuple[ChatRequest, Edited | None]:
    """The request as a chat, without what its `context_management` leaves out. Raises ApiError."""
    chat = chat_request(request, exchange.warn)
    if request.context_management is None:
        return chat, None
    edits = request.context_management.edits
    if any(isinstance(edit, Compact) for edit in edits):
        exchange.warn("context_management: compact_20260112 is skipped: this server writes no summaries.")

    def with_messages(changed: Messages) -> ChatRequest:
        return chat_request(structs.replace(request, messages=changed), lambda text: None)

    async def count(changed: Messages) -> int:
        prompt = _prompt(service, with_messages(changed))
        return len(await service.tokenization.tokens(Tokenize(new_rid(), prompt, exchange.work.trace))) // 4

    prompt = _prompt(service, chat)
    # A token stands for a byte at least, and what a template adds to a message is shorter than its frame of JSON.
    at_most = len(prompt.messages.encode()) + len(prompt.tools.encode()) + _TEMPLATE_TOKENS
    result = await edited(request.messages, edits, count, at_most)
    return (with_messages(result.messages) if result.applied else chat), result


def _prompt(service: Service, chat: ChatRequest) -> ChatPrompt:
    return conversation(service.model, chat, callable_tools(chat.tools, chat.tool_choice))
