"""Every transfer engine between real processes: what is read is what was there, whatever becomes of the peer."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq
from transfer_peer import STUCK, Peer, Unavailable

from llm_runtime.transport import Arena
from llm_runtime.transport.transfer import Piece, Region, TransferSettings, TransferUnavailable, create_engine
from llm_runtime.transport.transfer.listeners import listening, restrict, restrict_new

MIB = 2**20
SIZE = 64 * MIB
KINDS = ("shm", "tcp", "mooncake", "nixl")
PUBLIC, SECRET = (key.decode() for key in zmq.curve_keypair())
KEYS = {"public": PUBLIC, "secret": SECRET}
NewPeer = Callable[..., Peer]
draw = np.random.default_rng(3)
_names = itertools.count()


def settings_of(kind: str) -> dict[str, Any]:
    return {"kind": kind, **(KEYS if kind == "tcp" else {})}


def memory(mib: int, random: bool) -> tuple[str, int]:
    """Name and descriptor of new memory."""
    name = f"memory{next(_names)}"
    descriptor = Arena.create(name, mib * MIB)
    if random:
        np.frombuffer(Arena(descriptor).buffer, np.uint64)[:] = draw.integers(0, 2**63, mib * MIB // 8)
    return name, descriptor


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def sources(kind: str) -> dict[str, int]:
    """The memory of all senders: two arenas."""
    return dict(memory(SIZE // MIB, random=True) for _ in range(2))


@pytest.fixture(scope="module")
def new_peer(kind: str, sources: dict[str, int]) -> Iterator[NewPeer]:
    """Makes senders, which have the sources registered, and receivers, which have memory of their own."""
    made: list[Peer] = []

    def make(sends: bool, environment: dict[str, str] | None = None, **settings: Any) -> Peer:
        arenas = sources if sends else dict([memory(SIZE // MIB, random=False)])
        mapped = sources if kind == "shm" and not sends else None
        try:
            made.append(Peer({**settings_of(kind), **settings}, arenas, mapped, environment))
        except Unavailable as reason:
            pytest.skip(str(reason))
        return made[-1]

    yield make
    for peer in made:
        peer.kill()


@pytest.fixture(scope="module")
def sender(new_peer: NewPeer) -> Peer:
    return new_peer(sends=True)


@pytest.fixture(scope="module")
def common_receiver(new_peer: NewPeer) -> Peer:
    return new_peer(sends=False)


@pytest.fixture
def receiver(common_receiver: Peer) -> Peer:
    """Its memory is zeros."""
    common_receiver.memory[0][:] = 0
    return common_receiver


def expected(sender: Peer, receiver: Peer, pieces: list[Piece]) -> np.ndarray[Any, Any]:
    """What the receiver's memory, zeros before, is to be afterwards."""
    whole = np.zeros_like(receiver.memory[0])
    for remote, remote_offset, _, local_offset, length in pieces:
        whole[local_offset : local_offset + length] = sender.memory[remote][remote_offset : remote_offset + length]
    return whole


def check_arrival(sender: Peer, receiver: Peer, pieces: list[Piece]) -> None:
    assert receiver.wait(receiver.read(sender, pieces)) == [""]
    assert np.array_equal(receiver.memory[0], expected(sender, receiver, pieces))


def everything() -> list[Piece]:
    return [Piece(0, offset, 0, offset, MIB) for offset in range(0, SIZE, MIB)]


# -- what is read --------------------------------------------------------------------------------------------------


def test_a_run_of_bytes_arrives_and_nothing_beside_it(sender: Peer, receiver: Peer) -> None:
    check_arrival(sender, receiver, [Piece(1, 12_345, 0, 777, 3_333_333)])


