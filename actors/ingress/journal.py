"""The journal of an ingress worker: what its next incarnation needs to go on with every open connection.

An answer is a function of what came in: the request's bytes, the identity drawn for it, its prompt's tokens and the
tokens that engines have sent. All of that is journalled before it has an effect, and so are the bytes of the answer
until the kernel has taken them. What the kernel has read and taken is not journalled: it is asked (`positions`).

The journal is a memory file with slots of fixed size; pages take memory only once written. A connection has a slot
from the first byte of a request until everything that was asked has been answered and taken by the kernel. One without
a slot has nothing to remember: each byte that was read has been answered.

A slot holds the serial number of its connection, 0 if it is free, and one log of records at [start, end). Both ends are
one 64-bit word that is stored at once. So a process that is killed at any instruction leaves either the log before a
change or the one after it, and the slot belongs either to no connection or to one with a whole log.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from collections import deque
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field

import msgspec

from llm_runtime.actors.ingress.output_deltas import Identity, OutputDelta

SLOT_OVERHEAD_BYTES = 8 * 2**20
"""What a slot has room for besides the largest request body: the tokens of its answer, above all."""
MAX_RESUMED = 12
QUICK_S = 1.0
"""A connection that was taken up so often, each time within so many seconds of the last, without any progress may be
what kills the worker. It is given up before the supervisor gives up the worker."""
READ_BYTES = 2**16
"""The most that is read from a connection at once."""
GRAIN_BYTES = 2**16
"""Memory is counted, and given back, in deltas of this size."""
_KEPT_BYTES = 4 * GRAIN_BYTES
"""What a slot may keep that has been given back, so that the next request costs no page faults."""
_WARM_SLOTS = 64
"""So many free slots keep memory."""

# Kinds of records.
_BASE = 1  # first of a log: serial number of the connection, bytes read and written before
_READ = 2  # bytes from the client
_SENT = 3  # bytes for the client, where they end in all that is sent, and how many deltas they cover
_IDENTITY = 4
_PROMPTS = 5
_PIECE = 6  # what has arrived of choice `index`
_ATTEMPT = 7  # choice `index` goes to a scheduler again, under this number
_CLOSE = 8  # after what was sent, the connection ends
_RESUMED = 9  # a new incarnation went on, at this time (monotonic)

# Flags of _SENT.
_ASIDE = 1  # not of an answer: 100 Continue, or bytes of an answer whose request is done
_LAST = 2  # the answer ends here
_DONE = 4  # belongs to nothing that is still journalled
_CLOSES = 8  # the connection ends with them

_HEADER = struct.Struct("=BBHI")  # kind, flags, index, length of what follows
_HEAD = _HEADER.size
_SENT_HEADER = struct.Struct(
    "=BBHIIQ"
)  # kind, flags, 0, length of the bytes, deltas covered, where they end in all that is sent
_SENT_HEAD = _SENT_HEADER.size
_LENGTH = struct.Struct("=I")
_LENGTH_AT = 4
_BASE_BODY = struct.Struct("=QQQ")  # serial number, bytes read, bytes sent
_BASE_SIZE = _HEAD + _BASE_BODY.size
_TIME = struct.Struct("=d")
_OWNER = struct.Struct("=Q")
_OWNER_AT = 8
_START = 16

_encode = msgspec.msgpack.Encoder().encode
_decode_identity = msgspec.msgpack.Decoder(Identity).decode
_decode_prompts = msgspec.msgpack.Decoder(list[bytes]).decode
_decode_delta = msgspec.msgpack.Decoder(OutputDelta).decode
_decode_attempt = msgspec.msgpack.Decoder(int).decode


def _nobody() -> None:
    pass


def slot_bytes(max_body_bytes: int) -> int:
    """The size of a slot when request bodies may have so many bytes."""
    return SLOT_OVERHEAD_BYTES + -(-max_body_bytes // GRAIN_BYTES) * GRAIN_BYTES


class Journal:
    """The slots of one worker.

    Args:
        descriptor: the memory file.
        slot_bytes: size of a slot, a multiple of the page size.
        limit_bytes: how much memory all slots may take together.

    Attributes:
        used_bytes: what they take, in whole grains.
        memory: all slots. One mapping, because Python's holds a descriptor of its own.
    """

    def __init__(self, descriptor: int, slot_bytes: int, limit_bytes: int) -> None:
        self.slot_bytes = slot_bytes
        self.used_bytes = 0
        self.memory = mmap.mmap(descriptor, 0)
        self._limit_bytes = limit_bytes
        self._descriptor = descriptor
        self._free = deque((number, 0) for number in range(len(self.memory) // slot_bytes)[::-1])
        """Number, and bytes of memory that it has kept. Those that have some are at the right end."""
        self._warm = 0

    def take(self, count: int) -> bool:
        """Counts memory as used, if there is so much left; a negative count gives it back."""
        while self.used_bytes + count > self._limit_bytes and self._warm:
            number, kept = self._free.pop()
            self._free.appendleft((number, 0))
            self._warm -= 1
            self.used_bytes -= kept
            self.clear(number, 0, kept)
        if count > 0 and self.used_bytes + count > self._limit_bytes:
            return False
        self.used_bytes += count
        return True

    def open(self, serial: int, read: int = 0, sent: int = 0) -> Slot | None:
        """A slot for a connection, None when there is no room.

        Args:
            serial: number of the connection, not 0.
            read: bytes that have been read from it so far.
            sent: bytes that have been sent on it so far.
        """
        if not self._free:
            return None
        number, kept = self._free.pop()
        self._warm -= kept > 0
        slot = Slot(self, number, kept)
        if slot.begin(serial, read, sent):
            return slot
        slot.release()
        return None

    def owners(self, living: Container[int]) -> dict[int, int]:
        """Slots that belong to connections of an earlier incarnation, by the connections' serial numbers.

        Args:
            living: serial numbers of the connections that go on. The memory of other slots is given back.
        """
        owners: dict[int, int] = {}
        position, step = 0, self.slot_bytes
        while True:
            try:
                number = os.lseek(self._descriptor, position, os.SEEK_DATA) // step
            except OSError:  # nothing but holes
                return owners
            (serial,) = _OWNER.unpack_from(self.memory, number * step + _OWNER_AT)
            if serial in living:
                owners[serial] = number
            else:
                self.clear(number, 0, step)
            position = (number + 1) * step

    def reopen(self, number: int) -> Slot:
        """The slot that an earlier incarnation has written. Raises ValueError when there is no such slot."""
        self._free.remove((number, 0))
        return Slot(self, number)

    def release(self, number: int, kept: int) -> None:
        """A slot belongs to no connection any more."""
        if kept and self._warm < _WARM_SLOTS:
            keep = min(kept, _KEPT_BYTES)
            self._warm += 1
            self._free.append((number, keep))
        else:
            keep = 0
            self._free.appendleft((number, 0))
        self.used_bytes -= kept - keep
        self.clear(number, keep, kept)

    def clear(self, number: int, start: int, end: int) -> None:
        """Gives the memory of a part of a slot back."""
        if start < end:
            self.memory.madvise(mmap.MADV_REMOVE, number * self.slot_bytes + start, end - start)


class Slot:
    """The log of one connection. Once it is `full` nothing is written any more, and `on_full` has been called; after
    `release` neither.

    Attributes:
        read_bytes: what has been read from the connection.
        sent_bytes: what has been sent on it, or is about to be.
    """

    def __init__(self, journal: Journal, number: int, kept: int = 0) -> None:
        self.number = number
        self.full = False
        self.on_full: Callable[[], None] = _nobody
        self._journal = journal
        at = number * journal.slot_bytes
        self._view = memoryview(journal.memory)[at : at + journal.slot_bytes]
        self._word = self._view[:8].cast("Q")
        self._owner = self._view[_OWNER_AT : _OWNER_AT + 8].cast("Q")
        self._start = self._end = _START
        self._limit = kept
        """So many bytes of it may take memory."""
        self._serial = 0
        self.read_bytes = self.sent_bytes = 0
        self._pending = 0
        """Where the bytes of the last record begin, if they are for the client and the kernel has not taken them; else
        0."""

    # -- writing --------------------------------------------------------------------------------------------------

    def begin(self, serial: int, read: int, sent: int) -> bool:
        """An empty log for a connection, which the slot belongs to from now on. False if there is no room."""
        self._serial = serial
        self.read_bytes, self.sent_bytes = read, sent
        self._start = self._end = _START
        if not self._reserve(_START + _BASE_SIZE):
            return False
        self._rewrite(_START, b"")
        self._owner[0] = serial
        return True

    def forget(self, pending: bytes) -> None:
        """All requests so far have been answered; only `pending`, the end of the last answer, is still to be sent."""
        log_bytes = _BASE_SIZE + _SENT_HEAD + len(pending)
        if self._reserve(self._end + log_bytes):
            self._rewrite(self._end, pending)
            if self._start >= _START + log_bytes:
                self._rewrite(_START, pending)
            self._shrink(max(_KEPT_BYTES, -(-self._end // GRAIN_BYTES) * GRAIN_BYTES))

    def inlet(self) -> memoryview | None:
        """Where to read the client's next bytes into, None if the slot is full. Unless nothing is read, `read` must
        follow before anything else is written.

        The kernel puts the bytes straight into the journal and counts them as read in one system call. Those of a
        process that is killed before it has called `read` are found by the kernel's count.
        """
        at = self._end + _HEAD
        if not self._reserve(at + READ_BYTES):
            return None
        return self._view[at : at + READ_BYTES]

    def read(self, count: int) -> None:
        """So many bytes have been read into the inlet."""
        self._pending = 0
        _HEADER.pack_into(self._view, self._end, _READ, 0, 0, count)
        self.read_bytes += count
        self._commit(self._end + _HEAD + count)

    def sent(self, data: bytes, covered: int, *, last: bool, aside: bool, closes: bool) -> None:
        """These bytes are about to be given to the kernel.

        Args:
            covered: how many deltas of the request's tokens the answer holds now.
            last: the answer ends with them.
            aside: they are not of an answer.
            closes: the connection ends with them.
        """
        at, size = self._end, len(data)
        payload = at + _SENT_HEAD
        end = payload + size
        if end > self._limit and not self._reserve(end):
            return
        self._pending = 0
        self.sent_bytes += size
        flags = _LAST * last | _ASIDE * aside | _CLOSES * closes
        _SENT_HEADER.pack_into(self._view, at, _SENT, flags, 0, size, covered, self.sent_bytes)
        self._view[payload:end] = data
        self._pending = payload
        self._end = end
        self._word[0] = self._start << 32 | end

    def taken(self) -> None:
        """The kernel has taken all that was sent: its bytes are needed no longer."""
        end = self._pending
        if end:
            self._pending = 0
            self._end = end
            self._word[0] = self._start << 32 | end  # cuts the bytes off, which a reader bears; then it is put right
            _LENGTH.pack_into(self._view, end - _SENT_HEAD + _LENGTH_AT, 0)

    def identity(self, identity: Identity) -> None:
        """What was drawn for the request that is being answered."""
        self._append(_IDENTITY, _encode(identity))

    def prompts(self, tokens: list[bytes]) -> None:
        """Token ids (i32) of the request's prompts."""
        self._append(_PROMPTS, _encode(tokens))

    def delta(self, index: int, delta: OutputDelta) -> None:
        """What has arrived of a choice."""
        self._append(_PIECE, _encode(delta), index)

    def attempt(self, index: int, attempt: int) -> None:
        """A choice is about to be handed to a scheduler under this number."""
        self._append(_ATTEMPT, _encode(attempt), index)

    def close(self) -> None:
        """The connection ends once everything has been sent."""
        self._append(_CLOSE, b"")

    def release(self) -> None:
        """Everything has been answered, or the connection has ended: the slot may be given to another one."""
        if self._limit:
            self._owner[0] = 0
        elif not self.full:  # an earlier incarnation's, which nobody has counted
            self._journal.clear(self.number, 0, self._journal.slot_bytes)
        self.full = True
        self._pending = 0
        limit, self._limit = self._limit, 0
        self._journal.release(self.number, limit)

    def _append(self, kind: int, data: bytes, index: int = 0) -> None:
        at = self._end
        end = at + _HEAD + len(data)
        if end > self._limit and not self._reserve(end):
            return
        self._pending = 0
        _HEADER.pack_into(self._view, at, kind, 0, index, len(data))
        self._view[at + _HEAD : end] = data
        self._end = end
        self._word[0] = self._start << 32 | end

    def _rewrite(self, at: int, pending: bytes) -> None:
        """A new log beside the present one takes its place."""
        view = self._view
        _HEADER.pack_into(view, at, _BASE, 0, 0, _BASE_BODY.size)
        _BASE_BODY.pack_into(view, at + _HEAD, self._serial, self.read_bytes, self.sent_bytes - len(pending))
        end = at + _BASE_SIZE
        if pending:
            _SENT_HEADER.pack_into(view, end, _SENT, _DONE, 0, len(pending), 0, self.sent_bytes)
            end += _SENT_HEAD + len(pending)
            view[end - len(pending) : end] = pending
        self._pending = 0
        self._start = at
        self._commit(end)

    def _commit(self, end: int) -> None:
        self._end = end
        self._word[0] = self._start << 32 | end

    def _reserve(self, end: int) -> bool:
        """Makes room up to a position; where there is none, the log ends for good and its memory is given back."""
        if end <= self._limit:
            return True
        if self.full:
            return False
        limit = -(-end // GRAIN_BYTES) * GRAIN_BYTES
        if limit <= self._journal.slot_bytes and self._journal.take(limit - self._limit):
            self._limit = limit
            return True
        self.full = True
        self._pending = 0
        self.on_full()  # first, since a slot without memory looks as if its connection had none
        self._shrink(0)
        return False

    def _shrink(self, limit: int) -> None:
        if self._limit > limit:
            self._journal.clear(self.number, limit, self._limit)
            self._journal.take(limit - self._limit)
            self._limit = limit

    # -- reading --------------------------------------------------------------------------------------------------

    def recover(self, serial: int, read: int, taken: int) -> Recovered:
        """What an earlier incarnation has journalled of a connection.

        Args:
            serial: of the connection.
            read: bytes that the kernel has handed out.
            taken: bytes that the kernel has taken.

        Raises ValueError when the log does not fit the connection, which then cannot go on.
        """
        self._serial = serial
        self._start, self._end = self._word[0] >> 32, self._word[0] & 0xFFFFFFFF
        if not self._belongs_to(serial):
            raise ValueError("its journal is another connection's")
        if not self._reserve(self._end):
            raise ValueError("there is no room for its journal")
        recovered, unsent = self._replay(taken)
        missing = read - self.read_bytes
        if not 0 <= missing <= READ_BYTES:
            raise ValueError(f"{read} bytes were read and {self.read_bytes} are in the journal")
        if missing:
            self._reserve(self._end + _HEAD + missing)
            at = self._end + _HEAD
            recovered.received += self._view[at : at + missing]
            self.read(missing)
        if taken + len(unsent) != self.sent_bytes:
            raise ValueError(f"{self.sent_bytes} bytes were sent, {taken} taken and {len(unsent)} are in the journal")
        recovered.unsent = bytes(unsent)
        if recovered.resumed >= MAX_RESUMED:
            raise ValueError(f"the worker was restarted {recovered.resumed} times without any progress of it")
        self._append(_RESUMED, _TIME.pack(time.monotonic()))
        return recovered

    def _belongs_to(self, serial: int) -> bool:
        start, end = self._start, self._end
        if not _START <= start <= end - _BASE_SIZE <= self._journal.slot_bytes:
            return False
        kind, _, _, _ = _HEADER.unpack_from(self._view, start)
        found, self.read_bytes, self.sent_bytes = _BASE_BODY.unpack_from(self._view, start + _HEAD)
        return bool(kind == _BASE and found == serial)

    def _replay(self, taken: int) -> tuple[Recovered, bytearray]:
        """The log's content, and the bytes that the kernel has not taken."""
        recovered, unsent = Recovered(idle=self.sent_bytes > 0), bytearray()
        replay = recovered.replay
        resumed_at = 0.0
        for kind, flags, index, at, data in self._records():
            if kind == _RESUMED:
                (when,) = _TIME.unpack(data)
                recovered.resumed = recovered.resumed + 1 if when - resumed_at < QUICK_S else 1
                resumed_at = when
            elif kind != _ATTEMPT:
                recovered.resumed = 0
            if kind == _READ:
                recovered.received += data
                self.read_bytes += len(data)
            elif kind == _SENT:
                _, _, _, _, covered, self.sent_bytes = _SENT_HEADER.unpack_from(self._view, at)
                begin = max(taken, self.sent_bytes - len(data))
                if begin < self.sent_bytes:
                    unsent += data[len(data) - (self.sent_bytes - begin) :]
                if flags & _LAST:
                    recovered.answered += 1
                    replay = recovered.replay = ReplayState()
                elif flags & _ASIDE:
                    replay.asides += 1
                elif not flags & _DONE:
                    replay.begun, replay.covered = True, covered
            elif kind == _IDENTITY:
                replay.identity = _decode_identity(data)
            elif kind == _PROMPTS:
                replay.prompts = _decode_prompts(data)
            elif kind == _PIECE:
                replay.deltas.append((index, _decode_delta(data)))
            elif kind == _ATTEMPT:
                replay.attempts[index] = _decode_attempt(data)
            if kind == _CLOSE or (kind == _SENT and flags & _CLOSES):
                recovered.closed = True
        return recovered, unsent

    def _records(self) -> Iterator[tuple[int, int, int, int, memoryview]]:
        """Kind, flags, index, place and data of each record after the first."""
        view, at = self._view, self._start + _BASE_SIZE
        while at < self._end:
            kind, flags, index, size = _HEADER.unpack_from(view, at)
            begin = at + (_SENT_HEAD if kind == _SENT else _HEAD)
            if kind == _SENT and begin == self._end and size:  # killed in `taken`
                _LENGTH.pack_into(view, at + _LENGTH_AT, 0)
                size = 0
            if not _READ <= kind <= _RESUMED or begin + size > self._end:
                raise ValueError("its journal is damaged")
            yield kind, flags, index, at, view[begin : begin + size]
            at = begin + size


@dataclass
class ReplayState:
    """What is known of the request that is being answered.

    Attributes:
        identity: None if the request had not come far enough.
        prompts: token ids (i32) of its prompts, None before they are known.
        deltas: (choice, delta), in the order in which they arrived.
        attempts: number under which each choice was last handed to a scheduler again.
        begun: a part of a streamed answer was sent, with the first `covered` deltas in it.
        asides: bytes sent before the answer, such as 100 Continue, in so many writes.
    """

    identity: Identity | None = None
    prompts: list[bytes] | None = None
    deltas: list[tuple[int, OutputDelta]] = field(default_factory=list)
    attempts: dict[int, int] = field(default_factory=dict)
    begun: bool = False
    covered: int = 0
    asides: int = 0


@dataclass
class Recovered:
    """A connection as its journal tells it.

    Attributes:
        received: what the client has sent, from the first byte of a request on.
        answered: that many requests in it have been answered.
        unsent: what was sent and the kernel has not taken.
        closed: the connection ends after that.
        idle: if nothing has been received, it has been kept alive after an answer.
        resumed: that many incarnations have gone on with it in quick succession and have made no progress.
        replay: of the first request that has not been answered.
    """

    received: bytearray = field(default_factory=bytearray)
    answered: int = 0
    unsent: bytes = b""
    closed: bool = False
    idle: bool = False
    resumed: int = 0
    replay: ReplayState = field(default_factory=ReplayState)
