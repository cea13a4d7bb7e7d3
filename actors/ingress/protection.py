"""How connections outlive their worker: the supervisor keeps a duplicate of each, and those with a request have a slot
of the journal."""

from __future__ import annotations

import logging
import socket

from llm_runtime.actors.actor import Link
from llm_runtime.actors.ingress.journal import Journal, Slot
from llm_runtime.actors.ingress.positions import positions

logger = logging.getLogger(__name__)


class Shelter:
    """The protection of all connections of a worker.

    Args:
        journal: None if connections are not to survive.
        counters: see `IngressMetrics`.
        incarnation: of the worker.
    """

    def __init__(self, journal: Journal | None, link: Link, counters: dict[str, int], incarnation: int) -> None:
        self.journal = journal
        self.link = link
        self.counters = counters
        self._serial = incarnation << 32
        self.receiving: dict[Protection, None] = {}
        """Those that have a slot and whose request has not arrived whole, the oldest first."""

    def accepted(self, connection: socket.socket) -> Protection:
        """For a new connection."""
        self._serial += 1
        protection = Protection(self, connection, self._serial)
        if self.journal is not None:
            protection.store()
        return protection

    def found(self, connection: socket.socket, serial: int, slot: Slot | None, read: int, sent: int) -> Protection:
        """For one that an earlier incarnation has left.

        Args:
            slot: None if it has no request.
            read: bytes that have been read from it.
            sent: bytes that have been sent on it.
        """
        protection = Protection(self, connection, serial)
        protection.stored = True
        protection.read_bytes, protection.sent_bytes = read, sent
        protection.slot = slot
        if slot is not None:
            slot.on_full = protection.give_up
            self.receiving[protection] = None
        return protection

    def open(self, serial: int, read: int, sent: int) -> Slot | None:
        """A slot for a connection whose request begins. Who has not sent a whole request loses the own one first, so
        that clients who leave theirs half sent take no protection from others."""
        if self.journal is None:
            return None
        slot = self.journal.open(serial, read, sent)
        if slot is None and self.receiving:
            next(iter(self.receiving)).give_up()
            slot = self.journal.open(serial, read, sent)
        return slot


class Protection:
    """The protection of one connection.

    At each moment it is one of these, and what a new incarnation does follows from it:

    - stored, without a slot: each byte that was read has been answered. It waits for a request.
    - stored, with a slot: it goes on as the slot's log says.
    - not stored: it ends with the worker.

    Attributes:
        slot: None if there is none.
        stored: the supervisor has a duplicate.
    """

    def __init__(self, shelter: Shelter, connection: socket.socket, serial: int) -> None:
        self.slot: Slot | None = None
        self.stored = False
        self._shelter = shelter
        self._connection = connection
        self._serial = serial
        self.read_bytes: int | None = 0
        """In all, as of the last moment without a request; None if that is not known."""
        self.sent_bytes = 0
        self._given_up = False

    def store(self) -> None:
        """Leaves a duplicate with the supervisor, if that has room for it."""
        try:
            self._shelter.link.store_fd(str(self._serial), self._connection.fileno())
        except ValueError:
            return
        self.stored = True

    def before_reading(self) -> Slot | None:
        """The slot into whose log bytes of a request are to be read; None if it goes without one."""
        if self._given_up:
            return None
        if self._shelter.journal is not None:
            try:
                if self.read_bytes is None:
                    self.read_bytes, self.sent_bytes = positions(self._connection)
                slot = self._shelter.open(self._serial, self.read_bytes, self.sent_bytes)
            except OSError:
                slot = None
            if slot is not None:
                self.slot = slot
                slot.on_full = self.give_up
                if not self.stored:
                    self.store()
                if self.stored:
                    self._shelter.receiving[self] = None
                    return slot
                self.slot = None
                slot.release()
        self.give_up()
        return None

    def is_whole(self) -> None:
        """The request has arrived."""
        self._shelter.receiving.pop(self, None)

    def rest(self) -> None:
        """All requests have been answered, and the kernel has taken the answers."""
        self._given_up = False
        self.is_whole()
        slot, self.slot = self.slot, None
        if slot is not None:
            self.read_bytes, self.sent_bytes = slot.read_bytes, slot.sent_bytes
            slot.release()

    def give_up(self) -> None:
        """Until the request has been answered, the connection ends if the worker dies."""
        self._given_up = True
        self.is_whole()
        self.read_bytes = None
        self._shelter.counters["connections_unprotected"] += 1
        self._remove()
        slot, self.slot = self.slot, None
        if slot is not None:
            slot.on_full = _nothing
            slot.release()

    def end(self) -> None:
        """The connection has ended."""
        self.is_whole()
        self._remove()
        if self.slot is not None:
            self.slot.release()

    def _remove(self) -> None:
        if self.stored:
            self.stored = False
            self._shelter.link.remove_fd(str(self._serial))


def _nothing() -> None:
    pass
