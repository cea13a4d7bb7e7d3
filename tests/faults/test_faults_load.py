"""Processes are killed under load: no client may notice anything but a pause. One node for all, disturbed in turn."""

from __future__ import annotations

import dataclasses

from faults_tools import LOAD, DisturbedNode, assert_unnoticed

from llm_runtime.runtime.chaos.inject import Plan

EVERY_ACTOR = (
    "tokenizer",
    "detokenizer",
    "main.grammar",
    "main.scheduler",
    "main.rank0",
    "bootstrap",
    "main.ranks",
    "main",
)


def test_every_actor_killed_in_turn(node: DisturbedNode) -> None:
    signals = ("KILL", "SEGV", "ABRT")
    schedule = [(0.5 + 0.8 * turn, name, signals[turn % 3]) for turn, name in enumerate(EVERY_ACTOR)]
    outcome = node.disturb(schedule)
    assert_unnoticed(outcome)
    assert {fault.actor for fault in outcome.faults} == set(EVERY_ACTOR)
    assert all(outcome.restarts[name] >= 1 for name in EVERY_ACTOR)


def test_rank_and_scheduler_killed_within_50_ms(node: DisturbedNode) -> None:
    outcome = node.disturb(
        [
            (0.5, "main.rank0", "KILL"),
            (0.52, "main.scheduler", "KILL"),
            (2.0, "main.scheduler", "KILL"),
            (2.01, "main.rank0", "KILL"),
        ]
    )
    assert_unnoticed(outcome)
    assert outcome.restarts["main.rank0"] == outcome.restarts["main.scheduler"] == 2


def test_two_at_a_time_and_killed_again_while_starting(node: DisturbedNode) -> None:
    outcome = node.disturb(plan=Plan(every_s=1.0, duration_s=0.0, kills=6, double=True, seed=3))
    assert_unnoticed(outcome)
    assert sum(fault.double for fault in outcome.faults) >= 4


def test_stopped_rank_and_scheduler_are_found_within_the_deadline(node: DisturbedNode) -> None:
    outcome = node.disturb([(0.5, "main.rank0", "STOP"), (3.5, "main.scheduler", "STOP")])
    assert_unnoticed(outcome)
    for name in ("main.rank0", "main.scheduler"):
        assert outcome.restarts[name] >= 1
        last = node.actor(name).last_exit
        assert last is not None
        assert last.text == "no sign of life for 1.5 s"


def test_killed_while_the_kv_pool_is_short_of_pages(node: DisturbedNode) -> None:
    load = dataclasses.replace(LOAD, streams=12, tokens=32, long_words=30)
    schedule = [(1.0, "main.scheduler", "KILL"), (2.5, "main.rank0", "KILL"), (4.0, "main", "KILL")]
    outcome = node.disturb(schedule, load=load)
    assert_unnoticed(outcome)  # twelve requests want more than the pool's 640 tokens
