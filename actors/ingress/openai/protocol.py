"""What requests to both kinds of completions have in common."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import msgspec
from msgspec import Meta, Struct

from llm_runtime.actors.ingress.config import IngressConfig, ServedModel
from llm_runtime.actors.ingress.constraints import FIELDS, constraint_of
from llm_runtime.actors.ingress.errors import invalid, unsupported
from llm_runtime.actors.ingress.generation import Generation
from llm_runtime.actors.ingress.sampling import (
    ExtraKey,
    LogitBias,
    MinP,
    Penalty,
    Priority,
    RepetitionPenalty,
    SeedField,
    TokenIds,
    TokenLimit,
    Tokens,
    TopK,
    TopP,
    sampling_params,
    text_params,
)
from llm_runtime.actors.messages import SamplingParams, TextParams

Choices = Annotated[int, Meta(ge=1, lt=2**31)]
TopLogprobsCount = Annotated[int, Meta(ge=0, le=20)]

UNSUPPORTED = (
    *("audio", "lora_path", "prediction", "web_search_options", "chat_template", "custom_logit_processor"),
    *("logits_processors", "allowed_token_ids", "bad_words", "prompt_logprobs", "use_beam_search", "early_stopping"),
    *("length_penalty", "mm_processor_kwargs", "kv_transfer_params", "return_hidden_states"),
    *("session_params", "stop_regex"),
)
"""Names of OpenAI, vLLM and SGLang that are known, and refused when they ask for anything."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("length_penalty", "best_of", "typical_p", "tfs_z"), (1,)),
    **dict.fromkeys(("include_reasoning", "cache_prompt"), (True,)),
    # switches of llama.cpp's samplers that are off, and what they would be told
    **dict.fromkeys(("mirostat", "dry_multiplier", "xtc_probability", "dynatemp_range", "n_probs", "min_keep"), (0,)),
    **{"id_slot": (-1,), "top_n_sigma": (-1, 0), "dynatemp_exponent": (1,), "xtc_threshold": (0.1,)},
    **{"mirostat_tau": (5,), "mirostat_eta": (0.1,), "dry_base": (1.75,), "dry_allowed_length": (2,)},
    **{"dry_penalty_last_n": (-1, 0), "reasoning_format": ("auto", "deepseek")},
}
"""Values of fields that are not known, with which they ask for nothing."""


