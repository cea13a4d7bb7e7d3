"""The child's side of supervision: what a started class gets, and how it answers."""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from llm_runtime.supervisors import messages
from llm_runtime.supervisors.messages import Crash, Failed, Heartbeat, Ignore, Ready, RemoveFd, StoreFd, encode
from llm_runtime.supervisors.spec import SupervisorSpec
from llm_runtime.supervisors.status import StatValue
from llm_runtime.supervisors.wire import Channel

MAX_STORED_FDS = 2**16
"""Descriptors one child may store at a time."""
MAX_META_BYTES = 32 * 1024


@dataclass(frozen=True)
class ChildContext:
    """What `run(cls, context)` of a started class is given.

    When `run` returns, the process exits at once, without waiting for threads or running `atexit` functions: flush
    sockets and files before.

    incarnation  count of starts of this id over the life of the node; the members of a one_for_all group get the
                 same, new number whenever the group starts, so that peers of a collective agree on it.
    generation   incarnation of its supervisor (1 for the root).
    descriptors  name to descriptor, for the names in its specification.
    stored_fds       name to (descriptor, meta) of what an earlier incarnation stored and did not take back.
    supervisor   what to supervise, for nested supervisors.
    incarnations number of the latest start of each actor that it has supervised before, for nested supervisors.
    """

    id: str
    incarnation: int
    generation: int
    args: dict[str, Any]
    descriptors: dict[str, int]
    run_dir: Path
    link: Link
    stored_fds: dict[str, tuple[int, bytes]] = field(default_factory=dict)
    supervisor: SupervisorSpec | None = None
    incarnations: Mapping[str, int] = field(default_factory=dict)


class Link:
    """A child's connection with its supervisor. All methods may be called from any thread.

    A daemon thread sends a heartbeat every `heartbeat_s` seconds with what the main loop last said it does, so that a
    process that is stopped or stuck is found while a busy one is left alone. If the supervisor goes away, the
    process exits.
    """

    def __init__(self, channel: Channel, owner: str, heartbeat_s: float) -> None:
        self.channel = channel
        self.heartbeat_s = heartbeat_s
        self.stats: Callable[[], Mapping[str, StatValue]] | None = None
        """Called in the heartbeat thread; what it returns is shown in the status."""
        self.shutdown_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        """Becomes (and stays) readable when the supervisor asks the child to stop; do not read from it."""
        self._owner = owner
        self._lock = threading.Lock()
        self._shutdown = threading.Event()
        self._doing: tuple[str, float, float | None] = ("", 0.0, None)
        self._stored_fds: set[str] = set()

    @property
    def shutdown_requested(self) -> bool:
        return self._shutdown.is_set()

    def wait_shutdown(self, timeout_s: float | None = None) -> bool:
        """Waits until the supervisor asks to stop; False after `timeout_s` seconds without."""
        return self._shutdown.wait(timeout_s)

    def ready(self) -> None:
        """The child is started: the supervisor goes on to the next one."""
        self.send(Ready())

    def ignore(self, reason: str) -> NoReturn:
        """OTP's `ignore`: there is nothing to do here. Ends the process; the supervisor goes on without it."""
        self.send(Ignore(reason=reason))
        raise SystemExit(0)

    def failed(self, reason: str) -> NoReturn:
        """The child cannot work. Ends the process; at its first start this stops the node with this sentence."""
        self.send(Failed(reason=reason))
        raise SystemExit(1)

    def doing(self, what: str, limit_s: float | None = None) -> None:
        """The main loop begins `what`. At the same thing for more than `limit_s` seconds, it counts as hung."""
        self._doing = (what, time.monotonic(), limit_s)

    def idle(self) -> None:
        """The main loop waits for work, for however long."""
        self._doing = ("", 0.0, None)

    def store_fd(self, name: str, fd: int, meta: bytes = b"") -> None:
        """Leaves a duplicate of `fd` with the supervisor: the next incarnation finds it, with `meta`, in
        `context.stored_fds`. The caller keeps its own. A connection ends for the peer only after `remove_fd` too.

        Raises ValueError for more than MAX_STORED_FDS descriptors or MAX_META_BYTES of meta.
        """
        if len(meta) > MAX_META_BYTES:
            raise ValueError(f"meta of {name!r} has {len(meta)} bytes; store at most {MAX_META_BYTES}")
        if name not in self._stored_fds and len(self._stored_fds) >= MAX_STORED_FDS:
            raise ValueError(f"{MAX_STORED_FDS} descriptors are stored already; remove some before {name!r}")
        self._stored_fds.add(name)
        self.send(StoreFd(owner=self._owner, name=name, meta=meta), [fd])

    def remove_fd(self, name: str) -> None:
        """The supervisor closes its duplicate. Does nothing for an unknown name."""
        if name in self._stored_fds:
            self._stored_fds.discard(name)
            self.send(RemoveFd(owner=self._owner, name=name))

    def crashed(self, traceback: str) -> None:
        """Hands the traceback of the exception that ends this process to the supervisor."""
        self.send(Crash(traceback=traceback))

    def send(self, message: messages.Up, fds: Sequence[int] = ()) -> None:
        """Sends one message; waits while the socket is full, returns at once when the supervisor is gone."""
        with self._lock:
            self.channel.send(encode(message), fds)
            self._drain()

    def _drain(self) -> None:
        poll = select.poll()
        poll.register(self.channel, select.POLLOUT)
        while self.channel.backlog and not self.channel.closed:
            poll.poll(1000)
            self.channel.flush()

    def adopt_stored_fds(self, names: Sequence[str]) -> None:
        """Counts what earlier incarnations left stored."""
        self._stored_fds.update(names)

    def start_heartbeats(self) -> None:
        """Starts the heartbeat thread."""
        threading.Thread(target=self._beat_forever, name="supervision link", daemon=True).start()

    def _beat_forever(self) -> None:
        poll = select.poll()
        poll.register(self.channel, select.POLLIN)
        next_beat = time.monotonic()
        while True:
            now = time.monotonic()
            if now >= next_beat:
                self._beat(now)
                next_beat = now + self.heartbeat_s
            if poll.poll(max(0.0, next_beat - now) * 1000):
                for payload, _ in self.channel.receive():
                    if isinstance(messages.decode_down(payload), messages.Shutdown):
                        self._shutdown.set()
                        os.eventfd_write(self.shutdown_fd, 1)
                if self.channel.closed:
                    os._exit(1)  # the supervisor is gone

    def _beat(self, now: float) -> None:
        what, since, limit_s = self._doing
        stats: dict[str, StatValue] = {}
        if self.stats is not None:
            try:
                stats = dict(self.stats())
            except Exception as error:
                stats = {"stats_error": f"{type(error).__name__}: {error}"}
        beat = Heartbeat(doing=what, doing_s=now - since if what else 0.0, limit_s=limit_s, stats=stats)
        with self._lock:
            self.channel.flush()
            if not self.channel.backlog:  # else the supervisor has not even read the previous ones
                self.channel.send(encode(beat))
