"""A scheduler among its peers: real sockets, the test in the place of the others."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from llm_runtime.actors.messages import (
    SAMPLE,
    Attached,
    Generate,
    Message,
    SamplingParams,
    Step,
    StepResult,
    TextParams,
    TokenEvent,
    Tokens,
)
from llm_runtime.actors.scheduler.actor import Scheduler
from llm_runtime.actors.scheduler.engine import EngineScheduler
from llm_runtime.actors.scheduler.pages import page_ledger_bytes
from llm_runtime.transport import Arena, Codec, Mailbox

PEERS = ("ingress0", "main.rank0", "detokenizer", "bootstrap")
DEADLINE_S = 10.0
ON_THE_WAY_S = 1.0
"""How long a message may be on its way; what was sent to an incarnation that is gone does not arrive."""
NUM_PAGES, PAGE_SIZE = 32, 4


class Stage:
    """One scheduler and a mailbox for each of its peers."""

    peers: tuple[str, ...] = PEERS
    kind: type[EngineScheduler] = Scheduler

    def __init__(self, directory: Path, **settings: Any) -> None:
        self.directory = directory
        self.shutdown = os.eventfd(0)
        self.pages = Arena.create("pages", page_ledger_bytes(NUM_PAGES, PAGE_SIZE))
        self.settings = settings
        self.received: dict[str, list[Message]] = {peer: [] for peer in self.peers}
        self.mailboxes: dict[str, Mailbox[Message]] = {}
        self.incarnations = dict.fromkeys(self.peers, 0)
        for peer in self.peers:
            self.restart(peer)
        self.scheduler = self.start(1)

    def address(self, name: str) -> str:
        return f"ipc://{self.directory}/{name}"

    def restart(self, peer: str) -> None:
        """A new incarnation of a peer takes the old one's place."""
        if peer in self.mailboxes:
            self.mailboxes.pop(peer).close()
        self.incarnations[peer] += 1
        peers = {"main.scheduler": self.address("main.scheduler")}
        codec: Codec[Message] = Codec(Message)
        self.mailboxes[peer] = Mailbox(peer, self.incarnations[peer], self.address(peer), peers, codec)

    def start(self, incarnation: int) -> Any:
        config = {
            "engine": "main",
            "model": "m",
            "address": self.address("main.scheduler"),
            "leader": "main.rank0",
            "detokenizer": "detokenizer",
            "bootstrap": "bootstrap",
            "page_size": PAGE_SIZE,
            "num_pages": NUM_PAGES,
            "max_model_len": 100,
            "max_running": 4,
            **self.settings,
        }
        args = {
            "address": self.address("main.scheduler"),
            "peers": {peer: self.address(peer) for peer in self.peers},
            "config": config,
        }
        link = SimpleNamespace(
            stats=None,
            shutdown_fd=self.shutdown,
            shutdown_requested=False,
            ready=lambda: None,
            doing=lambda what, limit_s=None: None,
            idle=lambda: None,
        )
        context: Any = SimpleNamespace(
            id="main.scheduler",
            incarnation=incarnation,
            args=args,
            descriptors={"main.pages": self.pages},
            run_dir=self.directory,
            link=link,
        )
        scheduler = self.kind(context)
        self.mailboxes["main.rank0"].send("main.scheduler", self.attached())
        self.before_setup()
        scheduler.setup()
        return scheduler

    def before_setup(self) -> None:
        """What else the scheduler is told before it is ready."""

    def close(self) -> None:
        """Closes all mailboxes and descriptors."""
        self.scheduler.mailbox.close()
        for mailbox in self.mailboxes.values():
            mailbox.close()
        for descriptor in (self.shutdown, self.pages):
            os.close(descriptor)

    def attached(self) -> Attached:
        return Attached(NUM_PAGES, PAGE_SIZE, 4, 100, 100, "fingerprint")

    def send(self, peer: str, message: Message) -> None:
        self.mailboxes[peer].send("main.scheduler", message)

    def until(self, condition: Callable[[], Any]) -> Any:
        """Lets everything run until nothing is on its way, to whomever, and the condition holds; its value."""
        start = time.monotonic()
        while True:
            self.scheduler.mailbox.poll(0.002)
            self.scheduler.drain()
            self.scheduler._run_timers()
            self.scheduler.turn()
            for peer, mailbox in self.mailboxes.items():
                self.received[peer] += [envelope.body for envelope in mailbox.receive()]
            late = time.monotonic() - start
            if late > ON_THE_WAY_S or self._all_arrived():
                value = condition()
                if value:
                    return value
            assert late < DEADLINE_S, {peer: got[-3:] for peer, got in self.received.items()}

    def _all_arrived(self) -> bool:
        mine, name = self.scheduler.mailbox, "main.scheduler"
        return all(
            theirs._next_in.get(name, 0) == mine._next_out.get(peer, 0)
            and mine._next_in.get(peer, 0) == theirs._next_out.get(name, 0)
            for peer, theirs in self.mailboxes.items()
        )

    def expect(self, peer: str, kind: type, skip: int = 0) -> Any:
        """The message of a type that a peer gets after `skip` others of it."""
        found = self.until(lambda: [m for m in self.received[peer] if isinstance(m, kind)][skip : skip + 1])
        return found[0]

    def steps(self) -> list[Step]:
        return [m for m in self.received["main.rank0"] if isinstance(m, Step)]

    def answer(self, step: Step, token: int = 5) -> None:
        drawn = sum(1 for flags in step.flags if flags & SAMPLE)
        self.send("main.rank0", StepResult(step.number, np.full(drawn, token, np.int32).tobytes()))

    def events(self) -> list[TokenEvent]:
        return [e for m in self.received["detokenizer"] if isinstance(m, Tokens) for e in m.events]

    def generate_all(self) -> None:
        """Answers every step until nothing is under way."""
        answered: set[int] = set()

        def quiet() -> bool:
            for step in self.steps():
                if step.number not in answered:
                    answered.add(step.number)
                    self.answer(step)
            arrived = {event.rid for event in self.events() if event.finish is not None}
            finished = {rid for rid, request in self.scheduler.requests.items() if request.finish is not None}
            return not self.scheduler.batch.running and not self.scheduler.batch.waiting and finished <= arrived

        self.until(quiet)


def generate(rid: str = "r", prompt: int = 6, max_tokens: int = 3, attempt: int = 0, **more: Any) -> Generate:
    tokens = np.arange(prompt, dtype=np.int32).tobytes()
    params = more.pop("sampling", SamplingParams(max_tokens=max_tokens, seed=1, stop_token_ids=[2]))
    return Generate(rid, attempt, tokens, params, more.pop("text", TextParams()), **more)
