"""The control plane alone: streamed tokens a second of a node whose rank has no model and answers at once.

    python benchmarks/control_plane.py [--concurrency 64] [--output 256] [--rounds 3] [--profile DIR]

Everything is as it is in production, except that `NullRank` stands in the rank's place: HTTP, SSE, journal, tokenizing,
scheduling, paging, detokenizing, supervision. The client runs on the same cores, reads sockets in one loop and does
nothing but count; its share is shown with the others'. When tokens come faster than the ingress can send them, it puts
several into one event: the rate that counts is the highest with one token an event.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

ROOT = Path(__file__).resolve().parent.parent
TOPOLOGY = ROOT / "topology" / "smollm2.toml"
PROMPT_TOKENS = 16
START_S, ROUND_S = 60.0, 60.0
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


# -- the node, in a process of its own -----------------------------------------------------------------------------


def run_node(options: argparse.Namespace) -> None:
    """Runs the node until it is told to stop."""
    from llm_runtime.runtime import node
    from llm_runtime.runtime.plan import plan_node
    from llm_runtime.runtime.topology import load_topology
    from llm_runtime.runtime.tree import build_tree

    settings = [f"node.name=control-plane-{os.getppid()}", "engine.main.kv_tokens=65536", *options.set]
    settings.append(f"engine.main.max_running={options.concurrency}")
    plan = plan_node(load_topology(TOPOLOGY, settings, options.port))
    node.build_tree = lambda plan, run_dir: with_null_ranks(build_tree(plan, run_dir), options)  # type: ignore[attr-defined]
    sys.exit(node.run_node(plan, lambda progress: None))


def with_null_ranks(spec: Any, options: argparse.Namespace) -> Any:
    """The tree with `NullRank` in the place of each rank and, to profile, each actor in a profiler."""
    children = []
    for child in spec.children:
        if child.supervisor is not None:
            child = msgspec.structs.replace(child, supervisor=with_null_ranks(child.supervisor, options))
        elif child.role == "rank":
            child = msgspec.structs.replace(child, start="null_rank:NullRank")
        if options.profile and child.supervisor is None:
            os.environ["CONTROL_PLANE_PROFILE"] = str(options.profile.resolve())
            os.environ[f"CONTROL_PLANE_{child.id}"] = child.start
            child = msgspec.structs.replace(child, start="control_plane:Profiled")
        children.append(child)
    return msgspec.structs.replace(spec, children=tuple(children))


class Profiled:
    """Runs an actor in cProfile and leaves DIR/NAME.prof."""

    @classmethod
    def run(cls, context: Any) -> None:
        import importlib

        module, _, name = os.environ[f"CONTROL_PLANE_{context.id}"].partition(":")
        profile = cProfile.Profile()
        try:
            profile.runcall(getattr(importlib.import_module(module), name).run, context)
        finally:
            profile.dump_stats(Path(os.environ["CONTROL_PLANE_PROFILE"]) / f"{context.id}.prof")


# -- the client ----------------------------------------------------------------------------------------------------


class Client:
    """Streams on connections that are kept alive, read by one epoll loop."""

    def __init__(self, port: int, concurrency: int, output: int) -> None:
        self.output = output
        self.drawn = 0
        self.sockets = {}
        self.poll = select.epoll()
        for _ in range(concurrency):
            connection = socket.create_connection(("127.0.0.1", port))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.sockets[connection.fileno()] = connection
            self.poll.register(connection, select.EPOLLIN)

    def request(self, steps_per_s: int) -> bytes:
        """A prompt of token ids that no other request has; the seed sets the null rank's pace."""
        self.drawn += 1
        prompt = [1_000 + self.drawn % 30_000, *range(2_000, 2_000 + PROMPT_TOKENS - 1)]
        document = {"prompt": prompt, "max_tokens": self.output, "stream": True, "ignore_eos": True, "temperature": 0}
        document |= {"stream_options": {"include_usage": True}, "seed": steps_per_s}
        body = json.dumps(document).encode()
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        )
        return (head % len(body)).encode() + body

    def round(self, steps_per_s: int) -> tuple[int, float]:
        """One stream on each connection; how many events came, and the seconds until the last had ended.

        Raises RuntimeError when a stream breaks off or is not as long as asked for.
        """
        requests = {number: self.request(steps_per_s) for number in self.sockets}
        usage = b'"completion_tokens":%d,' % self.output
        tails = dict.fromkeys(self.sockets, b"")
        events, open_streams = 0, len(self.sockets)
        began = time.perf_counter()
        for number, connection in self.sockets.items():
            connection.sendall(requests[number])
        while open_streams:
            ready = self.poll.poll(ROUND_S)
            if not ready:
                raise RuntimeError(f"nothing came for {ROUND_S:.0f} seconds")
            for number, _ in ready:
                data = self.sockets[number].recv(65_536)
                if not data:
                    raise RuntimeError("the server has closed a connection")
                events += data.count(b"data: ")
                if b"[DONE]" in data:
                    if usage not in tails[number] + data:
                        raise RuntimeError(f"a stream ended with {(tails[number] + data)[-500:]!r}")
                    open_streams -= 1
                tails[number] = data[-500:]
        return events - 2 * len(self.sockets), time.perf_counter() - began


