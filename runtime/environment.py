"""What has to stand in the environment before the first import of numpy or torch in a process that forks others."""

from __future__ import annotations

import os
import pwd
import stat
import sys
import tempfile
from pathlib import Path

from llm_runtime.runtime.cgroups import cpu_count


def prepare() -> None:
    """Keeps libraries from starting threads and from asking CUDA for devices, unless the user has said otherwise, and
    provides what accounts without a home or programs without standard streams lack."""
    _open_standard_streams()
    _provide_home()
    try:
        os.getcwd()
    except OSError:  # it was removed, and libraries look for themselves there
        os.chdir("/")
    # numpy's OpenBLAS would start threads when it is imported, and a process with threads must not be forked.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # Threads of torch that spin while they wait would take the cores from the other actors.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if cpu_count() < len(os.sched_getaffinity(0)):  # libraries count processors, and know nothing of quotas
        for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS"):
            os.environ.setdefault(name, str(cpu_count()))
    # A process that has asked CUDA cannot fork one that computes with it. xgrammar's foundation would ask when it is
    # imported, for what is not used here; torch, when somebody else asks, asks the driver's management library instead.
    os.environ.setdefault("TVM_FFI_DISABLE_TORCH_C_DLPACK", "1")
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")


def cache_directory() -> Path:
    """Where this user's caches of the runtime are, if possible a directory that is there: in the user's own cache if
    that can be written, else in a private directory for temporary files."""
    own = Path(os.environ.get("XDG_CACHE_HOME") or Path(os.path.expanduser("~")) / ".cache") / "llm-runtime"
    if own.is_absolute() and _can_write(own):
        return own
    return private_directory() or own


def private_directory() -> Path | None:
    """A directory for temporary files of this user alone; None if there is none. Others cannot have prepared it."""
    path = Path(tempfile.gettempdir()) / f"llm-runtime-{os.getuid()}"
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        status = path.lstat()
    except OSError:
        return None
    private = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022
    return path if private and os.access(path, os.W_OK | os.X_OK) else None


def _can_write(path: Path) -> bool:
    """Whether a directory can be written; it is made if it is not there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(path, os.W_OK | os.X_OK)


def _open_standard_streams() -> None:
    """Opens those that are closed: the next file would get their number, and all that is printed with it. Words that
    the terminal cannot show are not a reason to fail."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
            os.set_inheritable(number, True)
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _provide_home() -> None:
    """A home for accounts that have none, such as a number without a name in a container: libraries keep caches there,
    and ask for the name."""
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        os.environ.setdefault("LOGNAME", str(os.getuid()))
    if not os.path.isabs(os.path.expanduser("~")) and (private := private_directory()) is not None:
        os.environ["HOME"] = str(private)
