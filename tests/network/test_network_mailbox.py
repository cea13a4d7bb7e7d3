"""Mailboxes over TCP under keys: who has them gets through, nobody else does."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq
from msgspec import Struct, structs
from support import DEADLINE_S, eventually, free_port

from llm_runtime.transport import Codec, Envelope, Mailbox, Network, curve


class Blob(Struct, tag=True, array_like=True):
    data: bytes


def new_network(epoch: int = 1) -> Network:
    public, secret = zmq.curve_keypair()
    return Network(public.decode(), secret.decode(), epoch)


def free_address() -> str:
    return f"tcp://127.0.0.1:{free_port()}"


class Box(Mailbox[Blob]):
    """A mailbox with an inbox for other machines; remembers which incarnations it has met."""

    def __init__(self, path: Path, network: Network, name: str, peers: dict[str, str], incarnation: int, listen: str):
        self.met: list[tuple[str, int]] = []
        self.address = listen
        super().__init__(
            name,
            incarnation,
            f"ipc://{path}/{name}",
            peers,
            Codec(Blob, 2**20),
            lambda peer, number: self.met.append((peer, number)),
            structs.replace(network, listen=listen),
        )

    def take(self, count: int) -> list[Envelope[Blob]]:
        taken: list[Envelope[Blob]] = []
        deadline = time.monotonic() + DEADLINE_S
        while len(taken) < count:
            assert time.monotonic() < deadline, f"only {len(taken)} of {count} messages came"
            self.poll(0.1)
            taken.extend(self.receive())
        return taken


NewBox = Callable[..., Box]


@pytest.fixture
def network() -> Network:
    return new_network()


@pytest.fixture
def new_box(tmp_path: Path, network: Network) -> Iterator[NewBox]:
    boxes = []

    def new(
        name: str, peers: dict[str, str] | None = None, keys: Network = network, incarnation: int = 1, at: str = ""
    ):
        boxes.append(Box(tmp_path, keys, name, peers or {}, incarnation, at or free_address()))
        return boxes[-1]

    yield new
    for box in boxes:
        box.close(0)


def test_messages_go_both_ways_and_stay_in_order(new_box: NewBox) -> None:
    a = new_box("a")
    b = new_box("b", {"a": a.address})
    a.add_peer("b", b.address)
    for number in range(300):
        assert b.send("a", Blob(number.to_bytes(2, "little")))
    assert [int.from_bytes(each.body.data, "little") for each in a.take(300)] == list(range(300))
    a.send("b", Blob(bytes(500_000)))
    assert b.take(1)[0].body == Blob(bytes(500_000))
    assert a.counters.lost == a.counters.refused == b.counters.refused == 0


def test_local_and_remote_peers_reach_the_same_mailbox(new_box: NewBox, tmp_path: Path) -> None:
    a = new_box("a")
    far = new_box("far", {"a": a.address})
    near: Mailbox[Blob] = Mailbox("near", 1, f"ipc://{tmp_path}/near", {"a": f"ipc://{tmp_path}/a"}, Codec(Blob))
    try:
        near.send("a", Blob(b"near"))
        far.send("a", Blob(b"far"))
        assert {each.sender: each.body.data for each in a.take(2)} == {"near": b"near", "far": b"far"}
        assert not a.waiting
    finally:
        near.close(0)


def test_other_keys_are_turned_away(new_box: NewBox, network: Network, caplog: pytest.LogCaptureFixture) -> None:
    a = new_box("a")
    # One that does not know the deployment's public key, and one that knows nothing but that.
    stranger = new_box("stranger", {"a": a.address}, keys=new_network())
    own = new_network()
    context = zmq.Context()
    thief = context.socket(zmq.PUSH)
    thief.setsockopt(zmq.LINGER, 0)
    thief.setsockopt(zmq.CURVE_SERVERKEY, network.public.encode())
    thief.setsockopt(zmq.CURVE_PUBLICKEY, own.public.encode())
    thief.setsockopt(zmq.CURVE_SECRETKEY, own.secret.encode())
    try:
        thief.connect(a.address)
        thief.send(b"anything")
        stranger.send("a", Blob(b"x"))
        eventually(lambda: a.counters.refused >= 2 and "other keys" in caplog.text, "refusals")
        friend = new_box("friend", {"a": a.address})
        friend.send("a", Blob(b"x"))
        assert [each.sender for each in a.take(1)] == ["friend"]
        assert a.counters.received == 1
        assert a.counters.malformed == 0
    finally:
        thief.close(0)
        context.term()


def test_junk_and_plain_sockets_get_nothing_through(new_box: NewBox) -> None:
    a = new_box("a")
    host, _, port = a.address.removeprefix("tcp://").rpartition(":")
    context = zmq.Context()
    plain = [context.socket(kind) for kind in (zmq.PUSH, zmq.DEALER, zmq.PUB)]
    raws = []
    try:
        for each in plain:
            each.setsockopt(zmq.LINGER, 0)
            each.connect(a.address)
        frame = Codec[Blob](Blob).encode("thief", 1, 0, Blob(b"x"))
        plain[0].send(frame)
        greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(48)
        for junk in (b"GET / HTTP/1.0\r\n\r\n", os.urandom(4096), b"\x01\x00" + frame, greeting + os.urandom(200), b""):
            raws.append(socket.create_connection((host, int(port)), DEADLINE_S))
            raws[-1].sendall(junk)
        # All but the silent one are cut off as soon as they have shown what they are, and that one a little later.
        for raw in raws:
            raw.settimeout(DEADLINE_S)
            with contextlib.suppress(ConnectionResetError):
                while raw.recv(4096):
                    pass
        eventually(lambda: a.counters.refused >= 3, "refusals")
        friend = new_box("friend", {"a": a.address})
        friend.send("a", Blob(b"x"))
        assert [each.sender for each in a.take(1)] == ["friend"]
        assert (a.counters.received, a.counters.malformed) == (1, 0)
    finally:
        for each in plain:
            each.close(0)
        context.term()
        for raw in raws:
            raw.close()


def test_oversized_messages_end_the_connection_of_a_friend_too(new_box: NewBox) -> None:
    a = new_box("a")
    b: Mailbox[Blob] = new_box("b", {"a": a.address})
    b._codec = Codec(Blob, 2**24)  # a peer that has another limit
    b.send("a", Blob(bytes(2**23)))
    b.send("a", Blob(b"small"))
    assert [each.body.data for each in a.take(1)] == [b"small"]


def test_a_restarted_peer_is_reconnected_and_recognized(new_box: NewBox, network: Network) -> None:
    address = free_address()
    a = new_box("a", {"b": address})
    first = new_box("b", {"a": a.address}, incarnation=7, at=address)
    first.send("a", Blob(b"1"))
    a.take(1)
    first.close(0)
    a.send("b", Blob(b"while it is away"))
    # Its node has been started anew, so that its own starts are counted from 1 again.
    second = new_box("b", {"a": a.address}, keys=structs.replace(network, epoch=2), incarnation=1, at=address)
    assert second.take(1)[0].body.data == b"while it is away"
    second.send("a", Blob(b"2"))
    assert a.take(1)[0].body.data == b"2"
    assert [peer for peer, _ in a.met] == ["b", "b"]
    assert a.counters.stale == 0


def test_incarnations_rise_over_starts_of_the_node() -> None:
    epochs = [structs.replace(new_network(), epoch=epoch) for epoch in (2_900_000_000_000, 2_900_000_000_001)]
    numbers = [epoch.incarnation(starts) for epoch, starts in itertools.product(epochs, (1, 2, 1_000_000))]
    assert numbers == sorted(set(numbers))
    assert max(numbers) < 2**63


def test_what_waits_for_a_peer_that_is_away_is_bounded(new_box: NewBox) -> None:
    a = new_box("a", {"small": free_address(), "large": free_address()})
    small = sum(a.send("small", Blob(b"x")) for _ in range(2 * curve.HIGH_WATER_MARK))
    assert small == curve.HIGH_WATER_MARK
    body = Blob(bytes(2**20 - 100))
    large = sum(a.send("large", body) for _ in range(200))
    assert large * 2**20 <= curve.MAX_LARGE_BYTES + 2**20
    assert a.counters.undelivered == 2 * curve.HIGH_WATER_MARK - small + 200 - large


def test_large_messages_are_let_through_again_once_some_have_left(
    new_box: NewBox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curve, "MAX_LARGE_BYTES", 2**20)
    address = free_address()
    a = new_box("a", {"b": address})
    body = Blob(bytes(400_000))
    assert [a.send("b", body) for _ in range(4)] == [True, True, False, False]
    b = new_box("b", at=address)
    b.take(2)
    eventually(lambda: a.send("b", body), "room")


def test_a_peer_is_found_again_after_another_program_had_its_port(
    new_box: NewBox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curve, "RENEW_S", 0.2)
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("127.0.0.1", 0))
        server.listen()
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        a = new_box("a", {"b": address})
        a.send("b", Blob(b"lost"))
        server.settimeout(DEADLINE_S)
        connection, _ = server.accept()
        with connection, contextlib.suppress(ConnectionResetError):
            connection.sendall(b"HTTP/1.0 400 Bad Request\r\n\r\n" + bytes(100))
            while connection.recv(4096):
                pass
    b = new_box("b", at=address)

    def arrived() -> bool:
        a.send("b", Blob(b"again"))
        return any(each.body.data == b"again" for each in b.receive())

    eventually(arrived, "the message")


def test_without_keys_other_machines_are_out_of_reach(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="without keys is only allowed on a loopback address"):
        Mailbox("a", 1, f"ipc://{tmp_path}/a", {"b": "tcp://192.0.2.1:8600"}, Codec(Blob))


def test_a_peer_may_not_move_an_address_of_the_topology(new_box: NewBox) -> None:
    a = new_box("a")
    b = new_box("b", {"a": a.address})
    b.add_peer("a", free_address())
    b.send("a", Blob(b"x"))
    a.take(1)


def test_keys_are_not_shown(network: Network) -> None:
    assert network.secret not in repr(network)
