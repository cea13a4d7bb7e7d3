"""What dies or misbehaves around the ingress costs a client time, and nothing else."""

from __future__ import annotations

import json
import random
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from support import eventually

from llm_runtime.actors.messages import Generate, Refused, TextEvent

from .conftest import Serve, Served, chunks_of, listen
from .fakes import answer

TOKENS = 60
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"


class Clients:
    """Several streaming clients at once, each in a thread."""

    def __init__(self, served: Served, count: int = 4, tokens: int = TOKENS) -> None:
        self._served = served
        self._tokens = tokens
        self.results: dict[int, str] = {}
        self._threads = [threading.Thread(target=self._run, args=(i,)) for i in range(count)]
        for thread in self._threads:
            thread.start()

    def _run(self, i: int) -> None:
        request = {"prompt": f"p{i}", "max_tokens": self._tokens, "seed": i, "stream": i % 2 == 0}
        response = self._served.client.post("/v1/completions", json=request)
        if response.status_code != 200:
            self.results[i] = response.text
        elif i % 2 == 0:
            self.results[i] = "".join(chunk["choices"][0]["text"] for chunk in chunks_of(response.text))
        else:
            self.results[i] = response.json()["choices"][0]["text"]

    def check(self) -> None:
        """All clients have the exact answer."""
        for thread in self._threads:
            thread.join(40)
            assert not thread.is_alive()
        assert self.results == {i: answer(f"p{i}", i, self._tokens) for i in range(len(self._threads))}


