"""`kill -9` of an ingress worker: its clients notice nothing but a pause."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from support import eventually

from llm_runtime.actors.ingress.journal import slot_bytes
from llm_runtime.actors.ingress.openai.tools import call_id

from .conftest import ROOT, ingress_config, listen
from .fakes import Fakes, answer

TOKENS = 400
MAX_BODY = 2**20
SLOTS = 64


class Tree:
    """Ingress workers below a supervisor, with fake peers."""

    def __init__(self, directory: Path, workers: int = 1, slots: int = SLOTS, **config: Any) -> None:
        names = [f"ingress{i}" for i in range(workers)]
        self.fakes = Fakes(directory, names)
        self.fakes.start()
        self.listener = listen()
        self.port: int = self.listener.getsockname()[1]
        defaults = {"served_model_names": ["fake"], "max_model_len": 2**20, "max_body_bytes": MAX_BODY}
        settings = ingress_config(**(defaults | config))
        peers = {each: self.fakes.address(each) for each in ("bootstrap", "tokenizer", "detokenizer")}
        peers[self.fakes.scheduler] = self.fakes.address(self.fakes.scheduler)
        arguments = {
            "run_dir": str(directory),
            "workers": [
                [
                    name,
                    {
                        "address": self.fakes.address(name),
                        "peers": peers | {each: self.fakes.address(each) for each in names if each != name},
                        "config": settings,
                    },
                ]
                for name in names
            ],
            "descriptors": {"listener": self.listener.fileno()},
            "journal_bytes": slots * slot_bytes(MAX_BODY),
        }
        self.directory = directory
        self.pids: dict[str, int] = {}
        self.ready: dict[str, int] = {}
        self.gave_up = False
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests/ingress/supervised.py"), json.dumps(arguments)],
            pass_fds=[self.listener.fileno()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        eventually(lambda: len(self.ready) == workers, "ready workers")

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            kind, name, pid, incarnation = line.split()
            if kind == "ready":
                self.pids[name] = int(pid)
                self.ready[name] = int(incarnation)
            elif kind == "gave_up":
                self.gave_up = True

    def kill(self, name: str = "ingress0", wait: bool = True) -> None:
        """Kills a worker, unless it is just dead, and waits until the next incarnation is ready."""
        before = self.ready[name]
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pids[name], signal.SIGKILL)
        if wait:
            eventually(lambda: self.ready[name] > before, "restart")

    def connect(self) -> socket.socket:
        """A client's connection, which the supervisor knows already."""
        connection = socket.create_connection(("127.0.0.1", self.port))
        connection.settimeout(30)
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        data = b""
        while not data.endswith(b"{}"):
            data += connection.recv(4096)
        return connection

    def figure(self, name: str, actor: str = "ingress0") -> float:
        """A figure of /metrics."""
        text = httpx.get(f"http://127.0.0.1:{self.port}/metrics").text
        found = re.search(rf'^runtime:{name}(?:_total)?{{actor="{actor}",model_name="fake"}} (\S+)$', text, re.M)
        assert found is not None, (name, text)
        return float(found[1])

    def log(self) -> str:
        """What the workers have logged."""
        return "".join(path.read_text() for path in (self.directory / "logs").glob("ingress*.log"))

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(10)
        finally:
            self.process.kill()
            self._reader.join(5)
            assert self.process.stdout is not None
            self.process.stdout.close()
            self.fakes.stop()
            self.listener.close()
        assert not self.fakes.seen.wrong
        assert not self.gave_up


Grow = Callable[..., Tree]


@pytest.fixture
def grow(tmp_path: Path) -> Iterator[Grow]:
    """Starts ingress workers under supervision."""
    trees: list[Tree] = []

    def start(**arguments: Any) -> Tree:
        trees.append(Tree(tmp_path, **arguments))
        return trees[-1]

    yield start
    for tree in trees:
        tree.close()


def request(path: str = "/v1/completions", **fields: Any) -> bytes:
    """A whole request."""
    body = json.dumps({"seed": 1, "max_tokens": TOKENS, **fields}).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


