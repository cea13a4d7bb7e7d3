"""The default backend: llguidance. A constraint becomes a grammar in its variant of Lark's syntax."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer

from llm_runtime.actors.grammar.backends.base import Int32s, Matcher
from llm_runtime.actors.grammar.backends.lark import grammar_of
from llm_runtime.actors.grammar.closing import closing
from llm_runtime.actors.grammar.errors import BadGrammar
from llm_runtime.actors.grammar.json_limits import Limits, State
from llm_runtime.actors.grammar.tokens import Tokens
from llm_runtime.actors.messages import Constraint

LIMITS = LLParserLimits(
    initial_lexer_fuel=5_000_000,
    step_lexer_fuel=1_000_000,
    step_max_items=100_000,
    max_lexer_states=100_000,
    verbose_errors=False,
)
"""Of a compiler's and of a mask's work. The first is about 100 ms of a processor."""
SIZE, SIZE_OF_CHARACTER = 300_000, 100
"""Bytes of a compiled constraint, and for each character of its text, as measured."""
_PLACE = re.compile(r"^at \d+\(\d+\): ")
_LIBRARY = re.compile(r"^(failed to compile JSON schema|invalid regex .* \(in regex\)): ")
_QUOTED = 300
_NAMES = {
    "json": "JSON object",
    "json_schema": "JSON schema",
    "regex": "regular expression",
    "ebnf": "grammar",
    "choice": "list of choices",
    "structural_tag": "structural tag",
}


class _Vocabulary:
    """What `LLTokenizer` reads. The last token is ours: its bit in a mask says that the answer is complete."""

    is_tokenizer_wrapper = True
    bos_token_id = None
    special_token_ids: Sequence[int] = ()

    def __init__(self, tokens: Tokens) -> None:
        self.tokens = [*tokens.texts, *[b""] * (tokens.vocab_size + 1 - len(tokens.texts))]
        self.eos_token_id = tokens.vocab_size

    def __call__(self, text: str | bytes) -> list[int]:
        raise NotImplementedError("grammars with `no_forcing` need no tokenizer")


class LLGuidance:
    """Compiles constraints. Threads may compile at once: the library holds no interpreter lock meanwhile.

    Args:
        tokens: of the model.
        threads: that fill the masks of a step.
    """

    def __init__(self, tokens: Tokens, threads: int = 1) -> None:
        self.tokens = tokens
        self.limits = Limits(tokens)
        vocabulary: Any = _Vocabulary(tokens)
        self._tokenizer = LLTokenizer(vocabulary, n_vocab=tokens.vocab_size + 1, eos_token=tokens.vocab_size)
        self._words = -(-tokens.vocab_size // 32)
        self._own_words = -(-(tokens.vocab_size + 1) // 32)
        self._threads = threads
        self._executor: LLExecutor | None = None

    def compile(self, constraint: Constraint) -> CompiledGrammar:
        """Raises BadGrammar if the constraint makes no sense, allows nothing, is too large, or cannot be kept."""
        name = _NAMES[constraint.kind]
        try:
            grammar, endings = grammar_of(constraint)
        except BadGrammar:
            raise
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise BadGrammar(f"The {name} cannot be compiled: {_reason(error)}.") from None
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=LIMITS)
        if matcher.is_error():
            raise BadGrammar(_refusal(name, matcher.get_error()))
        return CompiledGrammar(self, name, matcher, endings, len(constraint.text), "json" in constraint.kind)

    def fill(self, matchers: list[Matcher], masks: Int32s, rows: list[int]) -> None:
        """Fills rows of masks [B, words]."""
        if self._threads > 1 and len(rows) > 1:
            if self._executor is None:
                self._executor = LLExecutor(self._threads)
            own = np.zeros((len(rows), self._own_words), np.int32)
            inner = [(matcher.inner, at) for at, matcher in enumerate(matchers) if isinstance(matcher, _Matcher)]
            self._executor.unsafe_compute_mask_ptr(inner, own.ctypes.data, own.shape[1] * 4, len(rows))
            for matcher, row, mask in zip(matchers, rows, own, strict=True):
                assert isinstance(matcher, _Matcher)
                matcher.take(mask, masks[row])
            return
        for matcher, row in zip(matchers, rows, strict=True):
            matcher.fill(masks[row])


class CompiledGrammar:
    """One constraint."""

    def __init__(
        self, backend: LLGuidance, name: str, matcher: LLMatcher, endings: Sequence[bytes], length: int, is_json: bool
    ) -> None:
        self.backend = backend
        self.size = SIZE + SIZE_OF_CHARACTER * length
        self.endings = endings
        self.is_json = is_json
        self._matcher = matcher
        mask = np.zeros(-(-backend.tokens.vocab_size // 32), np.int32)
        beginning = self.matcher([])
        beginning.fill(mask)
        if beginning.inner.is_error():
            raise BadGrammar(_refusal(name, beginning.inner.get_error()))
        if not mask.any() and not beginning.complete:
            raise BadGrammar(f"The {name} allows no text at all.")

    @cached_property
    def shortest(self) -> bytes | None:
        """A short text that completes an answer from its beginning; None if none was found."""
        return closing(self.matcher([]), self.backend.tokens, self.endings)

    def matcher(self, stops: list[int]) -> _Matcher:
        """At the beginning of an answer."""
        return _Matcher(self, self._matcher.deep_copy(), stops)


class _Matcher:
    """Attributes:
    inner: the library's.
    """

    def __init__(self, compiled: CompiledGrammar, inner: LLMatcher, stops: list[int]) -> None:
        self.inner = inner
        self.stops = stops
        self._backend = compiled.backend
        self._mask = np.zeros(compiled.backend._own_words, np.int32)
        self._states = [State()] if compiled.is_json else []
        self._over = False

    @property
    def complete(self) -> bool:
        return bool(self.inner.is_accepting())

    @property
    def over(self) -> bool:
        return self._over

    @property
    def limited(self) -> bool:
        return bool(self._states) and (self._states[-1].full or self._states[-1].deep)

    def accept(self, token: int) -> bool:
        if self._over:
            return False
        if token in self.stops:
            self._over = self.complete
            return self._over
        texts = self._backend.tokens.texts
        if token >= len(texts) or self.inner.try_consume_tokens([token]) != 1:
            return False
        if self._states:
            self._states.append(self._states[-1].after(texts[token]))
        return True

    def rollback(self, count: int) -> None:
        if count and self._over:
            self._over = False
            count -= 1
        if count:
            self.inner.rollback(count)
            if self._states:
                del self._states[-count:]

    def fill(self, mask: Int32s) -> None:
        own = self._mask
        self.inner.unsafe_compute_mask_ptr(own.ctypes.data, own.nbytes)
        self.take(own, mask)

    def take(self, own: Int32s, mask: Int32s) -> None:
        """A mask as the library has filled it, with our token, becomes one of the model's tokens."""
        end = self._backend.tokens.vocab_size
        mask[:] = own[: len(mask)] if not self.inner.is_error() else 0
        if end >> 5 < len(mask):
            mask.view(np.uint32)[end >> 5] &= np.uint32(~(1 << (end & 31)) & 0xFFFFFFFF)
        if self.complete and not self.inner.is_error():
            for token in self.stops:
                mask.view(np.uint32)[token >> 5] |= np.uint32(1 << (token & 31))
        if self._states:  # last, for a number that is the whole answer may only end
            self._backend.limits.apply(self._states[-1], mask)

    def forced(self) -> bytes:
        return bytes(self.inner.compute_ff_bytes())


