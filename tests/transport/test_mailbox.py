"""Mailboxes between real processes that are killed: restarts, queues, and frames that must not count."""

from __future__ import annotations

import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import zmq
from mailbox_peer import Blob, Body, Number

from llm_runtime.transport import Codec, Envelope, Mailbox, mailbox

DEADLINE_S = 20.0
Addresses = Callable[[str], str]


@pytest.fixture(params=["ipc", "tcp"])
def addresses(request: pytest.FixtureRequest, tmp_path: Path) -> Addresses:
    """The address of each name: a socket file, or a port of the loopback interface."""
    known: dict[str, str] = {}

    def address(name: str) -> str:
        if name not in known:
            if request.param == "ipc":
                known[name] = f"ipc://{tmp_path}/{name}"
            else:
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", 0))
                    known[name] = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
        return known[name]

    return address


class Box(Mailbox[Body]):
    """The test's own mailbox; remembers which incarnations of which peers it has met."""

    def __init__(self, addresses: Addresses, name: str, *peers: str, incarnation: int = 1, max_bytes: int = 2**20):
        self.met: list[tuple[str, int]] = []
        super().__init__(
            name,
            incarnation,
            addresses(name),
            {peer: addresses(peer) for peer in peers},
            Codec(Body, max_bytes),
            lambda peer, number: self.met.append((peer, number)),
        )

    def take(self, count: int) -> list[Envelope[Body]]:
        """The next `count` messages."""
        taken: list[Envelope[Body]] = []
        deadline = time.monotonic() + DEADLINE_S
        while len(taken) < count:
            left = deadline - time.monotonic()
            assert left > 0, f"only {len(taken)} of {count} messages came"
            self.poll(left)
            taken.extend(self.receive(limit=count - len(taken)))
        return taken

    def numbers(self, count: int) -> list[int]:
        return [envelope.body.value for envelope in self.take(count) if isinstance(envelope.body, Number)]


NewBox = Callable[..., Box]


class Echo:
    """The process of `mailbox_peer.py`."""

    def __init__(self, addresses: Addresses) -> None:
        self.addresses = addresses
        self.incarnation = 0
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        self.incarnation += 1
        program = str(Path(__file__).with_name("mailbox_peer.py"))
        names = ["echo", str(self.incarnation), self.addresses("echo"), "test", self.addresses("test")]
        self.process = subprocess.Popen(
            [sys.executable, program, *names],
            stdout=subprocess.PIPE,
            text=True,
            env={"PYTHONPATH": ":".join(path for path in sys.path if path)},
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            assert self.process.wait(DEADLINE_S) == -signal.SIGKILL
            assert self.process.stdout is not None
            self.process.stdout.close()
            self.process = None


@pytest.fixture
def echo(addresses: Addresses) -> Iterator[Echo]:
    process = Echo(addresses)
    yield process
    process.kill()


@pytest.fixture
def new_box(addresses: Addresses) -> Iterator[NewBox]:
    """Makes mailboxes, and closes them after the test."""
    boxes = []

    def new(name: str, *peers: str, **options: int) -> Box:
        boxes.append(Box(addresses, name, *peers, **options))
        return boxes[-1]

    yield new
    for box in boxes:
        box.close(0)


@pytest.fixture
def box(new_box: NewBox) -> Box:
    return new_box("test", "echo")


class Raw:
    """A socket that sends any bytes to the test's mailbox."""

    def __init__(self, addresses: Addresses) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.PUSH)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(addresses("test"))

    def send(self, sender: str, incarnation: int, seq: int, body: Body) -> None:
        self.socket.send(msgspec.msgpack.encode((sender, incarnation, seq, body)))


@pytest.fixture
def raw(addresses: Addresses, box: Box) -> Iterator[Raw]:
    raw = Raw(addresses)
    yield raw
    raw.socket.close(0)
    raw.context.term()


# -- restarts ------------------------------------------------------------------------------------------------------


def test_killed_peer_comes_back_under_its_address(echo: Echo, box: Box) -> None:
    echo.start()
    for number in range(3):
        box.send("echo", Number(number))
    assert box.numbers(3) == [0, 1, 2]
    for restart in range(2, 4):
        echo.kill()
        for number in range(100):
            assert box.send("echo", Number(number))  # waits for the successor
        echo.start()
        answers = box.take(100)
        assert [envelope.body for envelope in answers] == [Number(number) for number in range(100)]
        assert {envelope.incarnation for envelope in answers} == {restart}
        assert [envelope.seq for envelope in answers] == list(range(100))
    assert box.met == [("echo", 1), ("echo", 2), ("echo", 3)]
    assert (box.counters.lost, box.counters.stale, box.counters.malformed) == (0, 0, 0)


