"""What the status page is told: figures over time, requests in progress, logs, restarts; and who is told."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support import eventually

from .conftest import Serve, Served, one_ingress

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 400, "stream": True}
ADMIN = {"Authorization": "Bearer boss"}
CLIENT = {"Authorization": "Bearer secret"}


class Node:
    """The node's end of the status socket: answers each line by `answers`, and keeps what it was asked."""

    def __init__(self, path: Path) -> None:
        self.asked: list[str] = []
        self.answers: dict[str, Any] = {"status": {"node": "n"}}
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                reader, _ = self._listener.accept()
                with reader:
                    line = reader.recv(300).decode()
                    assert line.endswith("\n")
                    self.asked.append(line[:-1])
                    answer = self.answers.get(line[:-1], {"error": f"there is no {line[:-1]}"})
                    reader.sendall(json.dumps(answer).encode())

    def close(self) -> None:
        self._listener.close()


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("i")


@pytest.fixture(scope="module")
def node(run_dir: Path) -> Iterator[Node]:
    node = Node(run_dir / "status")
    yield node
    node.close()


@pytest.fixture(scope="module")
def served(run_dir: Path, node: Node) -> Iterator[Served]:
    with one_ingress(run_dir, api_key="secret", admin_api_key="boss", status_socket=str(run_dir / "status")) as served:
        yield served


def test_who_is_told(served: Served) -> None:
    for path in ("/status", "/status/history"):
        assert served.client.get(path).status_code == 401
        assert served.client.get(path, headers=CLIENT).status_code == 200
    for path in ("/status/requests", "/status/logs?actor=root"):
        assert served.client.get(path).status_code == 401
        assert served.client.get(path, headers=CLIENT).status_code == 403
    for headers, status in (({}, 401), (CLIENT, 403)):
        assert served.client.post("/status/restart", json={"rolling": True}, headers=headers).status_code == status


def test_history(served: Served) -> None:
    figures = {"num_running_reqs": 3.0, "num_queue_reqs": 1.0, "num_used_tokens": 50.0, "max_total_num_tokens": 100.0}
    post, get = served.client.post, served.client.get

    def looked() -> dict[str, Any]:
        served.fakes.announce_stats("scheduler", figures)
        document: dict[str, Any] = get("/status/history", headers=CLIENT).json()
        return document

    first = eventually(lambda: (seen := looked())["points"] and seen, "a point")
    assert post("/v1/chat/completions", json={**CHAT, "max_tokens": 20}, headers=CLIENT).status_code == 200
    assert post("/v1/completions", json={"prompt": 1.5}, headers=CLIENT).status_code == 400

    def counted(name: str, document: dict[str, Any]) -> list[Any]:
        column = 1 + document["names"].index(name)
        return [point[column] for point in document["points"]]

    document = eventually(lambda: sum(counted("tokens", seen := looked())) == 20 and seen, "all tokens")
    assert sum(counted("requests", document)) == 1
    assert (counted("running", document)[-1], counted("kv_used", document)[-1]) == (3, 50)
    assert any(counted("ttft_p50", document))
    assert 0 < document["times"]["ttft_p50"] <= document["times"]["e2e_p99"] < 20
    eventually(lambda: get("/status/history", headers=CLIENT).json()["responses"]["kept"].get("400"), "the error")
    engine = document["engines"][0]
    assert (engine["engine"], engine["figures"]["num_running_reqs"]) == ("main", 3)
    assert len(document["points"]) > len(first["points"])
    last = document["points"][-1][0]
    later = get(f"/status/history?since={last}", headers=CLIENT).json()["points"]
    assert all(point[0] > last for point in later)
    assert get("/status/history?since=x", headers=CLIENT).status_code == 400


