"""What operators see of a node with prefill and decode apart, and what it leaves when one of its actors dies."""

from __future__ import annotations

import gzip
import json
import re
import signal
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from operations_tools import Collector, Span
from support import ROOT, Node, eventually, require_model

from llm_runtime.runtime.control import Kill, command

MODEL = "smollm2-135m-instruct"
DECODE, PREFILL = "decode.scheduler", "prefill.scheduler"


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.close()


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[Node]:
    require_model()
    base = tmp_path_factory.mktemp("o")
    made = Node(
        base,
        f"tracing.endpoint={collector.url}",
        "tracing.sample_rate=0",
        "node.log_format=json",
        f"node.crash_dump_dir={base / 'dumps'}",
        f"node.profile_dir={base / 'profiles'}",
        "ingress.access_log=true",
        "supervision.heartbeat_timeout_s=60",
        topology="pd-smollm2.toml",
    )
    try:
        yield made.up()
    finally:
        made.close()


def completion(words: str, tokens: int = 4, **others: Any) -> dict[str, Any]:
    """A request whose prompt is computed by the prefill engine."""
    return {
        **{"model": MODEL, "prompt": f"{words} " * 40, "max_tokens": tokens, "temperature": 0, "ignore_eos": True},
        **others,
    }


def headers(trace: str, sampled: bool = True, **others: str) -> dict[str, str]:
    return {"traceparent": f"00-{trace}-b7ad6b7169203331-{int(sampled):02x}", **others}


def described(spans: list[Span]) -> dict[str, set[tuple[str, str]]]:
    """The names of spans by actor, with the name of the span that each belongs to."""
    names = {span.id: f"{span.actor}: {span.name}" for span in spans}
    found: dict[str, set[tuple[str, str]]] = {}
    for span in spans:
        found.setdefault(span.actor, set()).add((span.name, names.get(span.parent, span.parent)))
    return found


def test_a_trace_shows_every_actor_and_who_asked_it(node: Node, collector: Collector) -> None:
    trace = "0af7651916cd43dd8448eb211c80319c"
    status, got, answer = node.ask(
        "/v1/completions", completion("trace"), headers(trace, tracestate="vendor=1", **{"X-Request-Id": "mine-1"})
    )
    assert (status, got["x-request-id"]) == (200, "mine-1")
    generate = "ingress0: generate"
    transfer = f"{DECODE}: transfer"
    request = "ingress0: POST /v1/completions"
    wanted = {
        "ingress0": {("POST /v1/completions", "b7ad6b7169203331"), ("generate", request)},
        "tokenizer": {("tokenize", request)},
        DECODE: {("queue", generate), ("transfer", generate), ("decode", generate)},
        PREFILL: {("queue", transfer), ("prefill", transfer)},
        "prefill.rank0": {("rank prefill", transfer)},
        "prefill.kv_sender": {("kv send", transfer)},
        "decode.kv_receiver": {("kv receive", transfer)},
        "decode.rank0": {("rank decode", generate)},
        "detokenizer": {("detokenize", generate)},
    }
    eventually(lambda: described(collector.trace(trace)) == wanted, "all spans")
    spans = collector.trace(trace)
    assert len(spans) == sum(map(len, wanted.values()))  # none a token
    assert {span.state for span in spans} == {"vendor=1"}
    assert not any(span.error for span in spans)
    by_name = {span.name: span for span in spans if span.actor != PREFILL}
    root = by_name["POST /v1/completions"]
    assert all(root.start <= span.start and span.end <= root.end for span in (by_name["tokenize"], by_name["generate"]))
    assert by_name["generate"].events == ("first token",)
    assert by_name["generate"].attributes["gen_ai.usage.output_tokens"] == 4
    assert by_name["generate"].attributes["gen_ai.usage.input_tokens"] == answer["usage"]["prompt_tokens"]
    assert root.attributes["http.response.status_code"] == 200
    assert root.attributes["runtime.request_id"] == "mine-1"
    assert collector.content_types == {"application/x-protobuf"}


def test_a_request_that_says_no_is_not_traced(node: Node, collector: Collector) -> None:
    no, yes = "1" * 32, "2" * 32
    assert node.ask("/v1/completions", completion("no", 1), headers(no, sampled=False))[0] == 200
    assert node.ask("/v1/completions", completion("none", 1))[0] == 200
    assert node.ask("/v1/completions", completion("yes", 1), headers(yes))[0] == 200
    eventually(lambda: any(span.name.startswith("POST") for span in collector.trace(yes)), "a later request's trace")
    assert collector.trace(no) == []
    assert {span.trace for span in collector.spans} <= {"0af7651916cd43dd8448eb211c80319c", yes}


