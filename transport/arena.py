"""Arenas: memory files that outlive the processes that map them.

The root of a node creates an arena and hands its descriptor down; actors map it. A killed actor's successor maps the
same memory and goes on. `memfd_create` needs no mount, has no size limit of /dev/shm and leaves no name behind.
"""

from __future__ import annotations

import fcntl
import mmap
import os

# <linux/fcntl.h>: later shared mappings and writes are refused, the mappings that exist go on.
_F_SEAL_FUTURE_WRITE = 0x0010


class Arena:
    """A mapped memory file.

    Args:
        descriptor: a memory file's descriptor; the arena does not close it.
        private: map copy-on-write; writes stay in this process. The way to map a sealed arena.
    """

    def __init__(self, descriptor: int, private: bool = False) -> None:
        self.descriptor = descriptor
        self.size = os.fstat(descriptor).st_size
        flags = mmap.MAP_PRIVATE if private else mmap.MAP_SHARED
        self._map = mmap.mmap(descriptor, self.size, flags, mmap.PROT_READ | mmap.PROT_WRITE)
        self.buffer = memoryview(self._map)

    @staticmethod
    def create(name: str, size: int) -> int:
        """A descriptor of a new memory file of `size` bytes of zeros. Pages take memory when first written.

        Raises ValueError for a size that is not positive and OSError when the kernel refuses.
        """
        if size <= 0:
            raise ValueError(f"arena {name}: a size of {size} bytes is not positive")
        descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(descriptor, size)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        except OSError:
            os.close(descriptor)
            raise
        return descriptor

    def seal(self) -> None:
        """Refuses every later shared mapping with write access; existing ones go on."""
        fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, _F_SEAL_FUTURE_WRITE)

    @property
    def sealed(self) -> bool:
        """Whether `seal` was called, by this or another process."""
        return bool(fcntl.fcntl(self.descriptor, fcntl.F_GET_SEALS) & _F_SEAL_FUTURE_WRITE)

    def close(self) -> None:
        """Unmaps the memory. Raises BufferError while a view of the buffer is still in use."""
        self.buffer.release()
        self._map.close()