def _refusal(name: str, error: str) -> str:
    """The library's error as a sentence."""
    if "oneOf constraints are not supported" in error:
        return (
            "The JSON schema's keyword 'oneOf' is supported where its schemas exclude each other, by a type or by the "
            "value of a required property: use 'anyOf'."
        )
    if "NoExtension" in error:
        return f"The {name} allows no text at all."
    if "Unsatisfiable" in error or "unsatisfiable" in error:
        return f"The {name} allows no text at all: {_reason(ValueError(error))}."
    return f"The {name} cannot be compiled: {_reason(ValueError(error))}."


def _reason(error: BaseException) -> str:
    """What the library says, without the grammar that it quotes."""
    if isinstance(error, KeyError):
        return f"{error} is missing"
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    text = str(error).strip()
    inner = re.search(r"^error: (.*)$", text, re.MULTILINE)
    text = inner[1] if inner else (text.splitlines() or [type(error).__name__])[0]
    text = _LIBRARY.sub("", _PLACE.sub("", text)).rstrip(".")
    return text if len(text) <= _QUOTED else f"{text[:_QUOTED]} …"


@lru_cache(maxsize=8)
def build(tokens: Tokens, threads: int) -> LLGuidance:
    """Kept in the process, so that processes forked from one that has made it start with it."""
    return LLGuidance(tokens, threads)
