"""A rank without a model: the same messages, and tokens at once. What is left of a node is its control plane."""

from __future__ import annotations

import time

import numpy as np

from llm_runtime.actors.actor import Actor, handles
from llm_runtime.actors.messages import SAMPLE, Attach, Attached, Step, StepResult

FIRST_TOKEN, TOKENS = 1_000, 30_000
"""Answers are made of these ids: ordinary tokens, none of them special."""


class NullRank(Actor):
    """Answers each step with tokens that follow from slot and position: at once, or so many steps a second as the
    request that was opened last has for a seed, if that is above 0."""

    def setup(self) -> None:
        self.source = ""
        self.steps_per_s = 0
        self.next_at = 0.0

    @handles(Attach)
    def attach(self, message: Attach, sender: str) -> None:
        """Nothing is held, so nothing is forgotten."""
        self.source = sender
        config = self.args.config
        names = ("num_pages", "page_size", "max_slots", "max_model_len")
        sizes = {name: config[name] for name in names}
        self.send(sender, Attached(**sizes, vocab_size=FIRST_TOKEN + TOKENS, fingerprint="null", kv_epoch=1))

    @handles(Step)
    def step(self, message: Step, sender: str) -> None:
        """Draws without computing."""
        if sender != self.source:
            return
        for opening in message.new_requests:
            self.steps_per_s = opening.sampling.seed
        if self.steps_per_s:
            now = time.monotonic()
            self.next_at = max(now, self.next_at + 1 / self.steps_per_s)
            time.sleep(self.next_at - now)
        slots, starts, lengths = (
            np.frombuffer(each, np.int32) for each in (message.slots, message.starts, message.lengths)
        )
        sampled = (np.frombuffer(message.flags, np.uint8) & SAMPLE) != 0
        positions = (starts + lengths + 101 * slots)[sampled]
        tokens = (FIRST_TOKEN + positions * 7_919 % TOKENS).astype(np.int32)
        self.send(sender, StepResult(message.number, tokens.tobytes()))
