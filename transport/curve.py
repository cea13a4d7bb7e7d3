"""Mailboxes between machines: TCP under ZeroMQ's CURVE, so that both ends prove who they are and nobody else can read.

All machines of a deployment hold one key pair. A client encrypts for the public key, and is let in if its own public
key, proven in the handshake, is the same one: whoever has the secret belongs to the deployment, and nobody else does.
Protocols: ZeroMQ RFC 26 (CurveZMQ) and RFC 27 (ZAP).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from typing import Any, Protocol

import msgspec
import zmq
from zmq.utils import z85

logger = logging.getLogger(__name__)

HIGH_WATER_MARK = 1_000
"""Messages that may wait for one peer on another machine."""
LARGE_BYTES = 64 * 2**10
"""Messages from this size on are counted in bytes too."""
MAX_LARGE_BYTES = 64 * 2**20
"""Bytes of large messages that may wait for one peer on another machine."""
RENEW_S = 5.0
"""A socket that takes nothing more is replaced if it is older."""

_HEARTBEAT_MS = 500
_SILENCE_MS = 2_000
"""A peer from which nothing comes for so long is gone, and is connected to anew."""
_CONNECT_MS = 1_000
"""An attempt to connect that takes longer is given up for the next one: the kernel itself would try for minutes."""
_HANDSHAKE_MS = 3_000
_RECONNECT_MS = 50
_RECONNECT_MAX_MS = 500
ZAP_ADDRESS = "inproc://zeromq.zap.01"
_MONITOR_ADDRESS = "inproc://handshakes"
_REFUSALS = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
_RESTARTS_BITS = 20


class Network(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a mailbox needs for peers on other machines.

    Attributes:
        public, secret: the deployment's key pair, in Z85.
        epoch: when this actor's node was started, in milliseconds. The count of an actor's starts begins anew with its
            node, and a peer elsewhere has to know a later start from an earlier one. So the clock of a machine must not
            be turned back between two starts of its node.
        listen: `tcp://ADDRESS:PORT` where peers on other machines reach the actor; empty if none has to.
    """

    public: str
    secret: str
    epoch: int
    listen: str = ""

    def __repr__(self) -> str:
        return f"Network(epoch={self.epoch}, listen={self.listen!r})"  # keys do not belong into logs

    def incarnation(self, starts: int) -> int:
        """A number that is higher for each later start of an actor, over all starts of its node."""
        return (self.epoch << _RESTARTS_BITS) + starts


class RefusalCounter(Protocol):
    """What counts the connections that were turned away."""

    refused: int


class ZapAuthenticator:
    """A second inbox of a mailbox, bound to a TCP address, and the thread that lets nobody in without the keys.

    A thread, because a handshake must not wait until the actor's main loop has time. It ends with the context.

    Raises zmq.ZMQError if the address cannot be bound.
    """

    def __init__(
        self, context: zmq.Context[Any], network: Network, high_water_mark: int, max_bytes: int, counter: RefusalCounter
    ) -> None:
        self._key = z85.decode(network.public)
        self._counter = counter
        self._strangers = 0
        self._zap = context.socket(zmq.REP)
        self._zap.setsockopt(zmq.LINGER, 0)
        self._zap.bind(ZAP_ADDRESS)
        self.socket: zmq.Socket[bytes] = context.socket(zmq.PULL)
        """The inbox."""
        self.socket.setsockopt(zmq.RCVHWM, high_water_mark)
        self.socket.setsockopt(zmq.MAXMSGSIZE, max_bytes)
        self.socket.setsockopt(zmq.CURVE_SERVER, 1)
        self.socket.setsockopt(zmq.CURVE_SECRETKEY, network.secret.encode())
        self.socket.setsockopt(zmq.ZAP_DOMAIN, b"mailbox")
        self.socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # nobody to ask means nobody comes in
        _set_tcp_options(self.socket, network.listen)
        self.socket.monitor(_MONITOR_ADDRESS, _REFUSALS)
        self._events = context.socket(zmq.PAIR)
        self._events.setsockopt(zmq.LINGER, 0)
        self._events.connect(_MONITOR_ADDRESS)
        try:
            self.socket.bind(network.listen)
        except zmq.ZMQError:
            for each in (self._zap, self._events, self.socket):
                each.close(0)
            raise
        threading.Thread(target=self._run, name="zap", daemon=True).start()

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._zap, zmq.POLLIN)
        poller.register(self._events, zmq.POLLIN)
        try:
            while True:
                for socket, _ in poller.poll():
                    if socket is self._zap:
                        self._decide()
                    else:
                        self._events.recv_multipart()
                        self._refused("it does not have the keys, or does not speak the protocol")
        except zmq.ContextTerminated:
            self._zap.close(0)
            self._events.close(0)

    def _decide(self) -> None:
        """Answers ZeroMQ's question whether a client that has proven its public key may come in."""
        if (address := decide(self._zap, self._key)) is not None:
            self._strangers += 1
            if self._strangers.bit_count() == 1:  # 1, 2, 4, 8 …: whoever tries all the time must not fill the log
                logger.warning("%s has other keys than this deployment", address)

    def _refused(self, why: str) -> None:
        self._counter.refused += 1
        if self._counter.refused.bit_count() == 1:
            logger.warning("turned away connection number %d: %s", self._counter.refused, why)


