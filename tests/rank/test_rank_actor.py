"""The actor: real processes, real sockets, and a scheduler's end of the protocol."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rank_tools import Driver, generate, ints, rank_config, save_model

from llm_runtime.actors.checkpoint import read_config
from llm_runtime.actors.messages import Attach, Attached, Hello, Message, SamplingParams, Step, StepRefused, StepResult
from llm_runtime.actors.rank import Executor, build_executor, kv_format, weight_bytes
from llm_runtime.transport import Arena, Codec, Mailbox

HERE = Path(__file__).parent
SAMPLING = SamplingParams(max_tokens=12, seed=9)
PROMPT = list(range(40, 90))


class Engine:
    """Ranks of one engine, their arenas, and a mailbox of their scheduler."""

    def __init__(self, directory: Path, tp: int = 1, **settings: Any) -> None:
        self.directory = directory
        self.tp = tp
        self.settings = settings
        self.model = directory / "model"
        self.processes: dict[int, subprocess.Popen[str]] = {}
        self.incarnations = dict.fromkeys(range(tp), 0)
        config = read_config(self.model)
        self.arenas: dict[str, int] = {}
        for rank in range(tp):
            pages = kv_format(config, settings.get("kv_dtype", "float32"), 16, tp, rank)
            self.arenas[f"main.rank{rank}.weights"] = Arena.create("w", weight_bytes(config, "float32", tp, rank))
            self.arenas[f"main.rank{rank}.kv"] = Arena.create("kv", 64 * pages.page_bytes)
        self.scheduler: Mailbox[Message]
        self.received: list[Message] = []
        self.start_scheduler(1)

    def address(self, name: str) -> str:
        return f"ipc://{self.directory}/{name}"

    def start_scheduler(self, incarnation: int) -> None:
        peers = {f"main.rank{rank}": self.address(f"main.rank{rank}") for rank in range(self.tp)}
        self.scheduler = Mailbox("main.scheduler", incarnation, self.address("main.scheduler"), peers, Codec(Message))

    def start(self, rank: int = 0, wait: bool = True, **overrides: Any) -> str:
        """Starts a rank; returns what it says of itself."""
        self.incarnations[rank] += 1
        name = f"main.rank{rank}"
        config = rank_config(
            **{
                "model": str(self.model),
                "num_pages": 64,
                "max_slots": 8,
                "max_model_len": 128,
                "threads": 1,
                "tp": self.tp,
                "rank": rank,
                "process_group_dir": str(self.directory / "group"),
                "weights_arena": f"{name}.weights",
                "kv_arena": f"{name}.kv",
                **self.settings,
                **overrides,
            },
        )
        peers = {f"main.rank{other}": self.address(f"main.rank{other}") for other in range(self.tp) if other != rank}
        descriptors = {key: value for key, value in self.arenas.items() if key.startswith(name)}
        fields = {
            "id": name,
            "incarnation": self.incarnations[rank],
            "args": {
                "address": self.address(name),
                "peers": {**peers, "main.scheduler": self.address("main.scheduler")},
                "config": msgspec.to_builtins(config),
            },
            "descriptors": descriptors,
        }
        process = subprocess.Popen(
            [sys.executable, str(HERE / "rank_process.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=list(descriptors.values()),
            env={**os.environ, "PYTHONPATH": str(HERE.parents[1] / "src")},
        )
        self.processes[rank] = process
        assert process.stdin is not None
        process.stdin.write(json.dumps(fields) + "\n")
        process.stdin.flush()
        return self.said(rank) if wait else ""

    def said(self, rank: int) -> str:
        output = self.processes[rank].stdout
        assert output is not None
        return output.readline().strip()

    def kill(self, rank: int = 0) -> None:
        self.processes[rank].send_signal(signal.SIGKILL)
        self.processes[rank].wait(30)

    def receive(self, wanted: Callable[[Message], bool], timeout_s: float = 60.0) -> Any:
        """The next message of a kind; what comes before it is kept in `received`."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            self.scheduler.poll(0.2)
            for envelope in self.scheduler.receive(1):
                self.received.append(envelope.body)
                if wanted(envelope.body):
                    return envelope.body
        raise AssertionError(f"no answer within {timeout_s} s")

    def attach(self) -> Attached:
        self.scheduler.send("main.rank0", Attach())
        return self.receive(lambda message: isinstance(message, Attached))  # type: ignore[no-any-return]

    def execute(self, step: Step) -> StepResult:
        """What an executor's `execute` is to a driver, over the sockets."""
        self.scheduler.send("main.rank0", step)
        return self.receive(lambda message: isinstance(message, StepResult) and message.number == step.number)  # type: ignore[no-any-return]

    def close(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait(30)
        self.scheduler.close(0)


class Remote:
    """An executor's stand-in for `Driver`."""

    def __init__(self, engine: Engine, config: Any) -> None:
        self.config = config
        self.execute = engine.execute


@contextmanager
def engine_of(directory: Path, tp: int = 1, **settings: Any) -> Iterator[Engine]:
    engine = Engine(directory, tp, **settings)
    try:
        yield engine
    finally:
        engine.close()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    save_model(tmp_path / "model", "LlamaForCausalLM")
    return tmp_path


@pytest.fixture
def local(directory: Path) -> Executor:
    return build_executor(rank_config(directory / "model", num_pages=64, max_slots=8, max_model_len=128))


def test_tokens_are_those_of_the_executor(directory: Path, local: Executor) -> None:
    (wanted,) = generate(local, [PROMPT], SAMPLING)
    with engine_of(directory) as engine:
        assert engine.start() == "ready"
        engine.receive(lambda message: isinstance(message, Hello))
        attached = engine.attach()
        assert attached == Attached(64, 16, 8, 300, 128, local.fingerprint)
        driver = Driver(Remote(engine, local.config))  # type: ignore[arg-type]
        sequence = driver.sequence(3, PROMPT, SAMPLING)
        driver.run([sequence], chunk=20)
        assert sequence.output == wanted.output
        process = engine.processes[0]
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(30) == 0


def test_steps_sent_ahead(directory: Path, local: Executor) -> None:
    (wanted,) = generate(local, [PROMPT], SAMPLING)
    with engine_of(directory) as engine:
        engine.start()
        engine.attach()
        driver = Driver(Remote(engine, local.config))  # type: ignore[arg-type]
        sequence = driver.sequence(0, PROMPT, SAMPLING)
        steps = []
        for length in (50, *[1] * 11):
            steps.append(driver.step([(sequence, length)]))
            sequence.computed += length
            sequence.output.append(0)  # not known yet: the rank fills it in
        for step in steps:
            engine.scheduler.send("main.rank0", step)
        results = [
            engine.receive(lambda message, step=step: isinstance(message, StepResult) and message.number == step.number)
            for step in steps
        ]
        assert [ints(result.tokens)[0] for result in results] == wanted.output


@pytest.mark.parametrize("kv_dtype", ["float32", "int8"])
def test_killed_rank_goes_on_from_its_arenas(directory: Path, kv_dtype: str) -> None:
    """The next incarnation decodes on keys and values that the killed one has written."""
    config = rank_config(directory / "model", num_pages=64, max_slots=8, max_model_len=128, kv_dtype=kv_dtype)
    (wanted,) = generate(build_executor(config), [PROMPT], SAMPLING)
    with engine_of(directory, kv_dtype=kv_dtype) as engine:
        engine.start()
        engine.attach()
        driver = Driver(Remote(engine, config))  # type: ignore[arg-type]
        sequence = driver.sequence(0, PROMPT, SAMPLING)
        while len(sequence.output) < 5:
            rows = [(sequence, len(sequence.tokens) - sequence.computed)]
            step = driver.step(rows)
            driver.apply(rows, step, engine.execute(step))
        engine.kill()
        (directory / "model" / "model.safetensors").write_bytes(b"")  # the weights come from the arena
        engine.start()
        engine.receive(lambda message: isinstance(message, Hello))
        engine.attach()
        sequence.opened = False
        driver.run([sequence])
        assert sequence.output == wanted.output


def test_only_the_attached_scheduler_is_served(directory: Path, local: Executor) -> None:
    with engine_of(directory) as engine:
        engine.start()
        driver = Driver(Remote(engine, local.config))  # type: ignore[arg-type]
        step = driver.step([(driver.sequence(0, PROMPT, SAMPLING), 50)])
        engine.scheduler.send("main.rank0", step)  # before Attach
        engine.attach()
        assert not any(isinstance(message, StepResult) for message in engine.received)
        first = engine.execute(step)
        engine.scheduler.close()
        engine.start_scheduler(2)
        engine.received.clear()
        engine.scheduler.send("main.rank0", msgspec.structs.replace(step, number=77))  # of a new one, before its Attach
        engine.attach()
        assert not any(isinstance(message, StepResult) for message in engine.received)
        assert engine.execute(step).tokens == first.tokens


def test_slots_are_closed_by_attach_and_bad_steps_are_survived(directory: Path, local: Executor) -> None:
    with engine_of(directory) as engine:
        engine.start()
        engine.attach()
        driver = Driver(Remote(engine, local.config))  # type: ignore[arg-type]
        sequence = driver.sequence(0, PROMPT, SAMPLING)
        rows = [(sequence, 50)]
        step = driver.step(rows)
        driver.apply(rows, step, engine.execute(step))
        unopened = driver.step([(sequence, 1)])
        engine.attach()
        engine.received.clear()
        engine.scheduler.send("main.rank0", unopened)
        engine.scheduler.send("main.rank0", msgspec.structs.replace(step, number=90, slots=b"\xff" * 4))
        engine.scheduler.send("main.rank0", Hello())
        assert engine.execute(msgspec.structs.replace(step, number=91)).number == 91
        assert [message.number for message in engine.received if isinstance(message, StepResult)] == [91]
        refused = [message for message in engine.received if isinstance(message, StepRefused)]
        assert [(each.number, each.slots) for each in refused] == [(unopened.number, [0]), (90, [])]
        assert "not open" in refused[0].reason


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"model": "/nowhere/model.gguf"}, "/nowhere/model.gguf: no such file or directory"),
        ({"num_pages": 65}, "the KV arena has"),
        ({"dtype": "float64"}, "Invalid enum value 'float64'"),
        ({"tp": 3}, "2 key-value heads"),
    ],
)
def test_failures_to_start_are_one_sentence(directory: Path, overrides: dict[str, Any], sentence: str) -> None:
    with engine_of(directory) as engine:
        assert sentence in engine.start(**overrides)
        assert engine.processes[0].wait(30) == 1


