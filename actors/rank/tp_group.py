"""The ranks of a tensor-parallel group: how they meet, and how they add up their results.

Collectives are torch.distributed's: gloo over the loopback interface on CPUs, NCCL on CUDA devices. A group lives as
long as the processes in it; its supervisor starts all ranks again when one of them dies (`one_for_all`).
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FileStore

JOIN_TIMEOUT_S = 600.0
COLLECTIVE_TIMEOUT_S = 120.0


class TPGroup:
    """The group as one of its ranks sees it. Until it has been joined, its operations return what they get.

    Args:
        directory: where the ranks meet, private to the group; None for a group of one, which has nothing to join.
        deterministic: add up in the order of the ranks, whatever the shape.
    """

    def __init__(self, tp: int = 1, rank: int = 0, directory: Path | None = None, deterministic: bool = False) -> None:
        self.tp = tp
        self.rank = rank
        self.joined = False
        self._directory = directory
        self._deterministic = deterministic
        self._lock = -1

    def join(self, device: torch.device, stopped: Callable[[], bool]) -> None:
        """Meets the other ranks and starts the collectives; they must join too.

        Raises TimeoutError after JOIN_TIMEOUT_S, and InterruptedError once `stopped` says so.
        """
        if self.joined or self._directory is None:
            return
        meeting = (
            self._open_meeting(self._directory) if self.rank == 0 else self._find_meeting(self._directory, stopped)
        )
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        store = FileStore(str(meeting / "store"), self.tp)
        store.set_timeout(timedelta(seconds=JOIN_TIMEOUT_S))
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=self.rank,
            world_size=self.tp,
            timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
        )
        self.joined = True

    def reduce(self, x: Tensor) -> Tensor:
        """The sum of all ranks' x, on every rank. May write to x."""
        if not self.joined:
            return x
        if not self._deterministic or self.tp == 2:  # the sum of two has one order
            dist.all_reduce(x)
            return x
        parts = [torch.empty_like(x) for _ in range(self.tp)]
        dist.all_gather(parts, x)
        for part in parts[1:]:
            parts[0] += part
        return parts[0]

    def gather(self, logits: Tensor, widths: list[int]) -> Tensor:
        """On rank 0 all ranks' logits [B, widths[rank]] side by side; on other ranks what they gave."""
        if not self.joined:
            return logits
        padded = torch.nn.functional.pad(logits, (0, max(widths) - logits.shape[1]))
        if self.rank:
            dist.gather(padded)
            return logits
        parts = [torch.empty_like(padded) for _ in range(self.tp)]
        dist.gather(padded, parts)
        return torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], dim=1)

    def broadcast(self, tokens: Tensor) -> Tensor:
        """Rank 0's tokens, on every rank."""
        if self.joined:
            dist.broadcast(tokens, 0)
        return tokens

    def leave(self) -> None:
        """Ends the collectives of a joined group."""
        if self.joined:
            dist.destroy_process_group()
            self.joined = False

    # Rank 0 holds a lock in the directory of the current meeting. The kernel gives it back when rank 0 dies, so others
    # never join a meeting of the past.

    def _open_meeting(self, directory: Path) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        meeting = directory / f"{os.getpid()}-{time.time_ns()}"
        for old in directory.iterdir():
            if old.is_dir():
                shutil.rmtree(old, ignore_errors=True)
        meeting.mkdir()
        self._lock = os.open(meeting / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        (directory / "current.new").write_text(meeting.name)
        (directory / "current.new").rename(directory / "current")
        return meeting

    def _find_meeting(self, directory: Path, stopped: Callable[[], bool]) -> Path:
        deadline = time.monotonic() + JOIN_TIMEOUT_S
        while time.monotonic() < deadline:
            if stopped():
                raise InterruptedError("asked to stop while waiting for rank 0")
            try:
                meeting = directory / (directory / "current").read_text()
                with (meeting / "lock").open("rb") as lock:
                    try:
                        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    except BlockingIOError:
                        return meeting
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                pass
            time.sleep(0.005)
        raise TimeoutError(f"rank 0 has not come to {directory} within {JOIN_TIMEOUT_S:.0f} s")
