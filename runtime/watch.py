"""Word of removals in a directory, by inotify(7), which the standard library lacks."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
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
        self.renew()

    def renew(self) -> None:
        """Forgets what has been told, and watches the directories that are there now."""
        try:
            while os.read(self.fd, 65_536):
                pass
        except BlockingIOError:
            pass
        for directory in self._directories:  # one that is watched already stays so
            _libc.inotify_add_watch(self.fd, os.fsencode(directory), _REMOVALS)

    def close(self) -> None:
        os.close(self.fd)
