"""Models, tokenization, health, metrics, and everything about HTTP that is not a completion."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
import time
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from support import eventually

from .conftest import Serve, Served
from .fakes import MAX_MODEL_LEN, MODEL, answer


def test_models(shared: Served) -> None:
    document = shared.client.get("/v1/models").json()
    assert document["object"] == "list"
    assert [card["id"] for card in document["data"]] == ["fake", "alias"]
    card = shared.client.get("/v1/models/alias").json()
    assert (card["id"], card["object"], card["max_model_len"], card["root"]) == ("alias", "model", MAX_MODEL_LEN, MODEL)
    missing = shared.client.get("/v1/models/some/other")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"


def test_tokenize_and_detokenize(shared: Served) -> None:
    document = shared.client.post("/tokenize", json={"prompt": "héy", "return_token_strs": True}).json()
    assert document["tokens"] == list("héy".encode())
    assert (document["count"], document["max_model_len"], len(document["token_strs"])) == (4, MAX_MODEL_LEN, 4)
    document = shared.client.post("/tokenize", json={"messages": [{"role": "user", "content": "a"}]}).json()
    assert bytes(document["tokens"]) == b"user:a\nassistant:"
    assert shared.client.post("/detokenize", json={"tokens": list(b"abc")}).json() == {"prompt": "abc"}
    for wrong in ({}, {"prompt": "a", "messages": []}, {"messages": []}, {"prompt": 1}):
        assert shared.client.post("/tokenize", json=wrong).status_code == 400
    for tokens in ([-1], [1000], [2**40], ["a"], None):
        assert shared.client.post("/detokenize", json={"tokens": tokens}).status_code == 400


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nothing", 404), ("GET", "/v1/chat/completions", 405), ("POST", "/v1/models", 405), ("POST", "/", 405)],
)
def test_unknown_routes_and_methods(shared: Served, method: str, path: str, status: int) -> None:
    response = shared.client.request(method, path)
    assert response.status_code == status
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert path in error["message"]


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/chat/completions", "/v1/chat/completions"),
        ("/v1/v1/messages", "/v1/messages"),
        ("//v1/models", "/v1/models"),
        ("/v1/api/chat", "/api/chat"),
    ],
)
def test_a_wrong_base_url_is_told_the_right_path(shared: Served, path: str, meant: str) -> None:
    response = shared.client.get(f"http://127.0.0.1:{shared.port}{path}")
    assert response.status_code == 404
    assert f"Did you mean {meant}?" in response.text
    assert "Did you mean" not in shared.client.get("/nothing").text


def test_health_generate(serve: Serve) -> None:
    served = serve()
    assert served.client.get("/health_generate").status_code == 200
    served.fakes.frozen = True
    assert served.client.get("/health").status_code == 200


def test_api_key(serve: Serve) -> None:
    served = serve(api_key="sécret")
    request = {"model": "fake", "prompt": "a", "max_tokens": 1}
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic sécret".encode()}):
        response = served.client.post("/v1/completions", json=request, headers=headers)
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
    key = {"authorization": "Bearer sécret".encode()}
    assert served.client.post("/v1/completions", json=request, headers=key).status_code == 200
    assert served.client.get("/v1/models").status_code == 401
    assert served.client.get("/health").status_code == 200
    assert served.client.get("/metrics").status_code == 200


def test_status_page(serve: Serve, tmp_path: Path) -> None:
    path = tmp_path / "status"
    served = serve(api_key="secret", status_socket=str(path))
    page = served.client.get("/")
    assert page.status_code == 200
    policy = dict(each.split(" ", 1) for each in page.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    for tag in ("script", "style"):
        content = page.text.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    assert "://" not in page.text.replace("http://www.w3.org/2000/svg", "")  # nothing from elsewhere

    for form in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert form not in page.text  # what comes from outside is never markup

    key = {"authorization": "Bearer secret"}
    assert served.client.get("/status").status_code == 401
    refused = served.client.get("/status", headers=key)
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    with StatusSocket(path, b'{"node"') as cut:
        assert served.client.get("/status", headers=key).status_code == 503
    with StatusSocket(path, b'{"node": "n"}') as whole:
        assert served.client.get("/status", headers=key).json() == {"node": "n"}
    assert (cut.asked, whole.asked) == (1, 1)


class StatusSocket:
    """A node that tells something to one that connects."""

    def __init__(self, path: Path, text: bytes) -> None:
        path.unlink(missing_ok=True)
        self.asked = 0
        self._text = text
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._listener.settimeout(30)
        self._thread = threading.Thread(target=self._tell)

    def __enter__(self) -> StatusSocket:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.join()
        self._listener.close()

    def _tell(self) -> None:
        reader, _ = self._listener.accept()
        with reader:
            assert reader.recv(100) == b"status\n"
            self.asked += 1
            reader.sendall(self._text)


def test_body_limit(serve: Serve) -> None:
    served = serve(max_body_bytes=10_000)
    for size in (20_000, 3_000_000):
        response = served.client.post("/v1/completions", json={"prompt": "x" * size})
        assert response.status_code == 413, size
        assert response.json()["error"]["code"] == "request_too_large"

    def pieces() -> object:
        for _ in range(20):
            yield b"x" * 1000

    headers = {"content-type": "application/json"}
    assert served.client.post("/v1/completions", content=pieces(), headers=headers).status_code == 413  # type: ignore[arg-type]
    with socket.create_connection(("127.0.0.1", served.port)) as connection:  # never sends what it announces
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"content-length: 99999999999999\r\n\r\n"
        )
        assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")


def test_concurrency_limit(serve: Serve) -> None:
    served = serve(max_concurrent=1)
    served.fakes.frozen = True
    request = {"prompt": "a", "max_tokens": 2, "seed": 1}
    with socket.create_connection(("127.0.0.1", served.port)) as first:
        first.sendall(_post(request))
        eventually(lambda: served.fakes.seen.generates, "the first request")
        refused = served.client.post("/v1/completions", json=request)
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        served.fakes.frozen = False
        assert answer("a", 1, 2) in json.loads(_body_of(first))["choices"][0]["text"]
    eventually(lambda: served.client.post("/v1/completions", json=request).status_code == 200, "room")


def test_metrics(serve: Serve) -> None:
    served = serve(workers=2)
    for _ in range(6):  # each on a connection of its own, which any worker may take; scrapes stay with one
        httpx.post(f"{served.url}/v1/completions", json={"prompt": "abcd", "max_tokens": 5}, timeout=30)
    served.client.post("/v1/completions", json={"prompt": 1})
    served.fakes.announce_stats("scheduler", {"num_running_reqs": 3.0, "token_usage": 0.5, "odd name!": 1.0})

    def values(name: str) -> dict[tuple[str, ...], float]:
        families = text_string_to_metric_families(served.client.get("/metrics").text)
        samples = [sample for family in families for sample in family.samples if sample.name == name]
        return {(each.labels["actor"], each.labels.get("status", "")): each.value for each in samples}

    def total(name: str) -> float:
        return sum(values(name).values())

    eventually(lambda: total("sglang:num_requests_total") == 6, "both workers' requests")
    assert total("sglang:generation_tokens_total") == 30
    assert total("sglang:prompt_tokens_total") == 24
    assert total("sglang:time_to_first_token_seconds_count") == 6
    assert total("sglang:inter_token_latency_seconds_count") == 24
    assert total("sglang:e2e_request_latency_seconds_count") == 6
    eventually(lambda: total("runtime:http_responses_total") >= 7, "responses")
    for name, value in (("sglang:num_running_reqs", 3), ("sglang:token_usage", 0.5), ("runtime:actor_odd_name_", 1)):
        expected = {("main.scheduler", ""): value}
        eventually(lambda name=name, expected=expected: values(name) == expected, name)
    for worker in ("ingress0", "ingress1"):
        eventually(lambda name=worker: (name, "") in values("runtime:actor_messages_received"), f"figures of {worker}")


def test_several_workers_share_the_socket(serve: Serve) -> None:
    served = serve(workers=2)
    connections = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(40)]
    for connection in connections:
        connection.sendall(_post({"prompt": "a", "max_tokens": 2, "seed": 1}))
    for connection in connections:
        assert json.loads(_body_of(connection))["choices"][0]["text"] == answer("a", 1, 2)
        connection.close()


def test_malformed_http(shared: Served) -> None:
    for garbage in (b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", b"POST /v1/x HTTP/1.1\r\ncontent-length: -5\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", shared.port)) as connection:
            connection.sendall(garbage)
            answered = connection.recv(1000)
            assert answered.startswith(b"HTTP/1.1 400 ")
            assert b'"error"' in answered
    with socket.create_connection(("127.0.0.1", shared.port)) as connection:
        try:
            for _ in range(100):
                connection.sendall(b"GET / HTTP/1.1\r\nx: " if _ == 0 else b"y" * 10_000)
            answered = connection.recv(1000)
        except (BrokenPipeError, ConnectionResetError):
            answered = b"HTTP/1.1 431 "
        assert answered.startswith(b"HTTP/1.1 431 ")
    assert shared.client.get("/health", headers={"x": "y" * 100_000}).status_code == 431
    assert shared.client.get("/health", headers={"x": "y" * 50_000}).status_code == 200


def test_pipelined_requests(shared: Served) -> None:
    with socket.create_connection(("127.0.0.1", shared.port)) as connection:
        connection.sendall(_post({"prompt": "a", "max_tokens": 2, "seed": 1}) * 3)
        received = b""
        deadline = time.monotonic() + 10
        while received.count(b'"text_completion"') < 3:
            assert time.monotonic() < deadline
            received += connection.recv(65536)
    assert len(re.findall(rb"HTTP/1.1 200 ", received)) == 3


def _post(document: object) -> bytes:
    body = json.dumps(document).encode()
    head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n"
    return head.format(len(body)).encode() + body


def _body_of(connection: socket.socket) -> bytes:
    connection.settimeout(20)
    received = b""
    while b"\r\n\r\n" not in received:
        received += connection.recv(65536)
    head, _, body = received.partition(b"\r\n\r\n")
    match = re.search(rb"content-length: (\d+)", head)
    assert match is not None, head
    while len(body) < int(match[1]):
        body += connection.recv(65536)
    return body
