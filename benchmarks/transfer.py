"""KV pages of SmolLM2 from a prefill engine's arena to a decode engine's, through KV sender and receiver.

    python benchmarks/transfer.py [--engines shared,fake,shm,tcp,mooncake,nixl] [--pages 1024] [--rounds 5]

Both actors are processes of their own, this one is in the place of both schedulers. For each transfer engine: the time
from an `Offer` until `Received` for one page and for 1,000 tokens (medians), and the rate of many pages, beside a plain
copy of the same bytes between the same arenas in the same run. `shared` and `fake` copy nothing: theirs are the times
of the messages.
"""

from __future__ import annotations

import argparse
import os
import signal
import tempfile
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import zmq

from llm_runtime.actors.actor import Actor
from llm_runtime.actors.kv_format import KVFormat
from llm_runtime.actors.kv_receiver import KvReceiver
from llm_runtime.actors.kv_sender import KvSender
from llm_runtime.actors.messages import CancelReceive, Message, Offer, Receive, Received, ReceiveFailed, Withdraw
from llm_runtime.transport import Arena, Codec, Mailbox

FORMAT = KVFormat(layers=30, page_size=16, kv_heads=3, head_dim=64, dtype="bfloat16")
P, D = "prefill.scheduler", "decode.scheduler"
SENDER, RECEIVER = "prefill.kv_sender", "decode.kv_receiver"
TOKENS = 1_000
START_DEADLINE_S = 60.0
DEADLINE_S = 120.0


KEYS = dict(zip(("public", "secret"), (key.decode() for key in zmq.curve_keypair()), strict=True))


class Engines:
    """Both actors, forked, and the schedulers' mailboxes."""

    def __init__(self, directory: Path, kind: str, num_pages: int) -> None:
        self.directory, self.kind, self.num_pages = directory, kind, num_pages
        self.arenas = {name: Arena.create(name, num_pages * FORMAT.page_bytes) for name in ("prefill.kv", "decode.kv")}
        self.memory = [np.frombuffer(Arena(each).buffer, np.uint8) for each in self.arenas.values()]
        self.memory[0][:] = np.random.default_rng(1).integers(0, 256, self.memory[0].size, np.uint8)
        self.memory[1][:] = 0
        self.count = 0
        self.pids = [self.fork(KvSender, SENDER, P, RECEIVER), self.fork(KvReceiver, RECEIVER, D, SENDER)]
        codec: Codec[Message] = Codec(Message)
        self.boxes = {
            name: Mailbox(name, 1, self.address(name), {actor: self.address(actor)}, codec)
            for name, actor in ((P, SENDER), (D, RECEIVER))
        }

    def address(self, name: str) -> str:
        return f"ipc://{self.directory}/{self.kind}.{name}"

    def fork(self, role: type[Actor], name: str, scheduler: str, other: str) -> int:
        pid = os.fork()
        if pid:
            return pid
        ranks = [{"arena": f"{name.partition('.')[0]}.kv", "format": msgspec.to_builtins(FORMAT), "heads": [0, 3]}]
        config: dict[str, Any] = {
            "scheduler": scheduler,
            "ranks": ranks,
            "num_pages": self.num_pages,
            "transfer": {"kind": self.kind, **(KEYS if self.kind == "tcp" else {})},
        }
        if role is KvReceiver and self.kind == "shm":
            config["sources"] = ["prefill.kv"]
        link = SimpleNamespace(
            stats=None,
            shutdown_fd=os.eventfd(0),
            shutdown_requested=False,
            ready=lambda: None,
            failed=lambda reason: print(f"{self.kind}: {reason}", flush=True),
            doing=lambda what, limit_s=None: None,
            idle=lambda: None,
        )
        args = {
            "address": self.address(name),
            "peers": {peer: self.address(peer) for peer in (scheduler, other)},
            "config": config,
        }
        context: Any = SimpleNamespace(
            id=name, incarnation=1, args=args, descriptors=self.arenas, run_dir=self.directory, link=link
        )
        try:
            role.run(context)
        finally:
            os._exit(1)

    def await_start(self) -> bool:
        """Whether both actors are ready; False when one has failed."""
        deadline = time.monotonic() + START_DEADLINE_S
        waiting = {P, D}
        while waiting and time.monotonic() < deadline:
            for name in list(waiting):
                if self.boxes[name].poll(0.01) and list(self.boxes[name].receive()):
                    waiting.discard(name)
            if any(os.waitpid(pid, os.WNOHANG)[0] for pid in self.pids):
                self.pids = []
                return False
        return not waiting

    def move(self, pages: int) -> float:
        """Seconds from the offer of a transfer until it has been received."""
        self.count += 1
        name = f"t{self.count}"
        numbers = array("i", range(pages)).tobytes()
        self.boxes[D].send(RECEIVER, Receive(name, SENDER, 0, numbers))
        # Answered after the Receive has been taken, so that only the hand-over is timed.
        self.boxes[D].send(RECEIVER, CancelReceive("none"))
        self._next()
        began = time.perf_counter()
        self.boxes[P].send(SENDER, Offer(name, RECEIVER, 0, numbers))
        answer = self._next()
        took = time.perf_counter() - began
        if not isinstance(answer, Received):
            raise SystemExit(f"{self.kind}: {answer.reason if isinstance(answer, ReceiveFailed) else answer}")
        self.boxes[P].send(SENDER, Withdraw([name]))
        return took

    def _next(self) -> Message:
        if not self.boxes[D].poll(DEADLINE_S):
            raise SystemExit(f"{self.kind}: no answer within {DEADLINE_S:g} s")
        (envelope,) = self.boxes[D].receive(1)
        return envelope.body

    def copy(self) -> float:
        """Seconds of a plain copy of all pages."""
        began = time.perf_counter()
        np.copyto(self.memory[1], self.memory[0])
        return time.perf_counter() - began

    def close(self) -> None:
        for pid in self.pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        for box in self.boxes.values():
            box.close(0)


