"""The ledger alone: whatever is dropped, repeated, reordered or restarted, the text is exact."""

from __future__ import annotations

import random
from array import array

import pytest
from msgspec.structs import replace

from llm_runtime.actors.ingress.engines import GRACE_S, Engines
from llm_runtime.actors.ingress.errors import ApiError
from llm_runtime.actors.ingress.ledger import Entry, Ledger
from llm_runtime.actors.ingress.metrics import IngressMetrics
from llm_runtime.actors.ingress.output_deltas import OutputDelta
from llm_runtime.actors.messages import (
    Abort,
    Acknowledge,
    EngineInfo,
    Generate,
    Message,
    Refused,
    Resend,
    SamplingParams,
    TextEvent,
    TextParams,
    Unknown,
)

from .fakes import Running, packed, plan


class Client:
    """The HTTP side: keeps what it is given."""

    def __init__(self) -> None:
        self.text = ""
        self.tokens: list[int] = []
        self.logprobs = 0
        self.errors: list[ApiError] = []
        self.deltas: list[OutputDelta] = []
        self.attempts: list[int] = []

    def received(self, entry: Entry, delta: OutputDelta) -> None:
        self.deltas.append(delta)

    def attempted(self, entry: Entry) -> None:
        self.attempts.append(entry.attempt)

    def progressed(self, entry: Entry) -> None:
        text, tokens, logprobs = entry.take()
        self.text += text
        self.tokens += tokens
        self.logprobs += len(logprobs)

    def failed(self, entry: Entry, error: ApiError) -> None:
        self.errors.append(error)


def engine(name: str = "main", load: int = 0) -> EngineInfo:
    return EngineInfo(name, "unified", f"{name}.scheduler", "ipc:///x", "m", "f", 1, 16, 64, 512, load, 0)


class Bench:
    """A ledger with a clock of its own, and everything that it has sent."""

    def __init__(self, engines: list[EngineInfo] | None = None) -> None:
        self.now = 100.0
        self.sent: list[tuple[str, Message]] = []
        self.metrics = IngressMetrics()
        self.engines = Engines(["m"], lambda name, address: None)
        self.ledger = Ledger(self._send, self.engines, self.metrics, 10.0, lambda: self.now)
        if engines is None:
            engines = [engine()]
        self.ledger.registry(engines)
        for each in engines:
            self.ledger.scheduler_started(each.scheduler)

    def _send(self, peer: str, message: Message) -> bool:
        self.sent.append((peer, message))
        return True

    def take(self) -> list[tuple[str, Message]]:
        sent, self.sent = self.sent, []
        return sent

    def submit(self, tokens: int = 20, deadline: float = 0.0, logprobs: int = -1) -> tuple[Entry, Client]:
        client = Client()
        sampling = SamplingParams(tokens, 7, logprobs=logprobs)
        entry = Entry("r", 0, packed("prompt"), sampling, TextParams(), client, self.now, deadline)
        self.ledger.submit(entry)
        return entry, client


def sent_generate(bench: Bench) -> Generate:
    ((_, message),) = bench.take()
    assert isinstance(message, Generate)
    return message


def running(generate: Generate) -> Running:
    whole = plan(generate)
    have = len(generate.output) // 4
    return Running(generate, "ingress", whole, have, have)