class StreamOptions(Struct, forbid_unknown_fields=True):
    """OpenAI's `stream_options`, and vLLM's and SGLang's `continuous_usage_stats`. `include_obfuscation` is without
    effect: events are not padded."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False


class CompletionsRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """Fields of both kinds of completions. OpenAI's, and under the names of vLLM and SGLang what OpenAI has not.

    Fields of type Any are those of a constraint, or without effect by their definition.
    """

    unsupported: ClassVar[tuple[str, ...]] = UNSUPPORTED
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = NEUTRAL

    model: str | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    seed: SeedField | None = None
    stop: str | list[str] | None = None
    stop_token_ids: TokenIds | None = None
    max_tokens: TokenLimit | None = None
    min_tokens: Tokens | None = None
    n: Choices | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    repetition_penalty: RepetitionPenalty | None = None
    logit_bias: LogitBias | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    no_stop_trim: bool | None = None
    include_stop_str_in_output: bool | None = None
    spaces_between_special_tokens: bool | None = None
    priority: Priority | None = None
    extra_key: ExtraKey | None = None
    cache_salt: ExtraKey | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1, lt=2**31)] | None = None
    rid: ExtraKey | None = None
    request_id: ExtraKey | None = None
    # the form of the answer; see `constraints`
    response_format: Any = None
    structured_outputs: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    json_schema: Any = None
    regex: Any = None
    ebnf: Any = None
    structural_tag: Any = None
    # without effect on the answer
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    guided_decoding_backend: Any = None
    prompt_cache_key: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    modalities: Any = None

    def check(self) -> None:
        """Raises ApiError for what is not supported and for fields that contradict each other."""
        if self.truncate_prompt_tokens == 0:
            raise invalid("truncate_prompt_tokens = 0 leaves no prompt.", "truncate_prompt_tokens", "invalid_value")
        if self.modalities not in (None, [], ["text"]):
            raise unsupported("modalities", "A modality other than text")
        if self.spaces_between_special_tokens is False:
            raise unsupported("spaces_between_special_tokens", "spaces_between_special_tokens = false")
        if self.stream_options not in (None, StreamOptions()) and not self.stream:
            raise invalid("stream_options is only allowed when stream is true.", "stream_options")
        if self.extra_key and self.cache_salt and self.extra_key != self.cache_salt:
            raise invalid("extra_key and cache_salt are two names for one thing: send one of them.", "cache_salt")

    def sampling(
        self,
        model: ServedModel,
        drawn_seed: int,
        max_tokens: int | None,
        logprobs: int = -1,
        prompt_logprobs: int = -1,
    ) -> SamplingParams:
        """What the engine is told; see `sampling_params`."""
        return sampling_params(
            model,
            seed=drawn_seed if self.seed is None else self.seed,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            repetition_penalty=self.repetition_penalty,
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            stop_token_ids=self.stop_token_ids,
            ignore_eos=self.ignore_eos,
            logit_bias=self.logit_bias,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            constraint=constraint_of({name: getattr(self, name) for name in FIELDS}),
        )

    def text_params(self, config: IngressConfig) -> TextParams:
        """How tokens become text; see `sampling.text_params`."""
        keep_stop = self.no_stop_trim or self.include_stop_str_in_output
        return text_params(config, self.stop, self.skip_special_tokens, keep_stop, self.min_tokens)

    def cut(self, prompt: bytes, max_model_len: int) -> bytes:
        """The end of a prompt's tokens (i32) that `truncate_prompt_tokens` leaves; -1 leaves what the model takes."""
        limit = self.truncate_prompt_tokens
        if limit is None:
            return prompt
        return prompt[-4 * (max_model_len - 1 if limit == -1 else limit) or len(prompt) :]

    @property
    def names(self) -> list[str]:
        """The client's own names for the request, by which it can be ended: SGLang's `rid`, vLLM's `request_id`."""
        return [name for name in (self.rid, self.request_id) if name]

    @property
    def prefix_key(self) -> str:
        """Only requests with the same key share cached prefixes."""
        return self.extra_key or self.cache_salt or ""


def usage(generation: Generation) -> dict[str, Any]:
    """OpenAI's `usage` of the tokens so far."""
    prompt_tokens, completion_tokens = generation.prompt_tokens, generation.completion_tokens
    counts: dict[str, Any] = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
    if generation.cache_report:
        counts["prompt_tokens_details"] = {"cached_tokens": generation.cached_tokens}
    return counts


class ChunkFrame:
    """The parts of a stream's chunks that do not change, so that a token costs the encoding of its text only.

    Args:
        kind: the chunks' `object`.
        options: `stream_options` of the request.
    """

    def __init__(self, kind: str, identity: str, created: int, model: str, options: StreamOptions | None) -> None:
        fixed = {"id": identity, "object": kind, "created": created, "model": model, "system_fingerprint": None}
        self._head = b"data: " + msgspec.json.encode(fixed)[:-1]
        self._include_usage = options is not None and options.include_usage
        self._continuous = options is not None and options.continuous_usage_stats
        self._no_usage = b',"usage":null}\n\n' if self._include_usage else b"}\n\n"
        self._choices_head = self._head + b',"choices":[{"index":'

    def chunk(self, index: int, content: bytes, generation: Generation, more: bytes = b"") -> bytes:
        """An event with one choice; `content` is the rest of its object after the index, without the last brace, and
        `more` further fields of the event."""
        return b"%s%d,%s}]%s%s" % (self._choices_head, index, content, more, self._usage(generation))

    def last(self, generation: Generation) -> bytes:
        """The event with the final usage, empty if it was not asked for."""
        if not self._include_usage:
            return b""
        return b'%s,"choices":[],"usage":%s}\n\n' % (self._head, msgspec.json.encode(usage(generation)))

    def _usage(self, generation: Generation) -> bytes:
        if self._continuous:
            return b',"usage":%s}\n\n' % msgspec.json.encode(usage(generation))
        return self._no_usage
