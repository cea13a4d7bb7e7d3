"""Which constraints are ready: requests wait until the ranks can keep to theirs."""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from llm_runtime.actors.messages import Compile, Compiled, Constraint, Message
from llm_runtime.actors.scheduler.config import Config
from llm_runtime.actors.scheduler.request import Request

REPEAT_S = 1.0
"""What is not answered is said again after so long."""
MAX_DEATHS = 3
"""Deaths of the grammar actor over one constraint after which it is the constraint's fault."""
CALM_S = 10.0
"""After `MAX_DEATHS` deaths within this time it is asked only once in `REPEAT_S`, so that its supervisor does not give
up."""
REMEMBERED = 1024
REMEMBER_REFUSAL_S = 60.0

Refusals = list[tuple[Request, str]]
"""Requests whose constraint cannot be kept, and why."""


@dataclass(slots=True, eq=False)
class PendingGrammar:
    """A constraint, and how far it is: at the grammar actor, at rank 0, or ready.

    Attributes:
        waiting: requests that are held for it.
        asked: when the actor that has it now was asked last; 0 for not yet.
        deaths: of the grammar actor while it had it.
        error: why it cannot be kept, known since `refused`.
    """

    constraint: Constraint
    waiting: list[Request] = field(default_factory=list)
    possible: bool = False
    ready: bool = False
    asked: float = 0.0
    deaths: int = 0
    error: str = ""
    refused: float = 0.0


class Grammars:
    """The constraints of one engine's requests.

    The grammar actor has many of them at a time, so that none waits for another one. When it dies, any of these may be
    to blame, and each is asked for alone until it is answered.

    Args:
        send: sends a message to a peer.
    """

    def __init__(self, config: Config, send: Callable[[str, Message], bool]) -> None:
        self._config = config
        self._send = send
        self._pending: OrderedDict[str, PendingGrammar] = OrderedDict()
        self._queue: deque[PendingGrammar] = deque()  # in the order of requests; asked ones are at the grammar actor
        self._deaths: deque[float] = deque(maxlen=MAX_DEATHS)
        self._incarnation: int | None = None
        self._calm_at = 0.0

    def hold(self, request: Request) -> str:
        """Holds a request until its constraint is ready; why it cannot be kept, if that is known."""
        constraint = request.sampling.constraint or request.sampling.checked
        if constraint is None:
            return ""
        if not self._config.grammar:
            return "Structured output is not available: the engine has no grammar actor."
        digest = constraint.digest
        pending = self._pending.get(digest)
        if pending is not None and pending.error and time.monotonic() - pending.refused > REMEMBER_REFUSAL_S:
            pending = None
        if pending is None:
            pending = self._pending[digest] = PendingGrammar(constraint)
            self._queue.append(pending)
        self._pending.move_to_end(digest)
        if not pending.ready and not pending.error:
            request.held = True
            pending.waiting.append(request)
            self._ask()
        self._forget()
        return pending.error

    def compiled(self, message: Compiled, sender: str) -> Refusals:
        """An answer of the grammar actor or of rank 0. Those of former incarnations are as true as any."""
        pending = self._pending.get(message.digest)
        if pending is None or pending.ready or pending.error:
            return []
        if message.error:
            return self._refuse(pending, message.error)
        if sender == self._config.leader:
            self._queue = deque(each for each in self._queue if each is not pending)
            pending.possible = pending.ready = True
            for request in pending.waiting:
                request.held = False
            pending.waiting.clear()
        elif not pending.possible:
            self._queue = deque(each for each in self._queue if each is not pending)
            pending.possible = True
            self._ask_leader(pending)
        self._ask()
        return []

    def grammar_started(self, incarnation: int) -> Refusals:
        """A first word of the grammar actor. Its former incarnation may have died of what it was asked."""
        restarted = self._incarnation is not None
        self._incarnation = incarnation
        asked = [pending for pending in self._queue if pending.asked]
        if not restarted or not asked:
            return []
        now = time.monotonic()
        self._deaths.append(now)
        if len(self._deaths) == MAX_DEATHS and now - self._deaths[0] < CALM_S:
            self._calm_at = now + REPEAT_S
        alone = len(asked) == 1
        refusals: Refusals = []
        for pending in asked:
            pending.asked = 0.0
            pending.deaths += 1
            if alone and pending.deaths >= MAX_DEATHS:
                refusals += self._refuse(pending, "The constraint cannot be compiled: the compiler crashes.")
        self._ask()
        return refusals

    def leader_started(self) -> None:
        """A new rank 0 has compiled nothing. Requests that run bring it their constraints with their slots."""
        for digest, pending in list(self._pending.items()):
            if pending.ready:
                del self._pending[digest]
            elif pending.possible:
                self._ask_leader(pending)

    def repeat(self) -> None:
        """Asks again what has not been answered."""
        now = time.monotonic()
        for pending in self._pending.values():
            if pending.possible and not pending.ready and now - pending.asked > REPEAT_S:
                self._ask_leader(pending)
        for pending in self._queue:
            if pending.asked and now - pending.asked > REPEAT_S:
                pending.asked = now
                self._send(self._config.grammar, Compile(pending.constraint))
        self._ask()

    def _ask(self) -> None:
        """Gives the grammar actor what it does not have: a suspect alone, or all that are none."""
        now = time.monotonic()
        if now < self._calm_at:
            return
        suspect = next((pending for pending in self._queue if pending.deaths), None)
        asked = any(pending.asked for pending in self._queue)
        for pending in list(self._queue) if suspect is None else [] if asked else [suspect]:
            if not pending.asked:
                pending.asked = now
                self._send(self._config.grammar, Compile(pending.constraint))

    def _ask_leader(self, pending: PendingGrammar) -> None:
        pending.asked = time.monotonic()
        self._send(self._config.leader, Compile(pending.constraint))

    def _refuse(self, pending: PendingGrammar, error: str) -> Refusals:
        self._queue = deque(each for each in self._queue if each is not pending)
        pending.error, pending.refused = error, time.monotonic()
        refusals = [(request, error) for request in pending.waiting]
        pending.waiting.clear()
        self._ask()
        return refusals

    def _forget(self) -> None:
        """Drops what nobody waits for and was wanted longest ago."""
        while len(self._pending) > REMEMBERED:
            digest = next((digest for digest, pending in self._pending.items() if not pending.waiting), None)
            if digest is None:
                return
            gone = self._pending.pop(digest)
            self._queue = deque(each for each in self._queue if each is not gone)
