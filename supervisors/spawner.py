"""Starts processes through the zygote and hands their messages and their end to whoever asked."""

from __future__ import annotations

import itertools
import logging
import os
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from socket import socket

import msgspec

from llm_runtime.supervisors import messages
from llm_runtime.supervisors.loop import Loop, pidfd_kill, reap_strangers
from llm_runtime.supervisors.messages import Down, ForkRequest, Start, StoredFds, Up, encode
from llm_runtime.supervisors.process import Process
from llm_runtime.supervisors.restarts import Delay
from llm_runtime.supervisors.spec import Backoff, ChildSpec
from llm_runtime.supervisors.wire import Channel, socket_pair
from llm_runtime.supervisors.zygote import HERE, Zygote

ZYGOTE_BACKOFF = Backoff(base_ms=20.0, cap_ms=1000.0)
"""Between replacements of a zygote that is lost again soon after its start."""

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Launch:
    process: Process
    child_end: socket
    start: Start
    fds: Sequence[int]
    stored_fds: Iterable[tuple[StoredFds, list[int]]]
    sent_at: float = 0.0


def _nobody(error: str) -> None:
    """Is told of nothing."""


class Spawner:
    """Owns the zygote, the pidfds and the links.

    on_message(process, message, fds) gets each message; the receiver owns the descriptors.
    on_exit(process, status, error) is called once per launch, after the last message: with the wait status, or with
    None and why it could not be forked.
    """

    def __init__(
        self,
        zygote: Zygote,
        loop: Loop,
        on_message: Callable[[Process, Up, list[int]], None],
        on_exit: Callable[[Process, os.waitid_result | None, str], None],
        on_zygote_lost: Callable[[int], None],
    ) -> None:
        self._zygote = zygote
        self._loop = loop
        self._on_message = on_message
        self._on_exit = on_exit
        self._on_zygote_lost = on_zygote_lost
        self._numbers = itertools.count(1)
        self._launches: dict[int, _Launch] = {}
        self._living: dict[int, Process] = {}
        self._retry_at: float | None = None
        self._delay = Delay(ZYGOTE_BACKOFF)
        self._strangers_due = False
        self._successor: Zygote | None = None
        self._renewed: Callable[[str], None] = _nobody
        self._watch_zygote()

    def launch(
        self,
        spec: ChildSpec,
        incarnation: int,
        log: Path,
        start: Start,
        fds: Sequence[int],
        stored_fds: Iterable[tuple[StoredFds, list[int]]],
    ) -> Process:
        """Requests a process. It gets `start` with `fds`, then `stored_fds`, once its pid is known."""
        ours, theirs = socket_pair()
        process = Process(spec, incarnation, log, Channel(ours), time.monotonic())
        number = next(self._numbers)
        self._launches[number] = _Launch(process, theirs, start, fds, stored_fds)
        self._request(number)
        return process

    def send(self, process: Process, message: Down, fds: Sequence[int] = ()) -> None:
        """Sends now, or when the link takes it."""
        self._return_stored_fds(process, all_now=True)
        process.channel.send(encode(message), fds)
        self._loop.want_write(process.channel.fileno(), process.channel.backlog > 0)

    def renew_zygote(self, done: Callable[[str], None]) -> None:
        """Puts a zygote in the place of this one that has imported the program as it is on the disk now. Meanwhile the
        old one goes on. `done` is told when it is there, or why it is not."""
        if self._successor is not None:
            return done("the zygote is being renewed already; try again when that is done")
        try:
            self._successor = self._zygote.successor()
        except OSError as error:
            return done(f"cannot start a zygote: {error.strerror}")
        self._renewed = done
        assert self._successor.channel is not None
        self._loop.watch(self._successor.channel.fileno(), self._successor_answered)

    def deadline(self) -> float | None:
        """When `check` has something to do, in monotonic seconds."""
        if self._retry_at is not None:
            return self._retry_at
        times = [launch.sent_at + self._zygote.patience_s for launch in self._launches.values()]
        if self._successor is not None:
            times.append(self._successor.started_at + self._successor.patience_s)
        return min(times, default=None)

    def check(self, now: float) -> None:
        """Replaces a zygote that is lost or does not answer; waits for ended orphans."""
        if self._strangers_due and not self._launches:  # else a stranger may be a child whose pid is not known yet
            zygotes = [self._zygote.pid, self._successor.pid if self._successor is not None else 0]
            self._strangers_due = not reap_strangers(lambda pid: pid in zygotes or pid in self._living)
        if self._successor is not None and now >= self._successor.started_at + self._successor.patience_s:
            self._succession_failed("it took too long to import the program")
        if self._retry_at is not None:
            if now >= self._retry_at:
                self._retry_at = None
                self._replace_zygote()
        elif any(now >= launch.sent_at + self._zygote.patience_s for launch in self._launches.values()):
            pidfd_kill(self._zygote.pidfd, signal.SIGKILL)
            self._zygote_ended()

    def child_ended(self) -> None:
        """To be called on SIGCHLD."""
        self._strangers_due = True

    def close(self) -> None:
        """Kills the zygote; all children must have ended."""
        for launch in self._launches.values():
            launch.child_end.close()
            launch.process.channel.close()
        self._launches.clear()
        if self._successor is not None:
            self._succession_failed("the supervisor has stopped")
        if self._zygote.channel is not None:
            self._unwatch_zygote()
            self._zygote.close()

    # The zygote

    def _watch_zygote(self) -> None:
        channel = self._zygote.channel
        assert channel is not None
        self._loop.watch(channel.fileno(), self._zygote_answered, self._zygote_writable)
        self._loop.watch(self._zygote.pidfd, self._zygote_ended)

    def _unwatch_zygote(self) -> None:
        assert self._zygote.channel is not None
        self._loop.unwatch(self._zygote.channel.fileno())
        self._loop.unwatch(self._zygote.pidfd)

    def _request(self, number: int) -> None:
        launch = self._launches[number]
        launch.sent_at = time.monotonic()
        if (channel := self._zygote.channel) is not None:
            request = ForkRequest(number=number, title=launch.process.spec.process_title, log=str(launch.process.log))
            channel.send(encode(request), [launch.child_end.fileno()])
            self._zygote_writable()

    def _zygote_writable(self) -> None:
        if (channel := self._zygote.channel) is not None:
            channel.flush()
            self._loop.want_write(channel.fileno(), channel.backlog > 0)

    def _zygote_answered(self) -> None:
        assert self._zygote.channel is not None
        for payload, _ in self._zygote.channel.receive():
            reply = messages.decode_fork_reply(payload)
            if reply.number == HERE:
                continue
            launch = self._launches.pop(reply.number)
            launch.child_end.close()
            if reply.error:
                launch.process.channel.close()
                self._on_exit(launch.process, None, reply.error)
            else:
                self._adopt(launch, reply.pid)
        if self._zygote.channel.closed:
            self._loop.unwatch(self._zygote.channel.fileno())  # its end is noticed by its pidfd

    def _zygote_ended(self) -> None:
        self._zygote_answered()  # what it had still said
        lived = time.monotonic() - self._zygote.started_at
        pid = self._zygote.pid
        self._unwatch_zygote()
        self._zygote.close()
        self._on_zygote_lost(pid)
        delay_s = self._delay.next(lived)
        if delay_s > 0:
            self._retry_at = time.monotonic() + delay_s
        else:
            self._replace_zygote()

    def _replace_zygote(self) -> None:
        try:
            self._zygote.start()
        except OSError as error:
            _log.error("cannot start a zygote: %s; trying again", error)
            self._retry_at = time.monotonic() + ZYGOTE_BACKOFF.cap_ms / 1000
            return
        self._resume()

    def _resume(self) -> None:
        """A new zygote is asked for what the old one has not answered."""
        self._watch_zygote()
        for number, launch in list(self._launches.items()):
            # A child that the old zygote may have forked for it must find its link closed, so it gets a new one.
            launch.child_end.close()
            launch.process.channel.close()
            ours, launch.child_end = socket_pair()
            launch.process.channel = Channel(ours)
            self._request(number)

    def _successor_answered(self) -> None:
        assert self._successor is not None
        assert self._successor.channel is not None
        successor, channel = self._successor, self._successor.channel
        if not channel.receive():
            if channel.closed:
                self._succession_failed("it ended while it imported the program; see the log of the supervisor")
            return
        self._loop.unwatch(channel.fileno())
        self._successor = None
        self._retry_at = None
        if self._zygote.channel is not None:
            self._zygote_answered()  # what it had still said
            self._unwatch_zygote()
        self._zygote.take_over(successor)
        self._resume()
        self._renewed("")

    def _succession_failed(self, why: str) -> None:
        assert self._successor is not None
        assert self._successor.channel is not None
        self._loop.unwatch(self._successor.channel.fileno())
        self._successor.close()
        self._successor = None
        self._renewed(f"a new zygote could not be started: {why}")

    # Children

    def _adopt(self, launch: _Launch, pid: int) -> None:
        process = launch.process
        process.pid, process.pidfd = pid, os.pidfd_open(pid)
        process.last_beat = time.monotonic()
        self._living[pid] = process
        self._loop.watch(process.pidfd, lambda: self._ended(process))
        link = process.channel.fileno()
        self._loop.watch(link, lambda: self._readable(process), lambda: self._writable(process))
        if process.killed:
            process.kill()
            return
        self.send(process, launch.start, launch.fds)
        process.stored_fds = iter(launch.stored_fds)
        self._writable(process)

    def _return_stored_fds(self, process: Process, all_now: bool = False) -> None:
        """Gives stored descriptors back, as the link takes them: what waits in it is duplicated, and there may be
        thousands."""
        while process.stored_fds is not None and (all_now or not process.channel.backlog):
            try:
                message, fds = next(process.stored_fds)
            except StopIteration:
                process.stored_fds = None
            else:
                process.channel.send(encode(message), fds)

    def _writable(self, process: Process) -> None:
        process.channel.flush()
        self._return_stored_fds(process)
        self._loop.want_write(process.channel.fileno(), process.channel.backlog > 0)

    def _readable(self, process: Process) -> None:
        self._read(process)

    def _read(self, process: Process) -> int:
        received = process.channel.receive()
        for payload, fds in received:
            try:
                message = messages.decode_up(payload)
            except msgspec.DecodeError as error:
                _log.warning("%s: dropped a malformed message on its link: %s", process.spec.id, error)
                for fd in fds:
                    os.close(fd)
                continue
            self._on_message(process, message, fds)
        if process.channel.closed:
            self._loop.unwatch(process.channel.fileno())
        return len(received)

    def _ended(self, process: Process) -> None:
        while self._read(process):
            pass  # what it said before it died
        try:
            os.killpg(process.pid, signal.SIGKILL)  # what it had started itself; the zombie keeps the number taken
        except (ProcessLookupError, PermissionError):
            pass
        status = os.waitid(os.P_PIDFD, process.pidfd, os.WEXITED)
        assert status is not None
        del self._living[process.pid]
        self._loop.unwatch(process.pidfd)
        self._loop.unwatch(process.channel.fileno())
        os.close(process.pidfd)
        process.pidfd = -1
        process.stored_fds = None
        process.channel.close()
        self._on_exit(process, status, "")
