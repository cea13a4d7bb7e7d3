"""A chaos run: the same requests undisturbed first, then over and over while processes are killed."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import aiohttp

from llm_runtime.runtime.chaos.client import Answer, send
from llm_runtime.runtime.chaos.compare import Difference, check, compare
from llm_runtime.runtime.chaos.corpus import Request, build_corpus, build_structured_corpus
from llm_runtime.runtime.chaos.inject import Fault, Injector, Plan, node_report
from llm_runtime.runtime.errors import UserError
from llm_runtime.supervisors.status import NodeStatus

SETTLE_S = 60.0
"""How long the node may take, after the last fault, until all of its processes run."""
FILL_EVERY_S = 5.0
_PROBE_INTERVAL_S = 0.05
_LOOK_INTERVAL_S = 0.5


@dataclass(frozen=True)
class Load:
    """The clients.

    Attributes:
        streams: requests at a time.
        tokens: of each answer.
        long_words: words of the longest prompts.
        fill: so many requests more at once, every few seconds, so that the KV pool runs out of pages.
        timeout_s: after which a request has failed.
        structured: answers of a form that is asked for, in place of text; they have a length of their own. "too":
            both, in turn.
        aborts: so many clients more that break off their requests somewhere and begin others.
    """

    streams: int = 8
    tokens: int = 200
    long_words: int = 700
    fill: int = 0
    timeout_s: float = 300.0
    seed: int = 0
    structured: bool | Literal["too"] = False
    aborts: int = 0


@dataclass
class Outcome:
    """What a chaos run has seen.

    Attributes:
        deterministic: whether answers were compared with the undisturbed run's.
        answers: of the undisturbed run.
        undisturbed, disturbed: when the pieces of each stream came.
        probes: when each of a row of calls to the tokenizer was answered.
        requests: how many were sent while processes were killed.
        failures: a sentence for each request that failed.
        difference: tokens lost, repeated and changed, in all requests.
        controls: moments before the first fault, for comparison.
        restarts: of each process.
        retractions: requests that gave their pages up for others, by all schedulers that ran meanwhile.
        settled: all processes run again.
    """

    deterministic: bool
    duration_s: float = 0.0
    requests: int = 0
    tokens: int = 0
    failures: list[str] = field(default_factory=list)
    difference: Difference = field(default_factory=Difference)
    differing: int = 0
    faults: list[Fault] = field(default_factory=list)
    controls: list[float] = field(default_factory=list)
    restarts: dict[str, int] = field(default_factory=dict)
    retractions: int = 0
    answers: list[Answer] = field(default_factory=list)
    undisturbed: list[list[float]] = field(default_factory=list)
    disturbed: list[list[float]] = field(default_factory=list)
    probes: list[float] = field(default_factory=list)
    settled: bool = True

    @property
    def ok(self) -> bool:
        """Nobody has noticed anything but pauses."""
        return not self.failures and not self.difference.any and self.settled


class _Clients:
    """The requests and what became of them."""

    def __init__(self, session: aiohttp.ClientSession, url: str, load: Load, corpus: list[Request], out: Outcome):
        self.session = session
        self.url = url
        self.load = load
        self.corpus = corpus
        self.out = out
        self.wanted: list[Answer] = []

    async def undisturbed(self) -> None:
        """Every request once. Raises UserError if one fails."""
        answers = await self._all(self.corpus)
        for request, answer in zip(self.corpus, answers, strict=True):
            wrong = check(request, answer)
            if answer.error or wrong.any:
                raise UserError(
                    f"{request.label}: {answer.error or wrong.text}, before anything was killed: see `runtime logs`"
                )
        self.take(answers)

    def take(self, answers: list[Answer]) -> None:
        """The answers that all others are compared with."""
        self.wanted = answers
        self.out.undisturbed = [answer.arrivals for answer in answers]

    async def stream(self, first: int, over: asyncio.Event) -> None:
        """One client: request after request until told to stop."""
        for number in itertools.count(first):
            if over.is_set():
                return
            await self._one(number % len(self.corpus))

    async def abort(self, seed: int, over: asyncio.Event) -> None:
        """One client that never waits for an end."""
        draw = random.Random(seed)
        while not over.is_set():
            request = draw.choice(self.corpus)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(draw.uniform(0.05, 3.0)):
                    await send(self.session, self.url, request, self.load.timeout_s)

    async def fill(self, over: asyncio.Event) -> None:
        """Bursts of requests."""
        while self.load.fill and not over.is_set():
            await asyncio.gather(*(self._one(number % len(self.corpus)) for number in range(self.load.fill)))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(over.wait(), FILL_EVERY_S)

    async def probe(self, over: asyncio.Event) -> None:
        """Calls the tokenizer all the time: its pauses show nowhere else, for streams do not need it."""
        while not over.is_set():
            try:
                async with self.session.post(f"{self.url}/tokenize", json={"prompt": "Where are you?"}) as response:
                    if response.status != 200:
                        self.out.failures.append(f"/tokenize: status {response.status}: {await response.text()}"[:200])
                    self.out.probes.append(time.monotonic())
            except aiohttp.ClientError as error:
                self.out.failures.append(f"/tokenize: {type(error).__name__}: {error}")
            await asyncio.sleep(_PROBE_INTERVAL_S)

    async def _all(self, requests: Sequence[Request]) -> list[Answer]:
        slots = asyncio.Semaphore(self.load.streams)

        async def one(request: Request) -> Answer:
            async with slots:
                return await send(self.session, self.url, request, self.load.timeout_s)

        return await asyncio.gather(*map(one, requests))

    async def _one(self, index: int) -> None:
        request, out = self.corpus[index], self.out
        answer = await send(self.session, self.url, request, self.load.timeout_s)
        out.requests += 1
        out.tokens += answer.counted
        out.disturbed.append(answer.arrivals)
        if answer.error:
            out.failures.append(f"{request.label}: {answer.error}")
            return
        wrong = check(request, answer)
        if out.deterministic:
            wrong.add(compare(request, answer, self.wanted[index]))
        out.differing += wrong.any
        out.difference.add(wrong)


async def run_chaos(
    run_dir: Path,
    load: Load,
    plan: Plan,
    api_key: str | None = None,
    note: Callable[[str], None] = lambda _: None,
    wanted: list[Answer] | None = None,
) -> Outcome:
    """Disturbs a running node and tells what its clients saw.

    Args:
        note: told what is being done.
        wanted: the answers of the undisturbed run, if one with the same load was made before.

    Raises UserError when the node does not serve even before anything is killed.
    """
    before = node_report(run_dir)
    if not before.url:
        raise UserError(
            f"the node {before.node} has no ingress to send requests to; choose the one that has with --node"
        )
    out = Outcome(before.deterministic)
    corpus = []
    if load.structured is not True:
        corpus += build_corpus(load.streams, load.tokens, load.long_words, load.seed, not before.deterministic)
    if load.structured:
        corpus += build_structured_corpus(load.streams, load.seed)
    async with _session(api_key) as session:
        clients = _Clients(session, before.url, load, corpus, out)
        if wanted is None:
            note(f"{len(corpus)} requests undisturbed")
            await clients.undisturbed()
        else:
            clients.take(wanted)
        out.answers = clients.wanted
        note("the same requests again and again, with faults")
        over = asyncio.Event()
        injector = Injector(run_dir, plan)
        began = time.monotonic()
        jobs = [asyncio.create_task(clients.stream(first, over)) for first in range(load.streams)]
        jobs += [asyncio.create_task(clients.abort(load.seed + each, over)) for each in range(load.aborts)]
        others = (clients.fill(over), clients.probe(over), _count_retractions(run_dir, out, over))
        jobs += [asyncio.create_task(each) for each in others]
        try:
            await injector.run()
        except UserError as error:
            out.failures.append(f"the faults stopped: {error}")
        finally:
            over.set()
            note("the last answers")
            await asyncio.gather(*jobs)
        out.duration_s = time.monotonic() - began
        out.faults, out.controls = injector.faults, injector.controls
    await _settle(run_dir, before.tree, out)
    return out


async def _count_retractions(run_dir: Path, out: Outcome, over: asyncio.Event) -> None:
    """Schedulers count them; each incarnation begins anew."""
    counts: dict[tuple[str, int], int] = {}
    while not over.is_set():
        with contextlib.suppress(UserError):
            tree = (await asyncio.to_thread(node_report, run_dir)).tree
            for each in tree.walk():
                if "retractions" in each.stats:
                    counts[each.name, each.incarnation] = int(each.stats["retractions"])
        out.retractions = sum(counts.values())
        await asyncio.sleep(_LOOK_INTERVAL_S)


@contextlib.asynccontextmanager
async def _session(api_key: str | None) -> AsyncIterator[aiohttp.ClientSession]:
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(headers=headers, connector=connector, read_bufsize=2**22) as session:
        yield session


async def _settle(run_dir: Path, before: NodeStatus, out: Outcome) -> None:
    """Waits until all processes run, and counts how often each was started."""
    deadline = time.monotonic() + SETTLE_S
    while True:
        try:
            report = await asyncio.to_thread(node_report, run_dir)
        except UserError as error:
            out.settled = False
            out.failures.append(str(error))
            return
        out.settled = report.state == "running"
        if out.settled or time.monotonic() > deadline:
            break
        await asyncio.sleep(0.05)
    started = {each.name: each.incarnation for each in before.walk()}
    out.restarts = {each.name: each.incarnation - started.get(each.name, 0) for each in report.tree.walk()}
