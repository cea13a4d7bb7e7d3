"""The process that forks children for a supervisor.

It is forked from the supervisor before that opens a socket or starts a thread, stays single-threaded, and does
nothing but fork. A child is forked twice and the middle process exits; the supervisor is a subreaper
(PR_SET_CHILD_SUBREAPER), so the orphan becomes the supervisor's own child and can be waited for.
"""

from __future__ import annotations

import gc
import importlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import NoReturn

from setproctitle import setproctitle

from llm_runtime.supervisors import linux, messages
from llm_runtime.supervisors.child_main import enter
from llm_runtime.supervisors.messages import ForkReply, ForkRequest, encode
from llm_runtime.supervisors.wire import LAST, PACKET_BYTES, Channel, socket_pair

FORK_TIMEOUT_S = 3.0
IMPORT_TIMEOUT_S = 120.0
HERE = 0


class Zygote:
    """The supervisor's handle of its zygote.

    A lost one is replaced by `start()`: by a fork, if this process has no more threads than when the first was forked
    (native libraries keep idle threads and are prepared for a fork), else by a fresh interpreter that imports
    `modules`, which takes as long as that import.
    """

    def __init__(self, owner: str, modules: Sequence[str]) -> None:
        self._title = f"runtime: zygote of {owner}"
        self._modules = tuple(dict.fromkeys(modules))
        self._threads: int | None = None
        self.pid = 0
        self.pidfd = -1
        self.channel: Channel | None = None
        self.started_at = 0.0
        self.patience_s = FORK_TIMEOUT_S
        """One that takes longer to fork is stuck or stopped."""

    def start(self, fresh: bool = False) -> None:
        """Starts a zygote; from a fork or, in a process with more threads than at first or if `fresh`, a fresh
        interpreter. Once it can fork, it says so by a `ForkReply` with the number HERE."""
        threads = linux.thread_count()
        if self._threads is None:
            if threading.active_count() > 1:
                raise RuntimeError("start the zygote before any thread: a process with threads cannot be forked safely")
            self._threads = threads
        ours, theirs = socket_pair()
        if not fresh and threads <= self._threads and threading.active_count() == 1:
            sys.stdout.flush()
            sys.stderr.flush()
            supervisor = os.getpid()
            pid, self.patience_s = os.fork(), FORK_TIMEOUT_S
            if pid == 0:
                _become_zygote(theirs, supervisor, self._title)
        else:
            pid, self.patience_s = self._spawn(theirs), IMPORT_TIMEOUT_S
        theirs.close()
        self.pid = pid
        self.pidfd = os.pidfd_open(pid)
        self.channel = Channel(ours)
        self.started_at = time.monotonic()

    def successor(self) -> Zygote:
        """Starts another one in a fresh interpreter, which imports the modules as they are on the disk now; for
        `take_over`. Raises OSError."""
        other = Zygote("", self._modules)
        other._title, other._threads = self._title, self._threads
        other.start(fresh=True)
        return other

    def take_over(self, successor: Zygote) -> None:
        """Ends this zygote; the successor, which must be there, is in its place."""
        self.close()
        self.pid, self.pidfd, self.channel = successor.pid, successor.pidfd, successor.channel
        self.started_at, self.patience_s = time.monotonic(), FORK_TIMEOUT_S

    def _spawn(self, theirs: socket.socket) -> int:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        level = str(logging.root.level)
        arguments = [str(theirs.fileno()), str(os.getpid()), level, self._title, *self._modules]
        process = subprocess.Popen(
            # Not -m, which would warn: the package has imported this module already.
            [sys.executable, "-c", "from llm_runtime.supervisors.zygote import main; main()", *arguments],
            pass_fds=[theirs.fileno()],
            env=environment,
            stdin=subprocess.DEVNULL,
        )
        process.returncode = 0  # this supervisor waits for it by its pidfd, not through Popen
        return process.pid

    def close(self) -> None:
        """Kills the zygote and waits for its end. Its children are the supervisor's and live on."""
        if self.channel is None:
            return
        try:
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        except ProcessLookupError:
            pass
        os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED)
        os.close(self.pidfd)
        self.channel.close()
        self.channel, self.pid, self.pidfd = None, 0, -1


def _become_zygote(control: socket.socket, supervisor: int, title: str) -> NoReturn:
    try:
        gc.disable()
        gc.freeze()  # the collector would write to, and so copy, every page that all children share
        linux.die_with_parent(supervisor)
        os.setsid()
        linux.close_descriptors({0, 1, 2, control.fileno()})
        linux.reset_signals()
        setproctitle(title)
        _serve(control, supervisor)
    finally:
        os._exit(1)


def _serve(control: socket.socket, supervisor: int) -> NoReturn:
    control.setblocking(True)
    control.send(LAST + encode(ForkReply(number=HERE, pid=os.getpid(), error="")))
    while True:
        packet, fds, _, _ = socket.recv_fds(control, PACKET_BYTES + 1, 1)
        if not packet:
            os._exit(0)
        request = messages.decode_fork_request(packet[1:])
        (link_fd,) = fds
        pid, error = 0, ""
        try:
            pid = _fork_twice(request, link_fd, supervisor)
        except OSError as problem:
            error = f"cannot fork: {problem.strerror}"
        os.close(link_fd)
        control.send(packet[:1] + encode(ForkReply(number=request.number, pid=pid, error=error)))


def _fork_twice(request: ForkRequest, link_fd: int, supervisor: int) -> int:
    """The pid of a new child of the supervisor. Raises OSError if the kernel refuses."""
    read, write = os.pipe()
    try:
        middle = os.fork()
        if middle == 0:
            status = 1
            try:
                middle = os.getpid()
                child = os.fork()
                if child == 0:
                    enter(request, link_fd, supervisor, middle)
                os.write(write, child.to_bytes(4, "little"))
                status = 0
            except OSError as problem:
                status = problem.errno or 1
            finally:
                os._exit(status)
        os.close(write)
        write = -1
        answer = os.read(read, 4)
        status = os.waitstatus_to_exitcode(os.waitpid(middle, 0)[1])
    finally:
        os.close(read)
        if write >= 0:
            os.close(write)
    if len(answer) != 4:
        raise OSError(status, os.strerror(status) if status > 0 else f"signal {-status}")
    return int.from_bytes(answer, "little")


def main() -> NoReturn:
    """What a fresh interpreter runs."""
    fd, supervisor, level, title, *modules = sys.argv[1:]
    logging.root.setLevel(int(level))
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:  # the child that needs it will fail with the same words
            sys.stderr.write(f"{title}: {error}\n")
    _become_zygote(socket.socket(fileno=int(fd)), int(supervisor), title)
