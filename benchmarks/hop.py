"""One-way hop of a message between two actors, against bare pyzmq + msgspec in the same run.

    python benchmarks/hop.py [--messages 20000] [--rounds 5]

Both sides send the same 64-item token batch over a PUSH/PULL pair on an ipc socket. Latency is measured at a pace that
leaves the queue empty (send time travels in the message; both processes share one clock), throughput by sending as fast
as possible.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import msgspec
import numpy as np
import zmq

from llm_runtime.actors.actor import Actor, handles
from llm_runtime.actors.messages import Hello, Message, TokenEvent, Tokens
from llm_runtime.transport import Codec, Mailbox

PACE_S = 0.001


def batch(sent_ns: int) -> Tokens:
    """64 events; the first carries the time of sending in its request id."""
    return Tokens([TokenEvent(str(sent_ns) if i == 0 else f"request-{i}", 0, 17, [1234]) for i in range(64)])


class Figures:
    """Collects arrivals and writes them for the parent when the last one is there."""

    def __init__(self, count: int, path: Path) -> None:
        self.latencies = np.zeros(count)
        self.first = 0
        self.path = path
        self.seen = 0

    def add(self, message: Tokens) -> bool:
        now = time.monotonic_ns()
        self.first = self.first or now
        self.latencies[self.seen] = now - int(message.events[0].rid)
        self.seen += 1
        if self.seen < len(self.latencies):
            return False
        p50, p99 = np.percentile(self.latencies, [50, 99]) / 1000
        rate = (self.seen - 1) / max(1, now - self.first) * 1e9
        self.path.write_bytes(msgspec.msgpack.encode([float(p50), float(p99), rate]))
        return True


class Receiver(Actor):
    """An ordinary actor whose handler counts."""

    figures: Figures

    @handles(Tokens)
    def tokens(self, message: Tokens, sender: str) -> None:
        if self.figures.add(message):
            os._exit(0)


def actor_receiver(directory: Path, figures: Figures) -> None:
    read_end, _ = os.pipe()
    link = SimpleNamespace(
        stats=None,
        shutdown_fd=read_end,
        shutdown_requested=False,
        ready=lambda: None,
        doing=lambda what, limit_s=None: None,
        idle=lambda: None,
    )
    args = {"address": f"ipc://{directory}/receiver", "peers": {}, "config": {}}
    context = SimpleNamespace(id="receiver", incarnation=1, args=args, descriptors={}, run_dir=directory, link=link)
    receiver = Receiver(context)  # type: ignore[arg-type]
    receiver.figures = figures
    receiver.begin()
    receiver.loop()


def actor_sender(directory: Path) -> Callable[[int], None]:
    peers = {"receiver": f"ipc://{directory}/receiver"}
    mailbox: Mailbox[Message] = Mailbox("sender", 1, f"ipc://{directory}/sender", peers, Codec(Message))
    mailbox.send("receiver", Hello())
    return lambda sent_ns: void(mailbox.send("receiver", batch(sent_ns)))


def bare_receiver(directory: Path, figures: Figures) -> None:
    socket = zmq.Context().socket(zmq.PULL)
    socket.setsockopt(zmq.RCVHWM, 65_536)
    socket.bind(f"ipc://{directory}/receiver")
    decode = msgspec.msgpack.Decoder(Message).decode
    while not figures.add(decode(socket.recv())):
        pass
    os._exit(0)


def bare_sender(directory: Path) -> Callable[[int], None]:
    socket = zmq.Context().socket(zmq.PUSH)
    socket.setsockopt(zmq.SNDHWM, 65_536)
    socket.connect(f"ipc://{directory}/receiver")
    encode = msgspec.msgpack.Encoder().encode
    return lambda sent_ns: void(socket.send(encode(batch(sent_ns))))


def void(_: object) -> None:
    """Drops a result."""


def measure(
    receiver: Callable[[Path, Figures], None],
    sender: Callable[[Path], Callable[[int], None]],
    count: int,
    pace_s: float,
) -> list[float]:
    """[p50 µs, p99 µs, messages/s] of `count` messages from one process to another."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        result = directory / "result"
        pid = os.fork()
        if pid == 0:
            receiver(directory, Figures(count, result))
        sender_pid = os.fork()
        if sender_pid == 0:
            send = sender(directory)
            time.sleep(0.2)
            for _ in range(count):
                send(time.monotonic_ns())
                if pace_s:
                    time.sleep(pace_s)
            time.sleep(60)
        try:
            os.waitpid(pid, 0)
        finally:
            os.kill(sender_pid, 9)
            os.waitpid(sender_pid, 0)
        return msgspec.msgpack.decode(result.read_bytes(), type=list[float])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=20_000, help="messages of a throughput round")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds, of which medians are shown")
    options = parser.parse_args()
    sides = {"bare pyzmq + msgspec": (bare_receiver, bare_sender), "actor": (actor_receiver, actor_sender)}
    figures: dict[str, list[tuple[float, float, float]]] = {name: [] for name in sides}
    for _ in range(options.rounds):
        for name, (receiver, sender) in sides.items():
            p50, p99, _ = measure(receiver, sender, 2_000, PACE_S)
            rate = measure(receiver, sender, options.messages, 0.0)[2]
            figures[name].append((p50, p99, rate))
    bare, actor = ([median(column) for column in zip(*rows, strict=True)] for rows in figures.values())
    print(f"{'':24}{'p50 µs':>10}{'p99 µs':>10}{'messages/s':>12}")
    for name, (p50, p99, rate) in zip(sides, (bare, actor), strict=True):
        print(f"{name:24}{p50:10.0f}{p99:10.0f}{rate:12.0f}")
    print(f"{'actor / bare':24}{actor[0] / bare[0]:10.2f}{actor[1] / bare[1]:10.2f}{actor[2] / bare[2]:12.2f}")


if __name__ == "__main__":
    main()
