"""Who is killed, with which signal and when."""

from __future__ import annotations

import asyncio
import fnmatch
import os
import random
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llm_runtime.runtime.control import NodeReport, Status, ask
from llm_runtime.runtime.errors import UserError
from llm_runtime.runtime.rolling import restart_all
from llm_runtime.supervisors.status import NodeStatus

DOUBLE_WITHIN_S = 0.05
_LOOK_S = 0.005


@dataclass(frozen=True)
class Fault:
    """A signal that was sent; `at` in monotonic seconds. `double` if another one came within 50 ms before."""

    at: float
    actor: str
    role: str
    signal: str
    double: bool = False


@dataclass(frozen=True)
class Planned:
    """A line of a schedule: seconds after the start, the actor's name and the signal."""

    after_s: float
    actor: str
    signal: signal.Signals


@dataclass
class Plan:
    """What to do to a node.

    Attributes:
        every_s: mean time between faults; each follows the last one after half to one and a half of it.
        duration_s: how long; 0 for as many as `kills` says.
        kills: how many at most; 0 for no limit.
        actors: patterns of names and roles; empty for all but the root and the ingress.
        double: each fault hits twice within 50 ms: another actor, or now and then the same one while it starts.
        most: each fault hits 1 to so many actors at once.
        schedule: in place of chance.
        rolling: a rolling restart in place of signals.
        controls: so many faults that are none come first: the gaps after them are those of the load itself.
    """

    every_s: float = 1.0
    duration_s: float = 60.0
    kills: int = 0
    signals: Sequence[signal.Signals] = (signal.SIGKILL,)
    actors: Sequence[str] = ()
    double: bool = False
    most: int = 1
    seed: int = 0
    schedule: Sequence[Planned] = field(default_factory=list)
    rolling: bool = False
    controls: int = 0


class Injector:
    """Carries out a plan on the node of a run directory.

    Attributes:
        faults: the signals that were sent, in order.
        controls: when nothing was done on purpose.
    """

    def __init__(self, run_dir: Path, plan: Plan) -> None:
        self.faults: list[Fault] = []
        self.controls: list[float] = []
        self._run_dir = run_dir
        self._plan = plan
        self._draw = random.Random(plan.seed)

    async def run(self) -> None:
        """Returns when the plan is carried out. Raises UserError when the node is gone or nothing matches."""
        plan = self._plan
        for _ in range(plan.controls):
            await asyncio.sleep(plan.every_s)
            self.controls.append(time.monotonic())
        began = time.monotonic()
        if plan.rolling:
            return await self._restart_all()
        if plan.schedule:
            for planned in plan.schedule:
                await asyncio.sleep(max(0.0, began + planned.after_s - time.monotonic()))
                await self._hit_named(planned)
            return
        rounds = 0
        while not plan.kills or rounds < plan.kills:
            pause = plan.every_s * self._draw.uniform(0.5, 1.5)
            if plan.duration_s and time.monotonic() + pause > began + plan.duration_s:
                return
            await asyncio.sleep(pause)
            rounds += 1
            first = await self._hit(None)
            for _ in range(self._draw.randrange(plan.most)):
                await self._hit(None, at_once=True)
            if plan.double:
                await self._hit_again(first)

    async def _restart_all(self) -> None:
        began = time.monotonic()

        def replaced(names: str) -> None:
            nonlocal began
            who = names.partition(",")[0].partition(":")[0]
            self.faults.append(Fault(began, who, who, "restart"))
            time.sleep(self._plan.every_s)  # so that each pause can be told from the next
            began = time.monotonic()

        await asyncio.to_thread(restart_all, self._run_dir, replaced)

    async def _hit(self, actor: str | None, at_once: bool = False) -> NodeStatus:
        """Sends a signal to one actor, drawn among all that match."""
        victims = [each for each in await self._candidates() if actor is None or each.name == actor]
        if not victims:
            raise UserError(f"no running actor matches {', '.join(self._plan.actors) or actor}; see `runtime status`")
        victim = self._draw.choice(victims)
        self._send(victim, self._draw.choice(list(self._plan.signals)), at_once)
        return victim

    async def _hit_again(self, first: NodeStatus) -> None:
        """The second fault of a pair: every third time the same actor's next process, else another actor."""
        until = time.monotonic() + DOUBLE_WITHIN_S * (1 if self._draw.randrange(3) else 20)
        same = until - time.monotonic() > DOUBLE_WITHIN_S
        if not same:
            await asyncio.sleep(self._draw.uniform(0, DOUBLE_WITHIN_S / 2))
        while True:
            victims = [
                each for each in await self._candidates() if (each.name == first.name) == same and each.pid != first.pid
            ]
            if victims:
                self._send(self._draw.choice(victims), self._draw.choice(list(self._plan.signals)), True)
                return
            if time.monotonic() > until:
                return
            await asyncio.sleep(_LOOK_S)

    async def _hit_named(self, planned: Planned) -> None:
        for each in matching(await self._tree(), [planned.actor]):
            self._send(each, planned.signal, False)

    async def _candidates(self) -> list[NodeStatus]:
        return [each for each in matching(await self._tree(), self._plan.actors) if each.pid is not None]

    async def _tree(self) -> NodeStatus:
        return (await asyncio.to_thread(node_report, self._run_dir)).tree

    def _send(self, victim: NodeStatus, number: signal.Signals, double: bool) -> None:
        if victim.pid is None:
            return
        try:
            os.kill(victim.pid, number)
        except ProcessLookupError:
            return  # it has just ended by itself
        name = number.name.removeprefix("SIG")
        self.faults.append(Fault(time.monotonic(), victim.name, victim.role or victim.kind, name, double))


def node_report(run_dir: Path) -> NodeReport:
    """The node's state. Raises UserError if it does not answer."""
    report = ask(run_dir, Status())
    if not isinstance(report, NodeReport):
        raise UserError(report.error)
    return report


def matching(tree: NodeStatus, patterns: Sequence[str]) -> list[NodeStatus]:
    """The processes below the root whose name or role matches; without patterns all but those of the ingress."""
    below = [each for each in tree.walk() if each is not tree]
    if not patterns:
        return [each for each in below if each.role != "ingress"]
    return [each for each in below if any(_matches(each, pattern) for pattern in patterns)]


def _matches(node: NodeStatus, pattern: str) -> bool:
    return fnmatch.fnmatchcase(node.name, pattern) or fnmatch.fnmatchcase(node.role, pattern)


def read_schedule(file: Path) -> list[Planned]:
    """A schedule file: one "SECONDS ACTOR SIGNAL" a line; "#" begins a comment. Raises UserError."""
    try:
        lines = file.read_text().splitlines()
    except OSError as error:
        raise UserError(f"the schedule {file} cannot be read: {error.strerror}") from None
    return sorted(_planned(file, lines), key=lambda planned: planned.after_s)


def _planned(file: Path, lines: Sequence[str]) -> Iterator[Planned]:
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        try:
            seconds, actor, name = words
            yield Planned(float(seconds), actor, signal.Signals[f"SIG{name.upper().removeprefix('SIG')}"])
        except (ValueError, KeyError):
            raise UserError(f"{file}:{number}: write SECONDS ACTOR SIGNAL, such as: 2.5 main.rank0 KILL") from None
