"""A KV sender and a KV receiver with real mailboxes and arenas; the test is in the place of both schedulers."""

from __future__ import annotations

import os
import time
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import torch

from llm_runtime.actors.actor import Actor
from llm_runtime.actors.kv_format import KVFormat
from llm_runtime.actors.kv_receiver import KvReceiver
from llm_runtime.actors.kv_sender import KvSender
from llm_runtime.actors.messages import (
    Message,
    Offer,
    Receive,
)
from llm_runtime.transport import Arena, Codec, Mailbox
from llm_runtime.transport.transfer import Piece, TransferEngine

DEADLINE_S = 10.0
NUM_PAGES = 24
P, D = "prefill.scheduler", "decode.scheduler"
SENDER, RECEIVER = "prefill.kv_sender", "decode.kv_receiver"
MESSAGES: Codec[Message] = Codec(Message)


def page_format(kv_heads: int = 3, dtype: Any = "float32", kind: Any = "mha") -> KVFormat:
    return KVFormat(layers=2, page_size=4, kv_heads=kv_heads, head_dim=8, dtype=dtype, kind=kind)


def packed(pages: Sequence[int]) -> bytes:
    return array("i", pages).tobytes()


class HeldEngine:
    """An engine whose reads are not carried out, or seem not to be, until the test lets go."""

    def __init__(self, engine: TransferEngine) -> None:
        self.engine = engine
        self.held = True
        self.waiting: list[tuple[int, bytes, Sequence[Piece]]] = []
        self.handles: dict[int, int] = {}
        self.cancelled: list[int] = []
        self.ended: list[tuple[int, str]] = []
        self.next = 0

    def read(self, endpoint: bytes, pieces: Sequence[Piece]) -> int:
        self.next += 1
        self.waiting.append((self.next, endpoint, pieces))
        return self.next

    def let_go(self) -> None:
        """Carries out what was begun, cancelled or not: a read may be too far gone to be stopped."""
        for handle, endpoint, pieces in self.waiting:
            self.handles[self.engine.read(endpoint, pieces)] = handle
        self.waiting.clear()

    def fail(self, error: str) -> None:
        self.ended += [(handle, error) for handle, _, _ in self.waiting]
        self.waiting.clear()

    def poll(self) -> list[tuple[int, str]]:
        if not self.held:
            self.let_go()
        ended, self.ended = self.ended, []
        return ended + [(self.handles.pop(handle), error) for handle, error in self.engine.poll()]

    def cancel(self, handle: int) -> None:
        self.cancelled.append(handle)

    def close(self) -> None:
        self.engine.close()


