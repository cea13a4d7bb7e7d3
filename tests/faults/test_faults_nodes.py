"""Faults that need a node of their own: while it starts, drains and stops, with two ranks, with messages lost."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import signal
from collections.abc import Callable
from typing import Any

from faults_tools import LOAD, DisturbedNode, assert_unnoticed
from support import eventually

NewNode = Callable[..., DisturbedNode]
QUESTION = {"prompt": "The sea", "max_tokens": 48, "temperature": 0, "ignore_eos": True}


def finish(answer: dict[str, Any]) -> tuple[str, int]:
    return answer["choices"][0]["finish_reason"], answer["usage"]["completion_tokens"]


def test_killed_while_the_node_starts_drains_and_stops(new_node: NewNode) -> None:
    node = new_node("ingress.drain_s=60")
    eventually(node.state, "the control socket")
    for name in ("main.rank0", "main"):
        os.kill(node.pid(name), signal.SIGKILL)
        eventually(lambda name=name: node.actor(name).incarnation == 2 or node.process.poll() is not None)
    node.up()
    assert node.actor("main.rank0").incarnation >= 2

    with concurrent.futures.ThreadPoolExecutor() as pool:
        answer = pool.submit(node.post, "/v1/completions", QUESTION)
        eventually(lambda: node.actor("main.scheduler").stats.get("num_running_reqs"), "the request")
        # The tree stops right to left: the ingress first, which lets running answers end, with all else alive.
        node.process.terminate()
        eventually(lambda: node.state() == "stopping", "the node stopping")
        for name in ("main.rank0", "main.scheduler", "detokenizer"):
            os.kill(node.pid(name), signal.SIGKILL)
        assert finish(answer.result(60)) == ("length", 48)
    assert node.process.wait(60) == 0


def test_a_process_killed_while_the_node_stops_does_not_keep_it(new_node: NewNode) -> None:
    node = new_node("supervision.shutdown_s=30").up()
    scheduler = node.pid("main.scheduler")
    os.kill(node.pid("main.rank0"), signal.SIGSTOP)  # it cannot stop as it is asked to
    node.process.terminate()
    eventually(
        lambda: not os.path.exists(f"/proc/{scheduler}"), "the end of the scheduler, which stops before the ranks"
    )
    assert node.process.wait(60) == 0, "the stopped rank was found by its silence"


def test_exhausted_restart_intensity_ends_the_node_with_one_sentence(new_node: NewNode) -> None:
    node = new_node("supervision.intensity=1").up()
    first = node.pid("tokenizer")
    os.kill(first, signal.SIGSEGV)
    os.kill(eventually(lambda: (pid := node.actor("tokenizer").pid) != first and pid), signal.SIGSEGV)
    assert node.process.wait(60) == 1
    assert node.process.stderr is not None
    (sentence,) = node.process.stderr.read().splitlines()
    assert sentence == (
        "runtime: more than 1 restarts within 10 s, the last because of tokenizer: killed by SIGSEGV "
        f"(log: {node.run_dir}/logs/tokenizer.log)"
    )


def test_one_of_two_ranks_killed(new_node: NewNode) -> None:
    node = new_node("engine.main.threads=1", topology="smollm2-tp2.toml").up()
    load = dataclasses.replace(LOAD, streams=3)
    outcome = node.disturb([(0.5, "main.rank1", "KILL"), (4.0, "main.rank0", "KILL")], load=load)
    assert_unnoticed(outcome)
    assert outcome.restarts["main.rank0"] == outcome.restarts["main.rank1"] == 2, "they restart together"


def test_messages_that_get_lost_or_come_late(new_node: NewNode) -> None:
    node = new_node("faults.drop_rate=0.01", "faults.delay_rate=0.05", "faults.delay_s=0.05", "faults.seed=4").up()
    load = dataclasses.replace(LOAD, tokens=12)
    outcome = node.disturb([(0.5, "main.rank0", "KILL"), (1.5, "main.scheduler", "KILL")], load=load)
    assert_unnoticed(outcome)
    lost = sum(count for name, count in node.figures().items() if name.startswith("runtime:actor_messages_lost"))
    assert lost > 0