def test_peer_that_starts_later(echo: Echo, box: Box) -> None:
    for number in range(1000):
        assert box.send("echo", Number(number))
    echo.start()
    assert box.numbers(1000) == list(range(1000))


def test_killed_at_any_moment(echo: Echo, box: Box) -> None:
    """Under load, with kills in the middle: what was not answered is sent again, and in the end all is answered."""
    echo.start()
    waiting, kills = set(range(2000)), 0
    answered: set[int] = set()
    deadline = time.monotonic() + DEADLINE_S
    latest = 0
    while waiting and time.monotonic() < deadline:
        for number in sorted(waiting)[:100]:
            box.send("echo", Number(number))
        if kills < 5 and len(answered) >= 300 * (kills + 1):
            echo.kill()
            echo.start()
            kills += 1
        box.poll(0.2)
        for envelope in box.receive(limit=1000):
            assert envelope.incarnation >= latest
            latest = envelope.incarnation
            assert isinstance(envelope.body, Number)
            answered.add(envelope.body.value)
        waiting -= answered
    assert not waiting
    assert kills == 5
    assert [number for _, number in box.met] == sorted({number for _, number in box.met})


def test_receiver_starts_anew(new_box: NewBox) -> None:
    """The other side of a restart: the new receiver meets the same incarnation, in the middle of its sequence."""
    sender = new_box("sender", "test")
    first = new_box("test")
    for number in range(5):
        sender.send("test", Number(number))
    assert first.numbers(5) == [0, 1, 2, 3, 4]
    first.close(0)
    second = new_box("test", incarnation=2)
    for number in range(5, 8):
        sender.send("test", Number(number))
    last: list[int] = []
    while last[-1:] != [7]:
        last += second.numbers(1)
    assert last == sorted(last)
    assert second.met == [("sender", 1)]
    assert second.counters.lost == 0  # what went to the first was not lost


def test_a_socket_file_left_behind(tmp_path: Path) -> None:
    path = tmp_path / "test"
    leftover = socket.socket(socket.AF_UNIX)
    leftover.bind(str(path))
    leftover.close()
    assert path.exists()
    box = Box(lambda name: f"ipc://{tmp_path}/{name}", "test", "test")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    box.send("test", Number(1))
    assert box.numbers(1) == [1]
    box.close(0)


# -- frames that do not count --------------------------------------------------------------------------------------


def test_dead_incarnations_are_dropped(raw: Raw, box: Box) -> None:
    raw.send("a", 2, 0, Number(1))
    raw.send("a", 1, 0, Number(2))
    raw.send("a", 1, 1, Number(3))
    raw.send("b", 1, 0, Number(4))
    raw.send("a", 3, 0, Number(5))
    raw.send("a", 2, 1, Number(6))
    raw.send("a", 3, 1, Number(7))
    assert box.numbers(4) == [1, 4, 5, 7]
    assert (box.counters.stale, box.counters.lost, box.counters.received) == (3, 0, 4)
    assert box.met == [("a", 2), ("b", 1), ("a", 3)]


def test_missing_frames_are_counted(raw: Raw, box: Box) -> None:
    raw.send("a", 1, 0, Number(0))
    raw.send("a", 1, 4, Number(4))
    raw.send("a", 1, 5, Number(5))
    raw.send("a", 2, 2, Number(6))  # the first two frames of a new incarnation are missing
    assert box.numbers(4) == [0, 4, 5, 6]
    assert box.counters.lost == 3 + 2


def test_junk_is_counted_and_survived(raw: Raw, box: Box) -> None:
    for junk in (b"", b"\xc1", b"\x94", b"GET / HTTP/1.1\r\n\r\n", b"\x00" * 1000):
        raw.socket.send(junk)
    raw.send("a", 1, 0, Number(1))
    assert box.numbers(1) == [1]
    assert box.counters.malformed == 5


def test_multipart_frames_are_single_messages(raw: Raw, box: Box) -> None:
    frame = msgspec.msgpack.encode(("a", 1, 0, Number(1)))
    raw.socket.send_multipart([b"junk", frame])
    assert box.numbers(1) == [1]
    assert box.counters.malformed == 1


def test_senders_are_bounded(raw: Raw, box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mailbox, "MAX_SENDERS", 3)
    for number in range(5):
        raw.send(f"sender{number}", 1, 0, Number(number))
    raw.send("sender0", 1, 1, Number(9))
    assert box.numbers(4) == [0, 1, 2, 9]
    assert box.counters.unknown_sender == 2