def progress(served: Served) -> Callable[[], bool]:
    """Whether some request is half done."""
    running = served.fakes._running
    return lambda: any(request.sent > TOKENS // 4 for request in list(running.values()))


def test_dropped_repeated_and_reordered_events(serve: Serve) -> None:
    served = serve()
    chance = random.Random(1)

    def disorder(events: list[TextEvent]) -> list[list[TextEvent]]:
        kept = [event for event in events if event.finish or chance.random() > 0.1]
        batches = [kept]
        if chance.random() < 0.3:
            batches.append(kept)
        if chance.random() < 0.2:
            batches.insert(0, [])
            chance.shuffle(kept)
        return batches

    served.fakes.filter = disorder
    Clients(served).check()
    assert served.fakes.seen.resends


def test_a_lost_last_event(serve: Serve) -> None:
    served = serve(stall_s=0.2)
    lost: set[str] = set()

    def lose_the_end(events: list[TextEvent]) -> list[list[TextEvent]]:
        lost.update(event.rid for event in events if event.finish)
        return [[event for event in events if not event.finish]]

    served.fakes.filter = lose_the_end
    Clients(served).check()
    assert len(lost) == 4


def test_scheduler_restarts(serve: Serve) -> None:
    served = serve()
    clients = Clients(served)
    for _ in range(3):
        eventually(progress(served), "progress")
        served.fakes.restart("scheduler", away_s=0.1)
    clients.check()
    attempts = [generate.attempt for generate in served.fakes.seen.generates]
    assert max(attempts) >= 3
    assert any(generate.output for generate in served.fakes.seen.generates)


def test_scheduler_forgets(serve: Serve) -> None:
    served = serve(stall_s=0.2)
    clients = Clients(served)
    eventually(progress(served), "progress")
    served.fakes.lose()
    clients.check()
    assert served.fakes.seen.resends


def test_tokenizer_restarts(serve: Serve) -> None:
    served = serve(stall_s=1000)  # longer than the clients wait
    served.fakes.silent_tokenizer = True
    clients = Clients(served)
    eventually(lambda: len({each.rid for each in served.fakes.seen.tokenizes}) == 4, "questions")
    served.fakes.silent_tokenizer = False
    served.fakes.restart("tokenizer", away_s=0.1)
    clients.check()


def test_a_lost_answer_of_the_tokenizer(serve: Serve) -> None:
    served = serve(stall_s=0.2)
    served.fakes.silent_tokenizer = True
    clients = Clients(served)
    eventually(lambda: len(served.fakes.seen.tokenizes) >= 8, "repeated questions")
    served.fakes.silent_tokenizer = False
    clients.check()


def test_detokenizer_and_bootstrap_restart(serve: Serve) -> None:
    served = serve()
    clients = Clients(served)
    eventually(progress(served), "progress")
    served.fakes.restart("detokenizer", away_s=0.05)
    served.fakes.registered = False
    served.fakes.restart("bootstrap", away_s=0.05)
    clients.check()
    Clients(served).check()  # the engine is still known


def test_no_engine_yet(serve: Serve) -> None:
    served = serve(request_timeout_s=1, model="not/registered")
    response = served.client.post("/v1/completions", json={"prompt": "a"})
    assert response.status_code == 408
    assert served.client.get("/health").status_code == 200


def test_malformed_messages_are_survived(serve: Serve) -> None:
    served = serve()
    clients = Clients(served)
    for frame in (b"", b"junk", b"\x94\xa1x\x01\x00\xc0", b"\xc1" * 100, b"\x91" * 100_000):
        served.fakes.raw(frame)
    clients.check()
    text = served.client.get("/metrics").text
    assert 'runtime:actor_messages_malformed{actor="ingress0",model_name="fake"} 5.0' in text


def test_a_full_queue_after_a_restart_is_waited_for(serve: Serve) -> None:
    served = serve()
    refused: list[str] = []

    def full_once(generate: Generate) -> Refused | None:
        if generate.attempt != 1:
            return None
        refused.append(generate.rid)
        return Refused(generate.rid, generate.attempt, 503, "The queue is full.", 0.1)

    served.fakes.refuse = full_once
    clients = Clients(served)
    eventually(progress(served), "progress")
    served.fakes.restart("scheduler")
    clients.check()
    assert refused


@pytest.mark.parametrize("status", [400, 429, 503])
@pytest.mark.parametrize("stream", [False, True])
def test_refusals(shared: Served, status: int, stream: bool) -> None:
    def refuse(generate: Generate) -> Refused:
        return Refused(generate.rid, generate.attempt, status, "Come back later.", 1.5 if status != 400 else 0.0)

    shared.fakes.refuse = refuse
    try:
        response = shared.client.post("/v1/completions", json={"prompt": "a", "stream": stream})
    finally:
        shared.fakes.refuse = lambda generate: None
    assert response.status_code == status
    assert response.json()["error"]["message"] == "Come back later."
    assert response.headers.get("retry-after") == (None if status == 400 else "2")


def test_one_choice_refused_aborts_the_others(serve: Serve) -> None:
    served = serve()
    served.fakes.step_s = 0.05

    def refuse(generate: Generate) -> Refused | None:
        return Refused(generate.rid, generate.attempt, 503, "No room.", 1.0) if generate.rid.endswith("/2") else None

    served.fakes.refuse = refuse
    assert served.client.post("/v1/completions", json={"prompt": "a", "n": 4}).status_code == 503
    eventually(lambda: len(served.fakes.seen.aborts) == 3, "aborts")


def test_timeout(serve: Serve) -> None:
    served = serve(request_timeout_s=0.5)
    served.fakes.frozen = True
    response = served.client.post("/v1/completions", json={"prompt": "a"})
    assert response.status_code == 408
    assert response.json()["error"]["code"] == "timeout"
    eventually(lambda: served.fakes.seen.aborts, "abort")
    served.fakes.silent_tokenizer = True
    assert served.client.post("/v1/completions", json={"prompt": "a"}).status_code == 408


def connect(served: Served, **fields: Any) -> socket.socket:
    """A client that has sent a request and not read anything."""
    body = json.dumps({"prompt": "a", "max_tokens": 500, "seed": 1, **fields}).encode()
    connection = socket.create_connection(("127.0.0.1", served.port))
    connection.sendall(HEAD % len(body) + body)
    return connection


@pytest.mark.parametrize("stream", [False, True])
def test_disconnect_frees_the_request(serve: Serve, stream: bool) -> None:
    served = serve()
    served.fakes.step_s = 0.02
    with connect(served, stream=stream, n=2):
        eventually(lambda: len(served.fakes._running) == 2, "the requests")
    eventually(lambda: len(served.fakes.seen.aborts) == 2, "aborts")
    assert set(served.fakes.seen.aborts) == {each.rid for each in served.fakes.seen.generates}
    eventually(lambda: not served.fakes._running, "freed")
    assert "Traceback" not in served.log.read_text()


def test_disconnect_while_tokenizing(serve: Serve) -> None:
    served = serve(stall_s=0.1)
    served.fakes.silent_tokenizer = True
    with connect(served):
        eventually(lambda: served.fakes.seen.tokenizes, "question")
    eventually(lambda: _gauge(served, "tokenizations_pending") == 0, "forgotten question")
    served.fakes.silent_tokenizer = False
    Clients(served).check()
    assert len({generate.rid for generate in served.fakes.seen.generates}) == 4


def test_disconnect_while_sending_the_body(serve: Serve) -> None:
    served = serve()
    with socket.create_connection(("127.0.0.1", served.port)) as connection:
        connection.sendall(HEAD % 100 + b"{")
    Clients(served).check()
    assert "Traceback" not in served.log.read_text()
    assert "ERROR" not in served.log.read_text()


def test_a_client_that_does_not_read_is_dropped(serve: Serve) -> None:
    """The stream of a client that reads nothing ends; the others go on meanwhile."""
    served = serve(client_stall_s=0.5, max_model_len=2**20)
    served.fakes.per_step = 200
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", served.port))
    with connection:
        request = {"messages": [{"role": "user", "content": "a"}], "logprobs": True, "top_logprobs": 2}
        body = json.dumps({**request, "max_tokens": 60_000, "stream": True}).encode()
        connection.sendall(HEAD.replace(b"/completions", b"/chat/completions") % len(body) + body)
        # more than the kernel buffers for a connection
        eventually(lambda: any(each.sent > 40_000 for each in list(served.fakes._running.values())), "megabytes")
        served.fakes.frozen = True
        eventually(lambda: served.fakes.seen.aborts, "abort")
    served.fakes.frozen = False
    Clients(served).check()


def test_connections_without_requests(serve: Serve) -> None:
    served = serve()
    idle = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(100)]
    for connection in idle[:50]:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n")
    Clients(served).check()
    for connection in idle:
        connection.close()


