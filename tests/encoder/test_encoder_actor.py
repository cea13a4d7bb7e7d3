"""What an encoder is asked that it cannot compute."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from llm_runtime.actors.encoder.actor import Encoder
from llm_runtime.actors.encoder.queue import Queue
from llm_runtime.actors.messages import Embed, EmbedRefused, TokenSequence


@pytest.mark.parametrize(
    "sequence",
    [
        TokenSequence(0, np.array([1, 50], "<i4").tobytes()),
        TokenSequence(0, np.array([-1], "<i4").tobytes()),
        TokenSequence(0, b""),
        TokenSequence(0, b"123"),
        TokenSequence(0, bytes(4 * 9)),
        TokenSequence(0, bytes(8), bytes([0, 2])),
    ],
    ids=["outside the vocabulary", "negative", "empty", "torn", "too long", "of no type"],
)
def test_is_refused_and_not_dropped(sequence: TokenSequence) -> None:
    encoder: Any = Encoder.__new__(Encoder)
    encoder.config = SimpleNamespace(max_model_len=8, max_queue=4)
    encoder.pooling = SimpleNamespace(vocab_size=50, encoder=SimpleNamespace(types=2))
    encoder.queue = Queue(64)
    sent: list[tuple[str, Any]] = []
    encoder.send = lambda peer, message: sent.append((peer, message))
    encoder.embed(Embed("r", [TokenSequence(1, bytes(8)), sequence]), "ingress0")
    ((peer, refused),) = sent
    assert (peer, type(refused), refused.rid, refused.status) == ("ingress0", EmbedRefused, "r", 400)
    assert not len(encoder.queue)
