"""Streams of a generation: nothing is left out, however the client and the engine take turns."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from llm_runtime.actors.ingress.engines import Engines
from llm_runtime.actors.ingress.generation import Generation
from llm_runtime.actors.ingress.journal import ReplayState
from llm_runtime.actors.ingress.ledger import Entry, Ledger
from llm_runtime.actors.ingress.metrics import IngressMetrics
from llm_runtime.actors.ingress.work import Work
from llm_runtime.actors.messages import EngineInfo, SamplingParams, TextEvent, TextParams

COUNT = 12


class Stream:
    """A generation of one choice, and the client's side of its answer.

    Attributes:
        waited: what went out through `events`, which may wait for the client.
        written: what was written at once.
        sent: all of it, in order.
    """

    def __init__(self, direct: bool) -> None:
        engines = Engines(["m"], lambda name, address: None)
        self.ledger = Ledger(lambda peer, message: True, engines, IngressMetrics(), 10.0, lambda: 0.0)
        info = EngineInfo("main", "unified", "main.scheduler", "ipc:///x", "m", "f", 1, 16, 64, 512)
        self.ledger.registry([info])
        prompts = [(b"\1\0\0\0", COUNT)]
        sampling = SamplingParams(COUNT, 7)
        work = Work(None, ReplayState())
        self.generation = Generation(self.ledger, work, prompts, sampling, TextParams(), timeout_s=60.0, eager=True)
        self.rid = work.identity.rid
        self.direct = direct
        self.waited: list[bytes] = []
        self.written: list[bytes] = []
        self.sent: list[bytes] = []
        self.keeps_up = True
        self.while_waiting = 0
        """Tokens that arrive while `events` waits."""
        self.made = 0

    @property
    def writer(self) -> Any:
        return self.write if self.direct and self.waited else None

    async def events(self, data: bytes) -> None:
        self.make(self.while_waiting)
        await asyncio.sleep(0)
        self.waited.append(data)
        self.sent.append(data)

    def write(self, data: bytes) -> bool:
        self.written.append(data)
        self.sent.append(data)
        return self.keeps_up

    def make(self, count: int) -> None:
        """The engine sends tokens, one an event; each is one letter."""
        for index in range(self.made, min(COUNT, self.made + count)):
            finish = "length" if index == COUNT - 1 else None
            letter = chr(ord("a") + index)
            self.ledger.texts([TextEvent(self.rid, 0, index, [index], index, letter, finish)])  # type: ignore[arg-type]
            self.made += 1

    @staticmethod
    def render(entries: list[Entry]) -> bytes:
        return b"".join(entry.take()[0].encode() for entry in entries)

    async def run(self) -> None:
        await self.generation.stream(self, self.render)  # type: ignore[arg-type]


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("at_a_time", [1, 5, COUNT])
def test_everything_is_sent_once_and_in_order(direct: bool, at_a_time: int) -> None:
    async def scenario() -> Stream:
        stream = Stream(direct)
        with stream.generation:
            task = asyncio.create_task(stream.run())
            while stream.made < COUNT:
                stream.make(at_a_time)
                await turns()
            await asyncio.wait_for(task, 5)
        return stream

    stream = asyncio.run(scenario())
    assert b"".join(stream.sent) == b"abcdefghijkl"
    assert len(stream.sent) == -(-COUNT // at_a_time)
    assert bool(stream.written) == (direct and at_a_time < COUNT)


def test_the_end_that_arrives_while_the_client_is_slow_is_sent() -> None:
    async def scenario() -> Stream:
        stream = Stream(direct=False)
        stream.while_waiting = COUNT
        with stream.generation:
            stream.make(1)
            await asyncio.wait_for(stream.run(), 5)
        return stream

    assert b"".join(asyncio.run(scenario()).sent) == b"abcdefghijkl"


def test_a_client_that_does_not_keep_up_is_waited_for() -> None:
    async def scenario() -> Stream:
        stream = Stream(direct=True)
        with stream.generation:
            task = asyncio.create_task(stream.run())
            stream.make(1)
            await turns()
            stream.keeps_up = False
            for _ in range(COUNT):
                stream.make(1)
                await turns()
            await asyncio.wait_for(task, 5)
        return stream

    stream = asyncio.run(scenario())
    assert b"".join(stream.sent) == b"abcdefghijkl"
    assert stream.written == [b"b", b"d", b"f", b"h", b"j", b"l"]


@pytest.mark.parametrize("count", [1, COUNT])
def test_an_error_in_a_direct_write_ends_the_stream(count: int) -> None:
    async def scenario() -> None:
        stream = Stream(direct=True)
        with stream.generation:
            task = asyncio.create_task(stream.run())
            stream.make(1)
            await turns()
            stream.written = None  # type: ignore[assignment]
            stream.make(count)
            with pytest.raises(AttributeError):
                await asyncio.wait_for(task, 5)

    asyncio.run(scenario())
