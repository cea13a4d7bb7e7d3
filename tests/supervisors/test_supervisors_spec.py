"""Faulty specifications are refused with a sentence that says what to change; the small pure parts."""

from __future__ import annotations

import math
import os
import socket
from pathlib import Path

import msgspec
import pytest
from supervised_tools import child, nested, steady

from llm_runtime.supervisors import Backoff, ChildSpec, SpecError, Supervisor, SupervisorSpec, validate
from llm_runtime.supervisors.loop import Loop
from llm_runtime.supervisors.restarts import Delay, Intensity
from llm_runtime.supervisors.spec import MAX_MS, AutoShutdown, Restart, validate_child
from llm_runtime.supervisors.wire import PACKET_BYTES, Channel, socket_pair


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        (SupervisorSpec(children=(steady("a"), nested("s", steady("a")))), "child 'a' occurs more than once"),
        (SupervisorSpec(children=(steady("a b"),)), "child 'a b': an id has 1 to 100 letters"),
        (SupervisorSpec(children=(steady("a/../b"),)), "child 'a/../b': an id has"),
        (SupervisorSpec(children=(ChildSpec(id="a", start="nowhere.to_be:Found"),)), "no module 'nowhere.to_be'"),
        (SupervisorSpec(children=(ChildSpec(id="a", start="os.path"),)), 'give "module:Class"'),
        (SupervisorSpec(children=(ChildSpec(id="a"),)), 'give "module:Class"'),
        (SupervisorSpec(children=(steady("a", shutdown=-5),)), "child 'a': shutdown is -5 ms"),
        (SupervisorSpec(children=(steady("a", shutdown=2**40),)), "shutdown is 1099511627776 ms"),
        (SupervisorSpec(children=(steady("a", shutdown=1.5),)), "Expected `int | str | null`, got `float`"),
        (SupervisorSpec(children=(steady("a", shutdown=True),)), "Expected `int | str | null`, got `bool`"),
        (SupervisorSpec(children=(steady("a", shutdown="soon"),)), "Invalid enum value 'soon'"),
        (SupervisorSpec(children=(steady("a", start_timeout_ms=0),)), "start_timeout_ms is 0"),
        (SupervisorSpec(children=(steady("a", start_timeout_ms=2**33),)), "start_timeout_ms is 8589934592"),
        (SupervisorSpec(children=(steady("a", heartbeat_timeout_ms=True),)), "Expected `int`, got `bool`"),
        (SupervisorSpec(children=(steady("a", significant=1),)), "Expected `bool`, got `int`"),
        (SupervisorSpec(children=(steady("a", type="nurse"),)), "Invalid enum value 'nurse'"),
        (SupervisorSpec(children=(steady("a", args={"x": 2**70}),)), "child 'a'"),
        (SupervisorSpec(children=(steady(""),)), "child '': an id has"),
        (SupervisorSpec(children=(steady(7),)), "Expected `str`, got `int`"),  # type: ignore[arg-type]
        (SupervisorSpec(children=(steady("a", heartbeat_timeout_ms=-1),)), "heartbeat_timeout_ms is -1"),
        (SupervisorSpec(children=(steady("a", restart="sometimes"),)), "Invalid enum value 'sometimes'"),
        (SupervisorSpec(children=(steady("a", args={"x": object()}),)), "unsupported"),
        (SupervisorSpec(strategy="some_for_all"), "Invalid enum value 'some_for_all'"),  # type: ignore[arg-type]
        (SupervisorSpec(intensity=-1), "Expected `int` >= 0"),
        (SupervisorSpec(intensity=True), "Expected `int`, got `bool`"),
        (SupervisorSpec(intensity=1.5), "Expected `int`, got `float`"),  # type: ignore[arg-type]
        (SupervisorSpec(period_s=0.0), "Expected `float` > 0"),
        (SupervisorSpec(period_s=-1.0), "Expected `float` > 0"),
        (SupervisorSpec(period_s=math.inf), "period_s is inf"),
        (SupervisorSpec(period_s=math.nan), "the supervisor: "),
        (SupervisorSpec(children=(nested("s", period_s=math.inf),)), "child 's': period_s is inf"),
        (SupervisorSpec(backoff=Backoff(base_ms=math.inf)), "backoff.base_ms is inf"),
        (SupervisorSpec(backoff=Backoff(factor=math.inf)), "backoff.factor is inf"),
        (SupervisorSpec(backoff=Backoff(jitter=math.nan)), "the supervisor: "),
        (SupervisorSpec(backoff=Backoff(give_up_after=0)), "Expected `int` >= 1"),
        (SupervisorSpec(auto_shutdown="sometimes"), "Invalid enum value 'sometimes'"),  # type: ignore[arg-type]
        *(
            (
                SupervisorSpec(strategy="simple_one_for_one", auto_shutdown=rule, children=(steady("a"),)),
                "auto_shutdown does not go with simple_one_for_one",
            )
            for rule in ("any_significant", "all_significant")
        ),
        (SupervisorSpec(backoff=Backoff(jitter=1.0)), "Expected `float` < 1"),
        (SupervisorSpec(strategy="simple_one_for_one"), "takes one child as template, not 0"),
        (
            SupervisorSpec(strategy="simple_one_for_one", children=(nested("s", steady("a")),)),
            "must be a worker",
        ),
        (
            SupervisorSpec(auto_shutdown="any_significant", children=(steady("a", significant=True),)),
            "must be transient or temporary",
        ),
        (
            SupervisorSpec(children=(steady("a", significant=True, restart="transient"),)),
            "unless the supervisor sets auto_shutdown",
        ),
        (SupervisorSpec(children=(ChildSpec(id="s", type="supervisor"),)), "needs its SupervisorSpec"),
        (SupervisorSpec(children=(steady("s", supervisor=SupervisorSpec()),)), 'set its type to "supervisor"'),
        (
            SupervisorSpec(children=(steady("a", descriptors=tuple(f"d{i}" for i in range(201))),)),
            "201 descriptors; at most 200",
        ),
    ],
)
def test_faulty_specs(spec: SupervisorSpec, sentence: str):
    with pytest.raises(SpecError) as caught:
        validate(spec)
    assert sentence in str(caught.value)


