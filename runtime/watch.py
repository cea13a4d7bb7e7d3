"""Word of removals in a directory, by inotify(7), which the standard library lacks."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Sequence
from pathlib import Path

_IN_MOVED_FROM, _IN_DELETE, _IN_DELETE_SELF, _IN_MOVE_SELF = 0x40, 0x200, 0x400, 0x800
_IN_ONLYDIR, _IN_DONT_FOLLOW = 0x0100_0000, 0x0200_0000
_REMOVALS = _IN_MOVED_FROM | _IN_DELETE | _IN_DELETE_SELF | _IN_MOVE_SELF | _IN_ONLYDIR | _IN_DONT_FOLLOW

_libc = ctypes.CDLL(None, use_errno=True)


class RemovalWatch:
    """Tells when an entry of one of some directories is removed or renamed, or a directory itself.

    Raises OSError when the system gives no more watches.
    """

    def __init__(self, directories: Sequence[Path]) -> None:
        self._directories = directories
        self.fd = _libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
        """Readable when something has been removed."""
        if self.fd < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        self._watches: list[int] = []
        self._watch()

    def handle(self, restore: Callable[[], None]) -> None:
        """Forgets what has been told and calls `restore`, once more after it has made a directory: that is watched only
        from then on. What is removed while it works is told again."""
        with contextlib.suppress(BlockingIOError):
            while os.read(self.fd, 65_536):
                pass
        restore()
        while self._watch():
            restore()

    def _watch(self) -> bool:
        """Watches the directories that are there now; whether one was not watched before."""
        before = self._watches
        self._watches = [_libc.inotify_add_watch(self.fd, os.fsencode(each), _REMOVALS) for each in self._directories]
        return any(each >= 0 and each not in before for each in self._watches)

    def close(self) -> None:
        os.close(self.fd)
