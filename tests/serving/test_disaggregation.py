"""Prefill and decode apart: the same answers as from one engine, whichever way the pages travel, and through kills."""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
from serving_node import FLOAT32, start
from support import MODEL, Node, eventually

DETERMINISTIC = (FLOAT32, "model.deterministic=true")
LONG = "The quick brown fox jumps over the lazy dog, number {}. "
PROMPTS = [
    "Hi",
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return ",
    "今天天气很好,我们去",
    "".join(LONG.format(number) for number in range(8)),
    "".join(LONG.format(number) for number in range(30)),
]
"""Of a single token, of less than a page, and of several chunks."""
CHUNKS = ("engine.prefill.chunk_tokens=160", "engine.decode.local_prefill_tokens=0")
REQUESTS = [
    *((prompt, "greedy") for prompt in PROMPTS),
    *((prompt, how) for prompt in (PROMPTS[2], PROMPTS[5]) for how in ("top p", "penalties", "logprobs")),
    (PROMPTS[4], "logprobs"),
]
"""What every deployment is asked: all prompts, and each kind of sampling for a short and a long one."""


def ask(node: Node, number: int) -> Any:
    """The answer to one of the requests."""
    prompt, how = REQUESTS[number]
    params: dict[str, Any] = {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True}
    body: dict[str, Any] = {"text": prompt, "sampling_params": params}
    match how:
        case "top p":
            params |= {"temperature": 0.9, "top_p": 0.95, "sampling_seed": number}
        case "penalties":
            params |= {"temperature": 0.7, "sampling_seed": number, "repetition_penalty": 1.2, "presence_penalty": 0.3}
        case "logprobs":
            body |= {"return_logprob": True, "top_logprobs_num": 2, "logprob_start_len": 0}
    answer = node.post("/generate", body)
    return answer["output_ids"], answer["text"], _rounded(answer["meta_info"])


def _rounded(meta: Any) -> Any:
    """Logprobs without their last digits, in which groups of ranks of different sizes differ."""
    keys = ("input_token_logprobs", "output_token_logprobs")
    return [[(each[1], each[0] and round(each[0], 2)) for each in meta[key]] for key in keys if key in meta]


def answers(node: Node, first: Callable[[], object] = lambda: None) -> list[Any]:
    """The answers to all requests, eight of them at a time; *first* is called when the first is there."""
    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(ask, node, number) for number in range(len(REQUESTS))]
        next(as_completed(running))
        first()
        return [each.result() for each in running]


@pytest.fixture(scope="module")
def unified(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Any]]:
    """What one engine answers that does both, by model."""

    @cache
    def of(model: str) -> list[Any]:
        for node in start(tmp_path_factory.mktemp("unified"), "smollm2.toml", *DETERMINISTIC, f"model.path={model}"):
            return answers(node)
        raise AssertionError

    return of


def over(node: Node) -> bool:
    """Whether no transfer is under way, nor any page lent for one that has failed."""
    return node.metric("runtime:actor_transfers") == 0 and node.metric("runtime:actor_transfers_ending") == 0


def wheel(module: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(module) is None, reason=f"the package {module} is not installed")


SMOLLM2, DEEPSEEK = "pd-smollm2.toml", "pd-deepseek.toml"
SHM, MOONCAKE, NIXL = (f"transfer.engine={engine}" for engine in ("shm", "mooncake", "nixl"))
ONE_TO_TWO, TWO_TO_ONE = "engine.decode.tp=2", "engine.prefill.tp=2"
MARKS = {MOONCAKE: wheel("mooncake"), NIXL: wheel("nixl_cu12")}
SHORT = [
    (SMOLLM2, SHM),
    (SMOLLM2, ONE_TO_TWO),
    (SMOLLM2, MOONCAKE),
    (DEEPSEEK, SHM),
    (DEEPSEEK, TWO_TO_ONE),
    (DEEPSEEK, NIXL),
]
LONG = [(SMOLLM2, TWO_TO_ONE), (SMOLLM2, NIXL), (DEEPSEEK, ONE_TO_TWO), (DEEPSEEK, MOONCAKE)]


@pytest.mark.parametrize(
    ("topology", "setting"),
    [pytest.param(*way, marks=MARKS.get(way[1], ())) for way in SHORT]
    + [pytest.param(*way, marks=(pytest.mark.slow, *([MARKS[way[1]]] if way[1] in MARKS else []))) for way in LONG],
)
def test_answers_are_those_of_one_engine(
    tmp_path: Path, unified: Callable[[str], list[Any]], topology: str, setting: str
) -> None:
    model = MODEL if topology == SMOLLM2 else "deepseek-v3-tiny"
    for node in start(tmp_path, topology, *DETERMINISTIC, *CHUNKS, setting):
        assert answers(node) == unified(model)
        prefills = partial(node.metric, "runtime:actor_prefills")
        eventually(lambda prefills=prefills: prefills() >= len(PROMPTS), "figures of all prompts")  # type: ignore[misc]
        eventually(partial(over, node), "the end of all transfers")


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """Two engines that prefill, two that decode."""
    chunks = (f"engine.{name}.chunk_tokens=160" for name in ("prefill0", "prefill1"))
    yield from start(tmp_path_factory.mktemp("four"), "pd-smollm2-2p2d.toml", *DETERMINISTIC, *chunks)


def test_all_roles_are_processes(four: Node) -> None:
    roles = {name: each.pid for name, each in four.actors().items()}
    for engine, actor in (("prefill", "kv_sender"), ("decode", "kv_receiver")):
        for number in (0, 1):
            for name in ("rank0", "scheduler", actor):
                assert os.path.exists(f"/proc/{roles[f'{engine}{number}.{name}']}")
    assert len(set(roles.values())) == len(roles)


def test_requests_are_divided_among_the_engines(four: Node, unified: Callable[[str], list[Any]]) -> None:
    assert answers(four) == unified(MODEL)

    def divided() -> bool:
        """Asks again until both of each kind had work: requests that arrive one by one may all go to one."""
        counts = [
            four.metrics(f"runtime:actor_{name}")[f"{engine}{number}.scheduler"]
            for engine, name in (("prefill", "prefills"), ("decode", "transfers_total"))
            for number in (0, 1)
        ]
        if not all(counts):
            answers(four)
        return all(counts)

    eventually(divided, "work for both engines of each kind")


VICTIMS = ["prefill0", "prefill0.kv_sender", "decode0.rank0", "decode0.scheduler"]
OTHERS = ["prefill0.rank0", "prefill0.scheduler", "decode0", "decode0.kv_receiver"]


@pytest.mark.parametrize("victim", VICTIMS + [pytest.param(other, marks=pytest.mark.slow) for other in OTHERS])
def test_a_kill_changes_no_answer(four: Node, unified: Callable[[str], list[Any]], victim: str) -> None:
    before = four.pid(victim)
    assert answers(four, partial(os.kill, before, signal.SIGKILL)) == unified(MODEL)

    def restarted() -> bool:
        after = four.actors().get(victim)
        return after is not None and after.pid not in (None, before) and after.state == "running"

    eventually(restarted, f"the restart of {victim}")


def test_pages_come_back(four: Node) -> None:
    """When nobody is served, no page is lent and none is missing."""
    eventually(lambda: over(four), "the end of all transfers")
    pages = 10_240 // 16
    eventually(
        lambda: {four.metrics("runtime:actor_available_pages")[f"decode{n}.scheduler"] for n in (0, 1)} == {pages},
        "all pages of the decode engines",
    )
