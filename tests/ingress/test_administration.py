"""What operators ask of a server: to end requests, to flush caches, to tell of itself."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from support import eventually

from llm_runtime.actors.ingress.engines import Engines
from llm_runtime.actors.ingress.service import Service
from llm_runtime.actors.messages import EngineInfo

from .conftest import Serve, Served
from .fakes import MAX_MODEL_LEN, MODEL

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 400, "stream": True}


@pytest.fixture
def slow(shared: Served) -> Iterator[Served]:
    """A server whose engine takes half a minute for an answer."""
    shared.fakes.step_s = 0.05
    yield shared
    shared.fakes.step_s = 0.002


def aborted(served: Served, path: str, body: dict[str, Any], **how: Any) -> list[Any]:
    """The rest of the stream of a request that is aborted after its first event, by the identity in it or by `how`."""
    before = len(served.fakes.seen.aborts)
    with httpx.stream("POST", served.url + path, json=body, timeout=30) as response:
        lines = response.iter_lines()
        first = json.loads(next(line for line in lines if line.startswith("data: ")).removeprefix("data: "))
        document = first.get("message", first.get("response", first))
        with httpx.Client(base_url=served.url) as client:
            answer = client.post("/abort_request", json=how or {"rid": document["id"]})
        assert answer.status_code == 200
        documents = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    eventually(lambda: len(served.fakes.seen.aborts) == before + 1, "the end of the request in the engine")
    return [json.loads(document) for document in documents if document != "[DONE]"]


def test_a_chat_ends_with_what_there_is(slow: Served) -> None:
    *_, last = aborted(slow, "/v1/chat/completions", CHAT)
    assert last["choices"][0]["finish_reason"] == "abort"


@pytest.mark.parametrize("how", [{"rid": "mine"}, {"abort_all": True}])
def test_native_requests_by_the_clients_name(slow: Served, how: dict[str, Any]) -> None:
    body = {"text": "a", "rid": "mine", "stream": True, "sampling_params": {"max_new_tokens": 400}}
    *_, last = aborted(slow, "/generate", body, **how)
    assert last["meta_info"]["finish_reason"]["type"] == "abort"


def test_in_other_protocols(slow: Served) -> None:
    messages = {"model": "fake", "messages": CHAT["messages"], "max_tokens": 400, "stream": True}
    *_, delta, stop = aborted(slow, "/v1/messages", messages)
    assert (delta["delta"]["stop_reason"], stop["type"]) == (None, "message_stop")
    *_, last = aborted(slow, "/v1/responses", {"input": "hi", "stream": True})
    assert last["type"] == "response.incomplete"


def test_others_go_on(slow: Served) -> None:
    document = slow.client.post("/abort_request", json={"rid": "nobody"})
    assert (document.status_code, document.json()) == (200, {})
    for wrong in ({}, {"rid": "a", "abort_all": True}):
        assert slow.client.post("/abort_request", json=wrong).status_code == 400


def test_whichever_worker_has_the_request(serve: Serve) -> None:
    served = serve(workers=2)
    served.fakes.step_s = 0.05
    for _ in range(3):
        *_, last = aborted(served, "/v1/chat/completions", CHAT)
        assert last["choices"][0]["finish_reason"] == "abort"


def test_flush_cache(shared: Served) -> None:
    eventually(lambda: shared.client.get("/get_load").json(), "an engine")
    for method in ("GET", "POST"):
        assert shared.client.request(method, "/flush_cache").status_code == 200


def test_flush_cache_is_refused_while_requests_run(slow: Served) -> None:
    generates = slow.fakes.seen.generates
    before = len(generates)
    with httpx.stream("POST", f"{slow.url}/v1/chat/completions", json=CHAT, timeout=30):
        eventually(lambda: len(generates) > before, "a running request")
        response = slow.client.get("/flush_cache")
    assert response.status_code == 400
    assert "Requests run." in response.json()["error"]["message"]


def test_flush_cache_is_asked_for_again(shared: Served) -> None:
    fakes, before = shared.fakes, len(shared.fakes.seen.flushes)
    eventually(lambda: not fakes._running, "the end of what ran before")
    fakes.silent_flush = True
    filter_flushes = fakes.seen.flushes

    def heard() -> None:
        eventually(lambda: len(filter_flushes) > before, "the first order")
        fakes.silent_flush = False

    thread = threading.Thread(target=heard)
    thread.start()
    assert shared.client.post("/flush_cache").status_code == 200
    thread.join()
    assert len(set(filter_flushes[before:])) == 1
    assert len(filter_flushes) >= before + 2


def test_get_load_and_infos(shared: Served) -> None:
    shared.fakes.announce_stats("scheduler", {"token_usage": 0.5})
    eventually(lambda: shared.client.get("/get_load").json()[0]["num_tokens"] == 32 * 16, "figures")
    assert shared.client.get("/get_load").json() == [
        {"dp_rank": 0, "engine": "main", "num_reqs": 0, "num_waiting_reqs": 0, "num_tokens": 32 * 16}
    ]
    assert shared.client.get("/v1/load").json() == shared.client.get("/get_load").json()
    assert shared.client.get("/load").json() == {"server_load": 0}
    model = shared.client.get("/get_model_info").json()
    assert (model["model_path"], model["is_generation"], model["max_model_len"]) == (MODEL, True, MAX_MODEL_LEN)
    server = shared.client.get("/get_server_info").json()
    assert server["served_model_name"] == "fake"
    assert server["internal_states"][0]["max_total_num_tokens"] == 64 * 16
    for former, path in (("/get_model_info", "/model_info"), ("/get_server_info", "/server_info")):
        assert shared.client.get(path).json().keys() == shared.client.get(former).json().keys()
    assert shared.client.get("/version").json() == shared.client.get("/api/version").json()
    assert shared.client.get("/ping").status_code == 200


def test_tokenizer_info(shared: Served) -> None:
    document = shared.client.get("/tokenizer_info").json()
    assert (document["bos_token"], document["eos_token"]) == ("<s>", "</s>")
    assert document["chat_template"] == "{{ messages }}"
    assert document["model_max_length"] == MAX_MODEL_LEN
    assert shared.client.get("/tokenizer_info?model=other").status_code == 404


def engine(role: Any) -> EngineInfo:
    return EngineInfo(role, role, f"{role}.scheduler", "ipc:///nowhere", MODEL, "", 1, 16, 1, 512)


def test_what_needs_engines_waits_for_them_after_a_start() -> None:
    """Profiles and flushes that are asked for before the engines have registered."""
    engines = Engines([MODEL], lambda name, address: None)
    service: Any = SimpleNamespace(
        ledger=SimpleNamespace(engines=engines), models=[SimpleNamespace(model=MODEL, task="generate")]
    )

    async def ask() -> list[str]:
        asked = asyncio.create_task(Service.known_engines(service))
        for roles in (["decode"], ["decode", "prefill"]):  # decode alone could not answer anything
            await asyncio.sleep(0)
            assert not asked.done()
            engines.update([engine(role) for role in roles], time.monotonic())
        async with asyncio.timeout(5):
            return [info.engine for info in await asked]

    assert asyncio.run(ask()) == ["decode", "prefill"]
