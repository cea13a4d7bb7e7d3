"""Run directories: one a node, with its sockets, logs and crash reports, held by a lock while the node lives.

The lock is on the directory itself (flock(2)), so no file in it has to stay for the node to be found, and
systemd-tmpfiles leaves alone what is in a directory that is locked.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import time
from pathlib import Path

import msgspec

from llm_runtime.runtime.errors import UserError
from llm_runtime.supervisors.exits import write_atomically

SUBDIRECTORIES = ("sockets", "logs", "crashes")
_LONGEST_SOCKET_PATH = 107  # sizeof(sockaddr_un.sun_path) - 1
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_LOCK_PATIENCE_S = 0.3  # a command that looks whether the node runs holds the lock for a moment


class NodeInfo(msgspec.Struct, frozen=True):
    """`node.json` of a run directory."""

    node: str
    pid: int
    url: str
    topology: str
    started_at: float


def base_directory() -> Path:
    """$RUNTIME_DIR, else $XDG_RUNTIME_DIR/llm-runtime, else /tmp/llm-runtime-UID."""
    if given := os.environ.get("RUNTIME_DIR"):
        return Path(os.path.abspath(given))
    if session := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(session) / "llm-runtime"
    return Path(f"/tmp/llm-runtime-{os.getuid()}")


class RunDirectory:
    """A node's run directory, locked by this process.

    Raises UserError if a living node has it, if another user could tamper with it, or if its path is too long.
    """

    def __init__(self, node: str, longest_actor_name: str) -> None:
        base = base_directory()
        self.node = node
        self.path = base / node
        self._info: NodeInfo | None = None
        longest = len(os.fsencode(self.path / "sockets" / longest_actor_name))
        if longest > _LONGEST_SOCKET_PATH:
            raise UserError(
                f"the run directory {self.path} makes socket paths of {longest} bytes, and {_LONGEST_SOCKET_PATH} is "
                "the most: set RUNTIME_DIR to a shorter directory, or give the node a shorter name"
            )
        _make_private(base)
        self._lock = _acquire(self.path)
        try:
            for entry in self.path.iterdir():  # what a node that died without cleaning up has left
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
            self._make_subdirectories()
        except OSError as error:
            raise _cannot_be_made(self.path, error) from None

    def write_info(self, info: NodeInfo) -> None:
        """Makes the node known to `runtime status` and the other commands. Raises UserError."""
        self._info = info
        try:
            self._write_info()
        except OSError as error:
            raise _cannot_be_made(self.path, error) from None

    def restore(self) -> bool:
        """Makes again what somebody has removed, and takes the lock of a new directory; False if another node has that
        now. Raises OSError if it cannot be done at present."""
        if not _is_same(self.path, self._lock):
            try:
                _make_private(self.path.parent)
                lock = _acquire(self.path, patience_s=0.0)
            except UserError:
                return False
            os.close(self._lock)
            self._lock = lock
        self._make_subdirectories()
        if self._info is not None and not (self.path / "node.json").exists():
            self._write_info()
        return True

    def _make_subdirectories(self) -> None:
        for name in SUBDIRECTORIES:
            (self.path / name).mkdir(mode=0o700, exist_ok=True)

    def _write_info(self) -> None:
        write_atomically(self.path / "node.json", msgspec.json.encode(self._info))

    @property
    def root_log(self) -> Path:
        return self.path / "logs" / "root.log"

    @property
    def has_crash_reports(self) -> bool:
        """Whether any process of the node has crashed."""
        try:
            return any((self.path / "crashes").iterdir())
        except OSError:
            return False

    def remove(self, keep_logs: bool) -> None:
        """Removes the directory; with `keep_logs`, all but logs, crash reports and `node.json`."""
        kept = {"logs", "crashes", "node.json"} if keep_logs else set()
        if not _is_same(self.path, self._lock):
            return os.close(self._lock)  # it was removed already, and may be another node's now
        try:
            for entry in self.path.iterdir():
                if entry.name not in kept:
                    shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink(missing_ok=True)
            if not kept:
                self.path.rmdir()
        except OSError:
            pass  # somebody else removes it too, or it cannot be written
        os.close(self._lock)
        try:
            self.path.parent.rmdir()
        except OSError:
            pass  # other nodes are in it


def _make_private(path: Path) -> None:
    """Creates a directory for this user alone. Raises UserError if others own it or can write to it."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.lstat()
    except OSError as error:
        raise _cannot_be_made(path, error) from None
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise UserError(
            f"the run directory {path} belongs to another user or can be written by others: run `chmod 700 {path}` "
            "or set RUNTIME_DIR to another"
        )


def _cannot_be_made(path: Path, error: OSError) -> UserError:
    return UserError(f"the run directory {path} cannot be made ({error.strerror}): set RUNTIME_DIR to another")


def _acquire(path: Path, patience_s: float = _LOCK_PATIENCE_S) -> int:
    """Creates the directory if need be and takes its lock; the descriptor holds it. Raises UserError."""
    deadline = time.monotonic() + patience_s
    while True:
        _make_private(path)
        try:
            lock = os.open(path, _DIRECTORY)
        except FileNotFoundError:
            continue  # its former owner has just removed the directory
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_same(path, lock):
                return lock
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(lock)
                info = read_info(path)
                where = f" at {info.url}" if info is not None and info.url else ""
                raise UserError(
                    f"the node {path.name} is running already{where}: stop it with `runtime down --node {path.name}`, "
                    "or start this one with another --port or --set node.name=NAME"
                ) from None
            time.sleep(0.05)
        except OSError as error:
            os.close(lock)
            raise UserError(
                f"the run directory {path} cannot be locked ({error.strerror}): set RUNTIME_DIR to a directory on a "
                "disk of this machine"
            ) from None
        os.close(lock)


def _is_same(path: Path, descriptor: int) -> bool:
    """Whether the descriptor is the directory's that is there now, not a removed one's."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def is_running(path: Path) -> bool:
    """Whether a living node holds the run directory."""
    try:
        lock = os.open(path, _DIRECTORY)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except OSError as error:
        return isinstance(error, BlockingIOError)
    finally:
        os.close(lock)


def read_info(path: Path) -> NodeInfo | None:
    """The node of a run directory; None if there is none."""
    try:
        return msgspec.json.decode((path / "node.json").read_bytes(), type=NodeInfo)
    except (OSError, msgspec.DecodeError):
        return None


def running_nodes() -> list[Path]:
    """The run directories of this user's living nodes."""
    base = base_directory()
    return [path for path in sorted(base.iterdir()) if is_running(path)] if base.is_dir() else []


def find_node(name: str | None, dead_too: bool = False) -> Path:
    """The run directory of a node of this user; of the only one if no name is given.

    Args:
        dead_too: also find what a node that is gone has left.

    Raises UserError.
    """
    base = base_directory()
    entries = sorted(base.iterdir()) if base.is_dir() else []
    running = [path for path in entries if is_running(path)]
    known = [path for path in entries if path in running or read_info(path)]
    candidates = known if dead_too and (name is not None or not running) else running
    if name is not None:
        for path in candidates:
            if path.name == name:
                return path
        others = f"; running: {', '.join(path.name for path in running)}" if running else ""
        raise UserError(f"no node {name} is running{others}")
    if not candidates:
        raise UserError("no node is running: start one with `runtime up topology/smollm2.toml`")
    if len(candidates) > 1:
        raise UserError(f"there are several nodes: choose one with --node {'|'.join(path.name for path in candidates)}")
    return candidates[0]
