"""Responses that are stored: the conversations that go on from them, their bounds, and `kill -9`."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import eventually

from llm_runtime.actors.ingress.openai.responses import store as module
from llm_runtime.actors.ingress.openai.responses.store import ResponseStore, Stored

from .conftest import Serve, Served, one_ingress
from .test_anthropic import events_of, prompt_of
from .test_responses import URL, added, body
from .test_survival import Grow, exchange, grow, half_done, kills_at
from .test_survival_protocols import whole, without_identities

__all__ = ["grow"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("i")
    settings: dict[str, Any] = {"response_dir": str(directory / "responses"), "response_store_bytes": 2**24}
    with one_ingress(directory, tool_call_parser="qwen25", reasoning_parser="qwen3", **settings) as served:
        served.fakes.per_step = 8
        served.fakes.script = lambda generate: "Hello."
        yield served


def ask(served: Served, status: int = 200, **fields: Any) -> dict[str, Any]:
    response = served.client.post(URL, json=body(**fields))
    assert response.status_code == status, response.text
    return response.json()  # type: ignore[no-any-return]


def names(served: Served) -> set[str]:
    return set(os.listdir(served.log.parent / "responses"))


def contents(served: Served) -> list[str]:
    return [message["content"] for message in prompt_of(served)[0]]


def test_a_conversation_goes_on(shared: Served) -> None:
    first = ask(shared, instructions="Be kind.")
    assert first["store"] is True
    second = ask(shared, input=[{"role": "user", "content": "b"}], previous_response_id=first["id"], instructions="s")
    assert second["previous_response_id"] == first["id"]
    assert contents(shared) == ["s", "hi", "Hello.", "b"]
    stream = shared.client.post(URL, json=body(input="c", previous_response_id=second["id"], stream=True)).text
    third = added(events_of(stream))
    assert contents(shared) == ["hi", "Hello.", "b", "Hello.", "c"]
    assert shared.client.get(f"{URL}/{third['id']}").json() == third
    ask(shared, input="d", previous_response_id=first["id"])  # a fork
    assert contents(shared) == ["hi", "Hello.", "d"]
    eventually(lambda: all(name.startswith("resp_") for name in names(shared)), "nothing held for an answer")


def test_what_is_not_stored(shared: Served) -> None:
    before = names(shared)
    unkept = ask(shared, store=False)
    assert (unkept["store"], names(shared)) == (False, before)
    for wrong in (unkept["id"], "resp_1", "../x", "resp_" + "0" * 24 + "/", "resp_" + "A" * 24):
        error = ask(shared, 404, previous_response_id=wrong)["error"]
        assert (error["param"], error["code"]) == ("previous_response_id", "previous_response_not_found")
    assert shared.client.get(f"{URL}/resp_{'0' * 24}").status_code == 404
    assert shared.client.delete(f"{URL}/..%2f..%2fx").status_code == 404


def test_items_by_reference(shared: Served) -> None:
    first = ask(shared)
    (item,) = first["output"]
    reference: dict[str, Any] = {"type": "item_reference", "id": item["id"]}
    for each in (reference, {"id": item["id"]}):
        ask(shared, input=[{"role": "user", "content": "a"}, each, {"role": "user", "content": "b"}])
        assert contents(shared) == ["a", "Hello.", "b"]
    for wrong in (item["id"][:-1] + "7", "msg_1", f"rs_{first['id'][5:]}_0", "x" * 5000):
        error = ask(shared, 404, input=[{**reference, "id": wrong}])["error"]
        assert (error["param"], error["code"]) == ("input[0].id", "item_not_found")


def test_the_items_before_a_response(shared: Served) -> None:
    first = ask(shared, input=[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 3)
    second = ask(shared, input="c", previous_response_id=first["id"])
    path = f"{URL}/{second['id']}/input_items"
    everything = shared.client.get(path, params={"order": "asc"}).json()
    assert [item["type"] for item in everything["data"]] == ["message"] * 8
    assert everything["data"][6]["id"] == first["output"][0]["id"]
    newest = shared.client.get(path).json()
    assert newest["data"] == everything["data"][::-1]
    seen: list[Any] = []
    page: dict[str, Any] = {"has_more": True}
    while page["has_more"]:
        after = {"after": page["last_id"]} if seen else {}
        page = shared.client.get(path, params={"order": "asc", "limit": 3, **after}).json()
        seen += page["data"]
    assert seen == everything["data"]
    for wrong in ({"limit": 0}, {"limit": "x"}, {"order": "up"}, {"after": "y"}):
        assert shared.client.get(path, params=wrong).status_code == 400


def test_a_response_is_deleted(shared: Served) -> None:
    first = ask(shared)
    second = ask(shared, previous_response_id=first["id"])
    path = f"{URL}/{first['id']}"
    assert shared.client.delete(path).json() == {"id": first["id"], "object": "response", "deleted": True}
    assert shared.client.get(path).status_code == shared.client.delete(path).status_code == 404
    ask(shared, 404, previous_response_id=first["id"])
    ask(shared, previous_response_id=second["id"])
    assert len(contents(shared)) == 5


def test_several_workers_share_it(serve: Serve, tmp_path: Path) -> None:
    served = serve(2, response_dir=str(tmp_path / "responses"), response_store_bytes=2**20)
    served.fakes.script = lambda generate: "Hello."
    identity = ask(served, max_output_tokens=20)["id"]
    for _ in range(8):
        served.client.close()
        served.client = type(served.client)(base_url=served.url, timeout=60)
        identity = ask(served, input="x", max_output_tokens=20, previous_response_id=identity)["id"]


def test_a_full_disk_costs_no_answer(serve: Serve, tmp_path: Path) -> None:
    served = serve(response_dir=str(tmp_path / "no" / "directory"), response_store_bytes=2**20)
    first = ask(served, max_output_tokens=3)
    assert first["status"] == "incomplete"
    ask(served, 404, previous_response_id=first["id"])
    eventually(lambda: "cannot be stored" in served.log.read_text(), "a line in the log")


def stored(size: int) -> Stored:
    return Stored({"output": []}, [{"type": "message", "content": "x" * size}])


def identity(number: int) -> str:
    return f"resp_{number:024x}"


def test_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PRUNE_SHARE", 2**30)  # look at every one
    store = ResponseStore(tmp_path / "r", 2**20)
    for number in range(40):
        store.save(identity(number), stored(60_000))
        assert store.load(identity(0), "reader") is not None  # in use all the time
        store.release("reader")
    names = os.listdir(tmp_path / "r")
    assert sum((tmp_path / "r" / name).stat().st_size for name in names) <= 2**20
    assert {identity(0), identity(39)} <= set(names)
    assert len(names) < 18
    monkeypatch.setattr(module, "MAX_COUNT", 3)
    store.save(identity(50), stored(1))
    assert len(os.listdir(tmp_path / "r")) == 3 + 1
    monkeypatch.setattr(module, "MAX_AGE_S", -1)
    store.save(identity(51), stored(1))
    assert os.listdir(tmp_path / "r") == [identity(51)]
    store.save(identity(52), stored(2**19))
    assert os.listdir(tmp_path / "r") == [identity(51)]


def test_a_file_that_is_broken(tmp_path: Path) -> None:
    store = ResponseStore(tmp_path, 2**20)
    for data in (b"", b"\x80", b"x" * 100, b"\xff" * 9):
        (tmp_path / identity(1)).write_bytes(data)
        assert store.load(identity(1), "r") is None
        assert store.get(identity(1)) is None


def test_an_answer_reads_the_same_conversation_after_a_kill(grow: Grow, tmp_path: Path) -> None:
    """Although the response before is deleted meanwhile."""
    settings = {"response_dir": str(tmp_path / "responses"), "response_store_bytes": 2**24}
    tree = grow(**settings)
    tree.fakes.script = lambda generate: "Once upon a time. " * 6
    first = json.loads(exchange(tree, whole("/v1/responses", input="hi")).body)
    sent = whole("/v1/responses", input="and?", previous_response_id=first["id"], stream=True)
    undisturbed = added(events_of(exchange(tree, sent).body.decode()))
    tree.fakes.step_s = 0.003
    ended = len(tree.fakes.seen.acknowledged)

    def delete_and_kill() -> None:
        half_done(tree, 10, ended)
        (tmp_path / "responses" / first["id"]).unlink()
        kills_at(tree, 30, 80)()

    disturbed = added(events_of(exchange(tree, sent, delete_and_kill).body.decode()))
    assert tree.figure("connections_resumed") >= 1
    assert without_identities(disturbed) == without_identities(undisturbed)
    kept = Stored(**module.msgspec.msgpack.decode((tmp_path / "responses" / disturbed["id"]).read_bytes()))
    assert len(kept.items) == 3
    tree.fakes.step_s = 0.001
    third = json.loads(exchange(tree, whole("/v1/responses", input="x", previous_response_id=disturbed["id"])).body)
    assert third["status"] == "completed"
    eventually(lambda: not [name for name in os.listdir(tmp_path / "responses") if "." in name], "nothing held")


def test_where_nothing_can_be_written_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is stored can be read, on a full disk and on one without links."""

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    store = ResponseStore(tmp_path, 2**20)
    identity = "resp_" + "0" * 24
    store.save(identity, Stored({"output": []}, [{"a": 1}]))
    assert store.load(identity, "first") is not None
    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(os, "utime", refuse)
    second = store.load(identity, "second")
    assert second is not None
    assert second.items == [{"a": 1}]
    assert store.delete(identity)
    assert store.load(identity, "first") is not None  # it was held
    assert store.load(identity, "second") is None
