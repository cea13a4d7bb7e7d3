"""Settings of a scheduler."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

Positive = Annotated[int, Meta(ge=1)]


class Config(Struct, frozen=True, forbid_unknown_fields=True):
    """`args["config"]` of a scheduler's child spec.

    Attributes:
        engine: name of the engine; its page ledger is the descriptor `ENGINE.pages`.
        role: `prefill` computes prompts for engines that decode, `decode` has them computed, `unified` does both.
        transfer: name of the KV sender (prefill) or KV receiver (decode).
        shared_kv: prefill and decode engines compute in the same arenas, so that pages are handed over without a copy.
        prefill_schedulers: (decode) all that may write into this engine's pages, where arenas are shared.
        local_prefill_tokens: (decode) requests that lack the KV of no more tokens are not sent to another engine.
        model: name under which the model is served.
        address: this scheduler's mailbox, as ingresses reach it.
        leader: name of the engine's rank 0.
        grammar: name of the engine's grammar actor; empty where there is none, and no structured output.
        tp: ranks of the engine.
        num_pages: KV pages of `page_size` tokens each.
        first_page, arena_pages: where engines share the arenas of their ranks, the number of this engine's first page
            in them, and the pages of all engines. 0 pages for an engine with arenas of its own.
        max_model_len: tokens of prompt and output together; at most `num_pages * page_size`.
        chunk_tokens: prompt tokens computed in one step, all requests together.
        max_step_ms: while requests decode, a step takes no more of prompts, and of guesses, than is expected to end
            within this time, or as many times it as more requests wait than decode; 0 for as much as `chunk_tokens`
            allows.
        max_running: requests that may have a slot at a time.
        max_queue: requests that may wait; one more is refused with 429.
        policy: order of the waiting queue; a name of `POLICIES`.
        run_ahead: send the next step while the rank works on one.
        poison_limit: deaths of the ranks in a row, with a request in the unanswered step, after which it is suspected
            of being the cause; see `Bisection`.
        prefix_cache: keep the pages of finished requests for later ones with the same prefix.
        speculation: what guesses tokens, several of which one step verifies where that is faster; a name of
            `DRAFTERS`, or `off`.
        num_speculative_tokens: guesses of one request that a step verifies at most.
        prompt_lookup_min, prompt_lookup_max: lengths of the runs of last tokens that are looked for.
    """

    engine: str
    model: str
    address: str
    leader: str
    bootstrap: str
    page_size: Positive
    num_pages: Positive
    max_model_len: Positive
    detokenizer: str = ""
    grammar: str = ""
    tp: Positive = 1
    role: Literal["unified", "prefill", "decode"] = "unified"
    transfer: str = ""
    prefill_schedulers: list[str] = []
    shared_kv: bool = False
    local_prefill_tokens: Annotated[int, Meta(ge=0)] = 0
    first_page: Annotated[int, Meta(ge=0)] = 0
    arena_pages: Annotated[int, Meta(ge=0)] = 0
    chunk_tokens: Positive = 2048
    max_step_ms: Annotated[int, Meta(ge=0, le=1_000_000)] = 50
    max_running: Positive = 64
    max_queue: Positive = 1024
    policy: str = "fcfs"
    poison_limit: Positive = 3
    run_ahead: bool = True
    prefix_cache: bool = True
    speculation: str = "ngram"
    num_speculative_tokens: Positive = 15
    prompt_lookup_min: Positive = 2
    prompt_lookup_max: Positive = 8
