"""The batch against a simulated rank: whatever happens, a row only ever reads the tokens of its own request."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable

import msgspec
import numpy as np
import pytest

from llm_runtime.actors.messages import SAMPLE, VERIFY, Generate, SamplingParams, TextParams
from llm_runtime.actors.scheduler.batch import Batch, Row
from llm_runtime.actors.scheduler.config import Config
from llm_runtime.actors.scheduler.pages import PageLedger, PagePool, page_ledger_bytes
from llm_runtime.actors.scheduler.request import Request
from llm_runtime.actors.scheduler.speculation import Speculation
from llm_runtime.actors.scheduler.step_times import StepTimes
from llm_runtime.actors.scheduler.wire import encode_step
from llm_runtime.transport import Arena

PAGE_SIZE, NUM_PAGES, SLOTS = 4, 40, 6


def next_token(tokens: list[int]) -> int:
    """What the simulated model draws: depends on every token before."""
    return sum((i + 1) * t for i, t in enumerate(tokens)) % 97


def loopy_token(tokens: list[int]) -> int:
    """Another model: goes on in a circle of three, with a surprise now and then."""
    drawn = next_token(tokens)
    return drawn if drawn < 12 or len(tokens) < 3 else tokens[-3]


class SimulatedRank:
    """Keeps (token, position) in the place of KV and checks what each row would attend to."""

    def __init__(self, model: Callable[[list[int]], int] = next_token) -> None:
        self.model = model
        self.kv = np.full((NUM_PAGES, PAGE_SIZE, 2), -1)
        self.reset()

    def reset(self) -> None:
        self.table = np.full((SLOTS, 64), -1)
        self.last = [-1] * SLOTS

    def execute(self, step) -> list[int]:
        for opening in step.new_requests:
            self.table[opening.slot] = -1
            self.last[opening.slot] = -1
        for slot, index, page in np.frombuffer(step.pages, np.int32).reshape(-1, 3):
            self.table[slot, index] = page
        drawn, at = [], 0
        tokens = np.frombuffer(step.tokens, np.int32).tolist()
        rows = zip(
            *(np.frombuffer(field, np.int32).tolist() for field in (step.slots, step.starts, step.lengths)),
            step.flags,
            strict=True,
        )
        for slot, start, length, flags in rows:
            for position in range(start, start + length):
                token = tokens[at]
                at += 1
                if token == -1:
                    token = self.last[slot]
                    assert token != -1, "the rank has not drawn a token for this slot"
                page = self.table[slot, position // PAGE_SIZE]
                self.kv[page, position % PAGE_SIZE] = token, position
            seen = [self.kv[self.table[slot, p // PAGE_SIZE], p % PAGE_SIZE].tolist() for p in range(start + length)]
            assert [position for _, position in seen] == list(range(start + length))
            known = [token for token, _ in seen]
            if flags & VERIFY:
                drawn += [self.model(known[:end]) for end in range(start + 1, start + length + 1)]
                self.last[slot] = -1
            elif flags & SAMPLE:
                self.last[slot] = self.model(known)
                drawn.append(self.last[slot])
        return drawn


class Simulation:
    """Scheduler and rank in one process, with up to two steps under way."""

    def __init__(
        self, seed: int, policy: str, chunk_tokens: int, model: Callable[[list[int]], int] = next_token
    ) -> None:
        self.random = random.Random(seed)
        self.model = model
        self.config = Config(
            engine="main",
            model="m",
            address="ipc:///x",
            leader="main.rank0",
            detokenizer="detokenizer",
            bootstrap="bootstrap",
            page_size=PAGE_SIZE,
            num_pages=NUM_PAGES,
            max_model_len=80,
            max_running=SLOTS,
            chunk_tokens=chunk_tokens,
            policy=policy,
        )
        self.arena = Arena(Arena.create("pages", page_ledger_bytes(NUM_PAGES, PAGE_SIZE)))
        self.rank = SimulatedRank(model)
        self.generates: dict[str, Generate] = {}
        self.outputs: dict[str, list[int]] = {}
        self.start_scheduler()

    def start_scheduler(self) -> None:
        self.pool = PagePool(PageLedger(self.arena, NUM_PAGES, PAGE_SIZE), prefix_cache=True)
        times = StepTimes()
        for size in (1, 100):  # a step takes as long however many tokens it has: guessing cannot lose much
            times.observe(size, 0.01)
        self.speculation = Speculation(self.config, times)
        self.batch = Batch(self.config, self.pool, times, self.speculation if self.model is loopy_token else None)
        self.flight: deque[tuple[int, list[Row], list[int]]] = deque()
        self.live: dict[str, Request] = {}
        self.number = 0

    def submit(self, rid: str) -> None:
        message = self.generates[rid]
        output = np.array(self.outputs[rid], np.int32).tobytes()
        again = Generate(rid, 0, message.prompt, message.sampling, message.text, output)
        self.live[rid] = Request(again, "ingress0", len(self.live), PAGE_SIZE)
        self.batch.add(self.live[rid])

    def arrive(self, rid: str) -> None:
        shared = self.random.choice([[], [7] * 10, [7] * 10 + [8] * 9, [5, 6] * 8])
        prompt = shared + [self.random.randrange(97) for _ in range(self.random.randrange(1, 20))]
        # Requests that want prompt logprobs compute pages that the tree has already.
        logprobs = self.random.choice([-1, -1, 0])
        params = SamplingParams(max_tokens=self.random.randrange(1, 30), seed=0, prompt_logprobs=logprobs)
        packed = np.array(prompt, np.int32).tobytes()
        self.generates[rid] = Generate(rid, 0, packed, params, TextParams(), priority=self.random.randrange(2))
        self.outputs[rid] = []
        self.submit(rid)

    def send_steps(self) -> None:
        while len(self.flight) < 2 and (rows := self.next_rows()):
            self.number += 1
            self.flight.append((self.number, rows, self.rank.execute(encode_step(self.number, rows))))

    def next_rows(self) -> list[Row]:
        if self.flight and any(row.draft for row in self.flight[-1][1]):
            return []
        if self.model is loopy_token and self.flight and self.speculation.worth_waiting(self.batch.running):
            return []
        return self.batch.next_rows()

    def answer(self) -> None:
        if not self.flight:
            return
        _, rows, drawn = self.flight.popleft()
        remaining = deque(drawn)
        for row in rows:
            request = row.request
            tokens = [remaining.popleft() for _ in range(row.draws)]
            request.pending -= bool(tokens)
            if self.live.get(request.rid) is not request:
                continue
            if row.draft:
                tokens = self.speculation.accepted(row.draft, tokens)
                tokens = tokens[: tokens.index(96) + 1] if 96 in tokens else tokens
                row.length = len(tokens)
            for token in tokens:
                request.append(token)
                self.outputs[request.rid].append(token)
            self.batch.computed(row)
            if request.output_len >= request.sampling.max_tokens or 96 in tokens:
                self.batch.remove(request)
                del self.live[request.rid]
        self.check_ledger()

    def check_ledger(self) -> None:
        """The ledger knows the computed tokens of running requests, and none of the guesses that were wrong."""
        for request in self.batch.running:
            assert request.block_table is not None
            assert request.computed <= len(request.tokens)
            pages = request.block_table.pages
            counts = self.pool.ledger.count[pages].tolist()
            known = [token for page in pages for token in self.pool.ledger.tokens[page, : counts[pages.index(page)]]]
            assert known == request.tokens[: request.computed].tolist()

    def lose_rank(self) -> None:
        """The rank restarts: KV stays, tables and unanswered results are gone."""
        self.rank.reset()
        for request in self.batch.running:
            assert request.block_table is not None
            request.block_table.opened = False
        again, self.flight = self.flight, deque()
        for number, rows, _ in again:
            for row in rows:
                if not row.live and row.flags & SAMPLE:
                    row.request.pending -= 1
            rows = [row for row in rows if row.live]
            if rows:
                self.flight.append((number, rows, self.rank.execute(encode_step(number, rows))))

    def lose_scheduler(self) -> None:
        self.rank.reset()
        rids = list(self.live)
        self.start_scheduler()
        for rid in rids:
            self.submit(rid)

    def abort(self) -> None:
        if self.live:
            request = self.live.pop(self.random.choice(list(self.live)))
            self.batch.remove(request)
            del self.outputs[request.rid]

    def expected(self, rid: str) -> list[int]:
        message = self.generates[rid]
        tokens = np.frombuffer(message.prompt, np.int32).tolist()
        output: list[int] = []
        while len(output) < message.sampling.max_tokens and (not output or output[-1] != 96):
            output.append(self.model(tokens + output))
        return output


@pytest.mark.parametrize("model", [next_token, loopy_token])
@pytest.mark.parametrize("policy", ["fcfs", "lpm"])
@pytest.mark.parametrize("chunk_tokens", [3, 16, 64])
@pytest.mark.parametrize("seed", range(4))
def test_every_request_gets_its_own_tokens_through_losses_and_retraction(
    seed: int, chunk_tokens: int, policy: str, model: Callable[[list[int]], int]
) -> None:
    simulation = Simulation(seed, policy, chunk_tokens, model)
    events = [simulation.lose_rank, simulation.lose_scheduler, simulation.abort]
    for number in range(60):
        simulation.arrive(f"r{number}")
        for _ in range(simulation.random.randrange(8)):
            simulation.send_steps()
            if simulation.random.random() < 0.05:
                simulation.random.choice(events)()
            simulation.answer()
    for _ in range(5000):
        simulation.send_steps()
        if not simulation.flight:
            break
        simulation.answer()
    assert not simulation.live
    for rid, output in simulation.outputs.items():
        assert output == simulation.expected(rid), rid
    simulation.pool.drop_partial()
    assert simulation.pool.available == NUM_PAGES, "pages leaked"
    assert simulation.pool.free + simulation.pool.tree.total_pages == NUM_PAGES
    assert sorted(simulation.batch._slots) == list(range(SLOTS))
    assert not +simulation.batch._coming


def test_retraction_happens_and_loses_nothing() -> None:
    simulation = Simulation(1, "fcfs", 64)
    for number in range(8):
        rid = f"r{number}"
        prompt = np.array([number] * 12, np.int32).tobytes()
        simulation.generates[rid] = Generate(rid, 0, prompt, SamplingParams(max_tokens=60, seed=0), TextParams())
        simulation.outputs[rid] = []
        simulation.submit(rid)
    while simulation.live:
        simulation.send_steps()
        simulation.answer()
    assert simulation.batch.retractions > 0
    assert all(output == simulation.expected(rid) for rid, output in simulation.outputs.items())


def test_a_restarted_scheduler_takes_pages_over_instead_of_computing_again() -> None:
    simulation = Simulation(2, "fcfs", 64)
    simulation.generates["r"] = Generate(
        "r", 0, np.arange(30, dtype=np.int32).tobytes(), SamplingParams(max_tokens=40, seed=0), TextParams()
    )
    simulation.outputs["r"] = []
    simulation.submit("r")
    for _ in range(6):
        simulation.send_steps()
        simulation.answer()
    known = 30 + len(simulation.outputs["r"])
    simulation.lose_scheduler()
    rows = simulation.batch.next_rows()
    assert [row.start for row in rows] == [known - 1], "all but the last token had been computed and answered"


def test_requests_that_share_a_prefix_wait_for_the_first_one() -> None:
    simulation = Simulation(3, "fcfs", 64)
    prompt = list(range(20))
    for number in range(3):
        rid = f"r{number}"
        packed = np.array([*prompt, 50 + number], np.int32).tobytes()
        simulation.generates[rid] = Generate(rid, 0, packed, SamplingParams(max_tokens=2, seed=0), TextParams())
        simulation.outputs[rid] = []
        simulation.submit(rid)
    simulation.send_steps()
    assert [row.length for row in simulation.flight[0][1]] == [21], "the other two wait for its prefix"
    while simulation.live:
        simulation.send_steps()
        simulation.answer()
    assert all(output == simulation.expected(rid) for rid, output in simulation.outputs.items())
    assert simulation.pool.tree.total_pages == 5, "the prefix is kept once"


@pytest.mark.parametrize(
    ("waiting", "slots", "pages", "priority", "taken"),
    [
        *((count, SLOTS, NUM_PAGES, 0, 40 * count - 1) for count in (1, 2, 3)),
        (3, 2, NUM_PAGES, 0, 39),
        (3, SLOTS, 20, 0, 39),
        (3, SLOTS, NUM_PAGES, 1, 119),
        (3, SLOTS, NUM_PAGES, -1, 39),
    ],
)
def test_a_step_takes_more_of_prompts_when_more_wait_than_decode(
    waiting: int, slots: int, pages: int, priority: int, taken: int
) -> None:
    """A millisecond a token, and 40 of them: as long for each that waits, is no less urgent, and can have a slot and
    pages, as for each that decodes."""
    simulation = Simulation(0, "fcfs", 1_000)
    config = msgspec.structs.replace(simulation.config, max_step_ms=40, max_running=slots)
    times = StepTimes()
    for size in (1, 511):
        times.observe(size, size / 1000)
    ledger = PageLedger(Arena(Arena.create("pages", page_ledger_bytes(pages, PAGE_SIZE))), pages, PAGE_SIZE)
    batch = Batch(config, PagePool(ledger, prefix_cache=True), times)

    def arrive(rid: str, length: int, priority: int = 0) -> Request:
        prompt = np.full(length, ord(rid), np.int32).tobytes()
        sampling = SamplingParams(max_tokens=20, seed=0)
        generate = Generate(rid, 0, prompt, sampling, TextParams(), priority=priority)
        request = Request(generate, "ingress0", 0, PAGE_SIZE)
        batch.add(request)
        return request

    first = arrive("a", 4)
    (row,) = batch.next_rows()
    first.pending -= 1
    first.append(1)
    batch.computed(row)
    for number in range(waiting):
        arrive("bcd"[number], 42, priority)
    rows = batch.next_rows()
    assert rows[0].request is first
    assert sum(row.length for row in rows[1:]) == taken


def test_a_retracted_request_is_planned_again_when_its_token_has_arrived() -> None:
    simulation = Simulation(0, "fcfs", 100)
    simulation.arrive("a")
    request, batch = simulation.live["a"], simulation.batch
    (row,) = batch.next_rows()
    assert request.pending == 1
    batch.retract(request)
    assert batch.next_rows() == []
    assert batch.waiting == [request]
    request.pending -= 1
    request.append(next_token(request.tokens.tolist()))
    (again,) = batch.next_rows()
    assert (again.request, again.length) == (request, row.length + 1)
