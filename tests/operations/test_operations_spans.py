"""Contexts of traces, and the spans of schedulers and ranks."""

from __future__ import annotations

import importlib.util
from array import array
from pathlib import Path
from typing import Any

import pytest

from llm_runtime.actors.ingress.output_deltas import Identity
from llm_runtime.actors.ingress.tracing import Tracing, TracingConfig, attempt_context
from llm_runtime.actors.messages import SAMPLE, Message, NewRequest, SamplingParams, SpanEnded, Step
from llm_runtime.actors.rank.traces import SlotTraces
from llm_runtime.actors.scheduler.phases import Phases
from llm_runtime.actors.scheduler.request import BlockTable
from llm_runtime.actors.spans import Spans
from llm_runtime.runtime.plan import plan_node
from llm_runtime.runtime.topology import TopologyError, load_topology

TRACE = bytes(range(16))
CONTEXT = TRACE + b"parent-8"
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Exported:
    """An exporter that keeps what it gets."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, SpanEnded, str, bool]] = []

    def export(self, actor: str, span: SpanEnded, tracestate: str, server: bool) -> None:
        self.spans.append((actor, span, tracestate, server))

    def close(self) -> None:
        pass


class Reported:
    """The spans that an actor sends to ingress workers."""

    def __init__(self, *ingresses: str) -> None:
        self.sent: list[tuple[str, SpanEnded]] = []
        self.spans = Spans(3, self.send, lambda: list(ingresses))

    def send(self, peer: str, message: Message) -> bool:
        assert isinstance(message, SpanEnded)
        self.sent.append((peer, message))
        return True

    @property
    def names(self) -> list[str]:
        return [span.name for _, span in self.sent]


def tracing(rate: float) -> Tracing:
    return Tracing(TracingConfig("http://127.0.0.1:1", rate), Exported(), "ingress0", 1)


@pytest.mark.parametrize(
    ("header", "taken"),
    [
        (PARENT, True),
        (PARENT.replace("00-", "cc-", 1) + "-more", True),  # of a later version
        (PARENT[:-1] + "0", False),
        ("", None),
        (PARENT.upper(), None),
        (PARENT.replace("00-", "ff-", 1), None),
        (PARENT + "-more", None),
        (PARENT.replace("0af7651916cd43dd8448eb211c80319c", "0" * 32), None),
        (PARENT.replace("b7ad6b7169203331", "0" * 16), None),
    ],
)
def test_traceparent(header: str, taken: bool | None) -> None:
    identity = Identity.draw()
    never, always = (tracing(rate).begin(identity, header.encode(), b"") for rate in (0.0, 1.0))
    if taken is None:  # as if there were none: the rate decides
        assert never is None
        assert always is not None
        assert always.parent == b""
    else:
        assert (never is not None, always is not None) == (taken, taken)
        if never is not None:
            assert (never.context[:16].hex(), never.parent.hex()) == (PARENT[3:35], PARENT[36:52])


def test_the_rate_is_kept_and_ids_are_the_same_after_a_restart() -> None:
    identities = [Identity.draw() for _ in range(2000)]
    sampled = [tracing(0.25).begin(identity, b"", b"") for identity in identities]
    assert 350 < sum(trace is not None for trace in sampled) < 650
    again = [tracing(0.25).begin(identity, b"", b"") for identity in identities]
    assert [trace and trace.context for trace in sampled] == [trace and trace.context for trace in again]
    assert len({trace.context for trace in sampled if trace}) == sum(trace is not None for trace in sampled)
    contexts = {attempt_context(CONTEXT, "r", attempt) for attempt in range(3)}
    assert len(contexts) == 3
    assert {context[:16] for context in contexts} == {TRACE}


def test_nothing_is_reported_for_others() -> None:
    reported = Reported("ingress0", "ingress1")
    reported.spans.ended(b"", "x", 1)
    Reported().spans.ended(CONTEXT, "x", 1)  # nobody to export it
    assert reported.sent == []
    for first in (0, 1, 2, 3):
        reported.spans.ended(bytes([first]) + CONTEXT[1:], "x", 1)
    assert [peer for peer, _ in reported.sent] == ["ingress0", "ingress1", "ingress0", "ingress1"]
    assert {span.attributes["runtime.incarnation"] for _, span in reported.sent} == {3}


def test_the_phases_of_a_request_that_is_retracted() -> None:
    reported = Reported("ingress0")
    phases, first, second = Phases(reported.spans, CONTEXT), BlockTable(0, []), BlockTable(1, [])
    phases.opened(first)
    phases.drawn()
    phases.opened(first)  # the ranks were restarted
    phases.drawn()
    phases.opened(second)
    phases.drawn()
    phases.end()
    assert reported.names == ["queue", "prefill", "decode", "prefill", "decode"]
    events = [[name for _, name in span.events] for _, span in reported.sent]
    assert events == [[], [], ["handed to restarted ranks"], [], []]
    times = [time for _, span in reported.sent for time in (span.start_ns, span.end_ns)]
    assert times == sorted(times)


def step(number: int, start: int, length: int, flags: int, opens: list[NewRequest] | None = None) -> Step:
    one = (array("i", [value]).tobytes() for value in (2, start, length))
    return Step(number, *one, bytes([flags]), array("i", [1] * length).tobytes(), b"", opens or [])


def test_a_rank_makes_two_spans_of_any_number_of_steps() -> None:
    reported, timers = Reported("ingress0"), []
    traces = SlotTraces(reported.spans, lambda delay_s, action: timers.append(action))
    opening = NewRequest(2, 8, SamplingParams(4, 0), trace=CONTEXT)
    traces.ran(step(1, 0, 4, 0, [opening]), 100)
    traces.ran(step(2, 4, 4, SAMPLE), 200)
    assert reported.names == ["rank prefill"]
    for number in range(10):
        traces.ran(step(3 + number, 8 + number, 1, SAMPLE), 300 + number)
    assert reported.names == ["rank prefill"]
    traces.ran(step(20, 0, 4, SAMPLE, [NewRequest(2, 4, SamplingParams(4, 0))]), 400)  # another request
    assert reported.names == ["rank prefill", "rank decode"]
    assert not traces
    counts = [(span.attributes["steps"], span.attributes["tokens"], span.start_ns) for _, span in reported.sent]
    assert counts == [(2, 8, 100), (10, 10, 300)]
    assert len(timers) == 1


@pytest.mark.parametrize("missing", ["opentelemetry.sdk", "opentelemetry.exporter"])
def test_tracing_without_its_library_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    file = tmp_path / "x.toml"
    text = (
        '[model]\npath = "deepseek-v3-tiny"\n[engine.main]\n[tracing]\nendpoint = "http://127.0.0.1:4318/v1/traces"\n'
    )
    file.write_text(text)
    find: Any = importlib.util.find_spec

    def find_spec(name: str) -> Any:
        if name == missing:
            return None
        if name.startswith(missing):  # as it is where the parent is not there
            raise ModuleNotFoundError(missing)
        return find(name)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    with pytest.raises(TopologyError, match=r"x\.toml:5: tracing\.endpoint: .*pip install opentelemetry-sdk "):
        plan_node(load_topology(file), download=False)
