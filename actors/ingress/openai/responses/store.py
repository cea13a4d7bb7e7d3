"""Responses that are kept for later requests: a file each, in a directory that all ingress workers of the node share.

A file is written whole before its name appears, so it is there or it is not, whoever dies. What is not asked for any
more goes first when there is no room, and after a day in any case.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

logger = logging.getLogger(__name__)

MAX_AGE_S = 24 * 3600
"""After so long without being used, a response is dropped."""
MAX_COUNT = 16_384
_PRUNE_S = 60.0
_PRUNE_SHARE = 16
"""A worker looks for what is too much after so many seconds, or after it has written this part of the limit."""

_IDENTITY = re.compile(r"resp_[0-9a-f]{24}")
_ITEM = re.compile(r"(?:rs|msg|fc)_([0-9a-f]{24})_([0-9]{1,4})")


class Stored(Struct, frozen=True, forbid_unknown_fields=True):
    """A response that is kept.

    Attributes:
        response: the document.
        items: the conversation before it: that of the response before, and the request's own input.
    """

    response: dict[str, Any]
    items: list[dict[str, Any]]

    @property
    def conversation(self) -> list[dict[str, Any]]:
        """What the next request goes on from."""
        output: list[dict[str, Any]] = self.response["output"]
        return [*self.items, *output]


_encode = msgspec.msgpack.encode
_decode = msgspec.msgpack.Decoder(Stored).decode


class ResponseStore:
    """The stored responses of a node.

    Args:
        directory: where they are; made when the first one is stored.
        limit_bytes: what they may take together, about; 0 stores nothing.
    """

    def __init__(self, directory: Path, limit_bytes: int) -> None:
        self._directory = directory
        self._limit_bytes = limit_bytes
        self._written = 0
        self._pruned_at = 0.0

    @property
    def on(self) -> bool:
        """Whether anything is stored."""
        return self._limit_bytes > 0

    def save(self, identity: str, stored: Stored) -> None:
        """Keeps a response. One that cannot be kept is logged: its answer is good all the same."""
        data = _encode(stored)
        new = self._directory / f"{identity}.new"
        try:
            if len(data) > self._limit_bytes // 4:
                raise OSError(
                    f"it has {len(data)} bytes, and at most a quarter of ingress.response_store_bytes is kept"
                )
            self._directory.mkdir(mode=0o700, exist_ok=True)
            self._make_room(len(data))
            new.write_bytes(data)
            new.replace(self._directory / identity)
        except OSError as error:
            with contextlib.suppress(OSError):
                new.unlink()
            logger.warning("the response %s cannot be stored: %s", identity, error)

    def load(self, identity: str, reader: str) -> Stored | None:
        """A response that is kept. For its reader, the rid of a request, it stays until `release`, so that the request
        reads the same again if this worker dies in between."""
        if not _IDENTITY.fullmatch(identity):
            return None
        path = self._directory / identity
        held = self._directory / f"{reader}.{identity}"
        with contextlib.suppress(OSError):
            os.link(path, held)
        try:
            try:
                data = held.read_bytes()
            except FileNotFoundError:  # the disk is full, or knows no links
                held, data = path, path.read_bytes()
            with contextlib.suppress(OSError):
                os.utime(held)
            return _decode(data)
        except (OSError, msgspec.MsgspecError):
            return None

    def get(self, identity: str) -> Stored | None:
        """A response that is kept, to be looked at once."""
        try:
            return _decode((self._directory / identity).read_bytes()) if _IDENTITY.fullmatch(identity) else None
        except (OSError, msgspec.MsgspecError):
            return None

    def item(self, identity: str, reader: str) -> dict[str, Any] | None:
        """An item of an answer that is kept, by its own identity."""
        found = _ITEM.fullmatch(identity)
        stored = self.load(f"resp_{found[1]}", reader) if found else None
        if found is None or stored is None:
            return None
        output: list[dict[str, Any]] = stored.response["output"]
        place = int(found[2])
        return output[place] if place < len(output) and output[place].get("id") == identity else None

    def release(self, reader: str) -> None:
        """The reader's answer is complete."""
        with contextlib.suppress(OSError):
            for held in self._directory.glob(f"{reader}.*"):
                held.unlink()

    def delete(self, identity: str) -> bool:
        """Forgets a response; whether there was one."""
        if not _IDENTITY.fullmatch(identity):
            return False
        try:
            (self._directory / identity).unlink()
        except OSError:
            return False
        return True

    def _make_room(self, size: int) -> None:
        now = time.monotonic()
        self._written += size
        if self._written < self._limit_bytes // _PRUNE_SHARE and now - self._pruned_at < _PRUNE_S:
            return
        self._written, self._pruned_at = 0, now
        with os.scandir(self._directory) as entries:
            files = [(entry.path, entry.stat()) for entry in entries]
        left_bytes, left_count, oldest = self._limit_bytes - size, MAX_COUNT, time.time() - MAX_AGE_S
        for path, stat in sorted(files, key=lambda each: each[1].st_mtime, reverse=True):
            left_bytes -= stat.st_blocks * 512
            left_count -= 1
            if left_bytes < 0 or left_count < 0 or stat.st_mtime < oldest:
                with contextlib.suppress(OSError):
                    os.unlink(path)