# -- what each process has used ------------------------------------------------------------------------------------


def cpu_seconds(pid: int) -> dict[str, float]:
    """CPU seconds of a process and all below it, by title."""
    used: dict[str, float] = {}
    todo = [pid]
    while todo:
        each = todo.pop()
        try:
            fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
            title = Path(f"/proc/{each}/cmdline").read_bytes().split(b"\0")[0].decode()
            for task in os.listdir(f"/proc/{each}/task"):
                todo += map(int, Path(f"/proc/{each}/task/{task}/children").read_text().split())
        except OSError:
            continue
        name = title.removeprefix("runtime: ")
        used[name] = used.get(name, 0.0) + (int(fields[11]) + int(fields[12])) * _TICK_S
    return used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--output", type=int, default=256, help="tokens of each answer")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each rate, of which the median is shown")
    parser.add_argument(
        "--rates",
        type=lambda text: [int(each) for each in text.split(",")],
        default=[10_000, 20_000, 30_000, 0],
        metavar="N,N…",
        help="tokens a second that the null rank offers; 0 for all it can (%(default)s)",
    )
    parser.add_argument("--port", type=int, default=8960)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a key of the topology")
    parser.add_argument("--profile", type=Path, metavar="DIR", help="leave a cProfile of each actor in DIR")
    parser.add_argument("--node", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.node:
        run_node(options)
    if options.profile:
        options.profile.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}/src:{Path(__file__).parent}"}
    node = subprocess.Popen([sys.executable, __file__, *sys.argv[1:], "--node"], env=environment)
    try:
        measure(options, node)
    finally:
        node.send_signal(signal.SIGTERM)
        try:
            node.wait(30)
        except subprocess.TimeoutExpired:
            node.kill()


@dataclass
class Load:
    """What came of one offered rate.

    Attributes:
        rate: streamed tokens a second, the median of the rounds.
        per_event: tokens of an event. Above 1 the ingress was behind and put several into one.
        cpu: seconds of each process for one token.
    """

    rate: float
    per_event: float
    cpu: dict[str, float]


def offer(rate: int, client: Client, options: argparse.Namespace, node: subprocess.Popen[bytes]) -> Load:
    """Runs the rounds with so many tokens a second from the null rank, or as many as it can for 0."""
    tokens, rates, events = options.concurrency * options.output, [], 0
    before, own = cpu_seconds(node.pid), time.process_time()
    for _ in range(options.rounds):
        count, seconds = client.round(rate // options.concurrency)
        rates.append(tokens / seconds)
        events += count
    own = time.process_time() - own
    used = {name: seconds - before.get(name, 0.0) for name, seconds in cpu_seconds(node.pid).items()} | {"client": own}
    total = tokens * options.rounds
    return Load(median(rates), total / events, {name: seconds / total for name, seconds in used.items()})


def measure(options: argparse.Namespace, node: subprocess.Popen[bytes]) -> None:
    """Offers one rate after the other and prints the figures."""
    client = connect(options, node)
    client.round(0)
    loads = {f"{rate:,}" if rate else "all": offer(rate, client, options, node) for rate in options.rates}
    print(f"{options.concurrency} streams of {options.output} tokens, {options.rounds} rounds each")
    print(f"{'offered tok/s':24}" + "".join(f"{name:>12}" for name in loads))
    print(f"{'streamed tok/s':24}" + "".join(f"{load.rate:12,.0f}" for load in loads.values()))
    print(f"{'tokens an event':24}" + "".join(f"{load.per_event:12.2f}" for load in loads.values()))
    print("CPU seconds for 1,000 tokens")
    last = list(loads.values())[-1]
    for name in sorted(last.cpu, key=lambda each: -last.cpu[each]):
        cells = [1000 * load.cpu.get(name, 0.0) for load in loads.values()]
        if max(cells) >= 0.0005:
            print(f"  {name:22}" + "".join(f"{cell:12.4f}" for cell in cells))
    print(f"  {'all':22}" + "".join(f"{1000 * sum(load.cpu.values()):12.4f}" for load in loads.values()))


def connect(options: argparse.Namespace, node: subprocess.Popen[bytes]) -> Client:
    """A client of the node, once that answers. Raises RuntimeError if it does not."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and node.poll() is None:
        try:
            with socket.create_connection(("127.0.0.1", options.port), 5) as connection:
                connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
                if connection.recv(65_536).startswith(b"HTTP/1.1 200"):
                    return Client(options.port, options.concurrency, options.output)
        except OSError:
            pass
        time.sleep(0.05)
    raise RuntimeError("the node did not start")


if __name__ == "__main__":
    main()
