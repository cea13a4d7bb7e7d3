"""The event loop of a supervisor: readable and writable descriptors, and signals as events."""

from __future__ import annotations

import os
import selectors
import signal
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

Callback = Callable[[], None]

LONGEST_WAIT_S = 3600.0
"""The kernel takes at most 2³¹ milliseconds."""


@dataclass(eq=False)
class _Watch:
    readable: Callback
    writable: Callback | None
    active: bool = True


class Loop:
    """Watches descriptors; `poll` runs their callbacks. Not reentrant, one thread."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._old_handlers: dict[int, Any] = {}
        self._wakeup: tuple[socket.socket, socket.socket] | None = None
        self._old_wakeup = -1

    def watch(self, fd: int, readable: Callback, writable: Callback | None = None) -> None:
        """Calls `readable` whenever `fd` is readable or hung up; `writable` only while `want_write` is set."""
        self._selector.register(fd, selectors.EVENT_READ, _Watch(readable, writable))

    def want_write(self, fd: int, wanted: bool) -> None:
        """Whether `writable` of a watched descriptor shall be called too."""
        key = self._selector.get_map().get(fd)
        if key is not None:
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if wanted else 0)
            if key.events != events:
                self._selector.modify(fd, events, key.data)

    def unwatch(self, fd: int) -> None:
        """Forgets a descriptor, which must still be open; does nothing for one not watched."""
        if fd in (self._selector.get_map() or ()):  # None once closed
            self._selector.unregister(fd).data.active = False

    def poll(self, timeout_s: float | None) -> None:
        """Waits for events, at most `timeout_s` seconds and LONGEST_WAIT_S, and runs their callbacks."""
        for key, events in self._selector.select(timeout_s if timeout_s is None else min(timeout_s, LONGEST_WAIT_S)):
            watch: _Watch = key.data
            if events & selectors.EVENT_WRITE and watch.active and watch.writable is not None:
                watch.writable()
            if events & selectors.EVENT_READ and watch.active:
                watch.readable()

    def watch_signals(self, callbacks: Mapping[int, Callback]) -> None:
        """From now on these signals only run their callback, inside `poll`."""
        receiver, sender = socket.socketpair()
        receiver.setblocking(False)
        sender.setblocking(False)
        self._wakeup = receiver, sender
        self._old_wakeup = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
        for number in callbacks:
            self._old_handlers[number] = signal.signal(number, _note)

        def received() -> None:
            for number in receiver.recv(4096):
                if number in callbacks:
                    callbacks[number]()

        self.watch(receiver.fileno(), received)

    def close(self) -> None:
        """Gives the signals their earlier handlers back and forgets all descriptors."""
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        if self._wakeup is not None:
            signal.set_wakeup_fd(self._old_wakeup)
            for end in self._wakeup:
                end.close()
        self._old_handlers, self._wakeup = {}, None
        self._selector.close()


def _note(number: int, frame: FrameType | None) -> None:
    """Python writes the number to the wake-up descriptor; nothing else to do."""


def pidfd_kill(pidfd: int, number: int) -> None:
    """Sends a signal; does nothing if the process is gone."""
    try:
        signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        pass


def reap_strangers(known: Callable[[int], bool]) -> bool:
    """Waits for ended children that nobody knows: orphans of processes below, which a subreaper inherits.

    False if it has to be called again, once the known child that is in the way has been waited for.
    """
    while True:
        try:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return True
        if ended is None:
            return True
        if known(ended.si_pid):
            return False
        os.waitid(os.P_PID, ended.si_pid, os.WEXITED | os.WNOHANG)