def test_scattered_and_partial_pieces_arrive(sender: Peer, receiver: Peer) -> None:
    size = 368_640
    places = draw.permutation(SIZE // size)[:60].tolist()
    targets = draw.permutation(SIZE // size)[:60].tolist()
    pieces = [
        Piece(number % 2, place * size, 0, target * size, size if number % 3 else 1 + number * 1000)
        for number, (place, target) in enumerate(zip(places, targets, strict=True))
    ]
    check_arrival(sender, receiver, pieces)


def test_64_mib_arrive(sender: Peer, receiver: Peer) -> None:
    check_arrival(sender, receiver, [Piece(1, 0, 0, 0, SIZE)])


def test_no_pieces_and_empty_ones_are_read_at_once(sender: Peer, receiver: Peer) -> None:
    check_arrival(sender, receiver, [])
    check_arrival(sender, receiver, [Piece(0, 0, 0, 0, 0), Piece(0, 5, 0, 9, 3)])


def test_many_reads_at_a_time_all_end_once(sender: Peer, receiver: Peer) -> None:
    pieces = [Piece(0, n * 100_000, 0, (99 - n) * 100_000, 100_000) for n in range(100)]
    handles = [receiver.read(sender, [piece]) for piece in pieces]
    assert len(set(handles)) == 100
    assert receiver.wait(*handles) == [""] * 100
    assert np.array_equal(receiver.memory[0], expected(sender, receiver, pieces))


def test_what_is_written_by_the_peer_later_is_read_later(sender: Peer, receiver: Peer) -> None:
    """Registered memory is read as it is now, not as it was."""
    for _ in range(3):
        sender.memory[0][5000:6000] = draw.integers(0, 256, 1000)
        check_arrival(sender, receiver, [Piece(0, 5000, 0, 5000, 1000)])


def test_many_senders_to_one_receiver(sender: Peer, receiver: Peer, new_peer: NewPeer) -> None:
    other = new_peer(sends=True)
    first = [Piece(0, offset, 0, offset, MIB) for offset in range(0, SIZE // 2, MIB)]
    second = [Piece(1, offset, 0, offset, MIB) for offset in range(SIZE // 2, SIZE, MIB)]
    assert receiver.wait(receiver.read(sender, first), receiver.read(other, second)) == ["", ""]
    assert np.array_equal(receiver.memory[0], expected(sender, receiver, first + second))
    other.kill()


def test_one_sender_to_many_receivers(sender: Peer, receiver: Peer, new_peer: NewPeer) -> None:
    other = new_peer(sends=False)
    pieces = everything()
    handles = [each.read(sender, pieces) for each in (receiver, other)]
    for each, handle in zip((receiver, other), handles, strict=True):
        assert each.wait(handle) == [""]
        assert np.array_equal(each.memory[0], expected(sender, each, pieces))
    assert other.ask("close") == ""
    assert other.process.wait(20) == 0
    check_arrival(sender, receiver, pieces)


# -- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "piece",
    [
        Piece(2, 0, 0, 0, 1),
        Piece(-1, 0, 0, 0, 1),
        Piece(0, SIZE, 0, 0, 1),
        Piece(0, -1, 0, 0, 1),
        Piece(0, 0, 1, 0, 1),
        Piece(0, 0, 0, SIZE - 1, 2),
        Piece(0, 0, 0, 0, -1),
    ],
)
def test_pieces_beyond_the_regions_are_refused(sender: Peer, receiver: Peer, piece: Piece) -> None:
    assert receiver.wait(receiver.read(sender, [Piece(0, 0, 0, 0, 10), piece])) == [
        f"{piece} is not within the registered regions"
    ]
    assert not receiver.memory[0].any()


def test_nonsense_for_an_endpoint_is_refused(kind: str, sender: Peer, receiver: Peer) -> None:
    for endpoint in ("", "00", "93" + "a1" * 40, sender.endpoint[:-20]):
        assert receiver.wait(receiver.read(endpoint, [Piece(0, 0, 0, 0, 10)])) != [""]
    assert not receiver.memory[0].any()
    check_arrival(sender, receiver, [Piece(0, 0, 0, 0, 10)])


# -- what does not go well -----------------------------------------------------------------------------------------


def test_after_a_cancelled_read_has_ended_nothing_is_written(sender: Peer, receiver: Peer) -> None:
    handle = receiver.read(sender, everything())
    receiver.ask("cancel", handle=handle)
    receiver.ask("cancel", handle=10_000)
    assert receiver.wait(handle) in (["the read was cancelled"], [""])
    receiver.memory[0][:] = 7
    other = receiver.read(sender, [Piece(0, 0, 0, 0, MIB)])
    assert receiver.wait(other) == [""]
    assert (receiver.memory[0][MIB:] == 7).all()


def test_the_peer_is_killed_while_it_is_read_from(new_peer: NewPeer, receiver: Peer) -> None:
    victim = new_peer(sends=True)
    assert receiver.wait(receiver.read(victim, [Piece(0, 0, 0, 0, 100)])) == [""]
    handles = [receiver.read(victim, everything()) for _ in range(4)]
    victim.signal(signal.SIGKILL)
    errors = receiver.wait(*handles)
    assert "never ended" not in errors
    if "" in errors:
        assert np.array_equal(receiver.memory[0], expected(victim, receiver, everything()))
    again = new_peer(sends=True)
    receiver.memory[0][:] = 0
    check_arrival(again, receiver, everything())
    for handle in [receiver.read(victim, [Piece(0, 0, 0, 0, 100)]) for _ in range(2)]:
        assert receiver.wait(handle) != ["never ended"]
    check_arrival(again, receiver, everything())
    again.kill()
    victim.kill()


def test_the_peer_is_stopped_while_it_is_read_from(
    kind: str, new_peer: NewPeer, sender: Peer, common_receiver: Peer
) -> None:
    """The read ends, or, where it cannot be ended, the process that reads; and then nothing is written any more."""
    over_tcp = {"UCX_TLS": "tcp"}  # else nixl reads out of the memory of a process of the same machine without its help
    victim = new_peer(sends=True, environment=over_tcp)
    receiver = new_peer(sends=False, environment=over_tcp, timeout_s=1.0)
    assert receiver.wait(receiver.read(victim, [Piece(0, 0, 0, 0, 100)])) == [""]
    victim.signal(signal.SIGSTOP)
    handles = [receiver.read(victim, everything()) for _ in range(4)]
    answer = receiver.wait(*handles)
    if answer == STUCK:
        assert receiver.process.wait(20) == 1
    else:
        assert "never ended" not in answer
        assert kind == "shm" or "" not in answer
    receiver.memory[0][:] = 7
    common_receiver.memory[0][:] = 0
    victim.signal(signal.SIGCONT)
    check_arrival(sender, common_receiver, everything())  # meanwhile the peer has sent what it had queued
    assert (receiver.memory[0] == 7).all()
    victim.kill()
    receiver.kill()


def test_closing_ends_reads_and_the_memory_can_be_registered_again(
    kind: str, new_peer: NewPeer, sender: Peer, sources: dict[str, int]
) -> None:
    descriptor = dict([memory(SIZE // MIB, random=False)])
    for _ in range(2):
        receiver = Peer(settings_of(kind), descriptor, sources if kind == "shm" else None)
        receiver.memory[0][:] = 0
        check_arrival(sender, receiver, everything()[:4])
        receiver.read(sender, everything())
        assert receiver.ask("close") == ""
        assert receiver.process.wait(20) == 0
        receiver.kill()


@pytest.mark.slow
def test_a_gibibyte_arrives(kind: str, sources: dict[str, int]) -> None:
    source, target = dict([memory(1024, random=True)]), dict([memory(1024, random=False)])
    try:
        sender = Peer({**settings_of(kind), "timeout_s": 20.0}, source)
    except Unavailable as reason:
        pytest.skip(str(reason))
    receiver = Peer({**settings_of(kind), "timeout_s": 20.0}, target, source if kind == "shm" else None)
    pieces = [
        Piece(0, offset, 0, 1024 * MIB - 32 * MIB - offset, 32 * MIB) for offset in range(0, 1024 * MIB, 32 * MIB)
    ]
    for piece in pieces:
        assert receiver.wait(receiver.read(sender, [piece])) == [""]
    assert np.array_equal(receiver.memory[0], expected(sender, receiver, pieces))
    sender.kill()
    receiver.kill()


# -- engines that move nothing, settings, listeners ----------------------------------------------------------------


@pytest.mark.parametrize("idle", ["shared", "fake"])
def test_engines_that_move_nothing_end_every_read_at_once(idle: Any) -> None:
    engine = create_engine(TransferSettings(kind=idle))
    engine.register([])
    handles = [engine.read(engine.endpoint(), [Piece(0, 0, 0, 0, 10**9)]) for _ in range(3)]
    assert engine.poll() == [(handle, "") for handle in handles]
    engine.cancel(handles[0])
    assert engine.poll() == []
    engine.close()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kind": "shm", "host": "127.0.0.2"}, "leave out host"),
        ({"kind": "tcp"}, "need a pair of keys"),
        ({"kind": "nixl", **KEYS}, "and no others, need a pair of keys"),
        ({"kind": "nixl", "protocol": "rdma"}, "protocol"),
        ({"kind": "mooncake", "device": "mlx5_0"}, "device"),
        ({"kind": "mooncake", "host": "localhost"}, "IP address"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        create_engine(TransferSettings(**settings))


@pytest.mark.parametrize(
    ("missing", "name", "package"),
    [
        ("mooncake.engine", "mooncake", "mooncake-transfer-engine-non-cuda"),
        ("nixl_cu12._api", "nixl", "nixl-cu12"),
    ],
)
def test_a_missing_package_is_named(missing: str, name: Any, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    with pytest.raises(TransferUnavailable, match=f"pip install {package}=="):
        create_engine(TransferSettings(kind=name))


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_a_socket_that_listens_everywhere_is_kept_to_one_address(family: socket.AddressFamily) -> None:
    before = listening()
    with socket.socket(family) as listener:
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind(("::" if family == socket.AF_INET6 else "0.0.0.0", 0))
        listener.listen()
        assert listening() - before == {listener.fileno()}
        port = listener.getsockname()[1]
        socket.create_connection(("127.0.0.2", port), timeout=5).close()
        restrict_new(before, "127.0.0.1")
        with socket.create_connection(("127.0.0.1", port), timeout=5) as client:
            accepted = [listener.accept()[0] for _ in range(2)][-1]
            client.sendall(b"hello")
            assert accepted.recv(5) == b"hello"
            accepted.close()
        with pytest.raises(TimeoutError):
            socket.create_connection(("127.0.0.2", port), timeout=0.3)
        if family == socket.AF_INET6:
            restrict(listener.fileno(), "::1")
            socket.create_connection(("::1", port), timeout=5).close()
            with pytest.raises(TimeoutError):
                socket.create_connection(("127.0.0.1", port), timeout=0.3)


def test_what_an_engine_listens_on_is_reached_under_its_address_alone(sender: Peer) -> None:
    inodes = set()
    for name in os.listdir(f"/proc/{sender.process.pid}/fd"):
        target = os.readlink(f"/proc/{sender.process.pid}/fd/{name}")
        if target.startswith("socket:"):
            inodes.add(target[8:-1])
    ports = set()
    for table in ("tcp", "tcp6"):
        with open(f"/proc/{sender.process.pid}/net/{table}") as lines:
            for fields in itertools.islice(map(str.split, lines), 1, None):
                if fields[3] == "0A" and fields[9] in inodes:
                    ports.add(int(fields[1].rpartition(":")[2], 16))
    for port in ports:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
        with pytest.raises((TimeoutError, ConnectionRefusedError)):
            socket.create_connection(("127.0.0.2", port), timeout=0.3)


# -- who may read ------------------------------------------------------------------------------------------------------

ATTACK = """
import os, sys, msgspec, zmq
address, public, secret, server, uid = sys.argv[1:]
if int(uid): os.setuid(int(uid))
socket = zmq.Context().socket(zmq.DEALER)
socket.setsockopt(zmq.LINGER, 0)
if public:
    socket.setsockopt(zmq.CURVE_PUBLICKEY, public.encode())
    socket.setsockopt(zmq.CURVE_SECRETKEY, secret.encode())
    socket.setsockopt(zmq.CURVE_SERVERKEY, server.encode())
socket.connect(address)
socket.send(msgspec.msgpack.encode([1, [[0, 0, 1 << 20]]]))
print(sum(len(each) for each in socket.recv_multipart()) if socket.poll(3000) else "nothing")
"""


@pytest.mark.parametrize("who", ["nobody's uid", "same uid"])
def test_only_those_with_the_keys_can_read_over_tcp(who: str) -> None:
    """Another user of the machine gets nothing through the port on the loopback interface."""
    uid = 65534 if who == "nobody's uid" else 0
    if uid and os.getuid():
        pytest.skip("needs root, to become another user")
    sender = Peer(settings_of("tcp"), dict([memory(1, random=True)]))
    address = msgspec.msgpack.decode(bytes.fromhex(sender.endpoint))[2].decode()
    assert address.startswith("tcp://127.0.0.1:")
    other_public, other_secret = (key.decode() for key in zmq.curve_keypair())
    attempts = {
        "without keys": ("", "", ""),
        "with other keys": (other_public, other_secret, PUBLIC),
        "with the public key alone": (PUBLIC, other_secret, PUBLIC),
        "as one of the deployment": (PUBLIC, SECRET, PUBLIC),
    }
    running = {
        name: subprocess.Popen(
            [sys.executable, "-c", ATTACK, address, *keys, str(uid)], stdout=subprocess.PIPE, text=True
        )
        for name, keys in attempts.items()
    }
    got = {name: process.communicate(timeout=30)[0].strip() for name, process in running.items()}
    assert got == dict.fromkeys(list(attempts)[:-1], "nothing") | {"as one of the deployment": str(2**20 + 1)}
    sender.kill()


@pytest.mark.parametrize(
    "request_",
    [b"", b"\xc1", b"[]", [1, [[9, 0, 8]]], [1, [[0, 2**20, 1]]], [1, [[0, 0, 2**40]]], [1, [[-1, 0, 1]]], [1, []]],
)
def test_requests_beyond_the_memory_are_refused_over_tcp(request_: Any) -> None:
    settings = TransferSettings(**settings_of("tcp"))
    engine = create_engine(settings)
    engine.register([Region("a", memoryview(bytearray(2**20)))])
    address = msgspec.msgpack.decode(engine.endpoint())[2]
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    for option, value in ((zmq.CURVE_PUBLICKEY, PUBLIC), (zmq.CURVE_SECRETKEY, SECRET), (zmq.CURVE_SERVERKEY, PUBLIC)):
        socket.setsockopt(option, value.encode())
    socket.connect(address)
    socket.send(request_ if isinstance(request_, bytes) else msgspec.msgpack.encode(request_))
    socket.send(msgspec.msgpack.encode([7, [[0, 2**20 - 3, 3]]]))
    answers = []
    while not answers or answers[-1][0] != b"\x07":
        assert socket.poll(20_000)
        answers.append(socket.recv_multipart())
    assert answers[-1] == [b"\x07", bytes(3)]
    assert answers[:-1] in ([], [[b"\x01"]]), "the number alone, or nothing"
    socket.close(0)
    context.term()
    engine.close()
