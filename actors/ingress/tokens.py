"""POST /tokenize and /detokenize, and GET /tokenizer_info, in vLLM's shape."""

from __future__ import annotations

from array import array
from typing import Any

import msgspec
from msgspec import Struct

from llm_runtime.actors.ingress.administration import asked_model
from llm_runtime.actors.ingress.errors import invalid
from llm_runtime.actors.ingress.exchange import Exchange
from llm_runtime.actors.ingress.openai.messages import ChatMessage, chat_prompt
from llm_runtime.actors.ingress.openai.tools import Tool, callable_tools, rendered
from llm_runtime.actors.ingress.service import Prompt, Service
from llm_runtime.actors.messages import TextPrompt


class TokenizeRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """Body of POST /tokenize: a prompt, or messages to render with the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Tool] | None = None
    return_token_strs: bool = False


class DetokenizeRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """Body of POST /detokenize."""

    tokens: list[int]
    model: str | None = None


async def tokenize(service: Service, request: TokenizeRequest, exchange: Exchange) -> None:
    """Answers with the token ids of a prompt."""
    service.check_model(request.model)
    if (request.prompt is None) == (request.messages is None):
        raise invalid("Send either 'prompt' or 'messages'.", "prompt")
    prompt: Prompt
    if request.prompt is not None:
        prompt = TextPrompt(request.prompt, request.add_special_tokens)
    else:
        prompt = chat_prompt(
            request.messages or [],
            request.chat_template_kwargs,
            request.add_generation_prompt,
            request.continue_final_message,
            rendered(callable_tools(request.tools, None)),
        )
    (packed,) = await service.tokenize(exchange, [prompt])
    tokens = array("i", packed)
    document: dict[str, Any] = {
        "count": len(tokens),
        "max_model_len": service.model.max_model_len,
        "tokens": tokens.tolist(),
    }
    if request.return_token_strs:
        document["token_strs"] = (await service.detokenize(tokens)).pieces if tokens else []
    await exchange.answer(msgspec.json.encode(document))


async def detokenize(service: Service, request: DetokenizeRequest, exchange: Exchange) -> None:
    """Answers with the text of token ids."""
    service.check_model(request.model)
    text = (await service.detokenize(request.tokens)).text
    await exchange.answer(msgspec.json.encode({"prompt": text}))


async def tokenizer_info(service: Service, exchange: Exchange) -> None:
    """What clients need that render conversations by themselves: special tokens and chat template, of several models of
    the first, or the one that `?model=` names."""
    service = asked_model(service, exchange)
    described = await service.tokenization.description()
    templates = described.chat_templates
    document = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": service.model.max_model_len,
        "vocab_size": described.vocab_size,
        **described.special_tokens,
        "chat_template": templates.get("default"),
        **({"chat_templates": templates} if len(templates) > 1 else {}),
    }
    await exchange.answer(msgspec.json.encode(document))