class Response:
    """An HTTP response, read strictly: every byte must be where it belongs."""

    def __init__(self, file: Any) -> None:
        status = file.readline()
        assert status.startswith(b"HTTP/1.1 "), status
        self.status = int(status.split()[1])
        self.headers: dict[str, str] = {}
        while (line := file.readline()) != b"\r\n":
            name, _, value = line.decode().partition(": ")
            assert name not in self.headers
            self.headers[name] = value.strip()
        if self.headers.get("transfer-encoding") == "chunked":
            self.chunks = list(self._chunks(file))
            self.body = b"".join(self.chunks)
        else:
            self.body = file.read(int(self.headers["content-length"]))

    @staticmethod
    def _chunks(file: Any) -> Iterator[bytes]:
        while size := int(file.readline(), 16):
            yield file.read(size)
            assert file.read(2) == b"\r\n"
        assert file.read(2) == b"\r\n"

    @property
    def events(self) -> list[dict[str, Any]]:
        """The documents of a whole stream."""
        parts = self.body.decode().split("\n\n")
        assert parts[-2:] == ["data: [DONE]", ""]
        return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def text(self, choice: int = 0) -> str:
        """The text of a completion, streamed or not."""
        documents = self.events if "text/event-stream" in self.headers["content-type"] else [self.json]
        identities = {document["id"] for document in documents}
        assert len(identities) == 1
        assert len({document["created"] for document in documents}) == 1
        choices = [each for document in documents for each in document["choices"] if each["index"] == choice]
        finishes = [each["finish_reason"] for each in choices if each["finish_reason"] is not None]
        assert finishes == ["length"]
        return "".join(
            each["text"] if "text" in each else {**each.get("delta", {}), **each.get("message", {})}.get("content", "")
            for each in choices
        )


def killer(tree: Tree, times: int, most_s: float, name: str = "ingress0") -> threading.Thread:
    """Kills a worker again and again, at random moments after it was ready."""
    chance = random.Random(times)

    def run() -> None:
        for _ in range(times):
            time.sleep(chance.random() * most_s)
            tree.kill(name)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_a_stream_survives_many_kills(grow: Grow) -> None:
    tree = grow()
    tree.fakes.step_s = 0.005
    with tree.connect() as connection, connection.makefile("rb") as file:
        thread = killer(tree, 20, 0.06)
        connection.sendall(request(prompt="a", stream=True))
        response = Response(file)
        thread.join()
        assert response.text() == answer("a", 1, TOKENS)
        attempts = [each.attempt for each in tree.fakes.seen.generates]
        assert attempts == sorted(set(attempts))
        assert len({each.rid for each in tree.fakes.seen.generates}) == 1
        assert any(each.output for each in tree.fakes.seen.generates)


def exchange(tree: Tree, whole: bytes, during: Callable[[], None] = lambda: None) -> Response:
    """Sends a request, does something meanwhile, and gives the response once the engine knows that it has arrived: told
    later, that would count as the end of the next request in `half_done`."""
    with tree.connect() as connection, connection.makefile("rb") as file:
        connection.sendall(whole)
        during()
        response = Response(file)
    eventually(lambda: not tree.fakes._running, "the acknowledgement")
    return response


def half_done(tree: Tree, tokens: int = 20, ended: int | None = None) -> None:
    """Waits until the engine has made some tokens of a request, or more than `ended` requests have ended: on a slow
    machine an answer may be complete before the next kill."""
    running, acknowledged = tree.fakes._running, tree.fakes.seen.acknowledged
    before = len(acknowledged) if ended is None else ended
    eventually(
        lambda: any(each.sent >= tokens for each in list(running.values())) or len(acknowledged) > before, "tokens"
    )


def kills_at(tree: Tree, *tokens: int) -> Callable[[], None]:
    """Kills the worker each time that so many tokens were made."""

    def act() -> None:
        ended = len(tree.fakes.seen.acknowledged)
        for count in tokens:
            half_done(tree, count, ended)
            tree.kill()

    return act


