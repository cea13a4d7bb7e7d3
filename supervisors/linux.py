"""The few Linux calls that process supervision needs and the standard library lacks."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
from collections.abc import Collection

import psutil

_libc = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def become_subreaper() -> None:
    """Orphaned descendants become children of this process from now on (not inherited by fork)."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(parent: int) -> None:
    """SIGKILL for this process when its parent's thread ends; exits at once if `parent` is gone already.

    The kernel forgets a death signal that was set for an earlier parent, so call it after reparenting.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def close_descriptors(keep: Collection[int]) -> None:
    """Closes every descriptor of this process except `keep`."""
    for name in os.listdir("/proc/self/fd"):
        if (fd := int(name)) not in keep:
            try:
                os.close(fd)
            except OSError:  # the one that listed the folder
                pass


def reset_signals() -> None:
    """Gives every signal the disposition and mask of a freshly started Python process."""
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            try:
                signal.signal(number, signal.SIG_DFL)
            except OSError:  # signals the C library keeps for itself
                pass
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def thread_count() -> int:
    """Threads of this process, those of native libraries included."""
    return psutil.Process().num_threads()


def raise_descriptor_limit() -> None:
    """Lifts the soft limit of open descriptors to the hard one: each connection takes one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def descriptors_for_connections(limit: int | None = None) -> int:
    """Descriptors below this number may be connections. The others are for everything without which a process cannot
    live: libraries abort when they get none.

    Args:
        limit: of open descriptors; by default this process's.
    """
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0] if limit is None else limit
    return limit - min(256, limit // 3)


def is_stopped(pid: int) -> bool:
    """Whether a process was stopped by a signal or is held by a debugger."""
    try:
        return psutil.Process(pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
    except psutil.Error:
        return False
