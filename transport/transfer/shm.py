"""Reads between processes of one machine: copies out of memory files that both have mapped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from llm_runtime.transport.transfer.engine import Piece, Region, TransferFailed
from llm_runtime.transport.transfer.worker import Endpoint, Progress, Reading, WorkerEngine

_SLICE_BYTES = 4 * 2**20
"""Copied between two looks at what was cancelled: about a millisecond."""

_Bytes = npt.NDArray[np.uint8]


class ShmEngine(WorkerEngine):
    """Copies between memory that is mapped here.

    Args:
        sources: the memory of peers that is mapped here, by the name under which they register it.
        timeout_s: see `WorkerEngine`.
    """

    kind = "shm"

    def __init__(self, sources: Mapping[str, memoryview], timeout_s: float) -> None:
        super().__init__(timeout_s)
        self._sources = {name: _array(buffer) for name, buffer in sources.items()}
        self._own: list[_Bytes] = []

    def _attach(self, regions: Sequence[Region]) -> None:
        self._own = [_array(region.buffer) for region in regions]

    def _detail(self) -> bytes:
        return msgspec.msgpack.encode([region.name for region in self._regions])

    def _begin(self, peer: Endpoint, pieces: Sequence[Piece]) -> Reading:
        try:
            names = msgspec.msgpack.decode(peer.detail, type=list[str])
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise TransferFailed(f"the endpoint is not one of shared memory: {error}") from None
        sources = []
        for name, size in zip(names, peer.sizes, strict=False):
            source = self._sources.get(name)
            if source is None or source.nbytes < size:
                raise TransferFailed(
                    f"the memory {name} of {size} bytes is not mapped here: shm is for engines of one node, "
                    "use mooncake or nixl between nodes"
                )
            sources.append(source)
        return _Copies(sources, self._own, pieces)

    def _detach(self) -> None:
        self._own = []
        self._sources = {}


class _Copies(Reading):
    """Copies piece after piece. numpy lets other threads run while it copies; slices of a memoryview would not."""

    def __init__(self, sources: list[_Bytes], own: list[_Bytes], pieces: Sequence[Piece]) -> None:
        self._slices = self._cut(sources, own, pieces)

    @staticmethod
    def _cut(sources: list[_Bytes], own: list[_Bytes], pieces: Sequence[Piece]) -> Iterator[int]:
        """Copies a slice for each item taken, its bytes."""
        for remote, remote_offset, local, local_offset, length in pieces:
            source, target = sources[remote], own[local]
            for done in range(0, length, _SLICE_BYTES):
                size = min(_SLICE_BYTES, length - done)
                begin, end = remote_offset + done, local_offset + done
                np.copyto(target[end : end + size], source[begin : begin + size])
                yield size

    def advance(self) -> Progress:
        copied = 0
        for size in self._slices:
            copied += size
            if copied >= _SLICE_BYTES:
                return Progress.MOVED
        return Progress.DONE

    def stop(self) -> bool:
        return True


def _array(buffer: memoryview) -> _Bytes:
    return np.frombuffer(buffer, np.uint8)
