"""Mailboxes: one bound inbox an actor (a second one for peers on other machines, see `transport.curve`), one outbox to
each peer, over ZeroMQ PUSH/PULL.

A peer may die and come back under the same address at any time. ZeroMQ reconnects by itself and keeps what was
queued meanwhile; the envelope's incarnation tells the receiver that the peer is a new process. Delivery
is at most once and in order for each pair of incarnations: the protocols above repeat what was not acknowledged.
"""

from __future__ import annotations

import ipaddress
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Generic, TypeVar

import msgspec
import zmq

from llm_runtime.transport.codec import Codec, Envelope, MalformedMessage, OversizedMessage
from llm_runtime.transport.curve import Network, RemoteOutbox, ZapAuthenticator

logger = logging.getLogger(__name__)

Body = TypeVar("Body")

HIGH_WATER_MARK = 65_536
"""Messages that may wait for one peer before further ones are dropped and counted."""
MAX_SENDERS = 4_096
"""Names a mailbox remembers; a sender beyond that is refused, so that junk cannot grow memory."""


class MailboxCounters(msgspec.Struct):
    """What went through a mailbox and what did not."""

    received: int = 0
    sent: int = 0
    malformed: int = 0
    oversized: int = 0
    stale: int = 0
    """Frames of an incarnation that is known to be dead."""
    lost: int = 0
    """Frames missing between two sequence numbers of one sender."""
    unknown_sender: int = 0
    undelivered: int = 0
    """Frames not sent because the peer's queue was full or there is no such peer."""
    refused: int = 0
    """Connections from other machines that were turned away, as they did not have the keys."""


def _check_address(address: str, network: Network | None) -> None:
    """Raises ValueError for an address that a mailbox must not use. Other machines are only talked to with keys."""
    scheme, _, rest = address.partition("://")
    if scheme == "ipc":
        if len(rest.encode()) > 107:
            raise ValueError(f"socket path {rest} is longer than 107 bytes: use a shorter run directory")
        return
    if scheme == "tcp" and network is not None:
        return
    if scheme == "tcp":
        host = rest.rpartition(":")[0].strip("[]")
        try:
            loopback = ipaddress.ip_address(host).is_loopback
        except ValueError:
            loopback = False
        if not loopback:
            raise ValueError(
                f"{address}: a tcp mailbox without keys is only allowed on a loopback address, such as 127.0.0.1"
            )
        return
    raise ValueError(f"{address}: a mailbox address starts with ipc:// or tcp://")