@pytest.mark.parametrize("seed", range(300))
def test_any_disorder_gives_the_exact_text(seed: int) -> None:
    """A random engine: drops, repeats, reorders and merges events, restarts, forgets, and answers what it is asked."""
    chance = random.Random(seed)
    bench = Bench()
    entry, client = bench.submit(tokens=chance.randint(1, 40), logprobs=0)
    first = sent_generate(bench)
    request: Running | None = running(first)
    whole = plan(first)
    wire: list[TextEvent] = []
    trouble = chance.random()
    for step in range(10_000):
        if entry.finish is not None:
            break
        calm = step > 400  # in the end the world is kind
        bench.now += 0.3
        if request is not None and not request.done:
            end = min(len(whole.tokens), request.sent + chance.randint(1, 3))
            event = request.event(request.sent, end)
            request.sent = end
            if calm or chance.random() > 0.3 * trouble:
                wire.append(event)
            if not calm and chance.random() < 0.3 * trouble:
                wire.append(event)
            if not calm and chance.random() < 0.2 * trouble:
                start = chance.randint(request.base, end)
                wire.append(request.event(start, end))
        if not calm and chance.random() < 0.2 * trouble:
            chance.shuffle(wire)
        while wire and chance.random() < 0.7:
            bench.ledger.texts([wire.pop(0)])
        if not calm and chance.random() < 0.05 * trouble:
            bench.ledger.scheduler_started("main.scheduler")
            if chance.random() < 0.5:
                wire.clear()
        elif not calm and chance.random() < 0.05 * trouble:
            request = None  # forgotten: only a question finds out
        bench.ledger.watch()
        for _, message in bench.take():
            match message:
                case Generate():
                    if request is None or message.attempt > request.generate.attempt:
                        request = running(message)
                        assert array("i", message.output).tolist() == whole.tokens[: request.base] == client.tokens
                        assert message.characters == len(client.text)
                case Resend():
                    if request is None or request.generate.attempt != message.attempt:
                        bench.ledger.unknown(Unknown(message.rid, message.attempt))
                    elif calm or chance.random() > 0.3 * trouble:
                        wire.append(request.event(request.base, request.sent))
    assert (client.text, client.tokens) == (whole.text, whole.tokens)
    assert client.logprobs == len(whole.tokens)
    assert entry.finish == "length"
    assert not client.errors
    assert not bench.ledger.live
    bench.ledger.flush()
    assert bench.take()[-1] == ("main.scheduler", Acknowledge(["r"]))


def test_a_gap_is_asked_for_once_in_a_while() -> None:
    bench = Bench()
    entry, client = bench.submit()
    request = running(sent_generate(bench))
    bench.now += 1
    for start in range(1, 6):
        bench.ledger.texts([request.event(start, start + 1)])
    assert bench.take() == [("main.scheduler", Resend("r", 0))]
    assert client.text == ""
    bench.now += 1
    bench.ledger.texts([request.event(6, 7)])
    assert bench.take() == [("main.scheduler", Resend("r", 0))]
    bench.ledger.texts([request.event(0, 7)])
    assert client.tokens == request.plan.tokens[:7]
    assert entry.characters == len(client.text) == request.plan.ends[6]


def test_missing_text_is_a_gap_too() -> None:
    bench = Bench()
    entry, client = bench.submit()
    bench.take()
    bench.now += 1
    bench.ledger.texts([TextEvent("r", 0, 0, [300], 0, "ab"), TextEvent("r", 0, 1, [301], 3, "d")])
    assert bench.take() == [("main.scheduler", Resend("r", 0))]
    assert (client.text, client.tokens, entry.characters) == ("ab", [300], 2)
    bench.ledger.texts([TextEvent("r", 0, 0, [300, 301], 0, "abcd")])
    assert (client.text, client.tokens) == ("abcd", [300, 301])


def test_text_without_tokens_at_the_end() -> None:
    bench = Bench()
    entry, client = bench.submit()
    bench.ledger.texts([TextEvent("r", 0, 0, [300], 0, "")])
    bench.ledger.texts([TextEvent("r", 0, 1, [], 0, "held back", "stop", "x")])
    assert (client.text, client.tokens, entry.finish, entry.stop_reason) == ("held back", [300], "stop", "x")


def test_an_old_end_is_no_end() -> None:
    bench = Bench()
    entry, _ = bench.submit()
    bench.ledger.texts([TextEvent("r", 0, 0, [300, 301, 302], 0, "abc")])
    bench.ledger.texts([TextEvent("r", 0, 0, [300], 0, "a", "stop")])
    assert entry.finish is None


