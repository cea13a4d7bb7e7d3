"""`GrammarCompiler`: compiled grammars, and the threads that make them while the actor attends to other things."""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

from llm_runtime.actors.checkpoint import CheckpointError
from llm_runtime.actors.grammar.backends.base import Backend
from llm_runtime.actors.grammar.backends.base import Compiled as CompiledGrammar
from llm_runtime.actors.grammar.errors import BadGrammar
from llm_runtime.actors.messages import Compiled, Constraint

logger = logging.getLogger(__name__)

MAX_KEPT = 128
MAX_KEPT_BYTES = 256 * 2**20
"""Of compiled grammars that a process keeps, the last used ones."""
SHORT = 4096
"""Characters of a constraint that does not wait for longer ones."""
NICE = 10
"""The threads', so that they take what time the others leave."""


class Lane(NamedTuple):
    """A thread that compiles, and what waits for it: (key, number, constraint), the shortest first."""

    wishes: queue.PriorityQueue[tuple[int, int, Constraint]]
    thread: threading.Thread


class GrammarCompiler:
    """Compiles on threads of its own, which start with the first wish, and keeps what was wanted last. Long constraints
    have a thread to themselves, so that a short one is never held up by them.

    Args:
        load: gives the backend; called on a thread. May raise ImportError and CheckpointError.
        closings: answers will be followed, so their shortest ends are looked for while others wait for nothing.

    Attributes:
        fd: readable while `finished` has something to give.
    """

    def __init__(self, load: Callable[[], Backend], closings: bool = False) -> None:
        self._load = load
        self._closings = closings
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._kept: OrderedDict[str, CompiledGrammar | BadGrammar] = OrderedDict()
        self._kept_bytes = 0
        self._askers: dict[str, list[str]] = {}
        self._pending: set[str] = set()  # what the threads have
        self._count = 0  # of wishes
        self._made: queue.SimpleQueue[tuple[str, CompiledGrammar | BadGrammar]] = queue.SimpleQueue()
        self._lanes: dict[str, Lane] = {}
        self._backend: Backend | None = None
        self._lock = threading.Lock()
        self._working: dict[str, tuple[str, float]] = {}  # by lane, a digest, and the thread's time when it began
        self.compiled = 0

    @property
    def backend(self) -> Backend:
        """The model's. Raises BadGrammar where there are no grammars."""
        with self._lock:
            if self._backend is None:
                try:
                    self._backend = self._load()
                except (ImportError, CheckpointError) as error:
                    raise BadGrammar(f"Structured output is not available here: {error}.") from None
            return self._backend

    def submit(self, constraint: Constraint, asker: str) -> None:
        """Somebody wants to know when a constraint is ready. Asking again changes nothing."""
        digest = constraint.digest
        askers = self._askers.setdefault(digest, [])
        if asker not in askers:
            askers.append(asker)
        if digest in self._kept:
            os.eventfd_write(self.fd, 1)
        elif digest not in self._pending:
            self._pending.add(digest)
            self._count += 1
            lane = self._lane("short" if len(constraint.text) <= SHORT else "long")
            lane.wishes.put((len(constraint.text).bit_length(), self._count, constraint))

    def finished(self) -> list[tuple[str, Compiled]]:
        """Answers for those who have asked: (asker, answer)."""
        try:
            os.eventfd_read(self.fd)
        except BlockingIOError:
            return []
        self._take_made()
        answers = []
        for digest in [digest for digest in self._askers if digest in self._kept]:
            outcome = self._kept[digest]
            answer = Compiled(digest, str(outcome) if isinstance(outcome, BadGrammar) else "")
            answers += [(asker, answer) for asker in self._askers.pop(digest)]
        return answers

    @property
    def busy(self) -> bool:
        """Whether anything is wanted that is not there yet."""
        return bool(self._pending)

    def overdue(self, limit_s: float) -> str:
        """The digest of a constraint on which a thread has worked for longer, not counting what time others took from
        it; empty if there is none."""
        for name, (digest, began) in list(self._working.items()):
            if _spent_s(self._lanes[name].thread) - began > limit_s:
                return digest
        return ""

    def askers(self, digest: str) -> list[str]:
        """Who waits for a constraint."""
        return self._askers.get(digest, [])

    def get(self, constraint: Constraint) -> CompiledGrammar:
        """A compiled constraint, compiled on the spot if need be. Raises BadGrammar."""
        digest = constraint.digest
        self._take_made()
        if digest not in self._kept:
            self._keep(digest, self._compile(constraint))
        self._kept.move_to_end(digest)
        outcome = self._kept[digest]
        if isinstance(outcome, BadGrammar):
            raise outcome
        return outcome

    def _take_made(self) -> None:
        while not self._made.empty():
            digest, outcome = self._made.get()
            self._pending.discard(digest)
            self._keep(digest, outcome)

    def _keep(self, digest: str, outcome: CompiledGrammar | BadGrammar) -> None:
        if digest not in self._kept:
            self._kept[digest] = outcome
            self._kept_bytes += _size(outcome)
        while len(self._kept) > MAX_KEPT or (self._kept_bytes > MAX_KEPT_BYTES and len(self._kept) > 1):
            self._kept_bytes -= _size(self._kept.popitem(last=False)[1])

    def _compile(self, constraint: Constraint) -> CompiledGrammar | BadGrammar:
        self.compiled += 1
        try:
            compiled = self.backend.compile(constraint)
            if self._closings:
                _ = compiled.shortest
            return compiled
        except BadGrammar as error:
            return error

    def _lane(self, name: str) -> Lane:
        lane = self._lanes.get(name)
        if lane is None:
            thread = threading.Thread(target=self._work, args=(name,), name=f"grammars-{name}", daemon=True)
            lane = self._lanes[name] = Lane(queue.PriorityQueue(), thread)
            thread.start()
        return lane

    def _work(self, name: str) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        lane = self._lanes[name]
        while True:
            constraint = lane.wishes.get()[2]
            digest = constraint.digest
            self._working[name] = digest, _spent_s(lane.thread)
            try:
                outcome = self._compile(constraint)
            except Exception as error:
                logger.exception("a constraint of kind %s could not be compiled", constraint.kind)
                outcome = BadGrammar(f"The constraint cannot be compiled ({type(error).__name__}).")
            del self._working[name]
            self._made.put((digest, outcome))
            os.eventfd_write(self.fd, 1)


def _spent_s(thread: threading.Thread) -> float:
    """A thread's time on a processor."""
    assert thread.ident is not None
    return time.clock_gettime(time.pthread_getcpuclockid(thread.ident))


def _size(outcome: CompiledGrammar | BadGrammar) -> int:
    return 0 if isinstance(outcome, BadGrammar) else outcome.size