def test_requests_in_progress_and_their_end(served: Served) -> None:
    served.fakes.step_s = 0.05
    try:
        headers = {**CLIENT, "X-Request-Id": "<b>mine</b>"}
        with httpx.stream("POST", f"{served.url}/v1/chat/completions", json=CHAT, headers=headers) as response:
            lines = response.iter_lines()
            next(lines)
            listed = served.client.get("/status/requests", headers=ADMIN).json()
            (request,) = listed["requests"]
            assert (listed["total"], listed["silent_workers"]) == (1, [])
            assert (request["path"], request["model"]) == ("/v1/chat/completions", "fake")
            assert (request["worker"], request["engines"]) == ("ingress0", ["main.scheduler"])
            assert request["request_id"] == "<b>mine</b>"
            assert request["prompt_tokens"] > 0
            assert request["output_tokens"] >= 1
            ended = served.client.post("/abort_request", json={"rid": request["rid"]}, headers=ADMIN)
            assert ended.status_code == 200
            assert '"finish_reason":"abort"' in "".join(lines)
    finally:
        served.fakes.step_s = 0.002
    assert served.client.get("/status/requests", headers=ADMIN).json()["requests"] == []


def test_requests_of_all_workers(serve: Serve) -> None:
    served = serve(workers=2)
    served.fakes.step_s = 0.05

    def ask() -> None:
        with contextlib.suppress(httpx.HTTPError):
            httpx.post(f"{served.url}/v1/chat/completions", json=CHAT, timeout=60)

    threads = [threading.Thread(target=ask) for _ in range(12)]
    for thread in threads:
        thread.start()

    def listed() -> list[dict[str, Any]]:
        with httpx.Client(base_url=served.url) as client:
            found: list[dict[str, Any]] = client.get("/status/requests").json()["requests"]
            return found

    eventually(lambda: len(listed()) == 12, "all of them")
    ages = [each["age_s"] for each in listed()]
    assert ages == sorted(ages, reverse=True)
    served.client.post("/abort_request", json={"abort_all": True})
    for thread in threads:
        thread.join()


def test_logs(served: Served, run_dir: Path) -> None:
    (run_dir / "logs").mkdir()
    (run_dir / "logs" / "main.rank0.log").write_text("".join(f"line {i} <script>\n" for i in range(30_000)))
    (run_dir / "logs" / "linked.log").symlink_to("/etc/passwd")
    (run_dir / "other.log").write_text("not for everybody")

    def log(query: str) -> httpx.Response:
        return served.client.get(f"/status/logs?{query}", headers=ADMIN)

    assert log("actor=main.rank0&lines=2").json() == {
        "actor": "main.rank0",
        "lines": ["line 29998 <script>", "line 29999 <script>"],
    }
    assert len(log("actor=main.rank0&lines=1000").json()["lines"]) == 1000
    for wrong in ("actor=linked", "actor=nobody"):
        assert log(wrong).status_code == 404
    for wrong in ("", "actor=", "actor=../other", "actor=%2Fetc%2Fpasswd", "actor=.", "actor=a%00", "actor=a%0Ab"):
        assert log(wrong).status_code == 400
    for wrong in ("0", "1001", "-1", "x", "1e9"):
        assert log(f"actor=main.rank0&lines={wrong}").status_code == 400


def test_restarts(served: Served, node: Node) -> None:
    node.answers |= {"restart main.rank0": {"error": ""}, "rolling": {"error": ""}}

    def post(body: dict[str, Any]) -> httpx.Response:
        return served.client.post("/status/restart", json=body, headers=ADMIN)

    node.asked.clear()
    assert post({"actor": "main.rank0"}).status_code == 200
    assert post({"rolling": True}).status_code == 200
    assert node.asked == ["restart main.rank0", "rolling"]
    unknown = post({"actor": "nobody"})
    assert (unknown.status_code, unknown.json()["error"]["message"]) == (409, "There is no restart nobody.")
    for wrong in ({}, {"actor": "a", "rolling": True}, {"actor": "a\nrolling"}, {"actor": "a b"}, {"actor": 1}):
        assert post(wrong).status_code == 400
    assert node.asked[2:] == ["restart nobody"]