def test_two_ranks_and_the_death_of_one(directory: Path, local: Executor) -> None:
    """Rank 0 passes steps on. When rank 1 is killed, rank 0 ends too; restarted, both go on from their arenas."""
    greedy = SamplingParams(max_tokens=12, seed=9, temperature=0.0)
    (wanted,) = generate(local, [PROMPT], greedy)
    with engine_of(directory, tp=2) as engine:
        # As a supervisor does: each is ready before the next is started.
        assert engine.start(0) == "ready"
        assert engine.start(1) == "ready"
        engine.attach()
        driver = Driver(Remote(engine, local.config))  # type: ignore[arg-type]
        sequence = driver.sequence(0, PROMPT, greedy)
        while len(sequence.output) < 5:
            rows = [(sequence, len(sequence.tokens) - sequence.computed)]
            step = driver.step(rows)
            driver.apply(rows, step, engine.execute(step))
        engine.kill(1)
        engine.scheduler.send("main.rank0", driver.step([(sequence, 1)]))
        assert engine.processes[0].wait(60) not in (0, None)
        assert engine.start(0) == "ready"
        engine.scheduler.send("main.rank0", Attach())  # before rank 1 is there
        assert engine.start(1) == "ready"
        engine.receive(lambda message: isinstance(message, Attached))
        sequence.opened = False
        driver.run([sequence])
        assert sequence.output == wanted.output
