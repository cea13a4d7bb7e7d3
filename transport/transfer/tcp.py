"""Reads over TCP that ask who is reading: under ZeroMQ's CURVE, for those alone who have the deployment's keys.

A thread of the engine whose memory is read answers requests for runs of bytes. It never writes into its own memory, and
a reader writes what it receives itself, so a read that was stopped writes nothing any more, at once.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import numpy as np
import zmq
from msgspec import Meta
from zmq.utils import z85

from llm_runtime.transport.curve import ZAP_ADDRESS, decide
from llm_runtime.transport.transfer.chunks import ChunkedReading, cut, grouped
from llm_runtime.transport.transfer.engine import Piece, Region, TransferFailed, TransferUnavailable
from llm_runtime.transport.transfer.worker import Endpoint, Progress, Reading, WorkerEngine

if TYPE_CHECKING:
    from llm_runtime.transport.transfer.create import TransferSettings

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 2**20
_WINDOW = 8
_MAX_RUNS = 4096
"""Runs of bytes in one request, more than a chunk has pages."""
_MAX_REQUEST_BYTES = 128 * 2**10
_MAX_PEERS = 64
_HANDSHAKE_MS = 3_000

Natural = Annotated[int, Meta(ge=0, le=2**62)]


class _Run(msgspec.Struct, array_like=True, frozen=True):
    region: Natural
    offset: Natural
    length: Natural


class _Request(msgspec.Struct, array_like=True, frozen=True):
    """Reader → engine: runs of bytes to send, all of them together no more than a chunk. The answer is the number and a
    frame for each run, or the number alone if they do not lie within the regions."""

    number: Natural
    runs: Annotated[list[_Run], Meta(min_length=1, max_length=_MAX_RUNS)]


_decode_request = msgspec.msgpack.Decoder(_Request).decode


class TcpEngine(WorkerEngine):
    """Reads from engines with the same keys. Raises TransferUnavailable where ZeroMQ was built without CURVE."""

    kind = "tcp"

    def __init__(self, settings: TransferSettings) -> None:
        super().__init__(settings.timeout_s)
        if not zmq.has("curve"):
            raise TransferUnavailable("this ZeroMQ has no CURVE: install pyzmq from PyPI, or use another engine")
        self._settings = settings
        self._context = zmq.Context()
        self._address = ""
        self._own: list[np.ndarray[Any, Any]] = []
        self._peers: OrderedDict[bytes, _Peer] = OrderedDict()

    def _attach(self, regions: Sequence[Region]) -> None:
        self._own = [np.frombuffer(region.buffer, np.uint8) for region in regions]
        settings, context = self._settings, self._context
        zap, server = context.socket(zmq.REP), context.socket(zmq.ROUTER)
        zap.setsockopt(zmq.LINGER, 0)
        zap.bind(ZAP_ADDRESS)
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        server.setsockopt(zmq.CURVE_SERVER, 1)
        server.setsockopt(zmq.CURVE_SECRETKEY, settings.secret.encode())
        server.setsockopt(zmq.ZAP_DOMAIN, b"transfer")
        server.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        server.setsockopt(zmq.MAXMSGSIZE, _MAX_REQUEST_BYTES)
        server.setsockopt(zmq.LINGER, 0)
        server.setsockopt(zmq.HANDSHAKE_IVL, _HANDSHAKE_MS)
        server.setsockopt(zmq.IPV6, int(":" in settings.host))
        try:
            server.bind(f"tcp://{host}:*")
        except zmq.ZMQError as error:
            raise TransferUnavailable(f"transfers cannot listen on {settings.host}: {error}") from error
        endpoint = server.getsockopt(zmq.LAST_ENDPOINT)
        assert isinstance(endpoint, bytes)
        self._address = endpoint.rstrip(b"\0").decode()
        answers = _Answers(zap, server, z85.decode(settings.public), self._own)
        threading.Thread(target=answers.run, name="tcp transfer answers", daemon=True).start()

    def _detail(self) -> bytes:
        return self._address.encode()

    def _begin(self, peer: Endpoint, pieces: Sequence[Piece]) -> Reading:
        known = self._peers.get(peer.detail)
        if known is None or known.lost:
            if known is None and len(self._peers) >= _MAX_PEERS:
                self._peers.popitem(last=False)[1].drop()
            known = self._peers[peer.detail] = _Peer(self._context, self._settings, peer.detail)
        self._peers.move_to_end(peer.detail)
        return _Chunks(known, self._own, pieces)

    def _detach(self) -> None:
        for peer in self._peers.values():
            peer.drop()
        self._peers.clear()
        self._context.term()  # ends the thread that answers, and what is still being sent
        self._own = []


class _Answers:
    """Lets readers with the keys in, and sends them what they ask for. Runs in a thread of its own until the context
    ends."""

    def __init__(
        self, zap: zmq.Socket[bytes], server: zmq.Socket[bytes], key: bytes, regions: Sequence[np.ndarray[Any, Any]]
    ) -> None:
        self._zap = zap
        self._server = server
        self._key = key
        self._regions = regions
        self._refused = 0

    def run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._zap, zmq.POLLIN)
        poller.register(self._server, zmq.POLLIN)
        try:
            while True:
                for socket, _ in poller.poll():
                    if socket is self._server:
                        self._answer(*self._server.recv_multipart())
                    elif (address := decide(self._zap, self._key)) is not None:
                        self._count(f"{address} has other keys than this deployment")
        except zmq.ContextTerminated:
            self._zap.close(0)
            self._server.close(0)

    def _answer(self, identity: bytes, *frames: bytes) -> None:
        try:
            (frame,) = frames
            request = _decode_request(frame)
        except (ValueError, msgspec.DecodeError) as error:
            return self._count(f"malformed: {error}")
        runs: list[memoryview] = []
        for run in request.runs:
            region = self._regions[run.region] if run.region < len(self._regions) else None
            if region is None or run.offset + run.length > region.nbytes:
                runs = []
                break
            runs.append(region[run.offset : run.offset + run.length].data)
        if sum(each.nbytes for each in runs) > _CHUNK_BYTES:
            runs = []
        number = msgspec.msgpack.encode(request.number)
        try:
            self._server.send_multipart([identity, number, *runs], zmq.NOBLOCK, copy=False)
        except zmq.Again:
            pass  # the reader does not take what it has asked for: its time runs out

    def _count(self, why: str) -> None:
        self._refused += 1
        if self._refused.bit_count() == 1:
            logger.warning("refused request number %d for KV pages: %s", self._refused, why)


class _Peer:
    """The connection to one engine, and the chunks that are on their way. Used by the engine's thread alone.

    After a read that was broken off it counts as lost: the next one begins with a new connection, for this one may be
    cut, or be busy with what nobody waits for any more. It is closed when the last read that uses it has ended.
    """

    def __init__(self, context: zmq.Context[Any], settings: TransferSettings, address: bytes) -> None:
        self.lost = False
        self._readers = 0
        self._numbers = 0
        self._waiting: dict[int, tuple[list[Piece], Sequence[np.ndarray[Any, Any]]]] = {}
        self._refused: set[int] = set()
        self._socket = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.CURVE_SERVERKEY, settings.public.encode())
        self._socket.setsockopt(zmq.CURVE_PUBLICKEY, settings.public.encode())
        self._socket.setsockopt(zmq.CURVE_SECRETKEY, settings.secret.encode())
        self._socket.setsockopt(zmq.MAXMSGSIZE, _CHUNK_BYTES + 1024)  # as it travels, encrypted
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.HANDSHAKE_IVL, _HANDSHAKE_MS)
        self._socket.setsockopt(zmq.IPV6, int(address.startswith(b"tcp://[")))
        try:
            self._socket.connect(address)
        except zmq.ZMQError as error:
            self._socket.close(0)
            raise TransferFailed(f"the endpoint is not one of tcp: {error}") from None

    def ask(self, chunk: list[Piece], own: Sequence[np.ndarray[Any, Any]]) -> int:
        """Asks for a chunk; its number."""
        self._numbers += 1
        runs = [_Run(piece.remote_region, piece.remote_offset, piece.length) for piece in chunk]
        try:
            self._socket.send(msgspec.msgpack.encode(_Request(self._numbers, runs)), zmq.NOBLOCK)
        except zmq.Again:
            raise TransferFailed("the peer takes no more requests") from None
        self._waiting[self._numbers] = (chunk, own)
        return self._numbers

    def arrived(self, number: int) -> bool:
        """Whether the chunk is there. Raises TransferFailed if the peer has refused it."""
        self._receive()
        if number in self._refused:
            self._refused.discard(number)
            raise TransferFailed("the peer does not have these bytes")
        return number not in self._waiting

    def forget(self, number: int) -> None:
        """Nothing is written for this chunk any more."""
        self._waiting.pop(number, None)
        self._refused.discard(number)

    def enter(self) -> None:
        """One more read uses the connection."""
        self._readers += 1

    def leave(self) -> None:
        """One read less does."""
        self._readers -= 1
        if self.lost and self._readers == 0:
            self._socket.close(0)

    def drop(self) -> None:
        """Closes the connection as soon as no read uses it."""
        self.lost = True
        if self._readers == 0:
            self._socket.close(0)

    def _receive(self) -> None:
        while True:
            try:
                first, *frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            try:
                number = msgspec.msgpack.decode(first.buffer, type=int)
            except msgspec.DecodeError:
                continue
            if (waiting := self._waiting.pop(number, None)) is None:
                continue
            pieces, own = waiting
            if [len(frame.buffer) for frame in frames] != [piece.length for piece in pieces]:
                self._refused.add(number)
                continue
            for piece, frame in zip(pieces, frames, strict=True):
                target = own[piece.local_region][piece.local_offset : piece.local_offset + piece.length]
                np.copyto(target, np.frombuffer(frame.buffer, np.uint8))


class _Chunks(ChunkedReading[int]):
    """Every chunk is a request of some runs of bytes."""

    def __init__(self, peer: _Peer, own: Sequence[np.ndarray[Any, Any]], pieces: Sequence[Piece]) -> None:
        whole = [piece for piece in pieces if piece.length]
        super().__init__(grouped(cut(whole, _CHUNK_BYTES), _CHUNK_BYTES), _WINDOW)
        self._peer = peer
        self._own = own
        self._over = False
        peer.enter()

    def advance(self) -> Progress:
        progress = super().advance()
        if progress is Progress.DONE:
            self._leave()
        return progress

    def _leave(self) -> None:
        if not self._over:
            self._over = True
            self._peer.leave()

    def _submit(self, chunk: list[Piece]) -> int:
        return self._peer.ask(chunk, self._own)

    def _ended(self, token: int) -> bool:
        return self._peer.arrived(token)

    def stop(self) -> bool:
        """At once: what still comes is not written."""
        for token in self._pending:
            self._peer.forget(token)
            self._peer.lost = True
        self._pending.clear()
        self._leave()
        return True
