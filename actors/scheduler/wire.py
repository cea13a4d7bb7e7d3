"""Rows of a batch as `Step` messages, and the logprobs of a `StepResult` as lists."""

from __future__ import annotations

from array import array

import numpy as np

from llm_runtime.actors.messages import NewRequest, Step, TokenLogprob, TopLogprobs
from llm_runtime.actors.scheduler.batch import Row


def encode_step(number: int, rows: list[Row], first_page: int = 0) -> Step:
    """The step that computes `rows`. Marks their block_tables as known to the rank.

    Args:
        first_page: number of the engine's page 0 in the arena of its ranks.
    """
    slots, starts, lengths, tokens, pages = (array("i") for _ in range(5))
    flags = bytearray()
    new_requests: list[NewRequest] = []
    for row in rows:
        request, block_table = row.request, row.block_table
        if not block_table.opened:
            history = request.tokens.tobytes() if request.sampling.needs_history else b""
            new_requests.append(
                NewRequest(block_table.slot, request.prompt_len, request.sampling, history, request.trace, request.room)
            )
            block_table.opened, block_table.pages_sent = True, 0
        if block_table.pages_sent < len(block_table.pages):
            for index in range(block_table.pages_sent, len(block_table.pages)):
                pages.extend((block_table.slot, index, first_page + block_table.pages[index]))
            block_table.pages_sent = len(block_table.pages)
        slots.append(block_table.slot)
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
        new_requests,
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
