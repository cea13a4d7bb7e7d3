"""A nested supervisor's link to the supervisor above it, inside its event loop."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence

from llm_runtime.supervisors import messages
from llm_runtime.supervisors.link import Link
from llm_runtime.supervisors.loop import Loop
from llm_runtime.supervisors.messages import Call, Up, encode
from llm_runtime.supervisors.status import Event, NodeStatus

MAX_BACKLOG = 1000
"""Packets waiting for a parent that does not read, above which events are dropped."""


class Parent:
    """Tells the supervisor above what it has to know, and hears what it wants.

    children()      the present state of the subtree.
    shutdown()      is called when the parent asks for a stop.
    command(call)   is called for a command; the answer goes through `reply`.

    If the parent goes away, the process exits, and with it all below.
    """

    def __init__(
        self,
        link: Link,
        loop: Loop,
        children: Callable[[], list[NodeStatus]],
        shutdown: Callable[[], None],
        command: Callable[[Call], None],
    ) -> None:
        self.changed = True
        """The state of the subtree is not what the parent was told last."""
        self.next_beat = 0.0
        """When `tell` has to be called next, in monotonic seconds."""
        self._link = link
        self._channel = link.channel
        self._loop = loop
        self._children = children
        self._shutdown = shutdown
        self._command = command
        self._said_ready = False
        loop.watch(self._channel.fileno(), self._readable, self._writable)

    def send(self, message: Up, fds: Sequence[int] = ()) -> None:
        """Sends now, or when the link takes it."""
        self._channel.send(encode(message), fds)
        self._loop.want_write(self._channel.fileno(), self._channel.backlog > 0)

    def event(self, event: Event) -> None:
        """Passes an event on."""
        if self._channel.backlog < MAX_BACKLOG:
            self.send(messages.EventRaised(event=event))

    def reply(self, number: int, error: str) -> None:
        """Answers a command, after the state it has led to."""
        self._send_tree()
        self.send(messages.Reply(number=number, error=error))

    def tell(self, started: bool) -> None:
        """Ready once `started`, a heartbeat when due, and the subtree with it and whenever it has changed."""
        if started and not self._said_ready:
            self._said_ready = True
            self.send(messages.Ready())
        now = time.monotonic()
        due = now >= self.next_beat
        if due:
            self.next_beat = now + self._link.heartbeat_s
        if self._channel.backlog:
            return  # the parent has not even read what it was told before
        if due:
            self.send(messages.Heartbeat())
        if due or self.changed:
            self._send_tree()

    def _send_tree(self) -> None:
        self.changed = False
        self.send(messages.Tree(children=self._children()))

    def _writable(self) -> None:
        self._channel.flush()
        self._loop.want_write(self._channel.fileno(), self._channel.backlog > 0)

    def _readable(self) -> None:
        for payload, _ in self._channel.receive():
            message = messages.decode_down(payload)
            if isinstance(message, messages.Shutdown):
                self._shutdown()
            elif isinstance(message, Call):
                self._command(message)
        if self._channel.closed:
            os._exit(1)
