"""Bodies of POST /api/chat, /api/generate and /api/show.

Fields of type Any are without effect by their definition, or refused when they ask for anything.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta, Struct

from actors.ingress.openai.tools import Tool
from actors.ingress.sampling import MinP, Penalty, RepetitionPenalty, SeedField, TopP

Temperature = Annotated[float, Meta(ge=0, le=1e6)]
Limit = Annotated[int, Meta(ge=-2, lt=2**31)]


class Options(Struct, forbid_unknown_fields=True, kw_only=True):
    """How to draw, with Ollama's defaults. A limit of 0 or less is none."""

    temperature: Temperature = 0.8
    top_k: Annotated[int, Meta(ge=-1, lt=2**31)] = 40
    top_p: TopP = 0.9
    min_p: MinP = 0.0
    seed: SeedField = -1
    stop: str | list[str] | None = None
    num_predict: Limit = -1
    repeat_penalty: RepetitionPenalty = 1.0
    repeat_last_n: Annotated[int, Meta(ge=-1, lt=2**31)] | None = None
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    # how to load a model, which is loaded
    f16_kv: Any = None
    low_vram: Any = None
    main_gpu: Any = None
    num_batch: Any = None
    num_ctx: Any = None
    num_gpu: Any = None
    num_keep: Any = None
    num_thread: Any = None
    numa: Any = None
    use_mlock: Any = None
    use_mmap: Any = None
    # not supported
    embedding_only: Any = None
    logits_all: Any = None
    mirostat: Any = None
    mirostat_eta: Any = None
    mirostat_tau: Any = None
    penalize_newline: Any = None
    tfs_z: Any = None
    typical_p: Any = None
    vocab_only: Any = None


class Called(Struct, forbid_unknown_fields=True):
    """The function of a call."""

    name: str
    arguments: dict[str, Any] = {}
    index: Any = None


class Call(Struct, forbid_unknown_fields=True):
    """A call of a former turn."""

    function: Called
    id: str | None = None
    type: Any = None


class Message(Struct, forbid_unknown_fields=True):
    """One message."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = ""
    thinking: str | None = None
    images: Any = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None
    tool_name: str | None = None


class Request(Struct, forbid_unknown_fields=True, kw_only=True):
    """What both kinds have in common."""

    model: str
    options: Options | None = None
    format: str | dict[str, Any] | None = None
    stream: bool | None = None
    think: bool | Literal["low", "medium", "high", "max"] | None = None
    # without effect: the model stays loaded, and nothing is cut off a prompt that is too long
    keep_alive: Any = None
    shift: Any = None
    truncate: Any = None
    # not supported
    logprobs: Any = None
    top_logprobs: Any = None


class ChatBody(Request, forbid_unknown_fields=True, kw_only=True):
    """Body of POST /api/chat."""

    messages: list[Message] | None = None
    tools: list[Tool] | None = None


class GenerateBody(Request, forbid_unknown_fields=True, kw_only=True):
    """Body of POST /api/generate."""

    unsupported: ClassVar[tuple[str, ...]] = ("context", "images", "suffix", "template")

    prompt: str | None = None
    system: str | None = None
    raw: bool | None = None


class ShowBody(Struct, kw_only=True):
    """Body of POST /api/show."""

    model: str = ""
    name: str = ""
