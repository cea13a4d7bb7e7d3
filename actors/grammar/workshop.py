"""`Workshop`: compiled grammars, and the thread that makes them while the actor attends to other things."""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from actors.checkpoint import CheckpointError
from actors.grammar.compiler import GrammarCompiler, Tokens
from actors.grammar.errors import BadGrammar
from actors.messages import Compiled, Constraint

logger = logging.getLogger(__name__)

MAX_KEPT = 128
MAX_KEPT_BYTES = 256 * 2**20
"""Of compiled grammars that a process keeps, the last used ones."""
NICE = 10
"""The thread's, so that it takes what time the others leave."""


class Workshop:
    """Compiles on a thread of its own, which starts with the first wish, and keeps what was wanted last. Of what waits,
    a short constraint is not held up by longer ones.

    Args:
        load: gives the model's tokens; called on the thread. May raise ImportError and CheckpointError.

    Attributes:
        fd: readable while `finished` has something to give.
    """

    def __init__(self, load: Callable[[], Tokens]) -> None:
        self._load = load
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._kept: OrderedDict[str, Any] = OrderedDict()  # a CompiledGrammar, or why there is none
        self._kept_bytes = 0
        self._askers: dict[str, list[str]] = {}
        self._pending: set[str] = set()  # what the thread has
        self._wishes: queue.PriorityQueue[tuple[int, int, Constraint]] = queue.PriorityQueue()
        self._count = 0  # of wishes
        self._made: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._tokens: Tokens | None = None
        self._compilers: dict[int, GrammarCompiler] = {}  # one a thread
        self._lock = threading.Lock()
        self._working: tuple[str, float] | None = None
        self.compiled = 0

    @property
    def tokens(self) -> Tokens:
        """The model's. Raises BadGrammar where there are no grammars."""
        with self._lock:
            if self._tokens is None:
                try:
                    self._tokens = self._load()
                except ImportError:
                    raise BadGrammar(
                        "Structured output is not available here: it needs pip install xgrammar==0.2.8."
                    ) from None
                except CheckpointError as error:
                    raise BadGrammar(f"Structured output is not available here: {error}.") from None
            return self._tokens

    def want(self, constraint: Constraint, asker: str) -> None:
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
            self._wishes.put((len(constraint.text).bit_length(), self._count, constraint))
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="grammars", daemon=True)
                self._thread.start()

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
        """The digest of a constraint on which the thread has worked for longer, not counting what time others took from
        it; empty if there is none."""
        working = self._working
        return working[0] if working is not None and self._spent_s() - working[1] > limit_s else ""

    def askers(self, digest: str) -> list[str]:
        """Who waits for a constraint."""
        return self._askers.get(digest, [])

    def get(self, constraint: Constraint) -> Any:
        """xgrammar's `CompiledGrammar`, compiled on the spot if need be. Raises BadGrammar."""
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

    def _keep(self, digest: str, outcome: Any) -> None:
        if digest not in self._kept:
            self._kept[digest] = outcome
            self._kept_bytes += _size(outcome)
        while len(self._kept) > MAX_KEPT or (self._kept_bytes > MAX_KEPT_BYTES and len(self._kept) > 1):
            self._kept_bytes -= _size(self._kept.popitem(last=False)[1])

    def _compile(self, constraint: Constraint) -> Any:
        self.compiled += 1
        thread = threading.get_ident()
        try:
            compiler = self._compilers.get(thread)
            if compiler is None:
                compiler = self._compilers[thread] = GrammarCompiler(self.tokens)
            return compiler.compile(constraint)
        except BadGrammar as error:
            return error

    def _spent_s(self) -> float:
        """The thread's time on a processor."""
        assert self._thread is not None
        assert self._thread.ident is not None
        return time.clock_gettime(time.pthread_getcpuclockid(self._thread.ident))

    def _work(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        while True:
            constraint = self._wishes.get()[2]
            digest = constraint.digest
            self._working = digest, self._spent_s()
            try:
                outcome: Any = self._compile(constraint)
            except Exception as error:
                logger.exception("a constraint of kind %s could not be compiled", constraint.kind)
                outcome = BadGrammar(f"The constraint cannot be compiled ({type(error).__name__}).")
            self._working = None
            self._made.put((digest, outcome))
            os.eventfd_write(self.fd, 1)


def _size(outcome: Any) -> int:
    return 0 if isinstance(outcome, BadGrammar) else int(outcome.memory_size_bytes)
