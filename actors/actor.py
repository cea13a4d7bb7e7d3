"""`Actor`: a process with a mailbox, a main loop, timers, and a link to its supervisor."""

from __future__ import annotations

import heapq
import itertools
import logging
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import msgspec
import zmq

from llm_runtime.actors.errors import StartFailure as StartFailure
from llm_runtime.actors.messages import ActorStats, Hello, Message
from llm_runtime.actors.spans import Spans
from llm_runtime.transport import Codec, Faults, FaultyMailbox, Mailbox, Network

logger = logging.getLogger(__name__)

STATS_INTERVAL_S = 1.0
_CODEC: Codec[Message] = Codec(Message)
"""Made once, before processes are forked: examining the types takes longer than starting one."""


class Link(Protocol):
    """The child's end of the link to its supervisor, as far as actors use it."""

    stats: Callable[[], dict[str, float]] | None

    @property
    def shutdown_fd(self) -> int: ...
    @property
    def shutdown_requested(self) -> bool: ...
    def ready(self) -> None: ...
    def failed(self, reason: str) -> None: ...
    def doing(self, what: str, limit_s: float | None = None) -> None: ...
    def idle(self) -> None: ...
    def store_fd(self, name: str, fd: int, meta: bytes = b"") -> None: ...
    def remove_fd(self, name: str) -> None: ...


class Context(Protocol):
    """What a supervisor gives to a process it has started, as far as actors use it."""

    @property
    def id(self) -> str: ...
    @property
    def incarnation(self) -> int: ...
    @property
    def args(self) -> dict[str, Any]: ...
    @property
    def descriptors(self) -> Mapping[str, int]: ...
    @property
    def stored_fds(self) -> Mapping[str, tuple[int, bytes]]: ...
    @property
    def run_dir(self) -> Path: ...
    @property
    def link(self) -> Link: ...


class BadMessage(ValueError):
    """A well-formed message whose content makes no sense. Raised by handlers; counted, logged and dropped."""