CHAT = {"messages": [{"role": "user", "content": "hi"}]}
REQUESTS = {
    "completion": request(prompt="a"),
    "n": request(prompt=["a", "b"], n=2, stream=True),
    "n at once": request(prompt=["a", "b"], n=2),
    "chat": request("/v1/chat/completions", **CHAT, stream=True, n=2, stream_options={"include_usage": True}),
    "chat logprobs": request("/v1/chat/completions", **CHAT, stream=True, logprobs=True, top_logprobs=2),
    "logprobs": request(prompt="a", logprobs=2, echo=True, stream=True),
    "logprobs at once": request(prompt="a", logprobs=2, echo=True),
}


def merged(response: Response) -> Any:
    """What a response says, whatever it was cut into, without what differs from run to run."""
    if "text/event-stream" not in response.headers["content-type"]:
        documents = [response.json]
    else:
        documents = response.events
    assert len({document["id"] for document in documents}) == 1
    whole: dict[int, dict[str, Any]] = {}
    for document in documents:
        for choice in document["choices"]:
            of_choice = whole.setdefault(choice["index"], {})
            _merge(of_choice, choice)
    return whole, documents[-1].get("usage")


def _merge(into: dict[str, Any], more: dict[str, Any]) -> None:
    for key, value in more.items():
        if isinstance(value, str) and key in ("text", "content"):
            into[key] = into.get(key, "") + value
        elif isinstance(value, list):
            into[key] = into.get(key, []) + value
        elif isinstance(value, dict):
            _merge(into.setdefault(key, {}), value)
        elif value is not None:
            assert key == "index" or key not in into
            into[key] = value


@pytest.mark.parametrize("kind", REQUESTS)
def test_every_kind_of_answer_is_the_same(grow: Grow, kind: str) -> None:
    tree = grow()
    undisturbed = merged(exchange(tree, REQUESTS[kind]))
    tree.fakes.step_s = 0.004
    assert merged(exchange(tree, REQUESTS[kind], kills_at(tree, 20, 60, 100))) == undisturbed
    assert tree.figure("connections_resumed") >= 1


OUTPUT = (
    "<think>" + "Think about it. " * 4 + "</think>\n\nI look.\n"
    '<tool_call>\n{"name": "f", "arguments": {"text": "' + "é🙂\\n " * 12 + '"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "g"}\n</tool_call>'
)
"""A scripted output of some 200 tokens with reasoning and calls."""


@pytest.mark.parametrize("stream", [False, True])
def test_calls_and_reasoning(grow: Grow, stream: bool) -> None:
    """Wherever the worker dies, in a tag or in a call, the parsers come to the same state, and calls keep their ids."""
    tree = grow(tool_call_parser="qwen25", reasoning_parser="qwen3")
    tree.fakes.script = lambda generate: OUTPUT + str(generate.sampling.seed)
    tools = [{"type": "function", "function": {"name": name}} for name in "fg"]
    whole = request("/v1/chat/completions", **CHAT, n=2, stream=stream, tools=tools)

    def said(response: Response) -> Any:
        """The message of each choice, put together in the case of a stream; identities by their place."""
        events = response.events if stream else [response.json]
        rid = events[0]["id"].removeprefix("chatcmpl-")
        messages: list[dict[str, Any]] = [{"tool_calls": []}, {"tool_calls": []}]
        for event in events:
            for choice in event["choices"]:
                message = messages[choice["index"]]
                for key, value in choice.get("delta", choice.get("message")).items():
                    if key != "tool_calls":
                        message[key] = message.get(key, "") + (value or "")
                        continue
                    for place, call in enumerate(value):
                        if "id" in call:
                            index = call.get("index", place)
                            assert index == len(message["tool_calls"])
                            assert call["id"] == call_id(rid, choice["index"], index)
                            message["tool_calls"].append([call["function"]["name"], ""])
                        message["tool_calls"][-1][1] += call["function"]["arguments"]
        return messages

    tree.fakes.step_s = 0.003
    undisturbed = said(exchange(tree, whole))
    assert [name for name, _ in undisturbed[0]["tool_calls"]] == ["f", "g"]
    assert undisturbed[0]["reasoning_content"] == ("Think about it. " * 4).strip()
    assert said(exchange(tree, whole, kills_at(tree, 5, 70, 95, 130, 190))) == undisturbed
    assert tree.figure("connections_resumed") >= 1