def decide(zap: zmq.Socket[bytes], key: bytes) -> str | None:
    """Answers one question of ZeroMQ, whether a client may come in: if the key that it has proven is the deployment's.
    The address of one that may not."""
    version, number, _, address, _, mechanism, *credentials = zap.recv_multipart()
    allowed = mechanism == b"CURVE" and credentials == [key]
    status = (b"200", b"") if allowed else (b"400", b"unknown key")
    zap.send_multipart([version, number, *status, b"", b""])
    return None if allowed else address.decode("ascii", "replace")


class RemoteOutbox:
    """The way to one peer on another machine. What waits while it is away is bounded in number and size.

    It reconnects by itself. But ZeroMQ gives an address up for good when something answers there that does not speak
    the protocol, such as another program on the port of an actor that is down, and then nothing can be queued, as if
    the queue were full. So a socket that takes nothing is replaced, at most every few seconds, and what waited in it is
    lost: it was old, and the protocols above repeat what was not acknowledged.

    Args:
        address: `tcp://HOST:PORT`.
    """

    def __init__(self, context: zmq.Context[Any], network: Network, address: str) -> None:
        self._context = context
        self._network = network
        self._address = address
        self._open()

    def _open(self) -> None:
        self._opened_at = time.monotonic()
        self._large: deque[tuple[zmq.MessageTracker, int]] = deque()
        self._large_bytes = 0
        self._socket = self._context.socket(zmq.PUSH)
        self._socket.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
        self._socket.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_MS)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, _RECONNECT_MAX_MS)
        self._socket.setsockopt(zmq.CONNECT_TIMEOUT, _CONNECT_MS)
        self._socket.setsockopt(zmq.CURVE_SERVERKEY, self._network.public.encode())
        self._socket.setsockopt(zmq.CURVE_PUBLICKEY, self._network.public.encode())
        self._socket.setsockopt(zmq.CURVE_SECRETKEY, self._network.secret.encode())
        _set_tcp_options(self._socket, self._address)
        self._socket.connect(self._address)

    def send(self, frame: bytes, flags: int) -> None:
        """Queues a frame. Raises zmq.Again when too much waits already."""
        try:
            self._put(frame, flags)
        except zmq.Again:
            if time.monotonic() - self._opened_at < RENEW_S:
                raise
            self._socket.close(0)
            self._open()
            self._put(frame, flags)

    def _put(self, frame: bytes, flags: int) -> None:
        if len(frame) < LARGE_BYTES:
            self._socket.send(frame, flags)
            return
        while self._large and self._large[0][0].done:
            self._large_bytes -= self._large.popleft()[1]
        if self._large_bytes + len(frame) > MAX_LARGE_BYTES and self._large:
            raise zmq.Again()
        tracker = self._socket.send(frame, flags, copy=False, track=True)
        assert tracker is not None
        self._large.append((tracker, len(frame)))
        self._large_bytes += len(frame)

    def close(self, linger_ms: int) -> None:
        """Closes the socket; what waits gets so many milliseconds to leave."""
        self._socket.close(linger_ms)


def _set_tcp_options(socket: zmq.Socket[bytes], address: str) -> None:
    """A cut link is noticed by heartbeats, which ZeroMQ's own thread sends and expects."""
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, _SILENCE_MS)
    socket.setsockopt(zmq.HEARTBEAT_TTL, _SILENCE_MS)
    socket.setsockopt(zmq.HANDSHAKE_IVL, _HANDSHAKE_MS)
    socket.setsockopt(zmq.IPV6, int(address.startswith("tcp://[")))
