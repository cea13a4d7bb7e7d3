"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import Struct

from actors.ingress.errors import invalid, unsupported
from actors.ingress.exchange import DONE, Exchange
from actors.ingress.generation import Generation
from actors.ingress.ledger import Entry
from actors.ingress.openai.logprobs import chat_logprobs
from actors.ingress.openai.protocol import ChunkFrame, CompletionsRequest, TopLogprobsCount, usage
from actors.ingress.sampling import Tokens
from actors.ingress.service import Service
from actors.messages import ChatPrompt, TextLogprob

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""Roles of messages, and what chat templates call them."""

_encode = msgspec.json.encode


class ChatMessage(Struct, forbid_unknown_fields=True):
    """One message. Fields of type Any are what clients send back of an answer, and are empty then."""

    role: str
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    annotations: Any = None
    audio: Any = None
    function_call: Any = None
    reasoning_content: Any = None
    refusal: Any = None
    tool_call_id: Any = None
    tool_calls: Any = None


class ChatRequest(CompletionsRequest, forbid_unknown_fields=True, kw_only=True):
    """Body of POST /v1/chat/completions."""

    messages: list[ChatMessage]
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobsCount | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False


async def chat_completions(service: Service, request: ChatRequest, exchange: Exchange) -> None:
    """Answers a chat request, as one document or as a stream of chunks."""
    request.check()
    model = service.check_model(request.model)
    n = request.n or 1
    service.check_choices(1, n)
    asked, asked_param = request.max_completion_tokens, "max_completion_tokens"
    if asked is None:
        asked, asked_param = request.max_tokens, "max_tokens"
    if asked == 0:
        raise invalid(f"Invalid value for '{asked_param}': it must be at least 1.", asked_param, "invalid_value")
    if request.top_logprobs is not None and not request.logprobs:
        raise invalid("top_logprobs is only allowed when logprobs is true.", "top_logprobs")
    top = (request.top_logprobs or 0) if request.logprobs else -1
    sampling = request.sampling(service.config, exchange.work.identity.seed, asked, logprobs=top)
    text = request.text_params(service.config)

    conversation = chat_prompt(
        request.messages, request.chat_template_kwargs, request.add_generation_prompt, request.continue_final_message
    )
    (prompt,) = await service.tokenize(exchange, [conversation])
    max_tokens = service.check_length(len(prompt) // 4, asked, None, "messages", asked_param)

    drawn = exchange.work.identity
    eager = bool(request.stream)
    with service.generate(
        exchange,
        [(prompt, max_tokens)],
        sampling,
        text,
        n=n,
        priority=request.priority or 0,
        extra_key=request.prefix_key,
        eager=eager,
    ) as generation:
        identity, created = f"chatcmpl-{drawn.rid}", drawn.created
        if eager:
            frame = ChunkFrame("chat.completion.chunk", identity, created, model, request.stream_options)
            started: set[int] = set()
            await generation.stream(exchange, lambda entries: _events(entries, generation, frame, top, started))
            await exchange.end(frame.last(generation) + DONE)
            return
        entries = await generation.progress()
        document = {
            "id": identity,
            "object": "chat.completion",
            "created": created,
            "model": model,
            "choices": [_choice(entry, top) for entry in entries],
            "usage": usage(generation),
            "system_fingerprint": None,
        }
        await exchange.answer(_encode(document))


def chat_prompt(
    messages: list[ChatMessage],
    template_arguments: dict[str, Any] | None,
    add_generation_prompt: bool | None,
    continue_final_message: bool,
) -> ChatPrompt:
    """What the tokenizer renders. Raises ApiError for messages that are not text or make no conversation."""
    if not messages:
        raise invalid("Invalid value for 'messages': there must be at least one message.", "messages", "invalid_value")
    plain = [_plain(message, f"messages[{i}]") for i, message in enumerate(messages)]
    if add_generation_prompt is None:
        add_generation_prompt = not continue_final_message
    if continue_final_message:
        if add_generation_prompt:
            raise invalid(
                "continue_final_message and add_generation_prompt exclude each other.", "continue_final_message"
            )
        if plain[-1]["role"] != "assistant":
            raise invalid(
                "continue_final_message needs a last message with role 'assistant'.", "continue_final_message"
            )
    return ChatPrompt(
        messages=_encode(plain).decode(),
        template_arguments=_encode(template_arguments or {}).decode(),
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
    )


def _plain(message: ChatMessage, param: str) -> dict[str, str]:
    """A message as chat templates know it. Parts of text are joined by a space, as SGLang does."""
    if message.role in ("tool", "function"):
        raise unsupported(f"{param}.role", f"A message with role '{message.role}'")
    role = _ROLES.get(message.role)
    if role is None:
        raise invalid(
            f"Invalid value for '{param}.role': '{message.role}' is none of {', '.join(_ROLES)}.",
            f"{param}.role",
            "invalid_value",
        )
    for field in ("audio", "function_call", "reasoning_content", "refusal", "tool_call_id", "tool_calls"):
        if getattr(message, field) not in (None, [], ""):
            raise unsupported(f"{param}.{field}", f"'{field}' in a message")
    if message.annotations not in (None, []):
        raise unsupported(f"{param}.annotations", "'annotations' in a message")
    content = message.content
    if content is None:
        raise invalid(
            f"Invalid value for '{param}.content': it must be a string or a list of text parts.",
            f"{param}.content",
            "invalid_value",
        )
    if isinstance(content, list):
        content = " ".join(_part(part, f"{param}.content[{i}]") for i, part in enumerate(content))
    plain = {"role": role, "content": content}
    if message.name is not None:
        plain["name"] = message.name
    return plain


def _part(part: dict[str, Any], param: str) -> str:
    kind = part.get("type")
    if kind != "text":
        if isinstance(kind, str):
            raise unsupported(f"{param}.type", f"A content part of type '{kind}'")
        raise invalid(f"Invalid value for '{param}': a content part has a 'type'.", param, "invalid_value")
    for key in part:
        if key not in ("type", "text"):
            raise invalid(
                f"Unrecognized request argument supplied: {param}.{key}", f"{param}.{key}", "unknown_parameter"
            )
    text = part.get("text")
    if not isinstance(text, str):
        raise invalid(f"Invalid value for '{param}.text': expected a string.", f"{param}.text", "invalid_value")
    return text


def _choice(entry: Entry, top: int) -> dict[str, Any]:
    text, _, logprobs = entry.take()
    return {
        "index": entry.index,
        "message": {"role": "assistant", "content": text, "refusal": None},
        "logprobs": chat_logprobs(logprobs, top) if top >= 0 else None,
        "finish_reason": entry.finish,
        "matched_stop": entry.stop_reason,
    }


def _events(entries: Sequence[Entry], generation: Generation, frame: ChunkFrame, top: int, started: set[int]) -> bytes:
    """Of the choices that have news; `started` are those that have had their first event."""
    pieces: list[bytes] = []
    for entry in entries:
        index = entry.index
        text, _, logprobs = entry.take()
        if index not in started:
            started.add(index)
            role = b'"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null'
            pieces.append(frame.chunk(index, role, generation))
        if text or logprobs:
            pieces.append(frame.chunk(index, _content(text, logprobs, top), generation))
        if entry.finish is not None:
            end = b'"delta":{},"logprobs":null,"finish_reason":"%s","matched_stop":%s' % (
                entry.finish.encode(),
                _encode(entry.stop_reason),
            )
            pieces.append(frame.chunk(index, end, generation))
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _content(text: str, logprobs: list[TextLogprob], top: int) -> bytes:
    if top < 0:
        return b'"delta":{"content":%s},"logprobs":null,"finish_reason":null' % _encode(text)
    return b'"delta":{"content":%s},"logprobs":%s,"finish_reason":null' % (
        _encode(text),
        _encode(chat_logprobs(logprobs, top)),
    )