def test_oversized(new_box: NewBox, addresses: Addresses, echo: Echo) -> None:
    box = new_box("test", "echo", max_bytes=1000)
    raw = Raw(addresses)
    echo.start()
    assert not box.send("echo", Blob(b"x" * 1000))
    assert box.send("echo", Number(1))
    assert box.numbers(1) == [1]
    assert (box.counters.undelivered, box.counters.lost) == (1, 0)
    raw.send("a", 1, 0, Blob(b"x" * 1500))  # over the limit of the codec
    raw.send("a", 1, 1, Number(2))
    assert box.numbers(1) == [2]
    assert box.counters.oversized == 1
    raw.send("a", 1, 2, Blob(b"x" * 1_000_000))  # over the limit of the socket: never taken into memory
    box.send("echo", Number(3))
    assert box.numbers(1) == [3]
    assert box.counters.oversized == 1
    raw.socket.close(0)
    raw.context.term()


# -- queues --------------------------------------------------------------------------------------------------------


def test_full_queue(new_box: NewBox, echo: Echo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mailbox, "HIGH_WATER_MARK", 50)
    box = new_box("test", "echo", "other")
    sent = [box.send("echo", Number(number)) for number in range(80)]
    taken = sum(sent)
    assert sent == [True] * taken + [False] * (80 - taken)  # send never blocks
    assert 50 <= taken < 80
    assert box.counters.undelivered == 80 - taken
    assert box.send("other", Number(0))  # other peers have queues of their own
    echo.start()
    answers = box.take(taken)
    assert [envelope.body for envelope in answers] == [Number(number) for number in range(taken)]
    assert box.send("echo", Number(99))
    assert box.numbers(1) == [99]
    assert box.counters.lost == 0  # what was refused took no sequence number


def test_unknown_peer(box: Box) -> None:
    assert not box.send("nobody", Number(1))
    assert box.counters.undelivered == 1


def test_peer_added_and_moved(new_box: NewBox, addresses: Addresses, box: Box) -> None:
    for place in ("old", "new"):
        other = new_box(place)
        box.add_peer("other", addresses(place))
        assert box.send("other", Number(1))
        assert other.numbers(1) == [1]
        other.close(0)
    with pytest.raises(ValueError):
        box.add_peer("other", "tcp://0.0.0.0:1")


def test_receive_takes_no_more_than_the_limit(raw: Raw, box: Box) -> None:
    for number in range(10):
        raw.send("a", 1, number, Number(number))
    assert box.poll(DEADLINE_S)
    first = list(box.receive(limit=3))
    assert 1 <= len(first) <= 3
    box.take(10 - len(first))
    assert not box.poll(0)
    assert list(box.receive()) == []


def test_what_was_sent_before_close_arrives(new_box: NewBox, box: Box) -> None:
    sender = new_box("sender", "test")
    for number in range(100):
        sender.send("test", Number(number))
    sender.close(linger_s=DEADLINE_S)
    assert box.numbers(100) == list(range(100))


@pytest.mark.parametrize(
    "address",
    [
        "tcp://0.0.0.0:5000",
        "tcp://*:5000",
        "tcp://192.168.1.1:5000",
        "tcp://example.org:5000",
        "tcp://[::]:5000",
        "udp://127.0.0.1:5000",
        "inproc://x",
        "x",
        "",
        "ipc://" + "x" * 200,
    ],
)
def test_addresses_that_are_refused(tmp_path: Path, address: str) -> None:
    with pytest.raises(ValueError):
        Mailbox("test", 1, address, {}, Codec(Body))
    with pytest.raises(ValueError):
        Mailbox("test", 1, f"ipc://{tmp_path}/test", {"peer": address}, Codec(Body))


def test_an_inbox_whose_file_was_removed_is_bound_again(tmp_path: Path):
    def addresses(name: str) -> str:
        return f"ipc://{tmp_path}/{name}"

    inbox, known = Box(addresses, "a"), Box(addresses, "b", "a")
    assert known.send("a", Number(1))
    assert inbox.take(1)[0].body == Number(1)
    inbox.keep_address()
    before = (tmp_path / "a").stat().st_ino
    for _ in range(2):
        (tmp_path / "a").unlink()
        inbox.keep_address()
        assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600
        new = Box(addresses, "c", "a", incarnation=before)
        assert new.send("a", Number(2))
        assert known.send("a", Number(3))
        assert {each.body.value for each in inbox.take(2)} == {2, 3}
        new.close()
        before += 1
    tmp_path.chmod(0o700)
    inbox.close()
    known.close()