@pytest.mark.parametrize("restart", ["permanent", "transient", "temporary"])
@pytest.mark.parametrize("rule", ["never", "any_significant", "all_significant"])
@pytest.mark.parametrize("significant", [False, True])
def test_significant_children_go_with_rules_as_in_otp(restart: Restart, rule: AutoShutdown, significant: bool):
    spec = SupervisorSpec(auto_shutdown=rule, children=(steady("a", restart=restart, significant=significant),))
    if significant and (restart == "permanent" or rule == "never"):
        with pytest.raises(SpecError):
            validate(spec)
    else:
        validate(spec)


def test_a_child_added_at_run_time_is_checked_as_strictly():
    for wrong in (steady("a", shutdown=True), steady("a", restart="sometimes"), steady("a", descriptors="x")):
        with pytest.raises(SpecError):
            validate_child(wrong)


def test_a_child_may_not_have_the_name_of_its_supervisor(tmp_path: Path):
    with pytest.raises(SpecError, match="child 'root' has the name of its supervisor"):
        Supervisor(SupervisorSpec(children=(nested("s", steady("root")),)), tmp_path)


def test_long_times_do_not_end_the_loop():
    loop = Loop()
    read, write = os.pipe()
    seen: list[bytes] = []
    loop.watch(read, lambda: seen.append(os.read(read, 1)))
    os.write(write, b"x")
    loop.poll(MAX_MS / 1000)
    loop.close()
    os.close(read)
    os.close(write)
    assert seen == [b"x"]


def test_good_spec_survives_the_wire():
    spec = SupervisorSpec(
        strategy="rest_for_one",
        children=(steady("a", shutdown="brutal_kill", args={"x": [1, 2.5, "y", b"z"]}), nested("s", steady("b"))),
    )
    validate(spec)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(spec), type=SupervisorSpec) == spec


def test_missing_descriptor_is_found_before_the_start(tmp_path: Path):
    spec = SupervisorSpec(children=(nested("s", child("a", "Environment", descriptors=("file",))),))
    with pytest.raises(SpecError, match="no descriptor named 'file'"):
        Supervisor(spec, tmp_path)


def test_intensity_counts_within_the_period():
    intensity = Intensity(2, 10.0)
    assert [intensity.add(now) for now in (0.0, 1.0, 11.5, 12.0)] == [True] * 4
    assert not intensity.add(12.5)
    assert not Intensity(0, 10.0).add(0.0)


def test_backoff_grows_to_its_cap_and_is_forgotten():
    delay = Delay(Backoff(base_ms=50, factor=2, cap_ms=300, jitter=0.0, stable_ms=1000, give_up_after=6))
    assert [delay.next(0.5) for _ in range(6)] == [0, 0.05, 0.1, 0.2, 0.3, 0.3]
    assert not delay.exhausted
    assert delay.next(0.0) == 0.3
    assert delay.exhausted
    assert delay.next(1.0) == 0
    assert not delay.exhausted


def test_backoff_jitter_stays_within_its_bounds():
    waits = []
    for _ in range(200):
        delay = Delay(Backoff(base_ms=100, jitter=0.2))
        delay.next(0)
        waits.append(delay.next(0))
    assert min(waits) >= 0.08
    assert max(waits) <= 0.12
    assert len(set(waits)) > 100


def test_channel_carries_long_messages_and_descriptors_past_a_full_socket():
    ours, theirs = socket_pair()
    near, far = Channel(ours), Channel(theirs)
    read, write = os.pipe()
    long = os.urandom(PACKET_BYTES * 2 + 17)
    sent = [(long, []), (b"", []), (b"with", [write])] * 20
    for payload, fds in sent:
        near.send(payload, fds)
    assert near.backlog > 0, "the socket is full, and send did not block"
    received: list[tuple[bytes, list[int]]] = []
    while len(received) < len(sent):
        received += far.receive()
        near.flush()
    assert [payload for payload, _ in received] == [payload for payload, _ in sent]
    passed = [fd for _, fds in received for fd in fds]
    assert len(passed) == 20
    os.write(passed[-1], b"x")
    assert os.read(read, 1) == b"x"
    near.send(b"last words")
    near.close()
    assert far.receive() == [(b"last words", [])]
    assert far.closed
    far.send(b"to nobody")
    far.close()
    for fd in (read, write, *passed):
        os.close(fd)


def test_messages_left_unread_do_not_hide_what_was_sent():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    near, far = Channel(ours), Channel(theirs)
    far.send(b"stored just before the end")
    near.send(b"never read")
    far.close()
    assert [payload for payload, _ in near.receive()] == [b"stored just before the end"]
    assert near.closed
    near.close()
