"""Questions to the tokenizer, asked again until they are answered."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from llm_runtime.actors.ingress.errors import invalid
from llm_runtime.actors.ingress.output_deltas import new_rid
from llm_runtime.actors.messages import (
    DescribeTokenizer,
    Detokenize,
    Detokenized,
    Message,
    Tokenize,
    Tokenized,
    TokenizeFailed,
    TokenizerDescribed,
)

Question = Tokenize | Detokenize | DescribeTokenizer
Answer = Tokenized | TokenizeFailed | Detokenized | TokenizerDescribed

_ANSWERS = {Tokenize: Tokenized, Detokenize: Detokenized, DescribeTokenizer: TokenizerDescribed}


class _Asked:
    __slots__ = ("answer", "asked_at", "message")

    def __init__(self, message: Question, answer: asyncio.Future[Message], asked_at: float) -> None:
        self.message = message
        self.answer = answer
        self.asked_at = asked_at


class Tokenization:
    """What the tokenizer has been asked and has not answered. Only for the ingress's event loop.

    Args:
        send: puts a message into an actor's mailbox, by name.
        tokenizer: the actor's name.
        stall_s: a question is repeated when it is not answered in this time.
        clock: seconds, monotonic.
    """

    def __init__(
        self, send: Callable[[str, Message], bool], tokenizer: str, stall_s: float, clock: Callable[[], float]
    ) -> None:
        self.tokenizer = tokenizer
        self._send = send
        self._stall_s = stall_s
        self._clock = clock
        self._questions: dict[str, _Asked] = {}

    def __len__(self) -> int:
        return len(self._questions)

    async def tokens(self, question: Tokenize) -> bytes:
        """Token ids (i32) of a prompt. Raises ApiError when it cannot be rendered or encoded."""
        answer = await self._ask(question)
        assert isinstance(answer, Tokenized)
        return answer.tokens

    async def pair(self, question: Tokenize) -> tuple[bytes, bytes]:
        """Token ids (i32) of a pair or a text to fill in, and `Tokenized.more`. Raises ApiError as `tokens`."""
        answer = await self._ask(question)
        assert isinstance(answer, Tokenized)
        return answer.tokens, answer.more

    async def text(self, question: Detokenize) -> Detokenized:
        """The text of token ids. Raises ApiError when there is none."""
        answer = await self._ask(question)
        assert isinstance(answer, Detokenized)
        return answer

    async def description(self) -> TokenizerDescribed:
        """Special tokens and chat templates."""
        answer = await self._ask(DescribeTokenizer(new_rid()))
        assert isinstance(answer, TokenizerDescribed)
        return answer

    def answered(self, message: Answer) -> None:
        """An answer has arrived; a second one is dropped, as is one of the wrong kind."""
        question = self._questions.get(message.rid)
        if question is None or question.answer.done():
            return
        if isinstance(message, TokenizeFailed):
            question.answer.set_exception(invalid(message.error))
        elif isinstance(message, _ANSWERS[type(question.message)]):
            question.answer.set_result(message)

    def tokenizer_started(self) -> None:
        """A new incarnation knows no question of the former one's."""
        for question in self._questions.values():
            self._repeat(question)

    def watch(self) -> None:
        """Repeats questions that have waited for long."""
        now = self._clock()
        for question in self._questions.values():
            if now - question.asked_at >= self._stall_s:
                self._repeat(question)

    async def _ask(self, message: Question) -> Message:
        question = _Asked(message, asyncio.get_running_loop().create_future(), self._clock())
        self._questions[message.rid] = question
        self._send(self.tokenizer, message)
        try:
            return await question.answer
        finally:
            del self._questions[message.rid]

    def _repeat(self, question: _Asked) -> None:
        question.asked_at = self._clock()
        self._send(self.tokenizer, question.message)
