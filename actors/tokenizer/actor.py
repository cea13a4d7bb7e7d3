"""The tokenizer actor. It keeps nothing between messages, so whatever is sent again is simply answered again."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import jinja2
import msgspec

from llm_runtime.actors.actor import Actor, StartFailure, handles
from llm_runtime.actors.checkpoint import CheckpointError
from llm_runtime.actors.messages import (
    ChatPrompt,
    DescribeTokenizer,
    Detokenize,
    Detokenized,
    FillPrompt,
    PairPrompt,
    TextPrompt,
    Tokenize,
    Tokenized,
    TokenizeFailed,
    TokenizerDescribed,
)
from llm_runtime.actors.tokenizer.chat_template import ChatTemplate, TemplateFailure
from llm_runtime.actors.tokenizer.fill_in import fill_in
from llm_runtime.actors.vocabulary import load_vocabulary, pack_ids, unpack_ids

_MAX_CHARACTERS = 4 * 2**20
_WARM_UP = "Hello, wörld! 123"


class TokenizerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Settings of the tokenizer.

    Attributes:
        model: GGUF file or Hugging Face directory.
        chat_template: file with a Jinja template that replaces the model's own.
        max_characters: length of the longest prompt that is encoded, so that no request can occupy the tokenizer.
    """

    model: str
    chat_template: str | None = None
    max_characters: int = _MAX_CHARACTERS


class Refusal(Exception):
    """A prompt that cannot become tokens; the text is one sentence for the client."""


class Tokenizer(Actor):
    """Answers `Tokenize`, `Detokenize` and `DescribeTokenizer`."""

    def setup(self) -> None:
        """Loads vocabulary and chat template, and encodes once, so that the first request is as fast as the others."""
        # One thread: the library's own are for batches, and would compete with the ranks for cores.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        os.environ["RAYON_NUM_THREADS"] = "1"
        self.config = msgspec.convert(self.args.config, TokenizerConfig)
        self.encoded_tokens = 0
        self.failures = 0
        try:
            self.vocabulary = load_vocabulary(Path(self.config.model))
            self.vocabulary.encode(_WARM_UP, add_special=True)
        except CheckpointError as error:
            raise StartFailure(str(error)) from None
        self.chat_template = self._chat_template()

    @handles(Tokenize)
    def tokenize(self, message: Tokenize, sender: str) -> None:
        """Renders and encodes a prompt."""
        began_ns = time.time_ns()
        try:
            tokens, more = self._encode(message.prompt)
        except (Refusal, TemplateFailure) as failure:
            self.spans.ended(message.trace, "tokenize", began_ns, error=str(failure))
            self._fail(sender, message.rid, str(failure))
            return
        self.spans.ended(message.trace, "tokenize", began_ns, {"tokens": len(tokens)})
        self.encoded_tokens += len(tokens)
        if not self.send(sender, Tokenized(message.rid, pack_ids(tokens), more)):
            self._fail(sender, message.rid, f"The prompt of {len(tokens)} tokens is too long to be passed on.")

    @handles(Detokenize)
    def detokenize(self, message: Detokenize, sender: str) -> None:
        """Decodes token ids."""
        try:
            tokens = unpack_ids(message.tokens)
        except ValueError:
            self._fail(sender, message.rid, "The token ids are not packed 32-bit integers.")
            return
        wrong = next((token for token in tokens if not 0 <= token < self.vocabulary.size), None)
        if wrong is not None:
            self._fail(
                sender, message.rid, f"Token id {wrong} is not one of the model's ids 0 to {self.vocabulary.size - 1}."
            )
            return
        text = self.vocabulary.decode(tokens, message.skip_special_tokens)
        pieces = [self.vocabulary.token_bytes[token].decode("utf-8", "replace") for token in tokens]
        if not self.send(sender, Detokenized(message.rid, text, pieces)):
            self._fail(sender, message.rid, f"The text of {len(tokens)} tokens is too long to be passed on.")

    @handles(DescribeTokenizer)
    def describe(self, message: DescribeTokenizer, sender: str) -> None:
        """Tells special tokens and chat templates."""
        vocabulary, sources = self.vocabulary, dict(self.chat_template.sources)
        self.send(sender, TokenizerDescribed(message.rid, dict(vocabulary.special_tokens), sources, vocabulary.size))

    def stats(self) -> dict[str, float]:
        """Prompt tokens encoded and prompts refused since the start."""
        return {"tokenizer_tokens": float(self.encoded_tokens), "tokenizer_failures": float(self.failures)}

    def _encode(self, prompt: ChatPrompt | TextPrompt | PairPrompt | FillPrompt) -> tuple[list[int], bytes]:
        """Token ids, and what `Tokenized` tells more."""
        pair, add_special, max_tokens = "", False, 0
        if isinstance(prompt, ChatPrompt):
            text = self._render(prompt)  # the template writes the special tokens itself
        else:
            text = prompt.text
            if isinstance(prompt, PairPrompt):
                pair, max_tokens = prompt.pair, prompt.max_tokens
            elif isinstance(prompt, FillPrompt):
                pair, add_special = prompt.suffix, prompt.add_special_tokens
            else:
                add_special, max_tokens = prompt.add_special_tokens, prompt.max_tokens
        if len(text) + len(pair) > self.config.max_characters:
            raise Refusal(
                f"The prompt has {len(text) + len(pair)} characters, and the longest one allowed has "
                f"{self.config.max_characters}."
            )
        try:
            if isinstance(prompt, PairPrompt):
                tokens, types = self.vocabulary.encode_pair(text, pair, max_tokens)
                return tokens, bytes(types)
            if isinstance(prompt, FillPrompt):
                filled = fill_in(self.vocabulary, text, pair, add_special)
                if filled is None:
                    raise Refusal("The model's vocabulary has no tokens for filling in the middle: leave out 'suffix'.")
                return filled[0], pack_ids(filled[1])
            return self.vocabulary.encode(text, add_special, max_tokens), b""
        except Refusal:
            raise
        except Exception as error:  # whatever a text does to the library must not end the process again and again
            raise Refusal(f"The prompt cannot be encoded ({type(error).__name__}: {error}).") from None

    def _render(self, prompt: ChatPrompt) -> str:
        messages = _parse("messages", prompt.messages, list[dict[str, Any]])
        if not messages:
            raise Refusal("messages must hold at least one message.")
        return self.chat_template.render(
            messages,
            tools=_parse("tools", prompt.tools, list[dict[str, Any]] | None) if prompt.tools else None,
            arguments=_parse("chat_template_kwargs", prompt.template_arguments, dict[str, Any]),
            add_generation_prompt=prompt.add_generation_prompt,
            continue_final_message=prompt.continue_final_message,
        )

    def _fail(self, sender: str, rid: str, error: str) -> None:
        self.failures += 1
        self.send(sender, TokenizeFailed(rid, error))

    def _chat_template(self) -> ChatTemplate:
        templates = self.vocabulary.chat_templates
        if self.config.chat_template is not None:
            file = Path(self.config.chat_template)
            try:
                templates = {"default": file.read_text("utf-8-sig")}
            except (OSError, UnicodeDecodeError) as error:
                raise StartFailure(f"The chat template {file} cannot be read: {error}.") from None
        try:
            return ChatTemplate(templates, self.vocabulary.special_tokens)
        except jinja2.TemplateError as error:
            raise StartFailure(f"The model's chat template is not a Jinja template: {error}.") from None


def _parse(name: str, source: str, kind: Any) -> Any:
    try:
        return msgspec.json.decode(source, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Refusal(f"{name} is not valid: {error}.") from None
