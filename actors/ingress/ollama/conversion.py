"""Ollama's requests as chat requests."""

from __future__ import annotations

from collections.abc import Callable

from llm_runtime.actors.ingress.decoding import converted
from llm_runtime.actors.ingress.errors import ApiError, invalid, unsupported
from llm_runtime.actors.ingress.ollama.protocol import ChatBody, GenerateBody, Message, Options, Request
from llm_runtime.actors.ingress.openai.messages import CalledFunction, ChatMessage, ToolCall
from llm_runtime.actors.ingress.openai.requests import ChatRequest
from llm_runtime.actors.ingress.sampling import Number
from llm_runtime.actors.ingress.service import LATEST, Service

Warn = Callable[[str], None]

_LOADING = frozenset(
    {
        *("f16_kv", "low_vram", "main_gpu", "num_batch", "num_ctx", "num_gpu", "num_keep", "num_thread", "numa"),
        *("use_mlock", "use_mmap", "vocab_only", "embedding_only", "logits_all", "draft_num_predict"),
    }
)
"""Options that say how to load a model, which is loaded."""


def served_name(service: Service, name: str) -> str:
    """A model's name without Ollama's tag for the newest. Raises ApiError for a model that is not served here."""
    try:
        return service.check_model(name)
    except ApiError:
        return service.check_model(name.removesuffix(LATEST))


def of_chat(service: Service, body: ChatBody, warn: Warn) -> ChatRequest:
    """Raises ApiError for what is not supported."""
    messages = [_message(message, f"messages[{i}]") for i, message in enumerate(body.messages or ())]
    chat = _request(service, body, messages, warn)
    chat.tools = body.tools or None
    if messages and messages[-1].role == "assistant" and not messages[-1].tool_calls:
        chat.continue_final_message = True
    return chat


def of_generate(service: Service, body: GenerateBody, warn: Warn) -> ChatRequest:
    """The prompt as a conversation, to which a template is applied. Raises ApiError for what is not supported."""
    if body.raw and body.system:
        raise invalid("With raw = true the prompt is all that the model sees: 'system' is not allowed.", "system")
    if body.raw and body.context:
        raise invalid("With raw = true the prompt is all that the model sees: 'context' is not allowed.", "context")
    if body.suffix and (body.system or body.context):
        name = "system" if body.system else "context"
        raise invalid(f"With a suffix the text is filled in, and nothing else is shown: '{name}' is not allowed.", name)
    messages = [ChatMessage("system", body.system)] if body.system else []
    return _request(service, body, [*messages, ChatMessage("user", body.prompt or "")], warn)


def _options(body: Request, warn: Warn) -> Options:
    """The options that are known. Ollama skips the others, and so does this."""
    known = Options.__struct_fields__
    given = {name: value for name, value in (body.options or {}).items() if value is not None}
    for name in given:
        if name not in known and name not in _LOADING:
            warn(f"options.{name} is skipped: this server has no such option.")
    return converted({name: value for name, value in given.items() if name in known}, Options, "options")


def _request(service: Service, body: Request, messages: list[ChatMessage], warn: Warn) -> ChatRequest:
    options = _options(body, warn)
    penalty = options.repeat_penalty
    if options.repeat_last_n == 0:
        penalty = 1.0
    elif penalty not in (None, 1.0) and options.repeat_last_n not in (None, -1):
        warn("options.repeat_last_n is skipped: the repeat_penalty is for the whole text.")
    limit, model = options.num_predict, service.model
    thinks = body.think is not False
    chat = ChatRequest(
        model=served_name(service, body.model),
        messages=messages,
        stream=body.stream is not False,
        chat_template_kwargs=None if body.think is None else {"enable_thinking": thinks, "thinking": thinks},
        reasoning_effort=body.think if isinstance(body.think, str) else None,
        temperature=_drawn(options.temperature, model.sampling.temperature, 0.8),
        top_k=_drawn(options.top_k, model.sampling.top_k, 40),
        top_p=_drawn(options.top_p, model.sampling.top_p, 0.9),
        min_p=options.min_p,
        seed=None if options.seed == -1 else options.seed,
        stop=options.stop,
        max_tokens=limit if limit is None or limit > 0 else model.max_model_len,
        repetition_penalty=penalty,
        presence_penalty=options.presence_penalty,
        frequency_penalty=options.frequency_penalty,
        logprobs=bool(body.logprobs),
        top_logprobs=body.top_logprobs if body.logprobs else None,
    )
    if body.format == "json":
        chat.response_format = {"type": "json_object"}
    elif isinstance(body.format, dict):
        chat.response_format = {"type": "json_schema", "json_schema": {"name": "answer", "schema": body.format}}
    elif body.format:
        raise invalid("Invalid value for 'format': it must be 'json' or a JSON schema.", "format", "invalid_value")
    return chat


def _drawn(given: Number | None, of_model: Number | None, of_ollama: Number) -> Number:
    """As in Ollama, the request goes before the model's parameters, and these before the program's defaults."""
    if given is not None:
        return given
    return of_ollama if of_model is None else of_model


def _message(message: Message, param: str) -> ChatMessage:
    if message.images not in (None, []):
        raise unsupported(f"{param}.images")
    calls = [
        ToolCall(CalledFunction(call.function.name, call.function.arguments), call.id)
        for call in message.tool_calls or ()
    ]
    return ChatMessage(
        message.role,
        message.content or "",
        name=message.tool_name or message.name,
        reasoning_content=message.thinking or None,
        tool_call_id=message.tool_call_id,
        tool_calls=calls or None,
    )
