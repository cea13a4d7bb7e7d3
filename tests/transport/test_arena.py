"""Arenas are inherited, sealed, and survive the processes that write into them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from llm_runtime.transport import Arena

WRITER = """
import sys
from llm_runtime.transport import Arena
arena = Arena(int(sys.argv[1]))
at = int(sys.argv[2])
arena.buffer[at : at + 4] = b"life"
print(arena.size, bytes(arena.buffer[:4]), flush=True)
sys.stdin.read()
"""


def in_process(descriptor: int, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(descriptor), *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        pass_fds=[descriptor],
        env={"PYTHONPATH": ":".join(path for path in sys.path if path)},
    )


@pytest.fixture
def descriptor() -> int:
    return Arena.create("test", 1 << 20)


def test_new_arena_is_zero_and_costs_nothing(descriptor: int) -> None:
    arena = Arena(descriptor)
    assert arena.size == 1 << 20
    assert bytes(arena.buffer) == bytes(1 << 20)
    assert os.fstat(Arena.create("huge", 1 << 40)).st_blocks == 0
    arena.close()


def test_survives_its_killed_writers(descriptor: int) -> None:
    for turn in range(3):
        writer = in_process(descriptor, 8 * turn)
        assert writer.stdout is not None
        assert writer.stdout.readline().startswith(str(1 << 20))
        writer.kill()
        assert writer.wait(20) == -signal.SIGKILL
        writer.communicate()
    arena = Arena(descriptor)
    assert bytes(arena.buffer[:24]) == b"life\0\0\0\0" * 3


def test_is_shared_at_once(descriptor: int) -> None:
    arena = Arena(descriptor)
    arena.buffer[:4] = b"seen"
    writer = in_process(descriptor, 8)
    assert writer.stdout is not None
    assert "seen" in writer.stdout.readline()
    assert bytes(arena.buffer[8:12]) == b"life"
    writer.communicate()


def test_sealed(descriptor: int) -> None:
    arena = Arena(descriptor)
    arena.buffer[:4] = b"pack"
    assert not arena.sealed
    arena.seal()
    assert arena.sealed
    arena.buffer[4:8] = b"more"  # the mapping that was there goes on
    with pytest.raises(PermissionError):
        Arena(descriptor)
    with pytest.raises(PermissionError):
        os.pwrite(descriptor, b"x", 0)
    reader = Arena(descriptor, private=True)
    assert reader.sealed
    assert bytes(reader.buffer[:8]) == b"packmore"
    reader.buffer[:4] = b"mine"
    assert bytes(arena.buffer[:4]) == b"pack"
    writer = in_process(descriptor, 0)
    _, errors = writer.communicate(timeout=20)
    assert "PermissionError" in errors
    assert writer.returncode == 1


def test_size_is_fixed(descriptor: int) -> None:
    for size in (0, 1 << 21):
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, size)


@pytest.mark.parametrize("size", [0, -1])
def test_sizes_that_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match="not positive"):
        Arena.create("test", size)


def test_close_while_in_use(descriptor: int) -> None:
    arena = Arena(descriptor)
    view = arena.buffer[:4]
    with pytest.raises(BufferError):
        arena.close()
    view.release()
    arena.close()


def test_descriptor_is_not_inherited_by_programs(descriptor: int) -> None:
    assert not os.get_inheritable(descriptor)
