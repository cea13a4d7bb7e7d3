"""What a supervisor and its children say to each other over their link, and the supervisor to its zygote.

Down: Start, StoredFds, Shutdown, Call. Up: Ready, Ignore, Failed, Crash, Heartbeat, StoreFd, RemoveFd from every child;
Counted, Tree, EventRaised, Reply and Ending from nested supervisors.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from llm_runtime.supervisors.spec import ChildInstance, ChildSpec, SupervisorSpec
from llm_runtime.supervisors.status import Culprit, Event, NodeStatus, StatValue


class _Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    pass


class Start(_Message, frozen=True):
    """First message of a link: everything a new process needs. Carries the descriptors in the order of their names."""

    id: str
    start: str
    incarnation: int
    generation: int
    args: dict[str, Any]
    supervisor: SupervisorSpec | None
    descriptors: tuple[str, ...]
    run_dir: str
    heartbeat_s: float
    stored_fds: int
    """Descriptors that follow in StoredFds messages before the child's code runs."""
    incarnations: dict[str, int] = {}
    """For a nested supervisor: the number of the latest start of each child that it, or one below it, has had."""


class StoredFd(_Message, frozen=True):
    """A descriptor kept for `owner` under `name`."""

    owner: str
    name: str
    meta: bytes


class StoredFds(_Message, frozen=True):
    """StoredFds descriptors coming back, in the order of the entries."""

    entries: tuple[StoredFd, ...]


class Shutdown(_Message, frozen=True):
    """Please stop."""


class Call(_Message, frozen=True):
    """A command for the child `target`, which is this nested supervisor's or further below. Answered by Reply.

    `spec` or `instance` come with op "start", where `target` is the supervisor that gets the child.
    """

    number: int
    op: Literal["terminate", "restart", "delete", "signal", "start"]
    target: str
    graceful: bool = True
    signum: int = 0
    spec: ChildSpec | None = None
    instance: ChildInstance | None = None


class Ready(_Message, frozen=True):
    """The child is started."""


class Ignore(_Message, frozen=True):
    """There is nothing to do for this child; it ends at once and shall not be restarted."""

    reason: str


class Failed(_Message, frozen=True):
    """The child cannot work; the sentence says why. It ends at once."""

    reason: str


class Crash(_Message, frozen=True):
    """The traceback of the exception that ends the child."""

    traceback: str


class Heartbeat(_Message, frozen=True):
    """Sent at a steady interval. `doing_s`: seconds the main loop has been at `doing`, of `limit_s` at most."""

    doing: str = ""
    doing_s: float = 0.0
    limit_s: float | None = None
    stats: dict[str, StatValue] = {}


class StoreFd(_Message, frozen=True):
    """Carries one descriptor for the supervisor to keep until RemoveFd; replaces one of the same name."""

    owner: str
    name: str
    meta: bytes


class RemoveFd(_Message, frozen=True):
    """The supervisor shall close its copy."""

    owner: str
    name: str


class Counted(_Message, frozen=True):
    """The child `id` of a nested supervisor, or of one below it, is about to be started for the `incarnation`-th time.

    Every supervisor above keeps the count, so it outlives the one that has started the child, without a file.
    """

    id: str
    incarnation: int


class Tree(_Message, frozen=True):
    """State of the children of a nested supervisor: after each change, and with each heartbeat."""

    children: list[NodeStatus]


class EventRaised(_Message, frozen=True):
    """Something happened below a nested supervisor."""

    event: Event


class Reply(_Message, frozen=True):
    """Answer to a Call; `error` is a sentence, empty when done."""

    number: int
    error: str


class Ending(_Message, frozen=True):
    """Why a nested supervisor ends, said before it does."""

    ok: bool
    text: str
    culprit: Culprit | None


Down = Start | StoredFds | Shutdown | Call
Up = Ready | Ignore | Failed | Crash | Heartbeat | StoreFd | RemoveFd | Counted | Tree | EventRaised | Reply | Ending


class ForkRequest(_Message, frozen=True):
    """To the zygote, with one descriptor: the child's end of its link."""

    number: int
    title: str
    log: str


class ForkReply(_Message, frozen=True):
    """From the zygote: the pid of the new process, or why there is none."""

    number: int
    pid: int
    error: str


encode = msgspec.msgpack.Encoder().encode
decode_down = msgspec.msgpack.Decoder(Down).decode
decode_up = msgspec.msgpack.Decoder(Up).decode
decode_fork_request = msgspec.msgpack.Decoder(ForkRequest).decode
decode_fork_reply = msgspec.msgpack.Decoder(ForkReply).decode
