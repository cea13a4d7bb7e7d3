"""How a program says what answers it wants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any

from llm_runtime.runtime.errors import UserError

_NATIVE = {
    "max_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "seed": "sampling_seed",
    "include_stop_str_in_output": "no_stop_trim",
}
"""Fields that SGLang, and so POST /generate, calls otherwise."""
_STRUCTURED = "give json_schema=, regex=, ebnf= or structural_tag="
_INSTEAD = {
    "guided_decoding": _STRUCTURED,
    "structured_outputs": _STRUCTURED,
    "best_of": "give n=N, the answers that you want to each prompt",
    "use_beam_search": "answers are drawn; give n=N for several of them",
    "beam_width": "answers are drawn; give n=N for several of them",
    "length_penalty": "it belongs to beam search; leave it out",
    "early_stopping": "it belongs to beam search; leave it out",
    "prompt_logprobs": "ask a server: POST /v1/completions takes it",
    "logits_processors": "give logit_bias={TOKEN: BIAS}",
    "allowed_token_ids": "give logit_bias={TOKEN: BIAS}, or regex=",
    "bad_words": "give logit_bias={TOKEN: -100}",
    "stop_regex": "give stop=, texts that end an answer",
    "truncate_prompt_tokens": "shorten the prompt",
    "detokenize": "a result has both text and token_ids; leave it out",
    "spaces_between_special_tokens": "texts are those of the tokenizer; leave it out",
    "output_kind": "llm.generate returns whole results; leave it out",
    "return_hidden_states": "hidden states are not returned; leave it out",
}
"""What to do in place of fields of vLLM and SGLang that have no equal here."""
_MAX_TOKENS = 128
_NOT_SAMPLING = ("logprobs",)


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """What answers to a prompt are wanted. Names and meanings are those of vLLM's and OpenAI's fields; None leaves a
    field to the server's default.

    Attributes:
        max_tokens: most tokens of an answer; 128 by default.
        n: answers to each prompt.
        seed: answers with a seed are the same each time; without one, it is drawn.
        stop: strings that end an answer; it does not hold them unless `include_stop_str_in_output`.
        logprobs: give each token's log probability, and those of so many most probable tokens.
        json_schema: the answer is a JSON document that fits this schema (a text, or the schema itself). It, `regex`
            (the answer matches it), `ebnf` and `structural_tag` exclude each other.
        max_new_tokens, min_new_tokens, sampling_seed, no_stop_trim: SGLang's names of `max_tokens`, `min_tokens`,
            `seed` and `include_stop_str_in_output`.

    Raises UserError where a value is given under both names, and for a name that there is not.
    """

    max_tokens: int | None = None
    min_tokens: int | None = None
    n: int = 1
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Mapping[int, float] | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    logprobs: int | None = None
    json_schema: str | Mapping[str, Any] | bool | None = None
    regex: str | None = None
    ebnf: str | None = None
    structural_tag: str | Mapping[str, Any] | None = None
    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    sampling_seed: int | None = None
    no_stop_trim: bool | None = None

    def __new__(cls, **given: Any) -> SamplingParams:
        """Answers names that there are not before the generated `__init__` does."""
        known = [each.name for each in fields(cls)]
        for name in given:
            if name not in known:
                near = get_close_matches(name, known, 1)
                hint = _INSTEAD.get(name) or (f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}")
                raise UserError(f"there is no sampling parameter {name}: {hint}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for ours, other in _NATIVE.items():
            if getattr(self, ours) is not None and getattr(self, other) is not None:
                raise UserError(f"{other} is another name of {ours}: give one of them")

    def native(self) -> dict[str, Any]:
        """The fields of a request to POST /generate, but for the prompt."""
        given = {
            _NATIVE.get(each.name, each.name): value
            for each in fields(self)
            if each.name not in _NOT_SAMPLING and (value := getattr(self, each.name)) is not None
        }
        request: dict[str, Any] = {"sampling_params": {"max_new_tokens": _MAX_TOKENS, **given}}
        if self.logprobs is not None:
            request |= {"return_logprob": True, "top_logprobs_num": self.logprobs}
        return request
