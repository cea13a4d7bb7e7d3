"""A node that one program starts for itself and that ends with it.

It is the node that `runtime up` starts, in a run directory of its own. Its HTTP server listens on the loopback
interface, on a port that the kernel chooses, and lets nobody in without a key that is drawn at random.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

import llm_runtime
from llm_runtime.runtime.errors import UserError
from llm_runtime.runtime.offline.child_main import Order
from llm_runtime.runtime.progress import Note, Ready, Stopped, read_progress

STOP_TIMEOUT_S = 20.0
END_TIMEOUT_S = 5.0
"""How long a node that has broken off a connection may take to say that it has ended."""
_LONGEST_TEMPORARY = 40
_ONE_ENGINE = "[engine.main]\n"
_HOST = "127.0.0.1"
_ARGUMENT = re.compile("^--set ", re.MULTILINE)
"""What an error's text begins with when a setting is wrong that was given as an argument."""


class PrivateNode:
    """A running node. It stops on `close`, at the end of a `with` block, when it is garbage, and when this process
    ends, however it does.

    Args:
        file: topology file; by default one engine with the settings alone.
        settings: `--set` arguments, "KEY=VALUE".
        note: told what takes long.

    Attributes:
        url: where its HTTP server is.
        api_key: what to send there as `Authorization: Bearer KEY`.
        model: the name of its model.
        directory: `RUNTIME_DIR` for `runtime status` and the other commands.

    Raises UserError when the node does not come up.
    """

    def __init__(
        self, file: Path | None, settings: Sequence[str] = (), note: Callable[[str], None] = lambda _: None
    ) -> None:
        self.api_key = secrets.token_urlsafe(32)
        self.directory = Path(tempfile.mkdtemp(prefix="llm-", dir=_temporary()))
        if file is None:
            file = self.directory / "topology.toml"
            file.write_text(_ONE_ENGINE)
        # What concerns the server comes last: this node is nobody else's.
        own = ["node.name=llm", f"ingress.host={_HOST}", "ingress.drain_s=0.1"]
        with socket.create_server((_HOST, 0), backlog=2048) as listener:
            self.url = f"http://{_HOST}:{listener.getsockname()[1]}"
            self._process, progress = self._start(file, [*settings, *own], listener)
        self._progress = open(progress, "rb")  # noqa: SIM115
        self._reading = threading.Lock()
        self._problem = ""
        self._kept: list[str] = []
        self._close = weakref.finalize(self, _stop, self._process, self.directory, self._kept, os.getpid())
        try:
            self.model = self._await_ready(note)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> PrivateNode:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops the node and waits for its end; does nothing for one that is closed."""
        self._close()
        self._progress.close()

    @property
    def closed(self) -> bool:
        return not self._close.alive

    def problem(self) -> str:
        """Why the node has ended; empty if it runs. For when it has broken off a connection."""
        try:
            self._process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return ""
        with self._reading:
            if not self._problem:
                told = [self._reason(each) for each in read_progress(self._progress) if isinstance(each, Stopped)]
                self._problem = next(filter(None, told), "it was stopped or killed")
        return self._problem

    def _reason(self, stopped: Stopped) -> str:
        """Why the node has ended. The log that tells more, if there is one, is kept with its directory."""
        if stopped.log:
            self._kept.append(stopped.log)
        hint = f" (log: {stopped.log})" if stopped.log else ""
        return _ARGUMENT.sub("", stopped.error) + hint

    def _start(self, file: Path, settings: list[str], listener: socket.socket) -> tuple[subprocess.Popen[bytes], int]:
        read, write = os.pipe()
        order = Order(str(file), settings, os.getpid(), str(self.directory), listener.fileno(), write, self.api_key)
        root = str(Path(llm_runtime.__file__).parents[1])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        try:
            with (self.directory / "start.log").open("wb") as log:
                process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "llm_runtime.runtime.offline.child_main"],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    pass_fds=[listener.fileno(), write],
                    env={**os.environ, "RUNTIME_DIR": str(self.directory), "PYTHONPATH": path},
                    start_new_session=True,  # Ctrl-C is for the program, which decides what becomes of the node
                )
            assert process.stdin is not None
            try:
                with process.stdin:
                    process.stdin.write(msgspec.json.encode(order))
            except BrokenPipeError:
                pass  # it has ended; its silence will tell
        except BaseException:
            os.close(read)
            raise
        finally:
            os.close(write)
        return process, read

    def _await_ready(self, note: Callable[[str], None]) -> str:
        """The model's name, once everything runs."""
        told = ""
        for progress in read_progress(self._progress):
            match progress:
                case Note(text=text) if text != told:
                    note(told := text)
                case Note():
                    pass  # more of the same is done
                case Ready(model=model, task=task):
                    if task != "generate":
                        raise UserError(
                            f"{model} does not generate text (its task is {task}): serve it with `runtime up`"
                        )
                    return model
                case Stopped():
                    raise UserError(self._reason(progress) or "the node was stopped while it was starting")
        log = (self.directory / "start.log").read_text(errors="replace").strip()
        last = log.rpartition("\n")[2]
        raise UserError("the node ended while it was starting" + (f": {last}" if last else ""))


def _stop(process: subprocess.Popen[bytes], directory: Path, kept: list[str], owner: int) -> None:
    """Stops the node, unless this is a fork of the process that has started it. Its directory goes, but for logs that
    an error has named."""
    if os.getpid() != owner:
        return
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()  # and everything below dies with it
        process.wait()
    if not kept:
        shutil.rmtree(directory, ignore_errors=True)


def _temporary() -> str:
    """A directory for run directories: paths of sockets must be short."""
    for directory in (os.environ.get("XDG_RUNTIME_DIR", ""), tempfile.gettempdir()):
        if directory and len(directory) <= _LONGEST_TEMPORARY and os.access(directory, os.W_OK):
            return directory
    return "/tmp"