def test_shutdown_lets_answers_end(serve: Serve) -> None:
    served = serve(drain_s=30)
    served.fakes.step_s = 0.01
    clients = Clients(served)
    eventually(lambda: len(served.fakes._running) == 4, "the requests")
    served.request_shutdown()
    clients.check()
    assert served.process.wait(20) == 0


def test_shutdown_deadline_ends_streams_with_an_error(serve: Serve) -> None:
    served = serve(drain_s=0.3)
    served.fakes.step_s = 0.05
    with connect(served, stream=True) as connection:
        eventually(lambda: served.fakes._running, "the request")
        served.request_shutdown()
        received = b""
        while chunk := connection.recv(65536):
            received += chunk
    assert b'data: {"error":{"message":"The server is shutting down."' in received
    assert received.endswith(b"0\r\n\r\n")
    assert b"[DONE]" not in received
    assert served.process.wait(20) == 0
    assert served.fakes.seen.aborts


def test_connections_wait_for_a_restarted_worker(serve: Serve) -> None:
    """The listening socket outlives the worker: who connects in between is served by the next one."""
    listener = listen()
    first = serve(listener=listener)
    first.process.send_signal(signal.SIGKILL)
    first.process.wait(10)
    with connect(first, max_tokens=3) as connection:
        second = Served(first.fakes.directory, first.fakes, "ingress0", listener)
        try:
            second.await_ready()
            connection.settimeout(20)
            received = b""
            while b"text_completion" not in received:
                received += connection.recv(65536)
            assert json.dumps(answer("a", 1, 3), ensure_ascii=False).encode() in received
        finally:
            second.stop()
    listener.close()


def test_hung_peers_do_not_hang_health(serve: Serve) -> None:
    served = serve()
    served.fakes.frozen = True
    served.fakes.silent_tokenizer = True
    with connect(served), connect(served, prompt=[1, 2]):
        eventually(lambda: served.fakes.seen.generates, "the request")
        before = time.monotonic()
        for _ in range(20):
            assert served.client.get("/health").status_code == 200
        assert time.monotonic() - before < 10


def _gauge(served: Served, name: str) -> float:
    for line in served.client.get("/metrics").text.splitlines():
        if line.startswith(f"runtime:actor_{name}{{"):
            return float(line.rpartition(" ")[2])
    return -1.0
