"""`GrammarCompiler`: constraints as automata over a model's tokens."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from actors.grammar.bounded import bounded
from actors.grammar.errors import BadGrammar
from actors.grammar.library import xgrammar
from actors.grammar.schema import prepared
from actors.messages import Constraint
from actors.vocabulary import Vocabulary, load_vocabulary

MAX_COMPILED_BYTES = 64 * 2**20
"""A larger automaton is refused: one rank holds many."""
CACHE_BYTES = 64 * 2**20
"""What a compiler keeps of parts that grammars share: strings of at most so many characters above all, each state of
which takes milliseconds to compile."""
BLANKS = 32
"""Between the parts of JSON in structural tags, unless the tag says how many: enough to indent it, and no more, for
small models draw them for ever."""
_BOUNDED_FORMATS = {
    *("structural_tag", "sequence", "or", "tag", "triggered_tags", "tags_with_separator"),
    *("const_string", "any_text", "json_schema"),
}
"""Of structural tags: what they hold is JSON or has no digits and nothing that holds itself."""
_AMBIGUOUS = re.compile(r"\\x[0-9a-fA-F]{3}")
"""An escape of two hexadecimal digits and a letter that xgrammar, whose cache holds grammars as texts that it reads
again, would take for a third."""
_WHERE = re.compile(r"^\[[\d:]+\] \S+:\d+: ")
_CHECK = re.compile(r"^Check failed: .*? is false: ")
_QUOTED = 300
_CONTROL = re.compile(rb"[\x00-\x1f]")


class Tokens:
    """A model's tokens as grammars see them.

    Attributes:
        info: xgrammar's view of the vocabulary. Special tokens have no text, so that none stands in an answer.
        special: ids of special tokens. ends: ids that end an answer.
        line_info: the same without control characters, which JSON on one line has only in other words.
        vocab_size: number of logits.
    """

    def __init__(self, vocabulary: Vocabulary, vocab_size: int) -> None:
        library = xgrammar()
        self.vocab_size = vocab_size
        self.special = vocabulary.special_ids | frozenset(vocabulary.eos_ids)
        self.ends = [token for token in vocabulary.eos_ids if token < vocab_size]
        texts = [b"" if token in self.special else text for token, text in enumerate(vocabulary.token_bytes)]
        self.info, self.line_info = (
            library.TokenizerInfo(each, library.VocabType.RAW, vocab_size=vocab_size, stop_token_ids=self.ends)
            for each in (texts[:vocab_size], [b"" if _CONTROL.search(text) else text for text in texts[:vocab_size]])
        )

    def stops(self, stop_token_ids: list[int]) -> list[int]:
        """The ids that may follow a complete answer to a request with these stop tokens."""
        asked = [token for token in stop_token_ids if token in self.special and token < self.vocab_size]
        return asked or self.ends


@lru_cache(maxsize=8)
def _tokens(vocabulary: Vocabulary, vocab_size: int) -> Tokens:
    """Kept in the process, so that processes forked from one that has made it start with it."""
    return Tokens(vocabulary, vocab_size)


def load_tokens(model: Path, vocab_size: int) -> Tokens:
    """The tokens of a checkpoint. Raises CheckpointError, and ImportError without xgrammar."""
    return _tokens(load_vocabulary(model), vocab_size)


class GrammarCompiler:
    """Compiles constraints. Of these it keeps parts that others may have as well.

    JSON has one form, `{"a": 1, "b": [2]}` on one line: where blanks are free, small models draw them for ever.

    Args:
        tokens: of the model.
    """

    def __init__(self, tokens: Tokens) -> None:
        self.tokens = tokens
        self._compiler, self._json_compiler = (
            xgrammar().GrammarCompiler(info, max_threads=1, cache_enabled=True, cache_limit_bytes=CACHE_BYTES)
            for info in (tokens.info, tokens.line_info)
        )

    def compile(self, constraint: Constraint) -> Any:
        """xgrammar's `CompiledGrammar`. Holds the interpreter's lock only for moments.

        Raises BadGrammar if the constraint makes no sense, allows nothing, or is too large.
        """
        try:
            compiled = self._compile(constraint.kind, constraint.text)
        except BadGrammar:
            raise
        except (RuntimeError, ValueError, TypeError, KeyError, RecursionError, MemoryError) as error:
            raise BadGrammar(f"The {_NAMES[constraint.kind]} cannot be compiled: {_reason(error)}.") from None
        if compiled.memory_size_bytes > MAX_COMPILED_BYTES:
            raise BadGrammar(
                f"The {_NAMES[constraint.kind]} is too large: it compiles to {compiled.memory_size_bytes >> 20} MiB, "
                f"and {MAX_COMPILED_BYTES >> 20} are allowed."
            )
        self._check_beginning(constraint, compiled)
        return compiled

    def _compile(self, kind: str, text: str) -> Any:
        compiler = self._compiler
        match kind:
            case "json":
                return self._compile_json('{"type": "object"}')
            case "json_schema":
                schema = json.dumps(prepared(json.loads(text)))
                return self._compile_json(schema)
            case "regex":
                return compiler.compile_regex(text)
            case "ebnf":
                return compiler.compile_grammar(text)
            case "choice":
                return compiler.compile_grammar(_choice(text))
            case _:
                tag = _structural_tag(text)
                if _formats(tag) <= _BOUNDED_FORMATS:
                    grammar = xgrammar().Grammar.from_structural_tag(tag)
                    return self._compile_bounded(grammar, compiler, self.tokens.info)
                return compiler.compile_structural_tag(tag)

    def _compile_json(self, schema: str) -> Any:
        grammar = xgrammar().Grammar.from_json_schema(schema, any_whitespace=False)
        return self._compile_bounded(grammar, self._json_compiler, self.tokens.line_info)

    def _compile_bounded(self, grammar: Any, compiler: Any, info: Any) -> Any:
        grammar = bounded(grammar)
        if _AMBIGUOUS.search(str(grammar)):
            compiler = xgrammar().GrammarCompiler(info, max_threads=1, cache_enabled=False)
        return compiler.compile_grammar(grammar)

    def _check_beginning(self, constraint: Constraint, compiled: Any) -> None:
        """Raises BadGrammar if no answer can even begin."""
        library = xgrammar()
        mask = np.zeros((1, -(-self.tokens.vocab_size // 32)), np.int32)
        matcher = library.GrammarMatcher(compiled, override_stop_tokens=self.tokens.ends or None)
        if matcher.fill_next_token_bitmask(mask) and not mask.any():
            raise BadGrammar(f"The {_NAMES[constraint.kind]} allows no text at all.")


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


def _formats(tag: Any) -> set[str]:
    """The types of a structural tag and of what it holds, but for schemas."""
    parts = tag if isinstance(tag, list) else []
    found: set[str] = set()
    if isinstance(tag, dict):
        found = {str(tag["type"])} if "type" in tag else set()
        parts = [part for name, part in tag.items() if name != "json_schema"]
    return found.union(*(_formats(part) for part in parts))


def _reason(error: BaseException) -> str:
    """What the compiler says, without the places in its source."""
    if isinstance(error, KeyError):
        return f"{error} is missing"
    text = _CHECK.sub("", _WHERE.sub("", str(error).strip())).strip() or type(error).__name__
    first = text.splitlines()[0].rstrip(".")
    return first if len(first) <= _QUOTED else f"{first[:_QUOTED]} …"
