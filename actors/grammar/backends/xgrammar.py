"""The optional backend: xgrammar. What it does not keep of a schema is refused."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from llm_runtime.actors.grammar.backends.base import Int32s, Matcher
from llm_runtime.actors.grammar.backends.xgrammar_library import xgrammar
from llm_runtime.actors.grammar.backends.xgrammar_schema import prepared
from llm_runtime.actors.grammar.closing import closing
from llm_runtime.actors.grammar.errors import BadGrammar
from llm_runtime.actors.grammar.json_limits import Limits, State
from llm_runtime.actors.grammar.tokens import Tokens
from llm_runtime.actors.messages import Constraint

MAX_COMPILED_BYTES = 64 * 2**20
"""A larger automaton is refused: one rank holds many."""
CACHE_BYTES = 64 * 2**20
"""What a compiler keeps of parts that grammars share: strings of at most so many characters above all, each state of
which takes milliseconds to compile."""
BLANKS = 32
"""Between the parts of JSON in structural tags, unless the tag says how many: enough to indent it, and no more, for
small models draw them for ever."""
_AMBIGUOUS = re.compile(r"\\x[0-9a-fA-F]{3}")
"""An escape of two hexadecimal digits and a letter that xgrammar, whose cache holds grammars as texts that it reads
again, would take for a third."""
_WHERE = re.compile(r"^\[[\d:]+\] \S+:\d+: ")
_CHECK = re.compile(r"^Check failed: .*? is false: ")
_QUOTED = 300
_CONTROL = re.compile(rb"[\x00-\x1f]")


class XGrammar:
    """Compiles constraints, on each thread with a compiler of its own, which keeps parts that others may have as well.

    Args:
        tokens: of the model.
        threads: that fill the masks of a step.
    """

    def __init__(self, tokens: Tokens, threads: int = 1) -> None:
        self.tokens = tokens
        self.limits = Limits(tokens)
        self._threads = threads
        self._batch: Any = None
        self._local = threading.local()
        library, size = xgrammar(), tokens.vocab_size
        texts = tokens.texts
        self.info, self.line_info = (  # the second has no control characters, which JSON has only in other words
            library.TokenizerInfo(each, library.VocabType.RAW, vocab_size=size, stop_token_ids=tokens.ends)
            for each in (texts, [b"" if _CONTROL.search(text) else text for text in texts])
        )

    def compile(self, constraint: Constraint) -> CompiledGrammar:
        """Raises BadGrammar if the constraint makes no sense, allows nothing, is too large, or cannot be kept."""
        name = _NAMES[constraint.kind]
        try:
            compiled = self._compile(constraint.kind, constraint.text)
        except BadGrammar:
            raise
        except (RuntimeError, ValueError, TypeError, KeyError, RecursionError, MemoryError) as error:
            raise BadGrammar(f"The {name} cannot be compiled: {_reason(error)}.") from None
        if compiled.memory_size_bytes > MAX_COMPILED_BYTES:
            raise BadGrammar(
                f"The {name} is too large: it compiles to {compiled.memory_size_bytes >> 20} MiB, "
                f"and {MAX_COMPILED_BYTES >> 20} are allowed."
            )
        return CompiledGrammar(self, name, compiled, "json" in constraint.kind)

    def fill(self, matchers: list[Matcher], masks: Int32s, rows: list[int]) -> None:
        """Fills rows of masks [B, words]."""
        if self._threads > 1 and len(rows) > 1:
            if self._batch is None:
                self._batch = xgrammar().BatchGrammarMatcher(max_threads=self._threads)
            inner = [matcher.inner for matcher in matchers if isinstance(matcher, _Matcher)]
            self._batch.batch_fill_next_token_bitmask(inner, masks, rows)
            for matcher, row in zip(matchers, rows, strict=True):
                assert isinstance(matcher, _Matcher)
                matcher.limit(masks[row])
            return
        for matcher, row in zip(matchers, rows, strict=True):
            matcher.fill(masks[row])

    def _compilers(self) -> tuple[Any, Any]:
        """For any text, and for JSON."""
        if not hasattr(self._local, "compilers"):
            self._local.compilers = tuple(
                xgrammar().GrammarCompiler(info, max_threads=1, cache_enabled=True, cache_limit_bytes=CACHE_BYTES)
                for info in (self.info, self.line_info)
            )
        compilers: tuple[Any, Any] = self._local.compilers
        return compilers

    def _compile(self, kind: str, text: str) -> Any:
        compiler = self._compilers()[0]
        match kind:
            case "json":
                return self._compile_json('{"type": "object"}')
            case "json_schema":
                return self._compile_json(json.dumps(prepared(json.loads(text))))
            case "regex":
                return compiler.compile_regex(text)
            case "ebnf":
                return compiler.compile_grammar(text)
            case "choice":
                return compiler.compile_grammar(_choice(text))
            case _:
                return compiler.compile_structural_tag(_structural_tag(text))

    def _compile_json(self, schema: str) -> Any:
        grammar = xgrammar().Grammar.from_json_schema(schema, any_whitespace=False)
        compiler = self._compilers()[1]
        if _AMBIGUOUS.search(str(grammar)):
            compiler = xgrammar().GrammarCompiler(self.line_info, max_threads=1, cache_enabled=False)
        return compiler.compile_grammar(grammar)


class CompiledGrammar:
    """One constraint."""

    endings: Sequence[bytes] = ()

    def __init__(self, backend: XGrammar, name: str, compiled: Any, is_json: bool) -> None:
        self.backend = backend
        self.size = int(compiled.memory_size_bytes)
        self.is_json = is_json
        self.compiled = compiled
        mask = np.zeros(-(-backend.tokens.vocab_size // 32), np.int32)
        beginning = self.matcher(backend.tokens.ends)
        beginning.fill(mask)
        if not mask.any():
            raise BadGrammar(f"The {name} allows no text at all.")

    @cached_property
    def shortest(self) -> bytes | None:
        """A short text that completes an answer from its beginning; None if none was found."""
        return closing(self.matcher(self.backend.tokens.ends), self.backend.tokens)

    def matcher(self, stops: list[int]) -> _Matcher:
        """At the beginning of an answer."""
        return _Matcher(self, stops)


class _Matcher:
    """Attributes:
    inner: the library's.
    """

    def __init__(self, compiled: CompiledGrammar, stops: list[int]) -> None:
        self.stops = stops
        self.inner = xgrammar().GrammarMatcher(compiled.compiled, override_stop_tokens=stops or None)
        self._backend = compiled.backend
        self._states = [State()] if compiled.is_json else []

    @property
    def complete(self) -> bool:
        return bool(self.inner.is_completed())

    @property
    def over(self) -> bool:
        return bool(self.inner.is_terminated())

    @property
    def limited(self) -> bool:
        return bool(self._states) and (self._states[-1].full or self._states[-1].deep)

    def accept(self, token: int) -> bool:
        if self.over or not self.inner.accept_token(token):
            return False
        if self._states:
            texts = self._backend.tokens.texts
            self._states.append(self._states[-1].after(texts[token] if token < len(texts) else b""))
        return True

    def rollback(self, count: int) -> None:
        if count:
            self.inner.rollback(count)
            if self._states:
                del self._states[-count:]

    def fill(self, mask: Int32s) -> None:
        mask[:] = -1
        self.inner.fill_next_token_bitmask(mask.reshape(1, -1))
        self.limit(mask)

    def limit(self, mask: Int32s) -> None:
        """Takes away what would go on beyond the limits of JSON."""
        if self._states:
            self._backend.limits.apply(self._states[-1], mask)

    def forced(self) -> bytes:
        return b""  # the library looks for it without end where a schema holds itself


@lru_cache(maxsize=8)
def build(tokens: Tokens, threads: int) -> XGrammar:
    """Kept in the process, so that processes forked from one that has made it start with it."""
    return XGrammar(tokens, threads)


_NAMES = {
    "json": "JSON object",
    "json_schema": "JSON schema",
    "regex": "regular expression",
    "ebnf": "grammar",
    "choice": "list of choices",
    "structural_tag": "structural tag",
}


def _choice(text: str) -> str:
    """A grammar of the strings of a JSON list."""
    choices = json.loads(text)
    if not isinstance(choices, list) or not choices or not all(isinstance(each, str) and each for each in choices):
        raise BadGrammar("The list of choices must be a list of strings that are not empty.")
    return "root ::= " + " | ".join(f'"{_escaped(each)}"' for each in choices)


def _escaped(text: str) -> str:
    return "".join(
        character if character.isascii() and (character.isalnum() or character == " ") else f"\\U{ord(character):08x}"
        for character in text
    )


def _structural_tag(text: str) -> Any:
    """The present form of a structural tag; that of `structures` and `triggers` is translated."""
    tag = json.loads(text)
    if not isinstance(tag, dict):
        raise BadGrammar("The structural tag must be a JSON object.")
    if "structures" in tag:
        structures = tag["structures"]
        if not isinstance(structures, list) or not all(isinstance(each, dict) for each in structures):
            raise BadGrammar("The structural tag's 'structures' must be a list of objects.")
        tags = [
            {
                "begin": each["begin"],
                "content": {"type": "json_schema", "json_schema": each.get("schema", True)},
                "end": each["end"],
            }
            for each in structures
        ]
        tag = {"format": {"type": "triggered_tags", "triggers": tag.get("triggers"), "tags": tags}}
    return _with_prepared_schemas({**tag, "type": "structural_tag"})


def _with_prepared_schemas(tag: Any) -> Any:
    if isinstance(tag, list):
        return [_with_prepared_schemas(each) for each in tag]
    if not isinstance(tag, dict):
        return tag
    if tag.get("type") == "json_schema" and "json_schema" in tag:
        blanks = {"max_whitespace_cnt": BLANKS} if tag.get("style", "json") == "json" else {}
        return {**blanks, **tag, "json_schema": prepared(tag["json_schema"])}
    return {name: _with_prepared_schemas(each) for name, each in tag.items()}


def _reason(error: BaseException) -> str:
    """What the compiler says, without the places in its source."""
    if isinstance(error, KeyError):
        return f"{error} is missing"
    text = _CHECK.sub("", _WHERE.sub("", str(error).strip())).strip() or type(error).__name__
    first = text.splitlines()[0].rstrip(".")
    return first if len(first) <= _QUOTED else f"{first[:_QUOTED]} …"
