"""Descriptors that children leave with their supervisor, so that the next incarnation finds them."""

from __future__ import annotations

import os
from collections.abc import Iterator

from llm_runtime.supervisors import linux
from llm_runtime.supervisors.link import MAX_STORED_FDS
from llm_runtime.supervisors.messages import StoredFd, StoredFds

_BATCH = 64


class FdStore:
    """The descriptors stored through one child: its own, or those of its subtree if it is a supervisor.

    Nested supervisors pass every descriptor on to their parent as well, so that it survives them.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, str], tuple[int, bytes]] = {}
        self._count: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def store_fd(self, owner: str, name: str, fd: int, meta: bytes) -> bool:
        """Keeps `fd`, in place of an earlier one of that name; closes it and returns False if there are too many."""
        self.remove_fd(owner, name)
        if self._count.get(owner, 0) >= MAX_STORED_FDS or fd >= linux.descriptors_for_connections():
            os.close(fd)
            return False
        self._kept[owner, name] = (fd, meta)
        self._count[owner] = self._count.get(owner, 0) + 1
        return True

    def remove_fd(self, owner: str, name: str) -> None:
        """Closes a kept descriptor; does nothing if there is none."""
        kept = self._kept.pop((owner, name), None)
        if kept is not None:
            self._count[owner] -= 1
            os.close(kept[0])

    def names(self) -> list[tuple[str, str]]:
        """(owner, name) of each."""
        return list(self._kept)

    def batches(self) -> Iterator[tuple[StoredFds, list[int]]]:
        """All of it in messages, each with its descriptors."""
        items = list(self._kept.items())
        for start in range(0, len(items), _BATCH):
            batch = items[start : start + _BATCH]
            entries = tuple(StoredFd(owner=owner, name=name, meta=meta) for (owner, name), (_, meta) in batch)
            yield StoredFds(entries=entries), [fd for _, (fd, _) in batch]

    def clear(self) -> None:
        """Closes everything."""
        for fd, _ in self._kept.values():
            os.close(fd)
        self._kept.clear()
        self._count.clear()
