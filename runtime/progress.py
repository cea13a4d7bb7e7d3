"""What a starting and running node says of itself, to a terminal in the foreground or through a pipe when detached."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import BinaryIO, Protocol

import msgspec
from msgspec import Struct

from llm_runtime.supervisors.status import Event


class Note(Struct, tag=True, frozen=True):
    """What is being done that takes a moment. `done` of `total`, in `unit`, if it is known how much there is to do."""

    text: str
    done: int = 0
    total: int = 0
    unit: str = ""


class Begin(Struct, tag=True, frozen=True):
    """The processes that will be started: depth in the tree and name, in starting order."""

    processes: list[tuple[int, str]]


class Happened(Struct, tag=True, frozen=True):
    """Something happened to a process."""

    event: Event


class Ready(Struct, tag=True, frozen=True):
    """Every process has been ready."""

    node: str
    url: str
    model: str
    task: str = "generate"


class Stopped(Struct, tag=True, frozen=True):
    """The node has ended; `error` is empty after a stop that was asked for. `log` is the file to read, if any."""

    error: str = ""
    log: str = ""


Progress = Note | Begin | Happened | Ready | Stopped
Tell = Callable[[Progress], None]


class TellNote(Protocol):
    """Takes the fields of a `Note`."""

    def __call__(self, text: str, done: int = 0, total: int = 0, unit: str = "") -> None: ...


def notes_to(tell: Tell) -> TellNote:
    """Tells what a function has to say that knows of notes alone."""
    return lambda text, done=0, total=0, unit="": tell(Note(text, done, total, unit))


def no_notes(text: str, done: int = 0, total: int = 0, unit: str = "") -> None:
    """Says nothing."""


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Progress).decode


def pipe_writer(fd: int) -> Tell:
    """Writes progress to a pipe, one JSON text a line, for as long as somebody reads."""

    def tell(progress: Progress) -> None:
        try:
            os.write(fd, _encode(progress) + b"\n")
        except OSError:
            pass  # nobody reads any more

    return tell


def read_progress(pipe: BinaryIO) -> Iterator[Progress]:
    """What `pipe_writer` wrote, until the other end is closed."""
    for line in pipe:
        yield _decode(line)
