"""The journal of open connections: whatever a killed process leaves is a log that makes sense."""

from __future__ import annotations

import os
import random
import signal
import socket
import struct
from collections.abc import Iterator

import pytest

from llm_runtime.actors.ingress.journal import GRAIN_BYTES, MAX_RESUMED, Journal, Slot, slot_bytes
from llm_runtime.actors.ingress.output_deltas import Identity, OutputDelta
from llm_runtime.actors.ingress.positions import positions
from llm_runtime.transport import Arena

SLOT = slot_bytes(2**16)
SERIAL = 7


@pytest.fixture
def arena() -> Iterator[int]:
    """The descriptor of a memory file with room for four slots."""
    descriptor = Arena.create("journal", 4 * SLOT)
    yield descriptor
    os.close(descriptor)


def journal(arena: int, limit_bytes: int = 4 * SLOT) -> Journal:
    return Journal(arena, SLOT, limit_bytes)


def opened(arena: int) -> Slot:
    slot = journal(arena).open(SERIAL)
    assert slot is not None
    return slot


def delta(number: int) -> OutputDelta:
    return OutputDelta([number], f"t{number}", None, None, None, 0, None)


def connected() -> tuple[socket.socket, socket.socket]:
    """Both ends of a TCP connection, the server's first."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        return listener.accept()[0], client


def test_positions() -> None:
    server, client = connected()
    with server, client:
        assert positions(server) == (0, 0)
        client.sendall(b"x" * 100)
        server.sendall(b"y" * 50)
        server.recv(60)
        assert positions(server) == (60, 50)
        client.recv(50)
        client.shutdown(socket.SHUT_WR)
        assert len(server.recv(1000)) == 40
        assert server.recv(1000) == b""
        assert positions(server) == (100, 50)
        server.shutdown(socket.SHUT_WR)
        with pytest.raises(ConnectionAbortedError):
            positions(server)


def test_what_is_written_is_recovered(arena: int) -> None:
    slot = opened(arena)
    inlet = slot.inlet()
    assert inlet is not None
    inlet[:5] = b"hello"
    slot.read(5)
    identity = Identity("r", 1.5, 2, 3)
    slot.identity(identity)
    slot.prompts([b"1234"])
    for number in range(3):
        slot.delta(number % 2, delta(number))
    slot.sent(b"head+first", 2, last=False, aside=False, closes=False)
    slot.attempt(1, 4)
    recovered = journal(arena).reopen(0).recover(SERIAL, 5, 6)
    assert recovered.received == b"hello"
    assert recovered.unsent == b"irst"
    assert not recovered.answered
    replay = recovered.replay
    assert (replay.identity, replay.prompts, replay.attempts) == (identity, [b"1234"], {1: 4})
    assert replay.deltas == [(number % 2, delta(number)) for number in range(3)]
    assert (replay.begun, replay.covered) == (True, 2)


def test_an_answered_request_is_forgotten_but_not_what_is_unsent(arena: int) -> None:
    slot = opened(arena)
    assert slot.inlet()
    slot.read(100)
    slot.delta(0, delta(1))
    slot.sent(b"x" * 50, 1, last=True, aside=False, closes=False)
    assert journal(arena).reopen(0).recover(SERIAL, 100, 10).answered == 1
    slot = journal(arena).reopen(0)
    slot.recover(SERIAL, 100, 10)
    slot.forget(b"x" * 40)
    recovered = journal(arena).reopen(0).recover(SERIAL, 100, 20)
    assert (recovered.received, recovered.answered, recovered.unsent) == (b"", 0, b"x" * 30)
    assert recovered.idle
    assert not recovered.replay.deltas


def test_bytes_that_were_read_and_not_journalled(arena: int) -> None:
    slot = opened(arena)
    inlet = slot.inlet()
    assert inlet is not None
    inlet[:3] = b"abc"  # killed before `read`
    assert journal(arena).reopen(0).recover(SERIAL, 3, 0).received == b"abc"
    assert journal(arena).reopen(0).recover(SERIAL, 3, 0).received == b"abc"


def test_a_log_that_does_not_fit_the_connection(arena: int) -> None:
    slot = opened(arena)
    slot.sent(b"abc", 0, last=False, aside=False, closes=False)
    for serial, read, taken in ((SERIAL + 1, 0, 3), (SERIAL, 10**6, 3), (SERIAL, 0, 4)):
        with pytest.raises(ValueError):
            journal(arena).reopen(0).recover(serial, read, taken)
    with pytest.raises(ValueError):
        journal(arena).reopen(99)


def test_a_connection_without_progress_is_given_up(arena: int) -> None:
    opened(arena)
    for _ in range(MAX_RESUMED):
        journal(arena).reopen(0).recover(SERIAL, 0, 0)
    with pytest.raises(ValueError, match="without any progress"):
        journal(arena).reopen(0).recover(SERIAL, 0, 0)


def test_damaged_logs_are_refused_or_read(arena: int) -> None:
    chance = random.Random(1)
    for _ in range(300):
        slot = opened(arena)
        for number in range(10):
            slot.delta(0, delta(number))
        slot.sent(b"x" * 100, 5, last=False, aside=False, closes=False)
        for _ in range(3):
            os.pwrite(arena, struct.pack("=I", chance.getrandbits(32)), chance.randrange(0, 300))
        try:
            journal(arena).reopen(0).recover(SERIAL, 0, 100)
        except ValueError:
            pass


def test_memory_is_bounded_and_given_back(arena: int) -> None:
    full: list[int] = []
    whole = journal(arena, 6 * GRAIN_BYTES)
    slots = [whole.open(serial) for serial in range(2)]
    for number, slot in enumerate(slots):
        assert slot is not None
        slot.on_full = lambda number=number: full.append(number)
    first, second = slots
    assert first is not None
    assert second is not None
    first.sent(b"x" * 4 * GRAIN_BYTES, 0, last=False, aside=False, closes=False)
    assert full == []
    second.sent(b"x" * 2 * GRAIN_BYTES, 0, last=False, aside=False, closes=False)
    assert full == [1]
    assert second.full
    second.delta(0, delta(0))
    assert full == [1]
    for slot in (first, second):
        slot.release()
    assert whole.used_bytes == 4 * GRAIN_BYTES  # kept for the next request
    assert os.fstat(arena).st_blocks * 512 <= 4 * GRAIN_BYTES
    third, fourth = whole.open(5), whole.open(6)
    assert third is not None
    assert fourth is not None
    third.release()
    fourth.sent(b"x" * (5 * GRAIN_BYTES - 1000), 0, last=False, aside=False, closes=False)
    assert not fourth.full, "what was kept goes to who needs it"


def test_slots_belong_to_connections(arena: int) -> None:
    """A new incarnation finds whose they are, and gives the memory of all others back."""
    first = journal(arena)
    slots = [first.open(serial, 10, 20) for serial in (3, 4, 5, 6)]
    assert first.open(7) is None
    assert all(slots)
    for slot in slots[:2]:
        assert slot is not None
        slot.delta(0, delta(0))
        slot.release()
        slot.delta(0, delta(1))  # too late: it may be another one's now
        slot.sent(b"x", 0, last=False, aside=False, closes=False)
    used = os.fstat(arena).st_blocks
    second = journal(arena)
    owners = second.owners({3, 5})
    assert set(owners) == {5}
    assert os.fstat(arena).st_blocks < used
    recovered = second.reopen(owners[5]).recover(5, 10, 20)
    assert (recovered.received, recovered.unsent, recovered.idle) == (b"", b"", True)
    assert all(second.open(serial) for serial in (8, 9, 10))


def test_a_slot_without_room_is_given_up_before_its_memory(arena: int) -> None:
    """Else a successor would take the connection for one that has no request."""
    slot = journal(arena, 2 * GRAIN_BYTES).open(SERIAL)
    assert slot is not None
    owners = []
    slot.on_full = lambda: owners.append(journal(arena).owners({SERIAL}))
    slot.sent(b"x" * 4 * GRAIN_BYTES, 0, last=False, aside=False, closes=False)
    assert owners == [{SERIAL: 0}]


def test_killed_at_any_moment(arena: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that reads, journals and sends without end is killed, and the next one goes on at the same byte."""
    monkeypatch.setattr("llm_runtime.actors.ingress.journal.MAX_RESUMED", 1000)
    server, client = connected()
    server.setblocking(False)
    client.settimeout(10)
    assert journal(arena).open(SERIAL) is not None
    chance = random.Random(1)
    sent, received, deltas = 0, b"", 0
    with server, client:
        for _ in range(40):
            ready, theirs = os.pipe()
            child = os.fork()
            if child == 0:
                _echo_for_ever(arena, server, theirs)
            os.close(theirs)
            os.read(ready, 1)
            for _ in range(chance.randrange(1, 30)):
                client.sendall(b"%08d" % sent)
                sent += 1
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(ready)
            recovered = journal(arena).reopen(0).recover(SERIAL, *positions(server))
            numbers = [each.tokens[0] for _, each in recovered.replay.deltas]
            assert numbers == list(range(len(numbers)))
            assert len(numbers) >= deltas
            deltas = len(numbers)
            assert bytes(recovered.received) == b"".join(b"%08d" % i for i in range(sent))[: len(recovered.received)]
        while len(received) < positions(server)[1]:
            received += client.recv(2**16)
        whole = received + recovered.unsent
        assert whole == b"".join(b"%08d" % i for i in range(len(whole) // 8))
        assert whole


def _echo_for_ever(arena: int, server: socket.socket, ready: int) -> None:
    """Answers each eight bytes with eight bytes, which are numbered."""
    try:
        slot = journal(arena).reopen(0)
        recovered = slot.recover(SERIAL, *positions(server))
        count = len(recovered.replay.deltas)
        answered = (positions(server)[1] + len(recovered.unsent)) // 8
        server.setblocking(True)
        server.sendall(recovered.unsent)
        os.write(ready, b"x")
        total = len(recovered.received)
        while True:
            while answered < total // 8:
                slot.delta(0, delta(count))
                count += 1
                data = b"%08d" % answered
                answered += 1
                slot.sent(data, count, last=False, aside=False, closes=False)
                server.sendall(data)
                slot.taken()
            inlet = slot.inlet()
            assert inlet is not None
            got = server.recv_into(inlet)
            slot.read(got)
            total += got
    finally:
        os._exit(1)
