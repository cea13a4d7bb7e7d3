"""A chat request, by whatever protocol it came: what the engine is asked, and how its output is read."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from msgspec import structs

from llm_runtime.actors.ingress.config import ServedModel
from llm_runtime.actors.ingress.errors import invalid
from llm_runtime.actors.ingress.exchange import Exchange
from llm_runtime.actors.ingress.generation import Generation
from llm_runtime.actors.ingress.ledger import Entry
from llm_runtime.actors.ingress.openai.messages import chat_prompt
from llm_runtime.actors.ingress.openai.requests import ChatRequest
from llm_runtime.actors.ingress.openai.tools import (
    Tool,
    call_id,
    callable_tools,
    constrained,
    is_forced,
    parameters_of,
    rendered,
)
from llm_runtime.actors.ingress.sampling import limit_of
from llm_runtime.actors.ingress.service import Prompt, Service
from llm_runtime.actors.ingress.thinking import thinking_budget, thinking_of
from llm_runtime.actors.messages import ChatPrompt, SamplingParams, TextLogprob, TextPrompt
from llm_runtime.actors.parsers.events import CallStart, Content, Event, Parser
from llm_runtime.actors.parsers.output import OutputParser
from llm_runtime.actors.parsers.reasoning import reasoning_format, reasoning_markers, reasoning_parser
from llm_runtime.actors.parsers.tool_calls import tool_call_format, tool_call_parser
from llm_runtime.actors.parsers.tool_calls.json_list import ForcedCalls, JSONListCalls
from llm_runtime.actors.parsers.whole import WholeOutput

_TAIL_TOKENS = 32
"""Tokens at the end of a prompt that tell whether it has begun the reasoning."""


class Output:
    """What has arrived of a choice, as events.

    Args:
        parser: None if the output is the content.
        name_call: the identity of a call by its index, for calls to which the model itself gives none.

    Attributes:
        calls: whether tools have been called.
    """

    def __init__(self, entry: Entry, parser: OutputParser | None, name_call: Callable[[int], str]) -> None:
        self.entry = entry
        self.calls = False
        self._parser = parser
        self._name_call = name_call

    def take(self) -> tuple[str, list[Event] | None, list[TextLogprob]]:
        """Text and logprobs that are new, and what the parser makes of the text; None if there is no parser."""
        text, _, logprobs = self.entry.take()
        if self._parser is None:
            return text, None, logprobs
        events = self._parser.feed(text)
        if self.entry.finish is not None:
            events += self._parser.finish()
        self.calls = self.calls or any(isinstance(event, CallStart) for event in events)
        return text, events, logprobs

    def events(self) -> list[Event]:
        """What is new."""
        text, events, _ = self.take()
        if events is None:
            return [Content(text)] if text else []
        return events

    def call_id(self, call: CallStart) -> str:
        """The identity of a call."""
        return call.id or self._name_call(call.index)


class Turn(NamedTuple):
    """A request that is ready to go to an engine, when the `with` block of its generation is entered.

    Attributes:
        model: the name to answer with.
        max_tokens: how many tokens the answer may have.
        top: how many of the most probable tokens are reported; -1 for no logprobs.
        outputs: of the choices.
    """

    model: str
    max_tokens: int
    top: int
    generation: Generation
    outputs: list[Output]


async def open_turn(
    service: Service,
    request: ChatRequest,
    exchange: Exchange,
    *,
    limit_name: str | None = None,
    cut_limit: bool = False,
    prompt: Prompt | None = None,
    context: bytes = b"",
) -> Turn:
    """Checks a request and renders its prompt. Raises ApiError.

    Args:
        limit_name: the protocol's name for `max_tokens`.
        cut_limit: a limit beyond the model's context is lowered to what fits, not refused.
        prompt: in place of the conversation.
        context: token ids (i32) of what was said before the prompt.
    """
    request.check()
    model = service.check_model(request.model)
    n = request.n or 1
    service.check_choices(1, n)
    asked, asked_param = request.max_completion_tokens, "max_completion_tokens"
    if asked is None:
        asked, asked_param = request.max_tokens, limit_name or "max_tokens"
    unlimited, asked = asked == -1, limit_of(asked)
    if asked == 0:
        raise invalid(f"Invalid value for '{asked_param}': it must be at least 1.", asked_param, "invalid_value")
    if request.top_logprobs and not request.logprobs:
        raise invalid("top_logprobs is only allowed when logprobs is true.", "top_logprobs")
    top = (request.top_logprobs or 0) if request.logprobs else -1
    sampling = request.sampling(service.model, exchange.work.identity.seed, asked, logprobs=top)
    text = request.text_params(service.config)
    tools = callable_tools(request.tools, request.tool_choice)
    as_list = is_forced(request.tool_choice) or (bool(tools) and sampling.constraint is not None)
    sampling = constrained(sampling, tools, request.tool_choice, request.parallel_tool_calls is not False)
    if tools and service.model.tool_call_parser is not None and request.skip_special_tokens is None:
        text = structs.replace(text, skip_special_tokens=False)  # markers of calls are special tokens of many models
    reasoning = service.model.reasoning_parser if prompt is None else None
    if reasoning is not None and reasoning_format(reasoning).SPECIAL_TOKENS and request.skip_special_tokens is None:
        text = structs.replace(text, skip_special_tokens=False)

    shown = prompt or conversation(service.model, request, tools)
    tokens, inside, sampling = await _tokenized(service, request, exchange, shown, reasoning, sampling)
    tokens = context + tokens
    tokens = request.cut(tokens, service.model.max_model_len)
    usual = None if unlimited else service.model.sampling.max_tokens
    if usual is not None:
        usual = max(usual, request.min_tokens or 0)
    limit, default = (None, usual if asked is None else asked) if cut_limit else (asked, usual)
    max_tokens = service.check_length(len(tokens) // 4, limit, default, "messages", asked_param)
    generation = service.generate(
        exchange.work,
        [(tokens, max_tokens)],
        sampling,
        text,
        n=n,
        priority=request.priority or 0,
        extra_key=request.prefix_key,
        eager=bool(request.stream),
    )
    rid, short_ids = exchange.work.identity.rid, _calls_format(service.model, "SHORT_IDS")

    def named(choice: int) -> Callable[[int], str]:
        return lambda call: call_id(rid, choice, call, short_ids)

    parser = _parsers(service.model, request, tools, as_list, inside, prompt is not None)
    outputs = [Output(entry, parser(), named(entry.index)) for entry in generation.entries]
    return Turn(model, max_tokens, top, generation, outputs)


async def _tokenized(
    service: Service,
    request: ChatRequest,
    exchange: Exchange,
    prompt: Prompt,
    reasoning: str | None,
    sampling: SamplingParams,
) -> tuple[bytes, bool, SamplingParams]:
    """The prompt's tokens (i32), whether the output begins inside its reasoning, and the sampling with what engines are
    told of that. Raises ApiError.

    Args:
        reasoning: its format, if the output may have one.
    """
    prompts, budget = [prompt], thinking_budget(service.model, request.thinking_budgets)
    if reasoning is not None and budget is not None:
        prompts.append(TextPrompt(reasoning_markers(reasoning, False).closing, add_special_tokens=False))
    tokens, *closing = await service.tokenize(exchange, prompts)
    if reasoning is None:
        return tokens, False, sampling
    inside = await _begins_inside(service, request, reasoning, tokens)
    if not closing:
        budget = None  # also of an answer that a former version, which knew no budgets, has begun
    # Where an output begins inside the reasoning, its form is that of the answer.
    if budget is not None or (inside and request.separate_reasoning and sampling.constraint is not None):
        markers = reasoning_markers(reasoning, inside)
        sampling = structs.replace(sampling, thinking=thinking_of(markers, budget, b"".join(closing)))
    return tokens, inside, sampling


async def _begins_inside(service: Service, request: ChatRequest, reasoning: str, tokens: bytes) -> bool:
    """Whether an output begins inside its reasoning: by the end of the prompt, which follows from the tokens, so that
    it is known again when an answer is made anew."""
    kind, last = reasoning_format(reasoning), request.messages[-1]
    if request.continue_final_message:
        return kind.goes_on_inside(last.text)
    tail = (await service.detokenize(array("i", tokens[-4 * _TAIL_TOKENS :]).tolist())).text
    if last.role == "tool" and _calls_format(service.model, "ONE_TURN"):
        return kind.goes_on_inside(tail)
    return kind.begins_inside(tail)


def conversation(model: ServedModel, request: ChatRequest, tools: Sequence[Tool]) -> ChatPrompt:
    """What the tokenizer renders. Raises ApiError for what makes no conversation."""
    return chat_prompt(
        request.messages,
        request.template_arguments,
        request.add_generation_prompt,
        request.continue_final_message,
        rendered(tools),
        _calls_format(model, "ONE_TURN"),
    )


def _parsers(
    model: ServedModel, request: ChatRequest, tools: Sequence[Tool], as_list: bool, inside: bool, plain: bool
) -> Callable[[], OutputParser | None]:
    """Makes the parser of a choice, None if its output is the content. `as_list` is for calls that a constraint
    allows as a list, `inside` for outputs that begin inside their reasoning, `plain` for prompts that no template has
    made."""
    if plain:
        return lambda: None
    reasoning_name = model.reasoning_parser if request.separate_reasoning else None
    calls_name = model.tool_call_parser if tools else None
    parameters = parameters_of(tools)

    def make() -> OutputParser | None:
        reasoning = None if reasoning_name is None else reasoning_parser(reasoning_name, inside)
        calls: Parser | None = None
        if as_list:
            calls = WholeOutput((ForcedCalls if is_forced(request.tool_choice) else JSONListCalls)(parameters))
        elif calls_name is not None:
            calls = tool_call_parser(calls_name, parameters)
        if reasoning is None and calls is None:
            return None
        return OutputParser(
            reasoning,
            calls,
            stream_reasoning=request.stream_reasoning,
            parallel_calls=request.parallel_tool_calls is not False,
        )

    return make


def _calls_format(model: ServedModel, trait: Literal["ONE_TURN", "SHORT_IDS"]) -> bool:
    """Whether the format of a model's calls has a trait."""
    name = model.tool_call_parser
    return name is not None and bool(getattr(tool_call_format(name), trait))