def test_the_logs_are_json_and_name_the_request(node: Node) -> None:
    assert node.ask("/v1/completions", completion("log", 1), {"X-Request-Id": "mine-2"})[0] == 200
    bad = node.ask("/v1/completions", {"model": "other", "prompt": "x"}, {"X-Request-Id": "has space"})
    assert bad[0] == 404
    assert re.fullmatch("[0-9a-f]{24}", bad[1]["x-request-id"])

    def lines(actor: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (node.run_dir / "logs" / f"{actor}.log").read_text().splitlines()]

    def said_of_both() -> dict[str, dict[str, Any]]:  # a request is logged when it has been answered
        said = {line.get("request_id"): line for line in lines("ingress0")}
        return said if {"mine-2", bad[1]["x-request-id"]} <= said.keys() else {}

    said = eventually(said_of_both)
    assert said["mine-2"]["status"] == 200
    assert said[bad[1]["x-request-id"]]["status"] == 404
    assert said["mine-2"]["actor"] == "ingress0"
    assert said["mine-2"]["incarnation"] == 1
    assert re.fullmatch("[0-9a-f]{24}", said["mine-2"]["request"])
    for actor in ("root", "decode", "bootstrap", "prefill.rank0"):
        for line in lines(actor):
            assert {"time", "level", "actor", "incarnation", "logger", "message"} <= line.keys()
            assert line["actor"] == actor
    shown = node.run("logs", "ingress0")
    assert re.search(
        r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO llm_runtime.actors.ingress.observation: "
        r"POST /v1/completions 200 \S+ s, request mine-2 \[request [0-9a-f]{24}\]$",
        shown,
        re.MULTILINE,
    )


def test_every_metric_of_the_dashboard_is_exported(node: Node) -> None:
    node.ask("/v1/completions", completion("metric", 2))
    dashboard = json.loads((ROOT / "monitoring/grafana-dashboard.json").read_text())
    targets = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    queries = [each["definition"] for each in dashboard["templating"]["list"] if each["type"] == "query"]
    wanted = {name for text in (*targets, *queries) for name in re.findall(r"(?:sglang|runtime):\w+", text)}
    assert len(targets) > 20
    assert all('model_name=~"$model_name"' in text or "http_responses" in text for text in targets)

    def missing() -> set[str]:
        samples = node.ask("/metrics", method="GET")[2]
        return wanted - {line.partition("{")[0] for line in samples.splitlines() if 'actor="' in line}

    eventually(lambda: not missing(), "all metrics")
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)


def test_metrics_have_the_names_and_labels_of_sglang(node: Node) -> None:
    names = {
        *("time_to_first_token_seconds_bucket", "inter_token_latency_seconds_bucket", "queue_time_seconds_bucket"),
        *("e2e_request_latency_seconds_bucket", "num_running_reqs", "num_queue_reqs", "token_usage", "cache_hit_rate"),
        *("prompt_tokens_total", "generation_tokens_total", "cached_tokens_total", "gen_throughput"),
        *("num_requests_total", "num_aborted_requests_total", "num_used_tokens", "max_total_num_tokens"),
    }
    node.ask("/v1/completions", completion("name", 2))

    def exported() -> set[str]:
        samples = node.ask("/metrics", method="GET")[2]
        return set(re.findall(rf'^sglang:(\w+)\{{.*model_name="{MODEL}".*\}}', samples, re.MULTILINE))

    eventually(lambda: names <= exported(), "all of SGLang's metrics")
    samples = node.ask("/metrics", method="GET")[2]
    assert re.search(r'sglang:num_queue_reqs\{actor="decode.scheduler",engine_type="decode",', samples)
    assert re.search(r'sglang:num_queue_reqs\{actor="prefill.scheduler",engine_type="prefill",', samples)


def test_a_profile_has_the_steps_and_ends_by_itself(node: Node) -> None:
    profiles = node.run_dir.parent / "profiles"
    eventually(lambda: node.ask("/get_load", method="GET")[2] != [], "the engines")
    body = {"output_dir": "mine/first", "num_steps": 3, "activities": ["CPU"], "with_stack": False}
    status, _, answer = node.ask("/start_profile", body)
    assert status == 200, answer
    files = sorted(Path(name) for name in answer["files"])
    assert [re.sub(r"^\d{8}-\d{6}-[0-9a-f]{4}-", "", file.name) for file in files] == [
        f"{rank}.trace.json.gz" for rank in ("decode.rank0", "prefill.rank0")
    ]
    assert {file.parent for file in files} == {profiles / "mine/first"}
    assert node.ask("/start_profile")[0] == 400
    assert node.ask("/v1/completions", completion("profile", 8))[0] == 200
    decode = next(file for file in files if "decode.rank0" in file.name)
    eventually(decode.exists, "the profile of the decode rank")
    eventually(lambda: _steps(decode) == 3, "a whole file")
    assert stat.S_IMODE(decode.stat().st_mode) == 0o600
    status, _, answer = node.ask("/stop_profile")
    assert (status, [Path(name) for name in answer["files"]]) == (200, [next(f for f in files if f != decode)])
    assert answer["problems"] == ["decode.rank0: no profile is being taken."]
    assert node.ask("/stop_profile")[0] == 400