class ActorArgs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The `args` of an actor's child spec.

    Attributes:
        address: where its mailbox is bound.
        peers: addresses of the actors that it may send to.
        config: the role's own settings, validated by the role.
        busy_limit_s: how long one message, timer or turn may take before the actor counts as hung.
        faults: what is done to the messages that it sends, in tests.
        network: keys, and where it is reached, if it has peers on other machines.
    """

    address: str
    peers: dict[str, str]
    config: dict[str, Any] = {}
    busy_limit_s: float = 60.0
    faults: Faults | None = None
    network: Network | None = None


Handler = Callable[[Any, Any, str], None]
A = TypeVar("A", bound="Actor")
M = TypeVar("M")


def handles(message_type: type[M]) -> Callable[[Callable[[A, M, str], None]], Callable[[A, M, str], None]]:
    """Marks a method `(self, message, sender)` as the handler of one message type."""

    def mark(method: Callable[[A, M, str], None]) -> Callable[[A, M, str], None]:
        method.handled_type = message_type  # type: ignore[attr-defined]
        return method

    return mark


class Actor:
    """Base of all roles with a synchronous main loop.

    Life: `setup` (then the supervisor is told that the actor is ready, and every peer gets a `Hello`), messages and
    timers until the supervisor asks for shutdown, `teardown`. An exception in a handler ends the process, and the
    supervisor starts it anew; only `BadMessage` is survived.
    """

    handlers: ClassVar[dict[type, Handler]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.handlers = {
            attribute.handled_type: attribute
            for base in reversed(cls.__mro__)
            for attribute in vars(base).values()
            if hasattr(attribute, "handled_type")
        }

    def __init__(self, context: Context) -> None:
        self.context = context
        self.name = context.id
        self.incarnation = context.incarnation
        self.link = context.link
        self.args = msgspec.convert(context.args, ActorArgs)
        kind = Mailbox if self.args.faults is None else partial(FaultyMailbox, self.args.faults)
        self.mailbox: Mailbox[Message] = kind(
            self.name,
            self.incarnation,
            self.args.address,
            self.args.peers,
            _CODEC,
            self.peer_started,
            self.args.network,
        )
        self.spans = Spans(self.incarnation, self.send, lambda: self.peers_of_role("ingress"))
        self.bad_messages = 0
        self.began = time.perf_counter()
        self.waited_s = 0.0
        self.watched: list[int] = []
        """Descriptors beside the mailbox that wake the main loop when they are readable; `turn` attends to them. They
        are added in `setup`."""
        self._timers: list[tuple[float, int, Callable[[], None], float | None]] = []
        self._timer_ids = itertools.count()

    # -- what a role overrides ------------------------------------------------------------------------------------

    def setup(self) -> None:
        """Runs before the actor is ready. Raises StartFailure when a restart would not help."""

    def turn(self) -> None:
        """Runs after each batch of messages and timers."""

    def teardown(self) -> None:
        """Runs once before a requested shutdown ends the process."""

    def peer_started(self, peer: str, incarnation: int) -> None:
        """The first frame of an incarnation of `peer` has arrived: what it held before is gone."""

    def stats(self) -> dict[str, float]:
        """Figures of the role for `runtime status` and /metrics, by metric name."""
        return {}

    # -- what a role uses -----------------------------------------------------------------------------------------

    def send(self, peer: str, message: Message) -> bool:
        """Queues a message for a peer; see `Mailbox.send`."""
        return self.mailbox.send(peer, message)

    def after(self, delay_s: float, action: Callable[[], None]) -> None:
        """Runs `action` once, `delay_s` seconds from now."""
        heapq.heappush(self._timers, (time.monotonic() + delay_s, next(self._timer_ids), action, None))

    def every(self, interval_s: float, action: Callable[[], None]) -> None:
        """Runs `action` every `interval_s` seconds."""
        heapq.heappush(self._timers, (time.monotonic() + interval_s, next(self._timer_ids), action, interval_s))

    def peers_of_role(self, role: str) -> list[str]:
        """Names of the peers with a role, in order: `ingress` finds `ingress0`, `ingress1` …"""
        return sorted(name for name in self.mailbox.peers if role_of(name) == role)

    # -- the main loop --------------------------------------------------------------------------------------------

    @classmethod
    def run(cls, context: Context) -> None:
        """Entry point named by a child spec. Returns after a requested shutdown."""
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        try:
            actor = cls(context)
            actor.setup()
        except (StartFailure, msgspec.ValidationError) as failure:
            context.link.failed(str(failure))
            raise SystemExit(1) from failure
        try:
            actor.begin()
            actor.loop()
            actor.teardown()
        finally:
            actor.mailbox.close()

    def begin(self) -> None:
        """Tells supervisor and peers that this incarnation is ready, and starts the regular reports."""
        self.link.stats = self.all_stats
        self.link.ready()
        for peer in self.mailbox.peers:
            self.send(peer, Hello())
        self.every(STATS_INTERVAL_S, self._report)

    def loop(self) -> None:
        """Serves messages and timers until shutdown is requested."""
        poller = zmq.Poller()
        for inbox in self.mailbox.sockets:
            poller.register(inbox, zmq.POLLIN)
        for descriptor in (self.link.shutdown_fd, *self.watched):
            poller.register(descriptor, zmq.POLLIN)
        link, limit = self.link, self.args.busy_limit_s
        while not link.shutdown_requested:
            timeout_ms = self._milliseconds_to_next_timer()
            if timeout_ms != 0:
                link.idle()
                idle_since = time.perf_counter()
                poller.poll(timeout_ms)
                self.waited_s += time.perf_counter() - idle_since
            link.doing("messages", limit)
            self.drain()
            self._run_timers()
            self.turn()

    def drain(self) -> None:
        """Dispatches the messages that wait in the mailbox."""
        for envelope in self.mailbox.receive():
            handler = self.handlers.get(type(envelope.body))
            try:
                if handler is None:
                    raise BadMessage(f"{self.name} does not handle {type(envelope.body).__name__}")
                handler(self, envelope.body, envelope.sender)
            except BadMessage as error:
                self.bad_messages += 1
                if self.bad_messages.bit_count() == 1:
                    logger.warning(
                        "dropped bad message number %d from %s: %s", self.bad_messages, envelope.sender, error
                    )

    @handles(Hello)
    def hello(self, message: Hello, sender: str) -> None:
        """A peer is ready. All there is to do happens in `peer_started`, by its first frame."""

    def all_stats(self) -> dict[str, float]:
        """The role's figures, the mailbox's counters, and how much of its life it has waited for messages."""
        counters = {
            f"messages_{name}": float(count) for name, count in msgspec.structs.asdict(self.mailbox.counters).items()
        }
        times = {"alive_seconds": time.perf_counter() - self.began, "waited_seconds": self.waited_s}
        return {**counters, "messages_bad": float(self.bad_messages), **times, **self.stats()}

    def _report(self) -> None:
        self.mailbox.keep_address()
        report = ActorStats(self.incarnation, self.all_stats())
        for peer in self.peers_of_role("ingress"):
            self.send(peer, report)

    def _milliseconds_to_next_timer(self) -> int | None:
        if not self._timers:
            return None
        return max(0, int((self._timers[0][0] - time.monotonic()) * 1000 + 0.999))

    def _run_timers(self) -> None:
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            _, _, action, interval_s = heapq.heappop(self._timers)
            action()
            if interval_s is not None:
                self.every(interval_s, action)


def role_of(name: str) -> str:
    """The role in an actor's name: `ingress0` → `ingress`, `main.rank1` → `rank`."""
    return name.rpartition(".")[2].rstrip("0123456789")