@pytest.mark.parametrize("stream", [False, True])
def test_native_answers(grow: Grow, stream: bool) -> None:
    tree = grow()
    body = {"text": ["a", "b"], "rid": ["x", "y"], "stream": stream, "return_logprob": True, "logprob_start_len": 0}
    body["sampling_params"] = {"max_new_tokens": 100, "sampling_seed": 3}
    whole = request("/generate").partition(b"\r\n\r\n")[0].rpartition(b":")[0]
    data = json.dumps(body).encode()
    whole += b": %d\r\n\r\n" % len(data) + data

    def answers(response: Response) -> list[Any]:
        documents = (
            response.json
            if not stream
            else [next(each for each in response.events[::-1] if each["index"] == i) for i in range(2)]
        )
        for document in documents:
            assert document["meta_info"].pop("e2e_latency") > 0
        return documents

    undisturbed = answers(exchange(tree, whole))
    tree.fakes.step_s = 0.004
    assert answers(exchange(tree, whole, kills_at(tree, 20, 60))) == undisturbed


def test_an_unstreamed_answer_goes_on_where_it_was(grow: Grow) -> None:
    tree = grow()
    tree.fakes.step_s = 0.004
    response = exchange(tree, request(prompt="a"), kills_at(tree, 100, 200))
    assert response.text() == answer("a", 1, TOKENS)
    known = [len(each.output) // 4 for each in tree.fakes.seen.generates]
    assert known[1] >= 90
    assert known[2] >= 190


def test_while_the_request_is_being_sent(grow: Grow) -> None:
    tree = grow()
    whole = request(prompt="a", stop=["x" * 1000] * 60)
    with tree.connect() as connection, connection.makefile("rb") as file:
        for start in range(0, len(whole), len(whole) // 8):
            connection.sendall(whole[start : start + len(whole) // 8])
            tree.kill()
        assert Response(file).text() == answer("a", 1, TOKENS)


def test_while_the_request_is_being_sent_at_random_moments(grow: Grow) -> None:
    """Kills that are not in step with what is sent: bytes may be read and not yet journalled."""
    tree = grow()
    whole = request(prompt="a", max_tokens=10, stop=["x" * 1000] * 60)
    with tree.connect() as connection, connection.makefile("rb") as file:
        thread = killer(tree, 15, 0.08)
        while True:
            for start in range(0, len(whole), 6000):
                connection.sendall(whole[start : start + 6000])
                time.sleep(0.001)
            assert Response(file).text() == answer("a", 1, 10)
            if not thread.is_alive():
                break


def test_while_tokenizing(grow: Grow) -> None:
    tree = grow(stall_s=1000)
    tree.fakes.silent_tokenizer = True

    def kill() -> None:
        eventually(lambda: tree.fakes.seen.tokenizes, "question")
        tree.kill()
        tree.fakes.silent_tokenizer = False
        tree.fakes.restart("tokenizer")

    assert exchange(tree, request(prompt="a"), kill).text() == answer("a", 1, TOKENS)


def test_while_no_engine_is_known(grow: Grow) -> None:
    tree = grow()
    tree.fakes.registered = False
    tree.kill()

    def kill() -> None:
        eventually(lambda: len(tree.fakes.seen.tokenizes) >= 1, "question")
        tree.kill()
        tree.fakes.registered = True

    assert exchange(tree, request(prompt="a"), kill).text() == answer("a", 1, TOKENS)


def test_a_connection_that_is_kept_alive(grow: Grow) -> None:
    tree = grow()
    with tree.connect() as connection, connection.makefile("rb") as file:
        for i in range(4):
            connection.sendall(request(prompt=f"p{i}", max_tokens=30, stream=i % 2 == 0))
            assert Response(file).text() == answer(f"p{i}", 1, 30)
            tree.kill()
            tree.kill()
        connection.sendall(b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n")
        assert Response(file).json["data"][0]["id"] == "fake"


def test_pipelined_requests(grow: Grow) -> None:
    tree = grow()
    tree.fakes.step_s = 0.004
    with tree.connect() as connection, connection.makefile("rb") as file:
        connection.sendall(b"".join(request(prompt=f"p{i}", max_tokens=60, stream=i != 1) for i in range(3)))
        for i in range(3):
            half_done(tree, 30)
            tree.kill()
            assert Response(file).text() == answer(f"p{i}", 1, 60)
        tree.kill()
        connection.sendall(request(prompt="last", max_tokens=3))
        assert Response(file).text() == answer("last", 1, 3)


def test_expect_100_continue(grow: Grow) -> None:
    tree = grow()
    whole = request(prompt="a").replace(b"host: x", b"host: x\r\nexpect: 100-continue")
    head, _, body = whole.partition(b"\r\n\r\n")
    with tree.connect() as connection, connection.makefile("rb") as file:
        connection.sendall(head + b"\r\n\r\n")
        assert file.readline() == b"HTTP/1.1 100 Continue\r\n"
        assert file.readline() == b"\r\n"
        tree.kill()
        connection.sendall(body)
        assert Response(file).text() == answer("a", 1, TOKENS)


def test_the_connection_ends_when_it_should(grow: Grow) -> None:
    """Also for the client, although the supervisor has a duplicate."""
    tree = grow()
    tree.fakes.step_s = 0.004
    whole = request(prompt="a", max_tokens=60).replace(b"host: x", b"host: x\r\nconnection: close")
    for kills in ((), (20, 40)):
        with tree.connect() as connection, connection.makefile("rb") as file:
            connection.sendall(whole)
            kills_at(tree, *kills)()
            assert Response(file).text() == answer("a", 1, 60)
            assert file.read() == b""


def test_a_client_that_goes_meanwhile(grow: Grow) -> None:
    tree = grow()
    tree.fakes.step_s = 0.01
    with tree.connect() as connection:
        connection.sendall(request(prompt="a", stream=True))
        half_done(tree)
        tree.kill(wait=False)
    eventually(lambda: tree.ready["ingress0"] > 1, "restart")
    eventually(lambda: tree.figure("actor_requests_in_progress") == 0, "the end of the request")
    if len(tree.fakes.seen.generates) > 1:
        eventually(lambda: tree.fakes.seen.aborts, "abort")


@pytest.mark.parametrize("whole", [False, True])
def test_a_client_that_reads_late(grow: Grow, whole: bool) -> None:
    """What is in the kernel's buffers, and what did not fit into them, arrives once and whole."""
    tree = grow()
    tree.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)  # connections inherit it
    tree.fakes.per_step = 50
    tokens = 6000
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(30)
    connection.connect(("127.0.0.1", tree.port))
    with connection, connection.makefile("rb") as file:
        body = request("/v1/chat/completions", **CHAT, stream=True, max_tokens=tokens, logprobs=True, top_logprobs=2)
        connection.sendall(body)
        if whole:
            eventually(lambda: tree.fakes.seen.acknowledged, "all tokens")
        else:
            half_done(tree, tokens // 2)
        tree.kill()
        tree.kill()
        assert tree.figure("actor_requests_in_progress") == 1
        (choice,) = merged(Response(file))[0].values()
        assert choice["delta"]["content"] == answer("user:hi\nassistant:", 1, tokens)
        assert len(choice["logprobs"]["content"]) == tokens


def test_two_workers(grow: Grow) -> None:
    tree = grow(workers=2)
    tree.fakes.step_s = 0.004
    texts: dict[int, str] = {}

    def run(i: int) -> None:
        texts[i] = exchange(tree, request(prompt=f"p{i}", stream=i % 2 == 0)).text()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    eventually(lambda: len(tree.fakes._running) == 12, "the requests")
    owners = {each.sender for each in tree.fakes._running.values()}
    tree.kill()
    tree.kill()
    for thread in threads:
        thread.join(30)
    assert texts == {i: answer(f"p{i}", 1, TOKENS) for i in range(12)}
    again = {each.rid for each in tree.fakes.seen.generates if each.attempt}
    once = {each.rid for each in tree.fakes.seen.generates} - again
    if len(owners) == 2:
        assert again
        assert once
    eventually(lambda: tree.figure("actor_messages_sent", "ingress1") > 0, "figures of both, whichever answers")


def test_killed_again_while_it_starts(grow: Grow) -> None:
    tree = grow()
    tree.fakes.step_s = 0.01
    chance = random.Random(1)

    def kills() -> None:
        for _ in range(4):
            half_done(tree)
            tree.kill(wait=False)
            for _ in range(3):
                time.sleep(chance.random() * 0.05)
                for each in psutil.Process(tree.process.pid).children():
                    with contextlib.suppress(psutil.Error):
                        if "ingress0" in " ".join(each.cmdline()):
                            each.kill()
            tree.kill()

    assert exchange(tree, request(prompt="a", stream=True), kills).text() == answer("a", 1, TOKENS)
    assert tree.ready["ingress0"] > 5


def test_new_connections_wait(grow: Grow) -> None:
    tree = grow()
    for _ in range(3):
        tree.kill(wait=False)
        assert exchange(tree, request(prompt="a", max_tokens=5)).text() == answer("a", 1, 5)


def test_a_full_journal_costs_no_request(grow: Grow) -> None:
    """The connections that find no room work, and end when the worker dies."""
    tree = grow(slots=2, journal_bytes=2**20)
    tree.fakes.step_s = 0.004
    with tree.connect() as kept, kept.makefile("rb") as file, tree.connect() as large, tree.connect() as third:
        kept.sendall(request(prompt="a", stream=True))
        half_done(tree)
        whole = request(prompt="b", max_tokens=5, stop=["x" * 1000] * 60, user="y" * 900_000)
        large.sendall(whole)
        third.sendall(request(prompt="c", max_tokens=5))
        with large.makefile("rb") as of_large, third.makefile("rb") as of_third:
            assert Response(of_large).text() == answer("b", 1, 5)
            assert Response(of_third).text() == answer("c", 1, 5)
            assert tree.figure("connections_unprotected") == 1
            tree.kill()
            assert not _read_or_reset(of_large)
        assert Response(file).text() == answer("a", 1, TOKENS)


def _read_or_reset(file: Any) -> bytes:
    try:
        return bytes(file.read())
    except ConnectionResetError:
        return b""


def test_nothing_is_left_of_ended_connections(grow: Grow) -> None:
    tree = grow()

    def count() -> int:
        return len(os.listdir(f"/proc/{tree.process.pid}/fd"))

    exchange(tree, request(prompt="a", max_tokens=2))
    tree.kill()
    eventually(lambda: tree.figure("actor_connections_open") == 1, "the end of connections")
    before = count()
    for i in range(30):
        exchange(tree, request(prompt="a", max_tokens=2))
        if i % 10 == 0:
            tree.kill()
    eventually(lambda: tree.figure("actor_connections_open") == 1, "the end of connections")
    eventually(lambda: count() <= before, "the end of descriptors")
    assert tree.figure("connections_lost") == 0


def test_many_clients_and_many_kills(grow: Grow) -> None:
    tree = grow()
    tree.fakes.step_s = 0.002
    failures: list[str] = []
    stop = threading.Event()
    done: list[int] = []

    def client(i: int) -> None:
        chance = random.Random(i)
        try:
            with tree.connect() as connection, connection.makefile("rb") as file:
                while not stop.is_set():
                    prompt, count = f"p{i}-{len(done)}", chance.randrange(1, 120)
                    chat = chance.random() < 0.5
                    fields: dict[str, Any] = {"prompt": prompt}
                    if chat:
                        fields = {"messages": [{"role": "user", "content": prompt}]}
                        prompt = f"user:{prompt}\nassistant:"
                    path = "/v1/chat/completions" if chat else "/v1/completions"
                    connection.sendall(request(path, max_tokens=count, stream=chance.random() < 0.6, **fields))
                    assert Response(file).text() == answer(prompt, 1, count)
                    done.append(i)
        except Exception as error:
            failures.append(f"client {i}: {error!r}")

    threads = [threading.Thread(target=client, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    eventually(lambda: set(done) == set(range(8)) or failures, "answers for all")
    killer(tree, 25, 0.15).join()
    stop.set()
    for thread in threads:
        thread.join(30)
    assert not failures
    assert tree.figure("connections_lost") == 0
    assert set(done) == set(range(8))