def test_other_attempts_are_dropped() -> None:
    bench = Bench()
    entry, client = bench.submit()
    request = running(sent_generate(bench))
    bench.ledger.texts([request.event(0, 2)])
    bench.ledger.scheduler_started("main.scheduler")
    again = sent_generate(bench)
    assert (again.attempt, array("i", again.output).tolist()) == (1, request.plan.tokens[:2])
    bench.ledger.texts([request.event(2, 4)])
    bench.ledger.unknown(Unknown("r", 0))
    bench.ledger.refused(Refused("r", 0, 400, "no"))
    assert client.tokens == request.plan.tokens[:2]
    assert bench.take() == []
    assert entry.attempt == 1


def test_a_stalled_request_is_asked_for_ever_less_often() -> None:
    bench = Bench()
    bench.submit()
    bench.take()
    asked = []
    for _ in range(2400):
        bench.now += 0.1
        bench.ledger.watch()
        asked += [round(bench.now - 100) for _ in bench.take()]
    assert asked == [10, 30, 70, 130, 190]


def test_requests_wait_for_an_engine() -> None:
    bench = Bench(engines=[])
    entry, _ = bench.submit()
    bench.now += 1000
    bench.ledger.watch()
    assert bench.take() == []
    bench.ledger.registry([engine()])
    assert sent_generate(bench).attempt == 0
    assert entry.scheduler == "main.scheduler"


def test_the_least_loaded_engine_takes_the_next_request() -> None:
    bench = Bench([engine("a", 3), engine("b", 1)])
    chosen = [bench.engines.choose() for _ in range(6)]
    assert chosen == ["b.scheduler", "b.scheduler", "a.scheduler", "b.scheduler", "a.scheduler", "b.scheduler"]


def test_prefill_engines_and_other_models_get_no_requests() -> None:
    bench = Bench([replace(engine("p"), role="prefill"), replace(engine("o"), model="other")])
    assert bench.engines.choose() is None


def test_requests_wait_for_an_engine_of_their_own_model() -> None:
    bench = Bench([])
    bench.engines = bench.ledger.engines = Engines(["m", "n"], lambda name, address: None)
    entries = {}
    for model in ("m", "n"):
        entry = Entry(model, 0, packed("prompt"), SamplingParams(5, 7), TextParams(), Client(), bench.now, model=model)
        entries[model] = entry
        bench.ledger.submit(entry)
    bench.ledger.registry([engine("a")])
    assert [(peer, getattr(message, "rid", "")) for peer, message in bench.take()] == [("a.scheduler", "m")]
    assert entries["n"].scheduler is None
    # Nor does an engine of another model take over where a model's last one is gone.
    bench.ledger.registry([replace(engine("b"), model="n")])
    assert sent_generate(bench).rid == "n"
    bench.now += 10
    bench.ledger.registry([replace(engine("b"), model="n")])
    assert bench.take() == []
    assert entries["m"].scheduler == "a.scheduler"
    bench.ledger.registry([replace(engine("b"), model="n"), engine("c")])
    assert [type(message) for _, message in bench.sent] == [Abort, Generate]
    assert bench.sent[1][0] == "c.scheduler"


def test_requests_of_a_vanished_engine_go_to_another() -> None:
    bench = Bench([engine("a")])
    entry, _ = bench.submit()
    bench.take()
    bench.ledger.registry([engine("b")])
    assert bench.take() == []  # a restarted bootstrap server may not have heard of the other one yet
    bench.now += GRACE_S + 1
    bench.ledger.registry([engine("b")])
    (_, abort), (peer, generate) = bench.take()
    assert abort == Abort("r")
    assert isinstance(generate, Generate)
    assert (peer, generate.attempt, entry.scheduler) == ("b.scheduler", 1, "b.scheduler")


def test_the_last_engine_is_kept_when_the_registry_is_empty() -> None:
    bench = Bench()
    entry, _ = bench.submit()
    bench.take()
    bench.now += GRACE_S + 1
    bench.ledger.registry([])
    assert bench.take() == []
    assert entry.scheduler == "main.scheduler"


