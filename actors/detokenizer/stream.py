"""The growing text of one request."""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Sequence

from msgspec import Struct

from llm_runtime.actors.detokenizer.stop import StopMatcher
from llm_runtime.actors.messages import TextParams
from llm_runtime.actors.vocabulary import Vocabulary


class Pieces(Struct, frozen=True):
    """What each token adds to a text, by token id.

    Attributes:
        bytes: its bytes; none for a token that is left out.
        texts: the same as text where the bytes are whole characters, else None.
        strip: the text's first space is left out.
    """

    bytes: list[bytes]
    texts: list[str | None]
    strip: bool

    @classmethod
    def of(cls, vocabulary: Vocabulary, skip_special: bool) -> Pieces:
        """The pieces of a vocabulary, special tokens left out or not."""
        pieces = list(vocabulary.token_bytes)
        if skip_special:
            for token in vocabulary.special_ids:
                pieces[token] = b""
        return cls(pieces, [_whole(piece) for piece in pieces], vocabulary.strips_leading_space)


def _whole(piece: bytes) -> str | None:
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return None


class TextStream:
    """Text of a sequence of tokens, given out as far as it is certain.

    All that was given out, one after the other, is the UTF-8 decoding of all tokens' bytes (U+FFFD for what is not
    valid), up to a stop string; nothing depends on how the tokens were grouped. Bytes that may be the beginning of a
    character, and text that may be the beginning of a stop string, are held back until that is decided.

    Args:
        pieces: of the vocabulary.
        text: the request's parameters.
        base: tokens that were turned into text before, by this or another process.
        characters: length of the text that the receiver has already; only what follows is given out.

    Attributes:
        next: index of the next output token.
        sent: length of the text given out, `characters` included.
        backlog: text of `base` beyond `characters`, to be given out first.
        stop: the stop string that has ended the text.
    """

    __slots__ = ("_held", "_matcher", "_min_tokens", "_pieces", "_skip", "_strip", "backlog", "next", "sent", "stop")

    def __init__(self, pieces: Pieces, text: TextParams, base: Sequence[int] = (), characters: int = 0) -> None:
        self._pieces = pieces
        self._strip = pieces.strip
        self._held = b""
        self._matcher = StopMatcher(text.stop, text.no_stop_trim) if any(text.stop) else None
        self._min_tokens = text.min_tokens
        self._skip = characters
        self.next = 0
        self.sent = characters
        self.stop: str | None = None
        self.backlog = self.push(base) if base else ""

    def push(self, tokens: Sequence[int]) -> str:
        """The text that the next tokens add. Counts them in `next`: all, or up to the one that completes a stop
        string, in which case `stop` is set and nothing more may be pushed."""
        if self._matcher is not None:
            text = self._push_until_stop(self._matcher, tokens)
        else:
            text = self._decode(tokens)
            self.next += len(tokens)
        if self._skip and text:
            text = self._beyond(text)
        self.sent += len(text)
        return text

    def finish(self) -> str:
        """The text held back, when no more tokens come."""
        text, self._held = utf_8_decode(self._held, "replace", True)[0], b""
        if self._matcher is not None:
            text, self.stop = self._matcher.push(text)
            text += self._matcher.flush()
        text = self._beyond(text)
        self.sent += len(text)
        return text

    def _push_until_stop(self, matcher: StopMatcher, tokens: Sequence[int]) -> str:
        text = ""
        for token in tokens:
            self.next += 1
            new = self._decode((token,))
            if self.next < self._min_tokens:
                text += new
            elif new:
                out, self.stop = matcher.push(new)
                text += out
                if self.stop is not None:
                    self._held = b""
                    break
        return text

    def _decode(self, tokens: Sequence[int]) -> str:
        text = ""
        texts, held = self._pieces.texts, self._held
        for token in tokens:
            try:
                piece = texts[token]
            except IndexError:  # padding of the model's output matrix: not a token
                continue
            if piece is None or held:
                held += self._pieces.bytes[token]
                piece, used = utf_8_decode(held, "replace", False)
                held = held[used:]
            text += piece
        self._held = held
        if self._strip and text:
            self._strip = False
            text = text.removeprefix(" ")
        return text

    def _beyond(self, text: str) -> str:
        """What the receiver does not have of `text`, which comes next."""
        skipped = min(self._skip, len(text))
        self._skip -= skipped
        return text[skipped:]
