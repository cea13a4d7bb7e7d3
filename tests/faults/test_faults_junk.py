"""What is no message, thrown at every actor's mailbox: nobody dies, everything is counted, service goes on."""

from __future__ import annotations

import concurrent.futures
import random
from collections.abc import Iterator

import msgspec
import pytest
import zmq
from support import Node, eventually

from llm_runtime.actors import messages
from llm_runtime.transport import Codec
from llm_runtime.transport.codec import DEFAULT_MAX_BYTES

COUNT = 10_000
PEERS = {
    "bootstrap": "main.scheduler",
    "main.rank0": "main.scheduler",
    "main.grammar": "main.scheduler",
    "main.scheduler": "detokenizer",
    "detokenizer": "main.scheduler",
    "tokenizer": "ingress0",
    "ingress0": "detokenizer",
}
"""Every actor, and one that it hears from."""
COUNTERS = ("malformed", "oversized", "stale", "bad", "unknown_sender")


def junk(draw: random.Random, sender: str) -> Iterator[bytes]:
    """Frames of five kinds in turn: truncated, random, of no type, with wrong fields, and of an old incarnation of
    `sender`, which the actor has heard of before."""
    codec: Codec[messages.Message] = Codec(messages.Message)
    pack = msgspec.msgpack.encode
    real = [
        messages.Step(1, b"\0" * 4, b"\0" * 4, b"\1\0\0\0", b"\1", b"\0" * 4),
        messages.StepResult(1, b"\0" * 4),
        messages.Tokens([], [], ["r"]),
        messages.Resend("r", 0),
        messages.Tokenize("r", messages.TextPrompt("text")),
        messages.Texts([]),
    ]
    for number in range(COUNT):
        message = draw.choice(real)
        match number % 5:
            case 0:
                frame = codec.encode("junk", 1, 0, message)
                yield frame[: draw.randrange(len(frame))]
            case 1:
                yield draw.randbytes(draw.randrange(200))
            case 2:
                yield pack(["junk", 1, 0, ["NoSuchMessage", 1, 2]])
            case 3:
                fields = [draw.choice([None, -1, 2**63, "x", b"y", [1], {"a": 1}, 1.5]) for _ in range(4)]
                yield pack(["junk", 1, 0, [type(message).__name__, {"no": "rid"}, *fields]])
            case _:
                yield codec.encode(sender, 0, number, message)


def counted(node: Node, actor: str) -> float:
    figures = node.figures()
    return sum(
        count
        for name, count in figures.items()
        if f'actor="{actor}"' in name and any(name.startswith(f"runtime:actor_messages_{each}{{") for each in COUNTERS)
    )


@pytest.mark.parametrize("actor", PEERS)
def test_junk_is_counted_and_dropped(node: Node, actor: str) -> None:
    before = {each.name: each.pid for each in node.tree().walk()}
    figures = counted(node, actor)
    peer = PEERS[actor]
    context = zmq.Context()
    socket = context.socket(zmq.PUSH)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.connect(f"ipc://{node.run_dir}/sockets/{actor}")
    question = {"prompt": "Once", "max_tokens": 24, "temperature": 0, "ignore_eos": True, "stop": ["###"]}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        answer = pool.submit(node.post, "/v1/completions", question)
        for frame in junk(random.Random(actor), peer):
            socket.send(frame)
        socket.send(bytes(DEFAULT_MAX_BYTES + 1))
        assert answer.result(60)["usage"]["completion_tokens"] == 24
    eventually(lambda: counted(node, actor) - figures >= COUNT + 1, "all junk counted")
    socket.close(0)
    context.term()
    assert {each.name: each.pid for each in node.tree().walk()} == before, "nobody has died"
