"""The codec takes back what it made, and of everything else it makes MalformedMessage or OversizedMessage."""

from __future__ import annotations

import random
from typing import Any

import msgpack  # type: ignore[import-untyped]
import msgspec
import pytest
from mailbox_peer import Blob, Body, Number

from llm_runtime.transport import Codec, Envelope, MalformedMessage, OversizedMessage

CODEC: Codec[Body] = Codec(Body, max_bytes=4096)
FRAMES = [
    CODEC.encode("peer", 3, 7, Number(12)),
    CODEC.encode("peer", 3, 8, Blob(b"\x00\xff" * 40, ["ä", "🚀"])),
    CODEC.encode("", 0, 0, Number(-(2**63))),
]


def is_refused(frame: bytes) -> bool:
    """Whether a frame is refused. Any other exception than the codec's own fails the test."""
    try:
        envelope = CODEC.decode(frame)
    except (MalformedMessage, OversizedMessage):
        return True
    assert isinstance(envelope, Envelope)
    assert isinstance(envelope.body, Number | Blob)
    return False


def test_round_trip() -> None:
    envelope = CODEC.decode(FRAMES[1])
    assert envelope == Envelope("peer", 3, 8, Blob(b"\x00\xff" * 40, ["ä", "🚀"]))


@pytest.mark.parametrize("frame", FRAMES)
def test_truncated(frame: bytes) -> None:
    for length in range(len(frame)):
        assert is_refused(frame[:length])
    assert is_refused(frame + b"\x00")


def test_random_bytes() -> None:
    source = random.Random(1)
    refused = sum(is_refused(source.randbytes(source.randint(0, 60))) for _ in range(20_000))
    assert refused == 20_000


@pytest.mark.parametrize("frame", FRAMES)
def test_flipped_bytes(frame: bytes) -> None:
    source = random.Random(2)
    for _ in range(5_000):
        changed = bytearray(frame)
        for _ in range(source.randint(1, 3)):
            changed[source.randrange(len(changed))] = source.randrange(256)
        is_refused(bytes(changed))


@pytest.mark.parametrize(
    "value",
    [
        None,
        5,
        "text",
        {},
        {"sender": "peer", "incarnation": 1, "seq": 0, "body": ["Number", 1]},
        [],
        ["peer", 1, 0],
        ["peer", 1, 0, None],
        ["peer", 1, 0, []],
        ["peer", 1, 0, ["Unknown", 1]],
        ["peer", 1, 0, ["Number"]],
        ["peer", 1, 0, ["Number", "1"]],
        ["peer", 1, 0, ["Number", 1.5]],
        ["peer", 1, 0, ["Blob", "text"]],
        ["peer", 1, 0, ["Blob", b"", [1]]],
        ["peer", 1, 0, ["Blob", b"", {"a": 1}]],
        ["peer", 1, 0, {"type": "Number", "value": 1}],
        ["peer", "1", 0, ["Number", 1]],
        ["peer", 1, None, ["Number", 1]],
        [5, 1, 0, ["Number", 1]],
        [["peer"], 1, 0, ["Number", 1]],
    ],
)
def test_wrong_types(value: Any) -> None:
    assert is_refused(msgpack.packb(value))


@pytest.mark.parametrize(
    "frame",
    [
        b"\x94\xa4peer\x01\x00" + b"\x91" * 3000,  # deep nesting
        b"\xdd\xff\xff\xff\xff" + b"\x00" * 10,  # an array of four thousand million items
        b"\xdb\xff\xff\xff\xff" + b"a" * 10,
        b"\xc6\xff\xff\xff\xff" + b"a" * 10,
        b"\x94\xa4\xff\xfe\xfd\xfc\x01\x00\x92\xa6Number\x01",  # a name that is not UTF-8
        b"\x94\xa4peer\x01\x00\x92\xa6Number\xc7\x03\x05abc",  # an extension type
        b"\x94\xa4peer\x01\x00\x92\xa6Number\xcf\xff\xff\xff\xff\xff\xff\xff\xff\x00",
        b"\xc1",
        b"",
    ],
)
def test_hostile_frames(frame: bytes) -> None:
    assert is_refused(frame)


def test_nested_values_are_bounded() -> None:
    anything: Codec[Any] = Codec(Any, max_bytes=2**20)
    with pytest.raises(MalformedMessage):
        anything.decode(b"\x94\xa4peer\x01\x00" + b"\x91" * 500_000 + b"\x00")


def test_oversized() -> None:
    with pytest.raises(OversizedMessage, match=r"Blob of 5\d\d\d bytes is over the limit of 4096"):
        CODEC.encode("peer", 1, 0, Blob(b"x" * 5000))
    frame: bytes = msgspec.msgpack.encode(("peer", 1, 0, ("Blob", b"x" * 5000)))
    with pytest.raises(OversizedMessage, match="frame"):
        CODEC.decode(frame)
    room = 4096 - len(CODEC.encode("peer", 1, 0, Blob(b"x" * 1000))) + 1000
    assert CODEC.decode(CODEC.encode("peer", 1, 0, Blob(b"x" * room))).body == Blob(b"x" * room)
    with pytest.raises(OversizedMessage):
        CODEC.encode("peer", 1, 0, Blob(b"x" * (room + 1)))
