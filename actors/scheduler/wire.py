"""Rows of a batch as `Step` messages, and the logprobs of a `StepResult` as lists."""

from __future__ import annotations

from array import array

import numpy as np

from llm_runtime.actors.messages import OpenSlot, Step, TokenLogprob, TopLogprobs
from llm_runtime.actors.scheduler.batch import Row


def encode_step(number: int, rows: list[Row], first_page: int = 0) -> Step:
    """The step that computes `rows`. Marks their leases as known to the rank.

    Args:
        first_page: number of the engine's page 0 in the arena of its ranks.
    """
    slots, starts, lengths, tokens, pages = (array("i") for _ in range(5))
    flags = bytearray()
    opens: list[OpenSlot] = []
    for row in rows:
        request, lease = row.request, row.lease
        if not lease.opened:
            history = request.tokens.tobytes() if request.sampling.needs_history else b""
            opens.append(
                OpenSlot(lease.slot, request.prompt_len, request.sampling, history, request.trace, request.room)
            )
            lease.opened, lease.pages_sent = True, 0
        if lease.pages_sent < len(lease.pages):
            for index in range(lease.pages_sent, len(lease.pages)):
                pages.extend((lease.slot, index, first_page + lease.pages[index]))
            lease.pages_sent = len(lease.pages)
        slots.append(lease.slot)
        starts.append(row.start)
        lengths.append(row.length)
        flags.append(row.flags)
        if row.length == 1:
            tokens.append(request.tokens[row.start] if row.start < len(request.tokens) else -1)
            continue
        known = request.tokens[row.start : row.start + row.length]
        tokens.extend(known)
        tokens.extend(row.draft or [-1] * (row.length - len(known)))
    return Step(
        number,
        slots.tobytes(),
        starts.tobytes(),
        lengths.tobytes(),
        bytes(flags),
        tokens.tobytes(),
        pages.tobytes(),
        opens,
    )


def token_logprobs(entry: TopLogprobs, tokens: list[int]) -> list[TokenLogprob]:
    """One `TokenLogprob` a token. Raises ValueError when the arrays do not fit the number of tokens."""
    count, top = len(tokens), entry.top
    own = np.frombuffer(entry.logprobs, dtype=np.float32)
    ids = np.frombuffer(entry.top_ids, dtype=np.int32).reshape(count, top)
    values = np.frombuffer(entry.top_logprobs, dtype=np.float32).reshape(count, top)
    if len(own) != count:
        raise ValueError(f"{len(own)} logprobs for {count} tokens")
    return [
        TokenLogprob(
            token,
            None if np.isnan(own[i]) else float(own[i]),
            list(zip(ids[i].tolist(), values[i].tolist(), strict=True)),
        )
        for i, token in enumerate(tokens)
    ]