def middle(rounds: int, measure: Callable[[], float]) -> float:
    return median(measure() for _ in range(rounds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", default="shared,fake,shm,tcp,mooncake,nixl")
    parser.add_argument("--pages", type=int, default=1024, help="pages of 360 KiB in each arena (default 1024)")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    handed = -(-TOKENS // FORMAT.page_size)
    if options.pages < handed or options.rounds < 1:
        parser.error(f"--pages must be at least {handed} and --rounds at least 1")
    nbytes = options.pages * FORMAT.page_bytes
    print(f"pages of {FORMAT.page_bytes} bytes; {TOKENS} tokens are {handed * FORMAT.page_bytes / 1e6:.1f} MB\n")
    print(f"| engine | 1 page, ms | {TOKENS} tokens, ms | {nbytes / 1e6:.0f} MB, GB/s | plain copy, GB/s | of it |")
    print("|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        for kind in options.engines.split(","):
            engines = Engines(Path(directory), kind, options.pages)
            try:
                if not engines.await_start():
                    continue
                engines.move(options.pages)  # connects, and touches all memory
                engines.copy()
                one = middle(10 * options.rounds, lambda: engines.move(1))  # noqa: B023
                some = middle(2 * options.rounds, lambda: engines.move(handed))  # noqa: B023
                row = f"| {kind} | {1e3 * one:.2f} | {1e3 * some:.2f} |"
                if kind not in ("shared", "fake"):
                    times = [(engines.move(options.pages), engines.copy()) for _ in range(options.rounds)]
                    moved, copied = (nbytes / 1e9 / median(column) for column in zip(*times, strict=True))
                    row += f" {moved:.2f} | {copied:.2f} | {moved / copied:.2f} |"
                else:
                    row += " | | |"
                print(row, flush=True)
            finally:
                engines.close()


if __name__ == "__main__":
    main()