class Stage:
    """Both actors, run by turns, and a mailbox for each scheduler.

    `theirs` and `own` are the heads [first, end) of each rank of the prefill and the decode engine.
    """

    def __init__(
        self,
        directory: Path,
        kind: str = "shm",
        theirs: Sequence[tuple[int, int]] = ((0, 3),),
        own: Sequence[tuple[int, int]] = ((0, 3),),
        dtype: Any = "float32",
        pages: Any = "mha",
        **receiver: Any,
    ) -> None:
        self.directory, self.kind = directory, kind
        self.receiver_settings = receiver
        self.theirs = self._ranks("prefill", theirs, dtype, pages)
        self.own = self._ranks("decode", own, dtype, pages)
        self.shutdown = os.eventfd(0)
        self.descriptors: dict[str, int] = {}
        self.arenas: dict[str, Arena] = {}
        draw = np.random.default_rng(7)
        for rank in (*self.theirs, *self.own):
            fmt = msgspec.convert(rank["format"], KVFormat)
            self.descriptors[rank["arena"]] = Arena.create(rank["arena"], NUM_PAGES * fmt.page_bytes)
            arena = self.arenas[rank["arena"]] = Arena(self.descriptors[rank["arena"]])
            cache = fmt.cache(arena.buffer, NUM_PAGES)
            for tensor in (cache.vectors, cache.scales):
                if tensor is not None:
                    numbers = draw.integers(-100, 100, tuple(tensor.shape))
                    tensor.copy_(torch.from_numpy(numbers))
            for twin in (other for other in self.theirs if rank in self.theirs and other["heads"] == rank["heads"]):
                if twin["arena"] in self.arenas:
                    arena.buffer[:] = self.arenas[twin["arena"]].buffer
                    break
        self.schedulers: dict[str, Mailbox[Message]] = {}
        self.got: dict[str, list[Message]] = {P: [], D: []}
        self.incarnations = dict.fromkeys((P, D, SENDER, RECEIVER), 0)
        self.actors: dict[str, Actor] = {}
        self.former: list[Actor] = []
        self.lost: Callable[[str, Message], bool] = lambda sender, message: False
        """Says of a message of an actor whether it is lost on its way."""
        for name in (P, D):
            self.restart_scheduler(name)
        self.restart(SENDER)
        self.restart(RECEIVER)

    @property
    def sender(self) -> KvSender:
        actor = self.actors[SENDER]
        assert isinstance(actor, KvSender)
        return actor

    @property
    def receiver(self) -> KvReceiver:
        actor = self.actors[RECEIVER]
        assert isinstance(actor, KvReceiver)
        return actor

    @staticmethod
    def _ranks(engine: str, heads: Sequence[tuple[int, int]], dtype: Any, pages: Any) -> list[dict[str, Any]]:
        return [
            {
                "arena": f"{engine}.rank{number}.kv",
                "format": msgspec.to_builtins(page_format(end - first, dtype, pages)),
                "heads": [first, end],
            }
            for number, (first, end) in enumerate(heads)
        ]

    def address(self, name: str) -> str:
        return f"ipc://{self.directory}/{name}"

    def restart_scheduler(self, name: str) -> None:
        """A new incarnation takes the place of the former."""
        if name in self.schedulers:
            self.schedulers.pop(name).close()
        self.incarnations[name] += 1
        peer = SENDER if name == P else RECEIVER
        self.schedulers[name] = Mailbox(
            name, self.incarnations[name], self.address(name), {peer: self.address(peer)}, MESSAGES
        )

    def restart(self, name: str, **settings: Any) -> None:
        """A killed actor's successor: nothing but the arenas is left."""
        if name in self.actors:
            self.former.append(self.actors.pop(name))
            self.former[-1].mailbox.close(0)
        self.incarnations[name] += 1
        kind, peers, config = (
            (KvSender, (P, RECEIVER), {"scheduler": P, "ranks": self.theirs})
            if name == SENDER
            else (KvReceiver, (D, SENDER), {"scheduler": D, "ranks": self.own, **self.receiver_settings})
        )
        if name == RECEIVER and self.kind == "shm":
            config["sources"] = [rank["arena"] for rank in self.theirs]
        config |= {"num_pages": NUM_PAGES, "transfer": {"kind": self.kind}, **settings}
        args = {
            "address": self.address(name),
            "peers": {peer: self.address(peer) for peer in peers},
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
            id=name,
            incarnation=self.incarnations[name],
            args=args,
            descriptors=self.descriptors,
            run_dir=self.directory,
            link=link,
        )
        actor = self.actors[name] = kind(context)
        send = actor.send

        def lossy(peer: str, message: Message) -> bool:
            return True if self.lost(name, message) else send(peer, message)

        actor.send = lossy  # type: ignore[method-assign]
        actor.setup()
        actor.begin()

    def close(self) -> None:
        for actor in self.actors.values():
            actor.teardown()
            actor.mailbox.close(0)
        for mailbox in self.schedulers.values():
            mailbox.close(0)
        for actor in self.former:
            actor.teardown()
        for descriptor in (self.shutdown, *self.descriptors.values()):
            os.close(descriptor)

    # -- what a test does -------------------------------------------------------------------------------------------

    def tell(self, scheduler: str, message: Message) -> None:
        self.schedulers[scheduler].send(SENDER if scheduler == P else RECEIVER, message)

    def offer(self, transfer: str, pages: Sequence[int], first: int = 0) -> None:
        self.tell(P, Offer(transfer, RECEIVER, first, packed(pages)))

    def receive(self, transfer: str, pages: Sequence[int], first: int = 0) -> None:
        self.tell(D, Receive(transfer, SENDER, first, packed(pages)))

    def until(self, condition: Callable[[], Any]) -> Any:
        """Lets everything run until the condition holds; its value."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            for actor in self.actors.values():
                actor.drain()
                actor._run_timers()
                actor.turn()
            for name, mailbox in self.schedulers.items():
                self.got[name] += [envelope.body for envelope in mailbox.receive()]
            value = condition()
            if value:
                return value
            assert time.monotonic() < deadline, {name: got[-3:] for name, got in self.got.items()}
            time.sleep(0.0005)

    def expect(self, scheduler: str, kind: type, skip: int = 0) -> Any:
        """The message of a type that a scheduler gets after `skip` others of it."""
        found = self.until(lambda: [m for m in self.got[scheduler] if isinstance(m, kind)][skip : skip + 1])
        return found[0]

    def settle(self) -> None:
        """Lets everything run until no message is on its way."""

        def all_arrived() -> bool:
            boxes = {name: actor.mailbox for name, actor in self.actors.items()} | self.schedulers
            return all(
                # What went to a former incarnation does not arrive.
                boxes[peer]._next_in.get(name, number if self.incarnations[peer] > 1 else 0) == number
                for name, mailbox in boxes.items()
                for peer, number in mailbox._next_out.items()
            )

        self.until(all_arrived)

    def pages(self, engine: str, rank: int, pages: Sequence[int]) -> list[bytes]:
        ranks = self.theirs if engine == "prefill" else self.own
        fmt = msgspec.convert(ranks[rank]["format"], KVFormat)
        buffer = self.arenas[ranks[rank]["arena"]].buffer
        return [bytes(fmt.pages(buffer, page)) for page in pages]

    def vectors(self, engine: str, rank: int, pages: Sequence[int]) -> tuple[Any, Any]:
        """Vectors and scales [pages, layers, 2, page_size, heads, …] of pages of one rank, copied."""
        ranks = self.theirs if engine == "prefill" else self.own
        fmt = msgspec.convert(ranks[rank]["format"], KVFormat)
        cache = fmt.cache(self.arenas[ranks[rank]["arena"]].buffer, NUM_PAGES)
        chosen = list(pages)
        return cache.vectors[chosen].clone(), None if cache.scales is None else cache.scales[chosen].clone()
