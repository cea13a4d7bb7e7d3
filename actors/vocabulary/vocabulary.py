"""`Vocabulary`: what a checkpoint says about its tokens, and the encoder built from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property

from tokenizers import Tokenizer


class Vocabulary:
    """The tokens of a model.

    Text is the UTF-8 decoding of the concatenated bytes of its tokens, with U+FFFD for what is not valid UTF-8, as
    Python decodes with `errors="replace"`. For valid text this equals what the `tokenizers` library decodes; for broken
    text the number of U+FFFD of a byte-fallback vocabulary may differ from it.

    Attributes:
        token_bytes: the bytes of each token by id, byte-level alphabet, byte fallback and `▁` undone.
        special_ids: ids of control tokens, which `skip_special_tokens` leaves out of a text.
        bos_id: id of the beginning-of-sequence token, if there is one.
        eos_ids: ids that end an answer of the model, the tokenizer's own end-of-sequence token first.
        strips_leading_space: the first space of a whole text is not part of it (sentencepiece with a prefix space).
        special_tokens: `bos_token`, `eos_token` … as chat templates know them.
        chat_templates: Jinja sources by name, `default` among them if there are any.
    """

    def __init__(
        self,
        *,
        token_bytes: Sequence[bytes],
        special_ids: Iterable[int],
        bos_id: int | None,
        eos_ids: Sequence[int],
        strips_leading_space: bool,
        special_tokens: Mapping[str, str],
        chat_templates: Mapping[str, str],
        build_tokenizer: Callable[[], Tokenizer],
        prefix_ids: Sequence[int] = (),
        suffix_ids: Sequence[int] = (),
    ) -> None:
        self.token_bytes = list(token_bytes)
        self.special_ids = frozenset(special_ids)
        self.bos_id = bos_id
        self.eos_ids = tuple(eos_ids)
        self.strips_leading_space = strips_leading_space
        self.special_tokens = dict(special_tokens)
        self.chat_templates = dict(chat_templates)
        self._build_tokenizer = build_tokenizer
        self._prefix_ids = list(prefix_ids)
        self._suffix_ids = list(suffix_ids)

    @property
    def size(self) -> int:
        """Number of token ids, unused ones included."""
        return len(self.token_bytes)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The encoder, built on first use: a process that only decodes never pays for it."""
        tokenizer = self._build_tokenizer()
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    def encode(self, text: str, add_special: bool, max_tokens: int = 0) -> list[int]:
        """The token ids of a text. Names of special tokens in the text become these tokens.

        Args:
            add_special: put the tokens around it that the model wants around a text, such as BOS.
            max_tokens: what is beyond so many tokens, the special ones included, is cut off the text; 0 for all of it.

        Raises ValueError where there is no room for a text.
        """
        added = len(self._prefix_ids) + len(self._suffix_ids) if add_special else 0
        with self._truncated(max_tokens, added):
            ids: list[int] = self.tokenizer.encode_batch_fast([text], add_special_tokens=add_special)[0].ids
        if added:
            return [*self._prefix_ids, *ids, *self._suffix_ids]
        return ids

    def encode_pair(self, text: str, pair: str, max_tokens: int = 0) -> tuple[list[int], list[int]]:
        """The token ids of two texts as one, and their token type ids; see `encode`. Of texts that are too long, the
        longer one is cut. Raises ValueError for a vocabulary that does not say how pairs are written."""
        if self.tokenizer.num_special_tokens_to_add(is_pair=True) == 0:
            raise ValueError("the model's tokenizer has no special tokens between two texts")
        with self._truncated(max_tokens, 0):
            encoding = self.tokenizer.encode_batch([(text, pair)])[0]
        return encoding.ids, encoding.type_ids

    @contextmanager
    def _truncated(self, max_tokens: int, added: int) -> Iterator[None]:
        if not max_tokens:
            yield
            return
        if max_tokens <= added + self.tokenizer.num_special_tokens_to_add(is_pair=False):
            raise ValueError(f"{max_tokens} tokens are too few for the special ones alone")
        self.tokenizer.enable_truncation(max_tokens - added)
        try:
            yield
        finally:
            self.tokenizer.no_truncation()

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        """The text of token ids. Raises IndexError for an id that is not in the vocabulary."""
        special = self.special_ids if skip_special else frozenset()
        text = b"".join([self.token_bytes[token] for token in ids if token not in special]).decode("utf-8", "replace")
        return text.removeprefix(" ") if self.strips_leading_space else text