class Mailbox(Generic[Body]):
    """The sockets of one actor. Not thread-safe: it belongs to the actor's main loop.

    Args:
        name: the actor's name, the sender of what it sends.
        incarnation: how often this actor has been started in this node; the attribute is what peers see of it.
        address: where the inbox is bound, `ipc://PATH` or `tcp://127.0.0.1:PORT`.
        peers: address of each actor that this one may send to.
        on_peer_started: called with (name, incarnation) when the first frame of an incarnation arrives,
            before that frame is delivered.
        network: for peers on other machines: the keys, and where they reach this actor. All addresses that begin with
            `tcp://` are then used with these keys only.
    """

    def __init__(
        self,
        name: str,
        incarnation: int,
        address: str,
        peers: Mapping[str, str],
        codec: Codec[Body],
        on_peer_started: Callable[[str, int], None] | None = None,
        network: Network | None = None,
    ) -> None:
        _check_address(address, None)
        for each in peers.values():
            _check_address(each, network)
        self.name = name
        self.incarnation = incarnation if network is None else network.incarnation(incarnation)
        self.peers = dict(peers)
        self.counters = MailboxCounters()
        self._codec = codec
        self._on_peer_started = on_peer_started
        self._incarnations: dict[str, int] = {}
        self._next_in: dict[str, int] = {}
        self._next_out: dict[str, int] = {}
        self._network = network
        self._fixed = frozenset(peers) if network is not None else frozenset()
        self._outboxes: dict[str, zmq.Socket[bytes] | RemoteOutbox] = {}
        self._context = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, 8_192)
        inbox = self._context.socket(zmq.PULL)
        inbox.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
        inbox.setsockopt(zmq.MAXMSGSIZE, 2 * codec.max_bytes)
        inbox.setsockopt(zmq.LINGER, 0)
        self.sockets = [inbox]
        """The inboxes, one of them for other machines if there are such peers: to be polled together."""
        self._address = address
        self._bound: os.stat_result | None = None
        """The inbox's socket file, if it has one."""
        self._bind()
        if network is not None and network.listen:
            zap = ZapAuthenticator(self._context, network, HIGH_WATER_MARK, 2 * codec.max_bytes, self.counters)
            self.sockets.append(zap.socket)
        self._poller = zmq.Poller()
        for socket in self.sockets:
            self._poller.register(socket, zmq.POLLIN)

    def _bind(self) -> None:
        path = Path(self._address.removeprefix("ipc://"))
        if self._address.startswith("ipc://"):
            path.unlink(missing_ok=True)  # a killed incarnation leaves its socket file behind
        self.sockets[0].bind(self._address)
        if self._address.startswith("ipc://"):
            os.chmod(path, 0o600)
            self._bound = path.stat()

    def keep_address(self) -> None:
        """Binds the inbox once more if its socket file is gone: whoever cleans a directory of temporary files may have
        removed it. Connections that there are go on; new ones would not be possible. To be called now and then."""
        if self._bound is None:
            return
        try:
            if os.path.samestat(os.stat(self._address.removeprefix("ipc://")), self._bound):
                return
        except OSError:
            pass
        try:  # the old listener stays: it would remove the new one's file if it were closed
            self._bind()
        except (OSError, zmq.ZMQError) as error:
            logger.warning("the socket file of %s is gone and cannot be made again: %s", self.name, error)

    def send(self, peer: str, body: Body) -> bool:
        """Queues a message for a peer and returns at once.

        False, and counted as undelivered, when there is no such peer, when the peer has been away for so long that its
        queue is full, or when the message is over the size limit.
        """
        try:
            outbox = self._outboxes.get(peer) or self._connect(peer)
            seq = self._next_out[peer]
            outbox.send(self._codec.encode(self.name, self.incarnation, seq, body), zmq.NOBLOCK)
        except (zmq.Again, KeyError, OversizedMessage) as error:
            self.counters.undelivered += 1
            if self.counters.undelivered.bit_count() == 1:  # 1, 2, 4, 8 …: a full queue must not fill the log too
                logger.warning("%s not delivered to %s: %s", type(body).__name__, peer, error or type(error).__name__)
            return False
        self._next_out[peer] = seq + 1
        self.counters.sent += 1
        return True

    def skip(self, peer: str) -> None:
        """Uses up a sequence number, as if a message had been lost on its way."""
        self._next_out[peer] = self._next_out.get(peer, 0) + 1
        self.counters.sent += 1

    def receive(self, limit: int = 256) -> Iterator[Envelope[Body]]:
        """The messages that wait, at most `limit` of each inbox, without blocking.

        What is not valid is counted and skipped.
        """
        decode, counters = self._codec.decode, self.counters
        for frame in self._frames(limit):
            try:
                envelope = decode(frame)
            except MalformedMessage as error:
                counters.malformed += 1
                if counters.malformed.bit_count() == 1:
                    logger.warning("dropped malformed message number %d: %s", counters.malformed, error)
                continue
            except OversizedMessage:
                counters.oversized += 1
                continue
            sender, incarnation = envelope.sender, envelope.incarnation
            if self._incarnations.get(sender) != incarnation and not self._meet(sender, incarnation, envelope.seq):
                continue
            expected = self._next_in[sender]
            if envelope.seq != expected and envelope.seq > expected:
                counters.lost += envelope.seq - expected
            self._next_in[sender] = envelope.seq + 1
            counters.received += 1
            yield envelope

    def _frames(self, limit: int) -> Iterator[bytes]:
        for socket in self.sockets:
            recv = socket.recv
            for _ in range(limit):
                try:
                    frame = recv(zmq.NOBLOCK)
                except zmq.Again:
                    break
                yield frame

    def poll(self, timeout_s: float) -> bool:
        """Waits for a message for at most `timeout_s` seconds."""
        return bool(self._poller.poll(int(timeout_s * 1000)))

    @property
    def waiting(self) -> bool:
        """Whether messages wait. An event loop that watches the descriptors of `sockets`, which tell of changes only,
        has to receive until this is false."""
        return any(int(socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN for socket in self.sockets)

    def add_peer(self, name: str, address: str) -> None:
        """Allows sending to a peer that was not known at start. Raises ValueError for a bad address.

        With peers on other machines, the addresses given at the start stay: what an actor says of its own address holds
        on its own machine.
        """
        _check_address(address, self._network)
        if name in self._fixed:
            return
        if self.peers.get(name) != address:
            self.peers[name] = address
            if name in self._outboxes:
                self._outboxes.pop(name).close(0)

    def close(self, linger_s: float = 0.2) -> None:
        """Closes all sockets; queued messages get `linger_s` seconds to leave."""
        for outbox in self._outboxes.values():
            outbox.close(int(linger_s * 1000))
        self._outboxes.clear()
        for inbox in self.sockets:
            inbox.close(0)
        self._context.term()

    def _connect(self, peer: str) -> zmq.Socket[bytes] | RemoteOutbox:
        address = self.peers.get(peer)
        if address is None:
            raise KeyError(f"no address for {peer!r}")
        if self._network is not None and address.startswith("tcp://"):
            outbox = self._outboxes[peer] = RemoteOutbox(self._context, self._network, address)
            self._next_out.setdefault(peer, 0)
            return outbox
        return self._connect_local(peer, address)

    def _connect_local(self, peer: str, address: str) -> zmq.Socket[bytes]:
        outbox = self._context.socket(zmq.PUSH)
        outbox.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
        outbox.setsockopt(zmq.RECONNECT_IVL, 5)
        outbox.setsockopt(zmq.RECONNECT_IVL_MAX, 50)
        outbox.setsockopt(zmq.LINGER, 0)
        outbox.connect(address)
        self._outboxes[peer] = outbox
        self._next_out.setdefault(peer, 0)
        return outbox

    def _meet(self, sender: str, incarnation: int, seq: int) -> bool:
        """Handles a frame of another incarnation than the known one; False if it is to be dropped."""
        known = self._incarnations.get(sender)
        if known is None:
            if len(self._incarnations) >= MAX_SENDERS:
                self.counters.unknown_sender += 1
                return False
        elif incarnation < known:
            self.counters.stale += 1
            return False
        self._incarnations[sender] = incarnation
        # What a sender that is met for the first time has sent before went to this inbox' former owner: not lost.
        self._next_in[sender] = seq if known is None else 0
        if self._on_peer_started is not None:
            self._on_peer_started(sender, incarnation)
        return True
