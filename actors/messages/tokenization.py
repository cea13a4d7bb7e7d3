"""Between ingress and tokenizer."""

from __future__ import annotations

from llm_runtime.actors.messages.base import AnyMessage, NonNegInt32, Rid, Tagged, Trace


class ChatPrompt(Tagged):
    """Messages to render with the model's chat template; `messages` and `tools` are JSON texts."""

    messages: str
    tools: str = ""
    template_arguments: str = "{}"
    add_generation_prompt: bool = True
    continue_final_message: bool = False


class TextPrompt(Tagged):
    """A plain prompt, encoded as it is, with the model's own BOS token where it has one, and cut off behind
    `max_tokens` tokens unless that is 0; the special ones count."""

    text: str
    add_special_tokens: bool = True
    max_tokens: NonNegInt32 = 0


class PairPrompt(Tagged):
    """Two texts as a model reads them that compares them, encoded as one with the model's special tokens."""

    text: str
    pair: str
    max_tokens: NonNegInt32 = 0


class FillPrompt(Tagged):
    """What stands before and behind a text that the model is to fill in."""

    text: str
    suffix: str
    add_special_tokens: bool = True


class Tokenize(AnyMessage):
    """Ingress → tokenizer. Answered by `Tokenized` or `TokenizeFailed`. Repeated when the tokenizer is restarted."""

    rid: Rid
    prompt: ChatPrompt | TextPrompt | PairPrompt | FillPrompt
    trace: Trace = b""


class Tokenized(AnyMessage):
    """Tokenizer → ingress: the prompt's token ids (i32).

    Attributes:
        more: of a pair the token type ids, one byte each; of a text to fill in the ids (i32) that end it.
    """

    rid: Rid
    tokens: bytes
    more: bytes = b""


class TokenizeFailed(AnyMessage):
    """Tokenizer → ingress: the prompt cannot be rendered or encoded; one sentence for the client."""

    rid: Rid
    error: str


class Detokenize(AnyMessage):
    """Ingress → tokenizer: the text of token ids (i32). Answered by `Detokenized` or `TokenizeFailed`."""

    rid: Rid
    tokens: bytes
    skip_special_tokens: bool = False


class Detokenized(AnyMessage):
    """Tokenizer → ingress: the whole text, and the text of each token alone."""

    rid: Rid
    text: str
    pieces: list[str]


class DescribeTokenizer(AnyMessage):
    """Ingress → tokenizer: what clients that tokenize by themselves want to know. Answered by `TokenizerDescribed`."""

    rid: Rid


class TokenizerDescribed(AnyMessage):
    """Tokenizer → ingress.

    Attributes:
        special_tokens: `bos_token`, `eos_token` … as chat templates know them.
        chat_templates: Jinja sources by name, `default` among them if there are any.
        vocab_size: token ids, unused ones included.
    """

    rid: Rid
    special_tokens: dict[str, str]
    chat_templates: dict[str, str]
    vocab_size: int
