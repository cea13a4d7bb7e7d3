"""How the command line talks to a node: a question, an answer, over the Unix socket `control` of its run directory."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import zmq
from msgspec import Meta, Struct

from llm_runtime.runtime.errors import UserError
from llm_runtime.runtime.happenings import Happening
from llm_runtime.supervisors.status import NodeStatus

logger = logging.getLogger(__name__)

MAX_QUESTION_BYTES = 4096
MAX_ANSWER_BYTES = 4 * 2**20
_SOCKET = "control"

NodeState = Literal["starting", "running", "degraded", "stopping"]
Name = Annotated[str, Meta(min_length=1, max_length=100)]


class Status(Struct, tag=True, frozen=True):
    """What runs? Answered by `NodeReport`."""


class Restart(Struct, tag=True, frozen=True):
    """Stop an actor in order and start it again. Answered by `Done` once it is ready."""

    actor: Name


class Kill(Struct, tag=True, frozen=True):
    """Send a signal to an actor's process. Answered by `Done`."""

    actor: Name
    signal: Annotated[int, Meta(ge=1, le=64)]


class Renew(Struct, tag=True, frozen=True):
    """Let processes that start from now on run the program as it is on the disk. Answered by `Done`."""


class Down(Struct, tag=True, frozen=True):
    """Stop the node. Answered by `Done` before it stops."""


Question = Status | Restart | Renew | Kill | Down


class NodeReport(Struct, tag=True, frozen=True):
    """A node and its tree. The state is "degraded" while any of its processes is not running.

    `url` is where its ingress is reached, empty if that is on another node.
    `deterministic` says whether a repeated request must get the same answer (`model.deterministic`).
    `events` is what has happened lately, oldest first.
    """

    node: str
    state: NodeState
    url: str
    tree: NodeStatus
    deterministic: bool = False
    events: list[Happening] = []


class Done(Struct, tag=True, frozen=True):
    """The command is carried out, or `error` says in a sentence why not."""

    error: str = ""


Answer = NodeReport | Done
Reply = Callable[[Answer], None]

_encode = msgspec.msgpack.Encoder().encode
_decode_question = msgspec.msgpack.Decoder(Question).decode
_decode_answer = msgspec.msgpack.Decoder(Answer).decode


class ControlServer:
    """The node's end. Answers may be given later than the questions came.

    Args:
        answer: called with each question and the function that takes its answer.
    """

    def __init__(self, run_dir: Path, answer: Callable[[Question, Reply], None]) -> None:
        self._answer = answer
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_QUESTION_BYTES)
        self._socket.setsockopt(zmq.LINGER, 200)
        self._path = run_dir / _SOCKET
        self._bind()
        self.fd = int(self._socket.getsockopt(zmq.FD))
        """Readable when `serve` should be called."""

    def _bind(self) -> None:
        self._socket.bind(f"ipc://{self._path}")
        os.chmod(self._path, 0o600)

    def restore(self) -> None:
        """Makes the socket's file again if it was removed. Raises OSError."""
        if not self._path.exists():
            try:
                self._bind()
            except zmq.ZMQError as error:  # the directory was removed too, just now
                raise OSError(error.errno, error.strerror) from None

    def serve(self) -> None:
        """Answers all questions that have arrived; the descriptor does not become readable again before."""
        while int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            frames = self._socket.recv_multipart(zmq.NOBLOCK)
            try:
                identity, frame = frames
                question = _decode_question(frame)
            except (ValueError, msgspec.DecodeError) as error:  # not two frames, or not a question
                logger.warning("dropped a malformed control message: %s", error)
                continue
            self._answer(question, lambda answer, identity=identity: self._reply(identity, answer))  # type: ignore[misc]

    def _reply(self, identity: bytes, answer: Answer) -> None:
        try:
            self._socket.send_multipart([identity, _encode(answer)], zmq.NOBLOCK)
        except zmq.Again:
            pass  # whoever asked does not read
        self.serve()  # a send may take the news of a question from the descriptor

    def close(self) -> None:
        """Sends the last answers and closes the socket."""
        self._socket.close()
        self._context.term()


def ask(run_dir: Path, question: Question, timeout_s: float = 5.0) -> Answer:
    """A node's answer. Raises UserError if there is none in time."""
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    try:
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_ANSWER_BYTES)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RCVTIMEO, int(timeout_s * 1000))
        socket.connect(f"ipc://{run_dir / _SOCKET}")
        socket.send(_encode(question))
        answer: Answer = _decode_answer(socket.recv())
        return answer
    except zmq.Again:
        raise UserError(
            f"the node {run_dir.name} does not answer; look at `runtime logs root --node {run_dir.name}`"
        ) from None
    except msgspec.DecodeError as error:
        raise UserError(f"the node {run_dir.name} is of another version of the runtime: {error}") from None
    finally:
        socket.close()
        context.term()


def command(run_dir: Path, question: Restart | Renew | Kill | Down, timeout_s: float = 60.0) -> None:
    """Has a node carry out a command. Raises UserError with the reason if it cannot."""
    answer = ask(run_dir, question, timeout_s)
    if isinstance(answer, Done) and answer.error:
        raise UserError(answer.error)
