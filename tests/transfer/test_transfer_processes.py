"""KV sender and KV receiver as processes that are killed, with every engine: the schedulers' repetitions repair it."""

from __future__ import annotations

import random
import subprocess
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from transfer_actor import StartFailed, kill, start

from llm_runtime.actors.kv_format import KVFormat
from llm_runtime.actors.messages import Message, Offer, Receive, Received, ReceiveFailed
from llm_runtime.transport import Arena, Codec, Mailbox

DEADLINE_S = 60.0
NUM_PAGES = 64
FORMAT = KVFormat(layers=30, page_size=16, kv_heads=3, head_dim=64, dtype="bfloat16")  # SmolLM2's: 360 KiB a page
P, D = "prefill.scheduler", "decode.scheduler"
SENDER, RECEIVER = "prefill.kv_sender", "decode.kv_receiver"
CLASSES = {SENDER: "llm_runtime.actors.kv_sender:KvSender", RECEIVER: "llm_runtime.actors.kv_receiver:KvReceiver"}
SCHEDULER = {SENDER: P, RECEIVER: D}
OTHER = {SENDER: RECEIVER, RECEIVER: SENDER}


class Engines:
    """The two actors as processes, the arenas, and the schedulers' mailboxes."""

    def __init__(self, directory: Path, kind: str) -> None:
        self.directory, self.kind = directory, kind
        self.arenas = {SENDER: "prefill.rank0.kv", RECEIVER: "decode.rank0.kv"}
        size = NUM_PAGES * FORMAT.page_bytes
        self.descriptors = {name: Arena.create(name, size) for name in self.arenas.values()}
        self.memory = {
            actor: np.frombuffer(Arena(self.descriptors[name]).buffer, np.uint8).reshape(NUM_PAGES, -1)
            for actor, name in self.arenas.items()
        }
        self.memory[SENDER][:] = np.random.default_rng(5).integers(0, 256, self.memory[SENDER].shape, np.uint8)
        codec: Codec[Message] = Codec(Message)
        self.boxes = {
            scheduler: Mailbox(scheduler, 1, self.address(scheduler), {actor: self.address(actor)}, codec)
            for actor, scheduler in SCHEDULER.items()
        }
        self.incarnations = dict.fromkeys(CLASSES, 0)
        self.processes: dict[str, subprocess.Popen[str]] = {}
        self.received: dict[str, Received] = {}
        self.tries: dict[str, int] = {}
        """A transfer that has failed is tried again under another name."""

    def address(self, name: str) -> str:
        return f"ipc://{self.directory}/{name}"

    def start(self, actor: str) -> None:
        """Starts an actor; the former incarnation is killed."""
        if actor in self.processes:
            kill(self.processes.pop(actor))
        self.incarnations[actor] += 1
        config: dict[str, Any] = {
            "scheduler": SCHEDULER[actor],
            "ranks": [{"arena": self.arenas[actor], "format": msgspec.to_builtins(FORMAT), "heads": [0, 3]}],
            "num_pages": NUM_PAGES,
            "transfer": {"kind": self.kind},
        }
        if actor == RECEIVER and self.kind == "shm":
            config["sources"] = [self.arenas[SENDER]]
        peers = {name: self.address(name) for name in (SCHEDULER[actor], OTHER[actor])}
        self.processes[actor] = start(
            {
                "class": CLASSES[actor],
                "id": actor,
                "incarnation": self.incarnations[actor],
                "run_dir": str(self.directory),
                "args": {"address": self.address(actor), "peers": peers, "config": config},
                "descriptors": self.descriptors,
            }
        )

    def repeat(self, transfers: dict[str, tuple[list[int], list[int]]], done: Callable[[], bool]) -> None:
        """Says again, as schedulers do, what is not done, until `done`."""
        deadline, said = time.monotonic() + DEADLINE_S, 0.0
        while not done():
            assert time.monotonic() < deadline, f"only {sorted(self.received)} have arrived"
            if time.monotonic() > said + 0.2:
                said = time.monotonic()
                for name, (sources, targets) in transfers.items():
                    if name not in self.received:
                        named = f"{name}/{self.tries.setdefault(name, 0)}"
                        self.boxes[D].send(RECEIVER, Receive(named, SENDER, 0, array("i", targets).tobytes()))
                        self.boxes[P].send(SENDER, Offer(named, RECEIVER, 0, array("i", sources).tobytes()))
            self.boxes[D].poll(0.01)
            for box in self.boxes.values():
                for envelope in box.receive():
                    body = envelope.body
                    if isinstance(body, Received | ReceiveFailed):
                        name, _, number = body.transfer.rpartition("/")
                        if isinstance(body, Received):
                            self.received[name] = body
                        elif int(number) == self.tries[name]:
                            self.tries[name] += 1

    def close(self) -> None:
        for process in self.processes.values():
            kill(process)
        for box in self.boxes.values():
            box.close(0)


@pytest.fixture(params=["shm", "mooncake", "nixl"])
def engines(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engines]:
    made = Engines(tmp_path, request.param)
    try:
        made.start(SENDER)
        made.start(RECEIVER)
        yield made
    except StartFailed as failed:
        pytest.skip(str(failed))
    finally:
        made.close()


def test_pages_arrive_though_both_ends_are_killed(engines: Engines) -> None:
    draw = random.Random(11)
    pages = draw.sample(range(NUM_PAGES), NUM_PAGES), draw.sample(range(NUM_PAGES), NUM_PAGES)
    transfers = {f"t{n}": (pages[0][16 * n : 16 * n + 16], pages[1][16 * n : 16 * n + 16]) for n in range(4)}
    engines.repeat(transfers, lambda: bool(engines.received))
    for victim in (SENDER, RECEIVER):
        engines.received.clear()
        engines.memory[RECEIVER][:] = 0
        transfers = {f"{name}-{victim}": move for name, move in transfers.items()}
        until = time.monotonic() + 0.05  # somewhere among the reads
        engines.repeat(transfers, lambda: time.monotonic() > until)  # noqa: B023
        engines.start(victim)
        engines.repeat(transfers, lambda: set(transfers) <= set(engines.received))  # noqa: B023
        for sources, targets in transfers.values():
            assert np.array_equal(engines.memory[SENDER][sources], engines.memory[RECEIVER][targets])
    assert all(message.nbytes == 16 * FORMAT.page_bytes for message in engines.received.values())