def test_where_profiles_may_not_go(node: Node, tmp_path: Path) -> None:
    profiles = node.run_dir.parent / "profiles"
    profiles.mkdir(exist_ok=True)
    (profiles / "away").symlink_to(tmp_path)
    (profiles / "file").touch()
    own = str(profiles)
    for directory in ("/etc/cron.d", "/tmp", "..", "a/../../b", f"{own}/..", "away", "away/x", "file", "a\0b", "/"):
        status, _, answer = node.ask("/start_profile", {"output_dir": directory})
        assert status == 400, answer
        assert "output_dir" in answer["error"]["message"]
    assert node.ask("/start_profile", {"profile_by_stage": True})[0] == 400
    assert node.ask("/start_profile", {"activities": ["RPD"]})[0] == 400


def _steps(file: Path) -> int:
    try:
        events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    except (EOFError, ValueError, gzip.BadGzipFile):
        return 0
    return len({event["name"] for event in events if re.fullmatch(r"step \d+", event.get("name", ""))})


def killed_meanwhile(
    node: Node, collector: Collector, victim: str, trace: str, name: str, body: dict[str, Any]
) -> dict[int, Span]:
    """The attempts of a request during which an actor is killed, by their numbers."""
    answers: list[tuple[int, dict[str, str], Any]] = []

    def ask() -> None:
        answers.append(node.ask("/v1/completions", body, headers(trace, **{"X-Request-Id": name})))

    client = threading.Thread(target=ask)
    command(node.run_dir, Kill("decode.rank0", signal.SIGSTOP))  # so that the request is there when the victim dies
    client.start()
    eventually(lambda: any(span.name == "prefill" for span in collector.trace(trace)), "the end of the prompt")
    node.kill(victim)
    command(node.run_dir, Kill("decode.rank0", signal.SIGCONT))
    client.join(60)
    assert [(status, got["x-request-id"]) for status, got, _ in answers] == [(200, name)]
    assert answers[0][2]["usage"]["completion_tokens"] == body["max_tokens"]

    def whole() -> bool:
        names = {(span.name, span.attributes.get("runtime.attempt")) for span in collector.trace(trace)}
        return {("POST /v1/completions", None), ("generate", 1), ("detokenize", None)} <= names

    eventually(whole, "the request's spans")
    return {span.attributes["runtime.attempt"]: span for span in collector.trace(trace) if span.name == "generate"}


def test_a_restarted_ingress_goes_on_with_the_trace(node: Node, collector: Collector) -> None:
    trace = "5" * 32
    attempts = killed_meanwhile(node, collector, "ingress0", trace, "ingress-1", completion("ingress", 12))
    assert {number: span.error for number, span in attempts.items()} == {0: "the ingress worker was restarted", 1: ""}
    spans = {span.id: span for span in collector.trace(trace)}
    (request,) = (span for span in spans.values() if span.name.startswith("POST"))
    assert request.attributes["runtime.incarnation"] == 2
    assert request.parent == "b7ad6b7169203331"
    assert {span.parent for span in attempts.values()} == {request.id}
    assert all(span.parent in spans for span in spans.values() if span is not request)


def test_a_crash_leaves_the_requests_both_attempts_and_a_restart(node: Node, collector: Collector) -> None:
    body, trace = completion("crash", 12), "3" * 32
    dumps = node.run_dir.parent / "dumps"
    known = set(eventually(lambda: list(dumps.glob("*.jsonl")), "the dump of the ingress's own crash"))
    attempts = killed_meanwhile(node, collector, DECODE, trace, "crash-1", body)
    assert {number: span.error for number, span in attempts.items()} == {0: "handed on again", 1: ""}
    last = eventually(
        lambda: [span for span in collector.trace(trace) if (span.actor, span.name) == (DECODE, "decode")], "its end"
    )[-1]
    assert (last.parent, last.attributes["runtime.incarnation"]) == (attempts[1].id, 2)

    (file,) = eventually(lambda: set(dumps.glob("*.jsonl")) - known, "the dump")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    eventually(lambda: len(file.read_text().splitlines()) >= 2, "its lines")
    head, *requests = map(json.loads, file.read_text().splitlines())
    assert [(death["actor"], death["reason"]) for death in head["deaths"]] == [(DECODE, "killed by SIGKILL")]
    in_flight = [request for request in requests if request["in_flight"]]
    assert [(each["request_id"], each["path"], each["body"]) for each in in_flight] == [
        ("crash-1", "/v1/completions", body)
    ]
    assert "1 requests sent, 0 failed" in node.run("replay", str(file))

    restarts = re.compile(rf'runtime:actor_restarts_total{{actor="{DECODE}",model_name="{MODEL}"}} 1.0')
    eventually(lambda: restarts.search(node.ask("/metrics", method="GET")[2]), "the restart among the metrics")


def test_a_collector_that_is_gone_costs_nothing(node: Node, collector: Collector) -> None:
    collector.close()
    for _ in range(3):
        assert node.ask("/v1/completions", completion("gone", 2), headers("4" * 32))[0] == 200
    assert node.running()
