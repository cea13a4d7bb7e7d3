"""`Rank`: the actor around an executor. It runs the steps of one scheduler in the order in which they come."""

from __future__ import annotations

import ctypes
import logging
import time
from collections import deque
from pathlib import Path

import msgspec
import torch

from llm_runtime.actors.actor import Actor, BadMessage, StartFailure, handles
from llm_runtime.actors.checkpoint import CheckpointError
from llm_runtime.actors.messages import Attach, Attached, Compile, Profile, Step, StepRefused
from llm_runtime.actors.rank.config import RankConfig
from llm_runtime.actors.rank.executor import BadStep, Executor, build_executor
from llm_runtime.actors.rank.profiler import Profiler, Refusal
from llm_runtime.actors.rank.tp_group import JOIN_TIMEOUT_S, TPGroup
from llm_runtime.actors.rank.traces import SlotTraces

logger = logging.getLogger(__name__)

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
PROFILE_LIMIT_S = 600.0
"""What the writing of a profile may take."""
SECONDS_PER_TOKEN = 0.05
"""What a token of a step may add to the time after which the rank counts as hung."""


class Rank(Actor):
    """One tensor-parallel rank of an engine. Rank 0 leads: it alone talks to the scheduler, and passes on what it does.

    Its arenas come as the descriptors that its configuration names; what is not given is made anew at each start.
    """

    def setup(self) -> None:
        config = self.config = msgspec.convert(self.args.config, RankConfig)
        config.check()
        _keep_freed_memory()
        if config.threads:
            torch.set_num_threads(config.threads)
        self.group = TPGroup(
            config.tp,
            config.rank,
            Path(config.process_group_dir) if config.tp > 1 else None,
            config.deterministic,
        )
        descriptors = self.context.descriptors
        weights, kv = descriptors.get(config.weights_arena), descriptors.get(config.kv_arena)
        try:
            self.executor: Executor = build_executor(config, weights, kv, self.group)
        except CheckpointError as error:
            raise StartFailure(str(error)) from error
        self.steps: deque[Step] = deque()
        prefix = self.name.removesuffix(f"rank{config.rank}")
        self.leader = f"{prefix}rank0"
        self.followers = [f"{prefix}rank{rank}" for rank in range(1, config.tp)] if config.rank == 0 else []
        # Whose steps are run: on rank 0 those of the scheduler that has attached, on others those of rank 0.
        self.source: str | None = None
        self.steps_run = self.tokens_run = self.steps_ignored = 0
        self.busy_s = 0.0
        self.watched.append(self.executor.grammars.fd)
        directory = Path(self.config.profile_dir or self.context.run_dir / "profiles")
        self.profiler = Profiler(self.name, self.executor.device, directory)
        self.traces = SlotTraces(self.spans, self.after)

    def peer_started(self, peer: str, incarnation: int) -> None:
        if peer == self.source:
            self._forget_steps()
            self.source = None

    @handles(Attach)
    def attach(self, message: Attach, sender: str) -> None:
        """Everything before is forgotten. The ranks of a group meet at the first of these and not in `setup`, for a
        supervisor waits for one child to be ready before it starts the next."""
        if self.config.rank and sender != self.leader:
            raise BadMessage(f"{sender} sent Attach to {self.name}, which follows {self.leader}")
        self._forget_steps()
        self.source = sender
        self.executor.reset()
        for follower in self.followers:
            self.send(follower, message)
        self.link.doing("meeting the other ranks", JOIN_TIMEOUT_S + self.args.busy_limit_s)
        try:
            self.group.join(self.executor.device, lambda: self.link.shutdown_requested)
        except InterruptedError:
            return
        config = self.config
        kept = config.kv_arena in self.context.descriptors and config.device == "cpu"
        if config.rank == 0:
            attached = Attached(
                num_pages=config.num_pages,
                page_size=config.page_size,
                max_slots=config.max_slots,
                vocab_size=self.executor.vocab_size,
                max_model_len=config.max_model_len,
                fingerprint=self.executor.fingerprint,
                kv_epoch=0 if kept else self.incarnation,
            )
            self.send(sender, attached)

    @handles(Compile)
    def compile(self, message: Compile, sender: str) -> None:
        """Compiles a constraint beside the steps."""
        self.executor.grammars.submit(message.constraint, sender)

    @handles(Profile)
    def profile(self, message: Profile, sender: str) -> None:
        """Begins or ends a profile of this rank, and has the others do the same."""
        for follower in self.followers:
            self.send(follower, message)
        self.link.doing("writing a profile", PROFILE_LIMIT_S)
        answer = self.profiler.ask(message)
        if message.reply_to in self.mailbox.peers:
            self.send(message.reply_to, answer)

    @handles(Step)
    def step(self, message: Step, sender: str) -> None:
        """Queues a step of the scheduler that is attached; others are ignored."""
        if sender == self.source:
            self.steps.append(message)
        else:
            self.steps_ignored += 1

    def turn(self) -> None:
        """Runs the queued steps, with a look into the mailbox after each: an `Attach` there forgets the others."""
        for asker, answer in self.executor.grammars.finished():
            self.send(asker, answer)
        while self.steps and not self.link.shutdown_requested:
            self._run(self.steps.popleft())
            if self.mailbox.poll(0):
                return

    def teardown(self) -> None:
        self.group.leave()

    def stats(self) -> dict[str, float]:
        """Steps and tokens run, seconds spent in them, and steps ignored, since the start of this incarnation."""
        executor = self.executor
        arrays_s, model_s, drawing_s = executor.decode_s.tolist()
        return {
            "steps": float(self.steps_run),
            "tokens": float(self.tokens_run),
            "busy_seconds": self.busy_s,
            "steps_ignored": float(self.steps_ignored),
            "decode_steps": float(executor.decode_steps),
            "decode_arrays_seconds": arrays_s,
            "decode_model_seconds": model_s,
            "decode_drawing_seconds": drawing_s,
            "weights_bytes": float(executor.weights_bytes),
            "kv_bytes": float(executor.cache.nbytes),
        }

    def _run(self, step: Step) -> None:
        tokens = len(step.tokens) // 4
        self.link.doing(f"step {step.number}", self.args.busy_limit_s + SECONDS_PER_TOKEN * tokens)
        for follower in self.followers:
            self.send(follower, step)
        began_ns = time.time_ns()
        try:
            with self.profiler.step(step.number):
                result = self.executor.execute(step)
        except BadStep as error:  # on every rank alike, before the first collective
            self.bad_messages += 1
            logger.error("refused a step of %s: %s", self.source, error)
            if self.config.rank == 0 and self.source is not None:
                self.send(self.source, StepRefused(step.number, error.slots, str(error)))
            return
        self.steps_run += 1
        self.tokens_run += tokens
        self.busy_s += result.duration_s
        if step.new_requests or self.traces:
            self.traces.ran(step, began_ns)
        if self.config.rank == 0 and self.source is not None:
            self.send(self.source, result)
        if self.profiler.due:
            self.link.doing("writing a profile", PROFILE_LIMIT_S)
            try:
                self.profiler.finish()
            except Refusal as refusal:
                logger.error("%s", refusal)

    def _forget_steps(self) -> None:
        self.steps_ignored += len(self.steps)
        self.steps.clear()
        self.traces.end_all()


def _keep_freed_memory() -> None:
    """Has the C library keep the memory of large tensors for the next ones. Given back to the system, as is its custom,
    it would come again a page fault at a time: a tenth of a long prefill."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 2**28)
        mallopt(_M_TRIM_THRESHOLD, 2**29)
