"""Restart types, strategies, intensity and escalation."""

from __future__ import annotations

import os
import re
import signal

import pytest
from supervised_tools import child, nested, steady
from support import eventually

from llm_runtime.supervisors import Backoff, ExitReason


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


ENDS = {"normal": signal.SIGUSR1, "abnormal": signal.SIGUSR2, "killed": signal.SIGKILL}


@pytest.mark.parametrize("end", ENDS)
def test_permanent_is_always_restarted(start_node, end: str):
    node = start_node(steady("a"), steady("b"))
    node.up()
    pid, other = node.running("a", "b")
    os.kill(pid, ENDS[end])
    assert node.running("a", incarnation=2) != [pid]
    assert node.running("b", incarnation=1) == [other]
    last = node.status("a").last_exit
    assert last is not None
    assert last.kind == {"normal": "normal", "abnormal": "error", "killed": "signal"}[end]
    assert node.status("a").restarts == 1


@pytest.mark.parametrize("end", ENDS)
def test_transient_is_restarted_after_an_abnormal_end(start_node, end: str):
    node = start_node(steady("a", restart="transient"))
    node.up()
    (pid,) = node.running("a")
    os.kill(pid, ENDS[end])
    if end == "normal":
        node.in_state("a", "stopped")
        assert node.restart("a") == "", "its specification is kept"
    node.running("a", incarnation=2)


@pytest.mark.parametrize("end", ENDS)
def test_temporary_is_never_restarted_and_forgotten(start_node, end: str):
    node = start_node(steady("a", restart="temporary"), steady("b"))
    node.up()
    (pid,) = node.running("a")
    os.kill(pid, ENDS[end])
    eventually(lambda: not node.known("a"))
    assert node.journal() == ["a 1 run", "b 1 run"]
    assert node.restart("a") == "there is no actor 'a'"


@pytest.mark.parametrize(("restart", "again"), [("permanent", True), ("transient", False)])
def test_shutdown_is_not_an_abnormal_end(start_node, restart: str, again: bool):
    """A supervisor that ends because of a significant child exits with the reason shutdown."""
    significant = steady("a", restart="temporary", significant=True)
    node = start_node(nested("sup", significant, restart=restart, auto_shutdown="any_significant"), steady("b"))
    node.up()
    (pid,) = node.running("a")
    os.kill(pid, signal.SIGUSR1)
    if again:
        assert node.running("a", incarnation=2) != [pid]
    else:
        node.in_state("sup", "stopped")
    last = node.status("sup").last_exit
    assert last is not None
    assert (last.kind, last.code, last.text) == ("shutdown", 0, "significant child a has ended")


def test_exit_code_and_exception_are_told(start_node):
    node = start_node(child("a", "Exiting", restart="transient"))
    node.up()
    (node.run_dir / "a.exit").touch()
    (event,) = eventually(lambda: node.events("exit", "a")[:1])
    assert event.text == "exit code 7"


def test_one_for_all_restarts_all_with_the_same_new_incarnation(start_node):
    node = start_node(nested("sup", steady("a"), steady("b"), steady("c"), strategy="one_for_all"), steady("z"))
    node.up()
    (_, b, _, z) = node.running("a", "b", "c", "z")
    # one of them has been started more often than the others
    assert node.terminate("b") == ""
    assert node.restart("b") == ""
    (b,) = node.running("b", incarnation=2)
    before = len(node.journal())
    kill(b)
    node.running("a", "b", "c", incarnation=3)
    assert node.journal()[before:] == ["c 1 stop", "a 1 stop", "a 3 run", "b 3 run", "c 3 run"]
    assert node.running("z", incarnation=1) == [z]


def test_rest_for_one_restarts_those_to_the_right(start_node):
    node = start_node(steady("a"), steady("b"), steady("c"), steady("d"), strategy="rest_for_one")
    node.up()
    a, b = node.running("a", "b")
    kill(b)
    node.running("b", "c", "d", incarnation=2)
    assert node.running("a", incarnation=1) == [a]
    assert node.journal()[4:] == ["d 1 stop", "c 1 stop", "b 2 run", "c 2 run", "d 2 run"]


@pytest.mark.parametrize("strategy", ["one_for_all", "rest_for_one"])
def test_temporary_bystander_is_stopped_and_forgotten(start_node, strategy: str):
    node = start_node(steady("a"), steady("t", restart="temporary"), steady("b"), strategy=strategy)
    node.up()
    kill(node.running("a")[0])
    node.running("a", "b", incarnation=2)
    assert not node.known("t")
    assert node.journal()[3:] == ["b 1 stop", "t 1 stop", "a 2 run", "b 2 run"]


def test_rest_for_one_another_child_fails_during_restart(start_node):
    node = start_node(steady("a"), steady("b"), steady("c"), strategy="rest_for_one")
    node.up()
    (node.run_dir / "b.broken").touch()
    kill(node.running("a")[0])
    eventually(lambda: len(node.events("exit", "b")) >= 3, "two failed restarts")
    (node.run_dir / "b.broken").unlink()
    node.running("b", "c")
    node.running("a", incarnation=2)  # to the left of the one that failed, so left alone
    assert node.journal().count("c 2 run") == 1
    assert not any(line.startswith("c 3") for line in node.journal())


def test_one_for_all_another_child_fails_during_restart(start_node):
    node = start_node(steady("a"), steady("b"), strategy="one_for_all")
    node.up()
    (node.run_dir / "b.broken").touch()
    kill(node.running("a")[0])
    eventually(lambda: len(node.events("exit", "b")) >= 3, "two failed restarts")
    (node.run_dir / "b.broken").unlink()
    node.running("a", "b")
    a, b = node.status("a").incarnation, node.status("b").incarnation
    assert a == b > 3


