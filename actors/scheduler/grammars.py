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
class Wish:
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
        self._wishes: OrderedDict[str, Wish] = OrderedDict()
        self._queue: deque[Wish] = deque()  # in the order of their requests; asked ones are at the grammar actor
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
        wish = self._wishes.get(digest)
        if wish is not None and wish.error and time.monotonic() - wish.refused > REMEMBER_REFUSAL_S:
            wish = None
        if wish is None:
            wish = self._wishes[digest] = Wish(constraint)
            self._queue.append(wish)
        self._wishes.move_to_end(digest)
        if not wish.ready and not wish.error:
            request.held = True
            wish.waiting.append(request)
            self._ask()
        self._forget()
        return wish.error

    def compiled(self, message: Compiled, sender: str) -> Refusals:
        """An answer of the grammar actor or of rank 0. Those of former incarnations are as true as any."""
        wish = self._wishes.get(message.digest)
        if wish is None or wish.ready or wish.error:
            return []
        if message.error:
            return self._refuse(wish, message.error)
        if sender == self._config.leader:
            self._queue = deque(each for each in self._queue if each is not wish)
            wish.possible = wish.ready = True
            for request in wish.waiting:
                request.held = False
            wish.waiting.clear()
        elif not wish.possible:
            self._queue = deque(each for each in self._queue if each is not wish)
            wish.possible = True
            self._ask_leader(wish)
        self._ask()
        return []

    def grammar_started(self, incarnation: int) -> Refusals:
        """A first word of the grammar actor. Its former incarnation may have died of what it was asked."""
        restarted = self._incarnation is not None
        self._incarnation = incarnation
        asked = [wish for wish in self._queue if wish.asked]
        if not restarted or not asked:
            return []
        now = time.monotonic()
        self._deaths.append(now)
        if len(self._deaths) == MAX_DEATHS and now - self._deaths[0] < CALM_S:
            self._calm_at = now + REPEAT_S
        alone = len(asked) == 1
        refusals: Refusals = []
        for wish in asked:
            wish.asked = 0.0
            wish.deaths += 1
            if alone and wish.deaths >= MAX_DEATHS:
                refusals += self._refuse(wish, "The constraint cannot be compiled: the compiler crashes.")
        self._ask()
        return refusals

    def leader_started(self) -> None:
        """A new rank 0 has compiled nothing. Requests that run bring it their constraints with their slots."""
        for digest, wish in list(self._wishes.items()):
            if wish.ready:
                del self._wishes[digest]
            elif wish.possible:
                self._ask_leader(wish)

    def repeat(self) -> None:
        """Asks again what has not been answered."""
        now = time.monotonic()
        for wish in self._wishes.values():
            if wish.possible and not wish.ready and now - wish.asked > REPEAT_S:
                self._ask_leader(wish)
        for wish in self._queue:
            if wish.asked and now - wish.asked > REPEAT_S:
                wish.asked = now
                self._send(self._config.grammar, Compile(wish.constraint))
        self._ask()

    def _ask(self) -> None:
        """Gives the grammar actor what it does not have: a suspect alone, or all that are none."""
        now = time.monotonic()
        if now < self._calm_at:
            return
        suspect = next((wish for wish in self._queue if wish.deaths), None)
        asked = any(wish.asked for wish in self._queue)
        for wish in list(self._queue) if suspect is None else [] if asked else [suspect]:
            if not wish.asked:
                wish.asked = now
                self._send(self._config.grammar, Compile(wish.constraint))

    def _ask_leader(self, wish: Wish) -> None:
        wish.asked = time.monotonic()
        self._send(self._config.leader, Compile(wish.constraint))

    def _refuse(self, wish: Wish, error: str) -> Refusals:
        self._queue = deque(each for each in self._queue if each is not wish)
        wish.error, wish.refused = error, time.monotonic()
        refusals = [(request, error) for request in wish.waiting]
        wish.waiting.clear()
        self._ask()
        return refusals

    def _forget(self) -> None:
        """Drops what nobody waits for and was wanted longest ago."""
        while len(self._wishes) > REMEMBERED:
            digest = next((digest for digest, wish in self._wishes.items() if not wish.waiting), None)
            if digest is None:
                return
            gone = self._wishes.pop(digest)
            self._queue = deque(each for each in self._queue if each is not gone)
