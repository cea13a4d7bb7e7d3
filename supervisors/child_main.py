"""What a freshly forked process does before the code of its class runs, and after."""

from __future__ import annotations

import faulthandler
import gc
import importlib
import logging
import os
import select
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import NoReturn

from setproctitle import setproctitle

from llm_runtime.supervisors import linux, logs, messages
from llm_runtime.supervisors.link import ChildContext, Link
from llm_runtime.supervisors.messages import ForkRequest
from llm_runtime.supervisors.wire import Channel

_REPARENT_POLL_S = 0.0002


def enter(request: ForkRequest, link_fd: int, supervisor: int, middle: int) -> NoReturn:
    """Turns this process, forked by the process `middle` which is about to exit, into a child of `supervisor`,
    and runs its class. Never returns."""
    code = 1
    try:
        while os.getppid() == middle:
            time.sleep(_REPARENT_POLL_S)
        linux.die_with_parent(supervisor)
        os.setsid()  # Ctrl-C in the terminal reaches the root alone
        _redirect(Path(request.log))
        linux.close_descriptors({0, 1, 2, link_fd})
        linux.reset_signals()
        faulthandler.enable(file=2, all_threads=True)
        setproctitle(request.title)
        gc.enable()
        channel = Channel(socket.socket(fileno=link_fd))
        code = _run(channel)
    except BaseException:
        traceback.print_exc()
    finally:
        _flush()
        os._exit(code)


def _redirect(log: Path) -> None:
    """Standard output and error to the log file, standard input from nowhere."""
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = sys.stderr = logs.open_log(log, descriptors=(1, 2))
    logging.root.handlers.clear()
    logging.basicConfig(level=logging.root.level, format=logs.TEXT, stream=sys.stderr)


def _run(channel: Channel) -> int:
    """Waits for Start, runs the class, and returns the exit code."""
    received = _receive_context(channel)
    if received is None:
        return 1  # the supervisor is gone or has changed its mind
    start, context = received
    logs.name_process(context.id, context.incarnation)
    link = context.link
    try:
        if context.supervisor is None:
            link.start_heartbeats()
        module, _, name = start.partition(":")
        getattr(importlib.import_module(module), name).run(context)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        _say(str(end.code))
        link.crashed(str(end.code))
        return 1
    except BaseException:
        text = traceback.format_exc()
        _say(text.rstrip("\n"))
        link.crashed(text)
        return 1
    return 0


def _say(text: str) -> None:
    """The last words of this process, as a line of its log."""
    if logs.is_json():
        logging.getLogger(__name__).critical("%s", text)
    else:
        sys.stderr.write(f"{text}\n")


def _receive_context(channel: Channel) -> tuple[str, ChildContext] | None:
    poll = select.poll()
    poll.register(channel, select.POLLIN)
    start: messages.Start | None = None
    descriptors: dict[str, int] = {}
    entries: list[tuple[messages.StoredFd, int]] = []
    while start is None or len(entries) < start.stored_fds:
        poll.poll()
        for payload, fds in channel.receive(limit=1):
            message = messages.decode_down(payload)
            if isinstance(message, messages.Start):
                start = message
                descriptors = dict(zip(message.descriptors, fds, strict=True))
            elif isinstance(message, messages.StoredFds):
                entries += zip(message.entries, fds, strict=True)
        if channel.closed:
            return None
    link = Link(channel, start.id, start.heartbeat_s)
    if start.supervisor is None:
        stored_fds = {entry.name: (fd, entry.meta) for entry, fd in entries}
        link.adopt_stored_fds(list(stored_fds))
    else:  # those of its subtree
        stored_fds = {f"{entry.owner}/{entry.name}": (fd, entry.meta) for entry, fd in entries}
    context = ChildContext(
        id=start.id,
        incarnation=start.incarnation,
        generation=start.generation,
        args=start.args,
        descriptors=descriptors,
        run_dir=Path(start.run_dir),
        link=link,
        stored_fds=stored_fds,
        supervisor=start.supervisor,
        incarnations=start.incarnations,
    )
    return start.start, context


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            pass