def test_group_member_killed_while_the_group_stops(start_node):
    slow = child("a", "Stubborn", shutdown="infinity")
    node = start_node(slow, steady("b"), steady("c"), strategy="one_for_all")
    node.up()
    (node.run_dir / "b.hang").touch()
    kill(node.running("c")[0])
    eventually(lambda: "a 1 asked" in node.journal())
    kill(node.status("a").pid)
    eventually(lambda: "b 2 run" in node.journal())
    kill(node.in_state("b", "starting").pid)
    (node.run_dir / "b.hang").unlink()
    (node.run_dir / "a.let_go").touch()
    node.running("a", "b", "c")
    assert len({node.status(id).incarnation for id in "abc"}) == 1


def test_multiple_restarts(start_node):
    node = start_node(steady("a"), backoff=Backoff(stable_ms=0))
    node.up()
    for incarnation in range(1, 11):
        kill(node.running("a", incarnation=incarnation)[0])
    node.running("a", incarnation=11)
    assert node.status("a").restarts == 10


def test_escalation_one_for_one(start_node):
    node = start_node(steady("a"), steady("b"), intensity=2, period_s=60.0)
    node.up()
    node.everything()
    for incarnation in (1, 2, 3):
        kill(node.running("a", incarnation=incarnation)[0])
    result = node.ended()
    assert not result.ok
    assert result.text == "more than 2 restarts within 60 s, the last because of a: killed by SIGKILL"
    assert result.culprit is not None
    assert (result.culprit.id, result.culprit.reason.signal) == ("a", "SIGKILL")
    assert node.journal()[-1] == "b 1 stop"


@pytest.mark.parametrize("strategy", ["one_for_one", "one_for_all", "rest_for_one"])
def test_escalation_reaches_the_parent_which_restarts_the_subtree(start_node, strategy: str):
    inner = nested("sup", steady("a"), steady("b"), strategy=strategy, intensity=1, period_s=60.0)
    node = start_node(inner, steady("z"))
    node.up()
    (z,) = node.running("z")
    kill(node.running("a", incarnation=1)[0])
    kill(node.running("a", incarnation=2)[0])
    node.running("a", incarnation=3)
    node.running("sup", incarnation=2)
    assert node.running("z", incarnation=1) == [z]
    last: ExitReason | None = node.status("sup").last_exit
    assert last is not None
    assert last.kind == "error"
    assert last.text == "more than 1 restarts within 60 s, the last because of a: killed by SIGKILL"


def test_escalation_through_to_the_root_names_the_actor(start_node):
    inner = nested("sup", steady("a"), intensity=0, period_s=60.0)
    node = start_node(inner, intensity=0, period_s=60.0)
    node.up()
    kill(node.running("a")[0])
    result = node.ended()
    assert result.culprit is not None
    assert result.culprit.id == "a"
    assert result.culprit.log == str(node.run_dir / "logs" / "a.log")


def test_backoff_first_restart_is_immediate_and_later_ones_wait(start_node):
    node = start_node(steady("a"), backoff=Backoff(base_ms=30, jitter=0.0, stable_ms=60_000))
    node.up()
    for incarnation in (1, 2, 3, 4):
        kill(node.running("a", incarnation=incarnation)[0])
    node.running("a", incarnation=5)
    told = [re.fullmatch(r"starts again in (\d\.\d\d) s", event.text) for event in node.events("backoff")]
    waits = [float(match[1]) for match in told if match]
    assert len(waits) == len(told) == 3
    for wait, least, most in zip(waits, (0.0, 0.03, 0.06), (0.03, 0.06, 0.12), strict=True):
        assert least <= wait <= most, "what is left of it when it is told"
    exits = [event.when for event in node.events("exit")]
    starts = [event.when for event in node.events("starting")][2:]
    gaps = [start - end for start, end in zip(starts, exits[1:], strict=True)]
    assert all(gap >= least for gap, least in zip(gaps, (0.029, 0.059, 0.119), strict=True))


def test_backoff_gives_up_a_child_that_never_starts_again(start_node):
    node = start_node(steady("a"), backoff=Backoff(base_ms=1, cap_ms=5, give_up_after=4))
    node.up()
    (node.run_dir / "a.broken").touch()
    kill(node.running("a")[0])
    result = node.ended()
    assert result.text == "a crashed 5 times in a row: it is broken"


def test_hanging_restart_loop_does_not_block_commands(start_node):
    node = start_node(steady("a"), steady("b"), backoff=Backoff(base_ms=1, cap_ms=20), intensity=1000)
    node.up()
    (node.run_dir / "a.broken").touch()
    kill(node.running("a")[0])
    eventually(lambda: len(node.events("exit", "a")) > 3, "a restart loop")
    assert node.restart("b") == ""
    assert node.start(steady("c")) == ""
    assert node.count().workers == 3
    assert node.terminate("a") == ""
    exits = len(node.events("exit", "a"))
    assert node.status("a").state == "stopped"
    assert node.terminate("c") == ""
    assert len(node.events("exit", "a")) == exits
    (node.run_dir / "a.broken").unlink()
    (node.run_dir / "a.hang").touch()
    node.send("restart", "a")
    eventually(lambda: node.events("starting", "a")[-1].incarnation > exits)
    node.send("terminate", "a")  # answers both: the restart that came to nothing, and itself
    assert {node.answer().error, node.answer().error} == {"a was stopped", ""}
