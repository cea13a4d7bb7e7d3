"""Classes that the tests start. Files in the run directory and signals make them misbehave."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from types import FrameType
from typing import NoReturn

from llm_runtime.supervisors import ChildContext


def note(context: ChildContext, text: str) -> None:
    """Adds a line to the journal of the test, in one write."""
    journal = os.open(context.run_dir / "journal", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(journal, f"{context.id} {context.incarnation} {text}\n".encode())
    os.close(journal)


def wait_forever() -> NoReturn:
    while True:
        signal.pause()


def _end_normally(number: int, frame: FrameType | None) -> None:
    raise SystemExit(0)


def _crash(number: int, frame: FrameType | None) -> None:
    raise RuntimeError("told to crash")


class Steady:
    """Becomes ready and stops when asked. SIGUSR1 ends it normally, SIGUSR2 raises an exception.

    RUNDIR/ID.broken makes it fail and RUNDIR/ID.hang makes it hang before it is ready.
    """

    @classmethod
    def run(cls, context: ChildContext) -> None:
        signal.signal(signal.SIGUSR1, _end_normally)
        signal.signal(signal.SIGUSR2, _crash)
        note(context, "run")
        if (context.run_dir / f"{context.id}.broken").exists():
            context.link.failed("it is broken")
        if (context.run_dir / f"{context.id}.hang").exists():
            wait_forever()
        context.link.stats = lambda: {"generation": context.generation, **context.args.get("stats", {})}
        context.link.ready()
        context.link.wait_shutdown()
        note(context, "stop")


class Ignoring:
    """Has nothing to do."""

    @classmethod
    def run(cls, context: ChildContext) -> None:
        note(context, "ignore")
        context.link.ignore("nothing to do here")


class Failing:
    """Cannot start, and says why."""

    @classmethod
    def run(cls, context: ChildContext) -> None:
        context.link.failed("the model file is missing; fetch it with `make model`")


class Raising:
    """Has a bug in its start."""

    @classmethod
    def run(cls, context: ChildContext) -> None:
        sys.stderr.write("about to divide\n")
        _ = 1 // context.args.get("zero", 0)


class Quitting:
    """Returns without ever being ready."""

    @classmethod
    def run(cls, context: ChildContext) -> None:
        pass


class Exiting:
    """Exits with a code of its own after it was ready, once RUNDIR/ID.exit exists."""

    @classmethod
    def run(cls, context: ChildContext) -> None:
        context.link.ready()
        while not (context.run_dir / f"{context.id}.exit").exists():
            context.link.wait_shutdown(0.01)
        raise SystemExit(7)


class Stubborn:
    """Does not stop when asked."""

    @classmethod
    def run(cls, context: ChildContext) -> None:
        note(context, "run")
        context.link.ready()
        context.link.wait_shutdown()
        note(context, "asked")
        until = context.run_dir / f"{context.id}.let_go"
        while not until.exists():
            time.sleep(0.01)
        note(context, "stop")


class Stuck:
    """Its main loop does `args["what"]` without end, having announced `args["limit_s"]`; the heartbeats go on."""

    @classmethod
    def run(cls, context: ChildContext) -> None:
        context.link.ready()
        context.link.doing(context.args["what"], context.args["limit_s"])
        wait_forever()


class Storer:
    """Echoes on the connections stored by earlier incarnations, and stores those it inherits as "client".

    `remove_fd` sent by a client makes it take the connection back from the supervisor and close it.
    """

    @classmethod
    def run(cls, context: ChildContext) -> None:
        connections = {name: socket.socket(fileno=fd) for name, (fd, _) in context.stored_fds.items()}
        for name, (_, meta) in context.stored_fds.items():
            note(context, f"found {name} {meta.decode()}")
        if not connections and context.incarnation == 1:
            connections = {"client": socket.socket(fileno=context.descriptors["client"])}
            context.link.store_fd("client", connections["client"].fileno(), b"first")
        context.link.ready()
        while not context.link.shutdown_requested:
            for name, connection in list(connections.items()):
                connection.settimeout(0.01)
                with contextlib.suppress(TimeoutError):
                    text = connection.recv(100)
                    if text == b"remove":
                        context.link.remove_fd(name)
                        note(context, "removed")
                    elif text == b"many":
                        for number in range(300):
                            context.link.store_fd(f"copy{number}", connection.fileno(), b"copy")
                    else:
                        connection.sendall(b"%d:%s" % (context.incarnation, text))


class Parent:
    """Starts a process of its own that would outlive it."""

    @classmethod
    def run(cls, context: ChildContext) -> None:
        helper = subprocess.Popen(["sleep", "1000"])
        note(context, f"helper {helper.pid}")
        context.link.ready()
        context.link.wait_shutdown()


class Environment:
    """Notes what a child starts with."""

    @classmethod
    def run(cls, context: ChildContext) -> None:
        note(context, f"session {os.getsid(0) == os.getpid()}")
        note(context, f"descriptors {sorted(context.descriptors)} {os.pread(context.descriptors['file'], 100, 0)!r}")
        note(context, f"open {len(os.listdir('/proc/self/fd')) - 1}")
        note(context, f"sigterm {signal.getsignal(signal.SIGTERM) == signal.SIG_DFL}")
        sys.stdout.write("a line on standard output\n")
        context.link.ready()
        context.link.wait_shutdown()