def test_a_refusal_reaches_the_client() -> None:
    bench = Bench()
    _, client = bench.submit()
    bench.ledger.refused(Refused("r", 0, 429, "The queue is full.", 2.0))
    (error,) = client.errors
    assert (error.status, error.message, error.headers) == (429, "The queue is full.", [(b"retry-after", b"2")])
    assert not bench.ledger.live


def test_a_request_that_has_been_running_is_not_refused() -> None:
    bench = Bench()
    _, client = bench.submit()
    bench.ledger.scheduler_started("main.scheduler")
    bench.take()
    bench.ledger.refused(Refused("r", 1, 503, "The queue is full.", 2.0))
    bench.ledger.watch()
    assert bench.take() == []
    bench.now += 2.1
    bench.ledger.watch()
    assert sent_generate(bench).attempt == 2
    assert not client.errors


@pytest.mark.parametrize(("late", "status"), [(True, 408), (False, 503)])
def test_an_engine_that_gives_up(late: bool, status: int) -> None:
    bench = Bench()
    _, client = bench.submit(deadline=150.0)
    bench.now += 50.0 if late else 1.0
    bench.ledger.texts([TextEvent("r", 0, 0, [], 0, "", "abort")])
    assert [error.status for error in client.errors] == [status]
    assert not bench.ledger.live


def test_the_engine_is_told_how_much_time_is_left() -> None:
    bench = Bench()
    bench.submit(deadline=160.0)
    assert sent_generate(bench).timeout_s == 60
    bench.now += 20
    bench.ledger.scheduler_started("main.scheduler")
    assert sent_generate(bench).timeout_s == 40


def test_prompt_logprobs_are_asked_for_until_they_have_come() -> None:
    bench = Bench()
    client = Client()
    entry = Entry("r", 0, packed("ab"), SamplingParams(5, 7, prompt_logprobs=0), TextParams(), client, bench.now)
    bench.ledger.submit(entry)
    request = running(sent_generate(bench))
    bench.ledger.scheduler_started("main.scheduler")
    assert sent_generate(bench).sampling.prompt_logprobs == 0
    bench.ledger.texts([replace(request.event(0, 1), attempt=1)])
    assert entry.prompt_logprobs is not None
    assert len(entry.prompt_logprobs) == 2
    bench.ledger.scheduler_started("main.scheduler")
    assert sent_generate(bench).sampling.prompt_logprobs == -1


def test_a_scheduler_that_is_met_late_is_asked_first() -> None:
    bench = Bench(engines=[])
    bench.ledger.registry([engine()])
    bench.submit()
    bench.take()
    bench.ledger.scheduler_started("main.scheduler")
    assert bench.take() == [("main.scheduler", Resend("r", 0))]
    bench.ledger.unknown(Unknown("r", 0))
    assert sent_generate(bench).attempt == 1


def test_an_aborted_request_is_forgotten() -> None:
    bench = Bench()
    entry, client = bench.submit()
    request = running(sent_generate(bench))
    bench.ledger.abort(entry)
    bench.ledger.abort(entry)
    assert bench.take() == [("main.scheduler", Abort("r"))]
    bench.ledger.texts([request.event(0, 1)])
    bench.ledger.scheduler_started("main.scheduler")
    assert bench.take() == []
    assert client.tokens == []


def test_a_request_that_is_ended_early_has_an_end_that_lasts() -> None:
    """Its end is a delta like those that engines send: what is made of the deltas alone ends as well."""
    bench = Bench()
    entry, client = bench.submit()
    bench.take()
    bench.ledger.texts([TextEvent("r", 0, 0, [5], 0, "a", None)])
    bench.ledger.end(entry)
    assert bench.take() == [("main.scheduler", Abort("r"))]
    assert not bench.ledger.live
    assert (client.text, entry.finish) == ("a", "abort")
    bench.ledger.texts([TextEvent("r", 0, 1, [6], 1, "b", None)])
    assert (client.text, client.errors) == ("a", [])
    assert client.deltas[-1].finish == "abort"
