"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import msgspec
from msgspec import structs

from actors.ingress.config import IngressConfig
from actors.ingress.errors import invalid
from actors.ingress.exchange import DONE, Exchange
from actors.ingress.ledger import Entry
from actors.ingress.openai.choices import ChatChoice
from actors.ingress.openai.messages import ChatMessage, chat_prompt
from actors.ingress.openai.protocol import ChunkFrame, CompletionsRequest, TopLogprobsCount, usage
from actors.ingress.openai.tools import (
    Tool,
    ToolChoice,
    call_id,
    callable_tools,
    constrained,
    forced_calls,
    parameters_of,
    rendered,
)
from actors.ingress.parsers.output import OutputParser
from actors.ingress.parsers.reasoning import reasoning_parser
from actors.ingress.parsers.tool_calls import tool_call_parser
from actors.ingress.parsers.tool_calls.json_list import JSONListCalls
from actors.ingress.sampling import Tokens
from actors.ingress.service import Service

_ONE_TURN = ("deepseekv3", "deepseekv31")
"""Formats of DeepSeek's whose templates take the arguments of calls as text, and let the model go on with its turn
after the tools' results, without a new beginning."""

_encode = msgspec.json.encode


class ChatRequest(CompletionsRequest, forbid_unknown_fields=True, kw_only=True):
    """Body of POST /v1/chat/completions."""

    messages: list[ChatMessage]
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobsCount | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    separate_reasoning: bool = True
    stream_reasoning: bool = True
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False

    @property
    def template_arguments(self) -> dict[str, Any]:
        """Variables for the chat template."""
        effort = {} if self.reasoning_effort is None else {"reasoning_effort": self.reasoning_effort}
        return {**effort, **(self.chat_template_kwargs or {})}


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
    tools = callable_tools(request.tools, request.tool_choice)
    forced = forced_calls(tools, request.tool_choice, request.parallel_tool_calls is not False)
    sampling = constrained(sampling, forced)
    if tools and service.config.tool_call_parser is not None and request.skip_special_tokens is None:
        text = structs.replace(text, skip_special_tokens=False)  # markers of calls are special tokens of many models

    conversation = chat_prompt(
        request.messages,
        request.template_arguments,
        request.add_generation_prompt,
        request.continue_final_message,
        rendered(tools),
        service.config.tool_call_parser in _ONE_TURN,
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
        parser = _parsers(service.config, request, tools, forced is not None)
        short_ids = service.config.tool_call_parser == "mistral"
        choices = [
            ChatChoice(entry, parser(), top, lambda choice, call: call_id(drawn.rid, choice, call, short_ids))
            for entry in generation.entries
        ]
        if eager:
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
        await exchange.answer(_encode(document))


def _parsers(
    config: IngressConfig, request: ChatRequest, tools: Sequence[Tool], forced: bool
) -> Callable[[], OutputParser | None]:
    """Makes the parser of a choice, None if its output is the content. `forced` is for calls that a grammar forces."""
    reasoning_format = config.reasoning_parser if request.separate_reasoning else None
    calls_format = config.tool_call_parser if tools else None
    parameters = parameters_of(tools)
    last = request.messages[-1]
    continued = last.text if request.continue_final_message else None
    if last.role == "tool" and config.tool_call_parser in _ONE_TURN:
        continued = ""

    def make() -> OutputParser | None:
        reasoning = reasoning_format and reasoning_parser(reasoning_format, request.template_arguments, continued)
        calls = JSONListCalls(parameters) if forced else calls_format and tool_call_parser(calls_format, parameters)
        if reasoning is None and calls is None:
            return None
        return OutputParser(
            reasoning,
            calls,
            stream_reasoning=request.stream_reasoning,
            parallel_calls=request.parallel_tool_calls is not False,
        )

    return make
