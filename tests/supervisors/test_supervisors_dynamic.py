"""Children added, stopped, restarted and forgotten at run time; what can be asked; automatic shutdown."""

from __future__ import annotations

import os
import signal

import pytest
from supervised_tools import child, nested, steady
from support import eventually

from llm_runtime.supervisors import ChildCounts, ChildInfo, ChildInstance


def test_child_added_terminated_restarted_deleted(start_node):
    node = start_node(steady("a"))
    node.up()
    assert node.start(steady("b")) == ""
    assert node.start(steady("b")) == "b is started already"
    assert [info.id for info in node.which()] == ["a", "b"]
    assert node.delete("b") == "cannot delete b, which is running: terminate it first"
    assert node.terminate("b") == ""
    assert node.terminate("b") == ""
    assert node.start(steady("b")) == "b is present already: restart it, or delete it first"
    assert node.restart("b") == ""
    assert node.status("b").incarnation == 2
    assert node.terminate("b") == ""
    assert node.delete("b") == ""
    assert node.delete("b") == "there is no actor 'b'"
    assert node.start(steady("b")) == ""
    assert node.status("b").incarnation == 3, "incarnations outlive the specification"


def test_added_child_that_cannot_start_is_forgotten(start_node):
    node = start_node(steady("a"))
    node.up()
    assert node.start(child("b", "Failing")).startswith("b could not start: the model file is missing")
    assert node.start(child("c", "Ignoring")) == ""
    assert node.status("c").state == "stopped"
    assert node.start(child("d", "Ignoring", restart="temporary")) == ""
    assert not node.known("d")
    assert node.start(child("e", "Steady", shutdown=-1)).startswith("child 'e': shutdown is -1 ms")
    assert node.start(steady("f", descriptors=("weights",))).endswith("has no descriptor named 'weights'")
    assert [info.id for info in node.which()] == ["a", "c"]
    assert node.tree().state == "running"


def test_restart_of_a_stopped_child_that_fails_leaves_it_stopped(start_node):
    node = start_node(steady("a"))
    node.up()
    assert node.terminate("a") == ""
    (node.run_dir / "a.broken").touch()
    assert node.restart("a") == "a could not start: it is broken"
    assert node.status("a").state == "failed"
    (node.run_dir / "a.broken").unlink()
    assert node.restart("a") == ""


@pytest.mark.parametrize("graceful", [True, False])
def test_restart_of_a_running_child(start_node, graceful: bool):
    node = start_node(steady("a"), steady("b"), intensity=0)
    node.up()
    (b,) = node.running("b")
    assert node.restart("a", graceful=graceful) == ""
    node.running("a", incarnation=2)
    assert node.running("b", incarnation=1) == [b]
    assert ("a 1 stop" in node.journal()) is graceful


def test_restart_of_a_group_member_takes_the_group(start_node):
    node = start_node(nested("sup", steady("a"), steady("b"), strategy="one_for_all"), intensity=0)
    node.up()
    assert node.restart("a") == ""
    node.running("a", "b", incarnation=2)


def test_commands_reach_grandchildren(start_node):
    node = start_node(nested("sup", nested("inner", steady("a"))), steady("b"))
    node.up()
    (a,) = node.running("a")
    assert node.restart("a") == ""
    assert node.running("a", incarnation=2) != [a]
    assert node.ask("signal", "a", signum=signal.SIGKILL).error == ""
    node.running("a", incarnation=3)
    assert node.terminate("a") == ""
    assert node.status("a").state == "stopped"
    assert node.ask("signal", "a", signum=signal.SIGKILL).error == "a has no process"
    assert node.delete("a") == ""
    assert node.start(steady("c"), under="inner") == ""
    assert [info.id for info in node.which("inner")] == ["c"]
    assert node.start(steady("b"), under="inner") == "the id 'b' is taken by another actor of the tree"
    assert node.start(steady("d"), under="nobody") == "there is no supervisor 'nobody'"
    assert node.terminate("sup") == ""
    assert node.restart("c") == "sup is stopped; try again when it runs"


def test_command_is_answered_when_the_supervisor_below_dies(start_node):
    node = start_node(nested("sup", child("a", "Stubborn", shutdown="infinity")))
    node.up()
    node.send("terminate", "a")
    eventually(lambda: "a 1 asked" in node.journal())
    os.kill(_pid(node, "sup"), signal.SIGKILL)
    assert node.answer().error == "sup ended before it could answer; try again"


def _pid(node, id: str) -> int:
    return next(event.pid for event in node.events("ready", id))


def test_which_and_count_children(start_node):
    node = start_node(steady("a"), nested("sup", steady("b"), steady("c")), child("d", "Ignoring"))
    node.up()
    a, sup = node.running("a", "sup")
    assert node.which() == [
        ChildInfo(id="a", pid=a, state="running", type="worker"),
        ChildInfo(id="sup", pid=sup, state="running", type="supervisor"),
        ChildInfo(id="d", pid=None, state="stopped", type="worker"),
    ]
    assert node.count() == ChildCounts(specs=3, active=2, supervisors=1, workers=2)
    assert node.count("sup") == ChildCounts(specs=2, active=2, supervisors=0, workers=2)


def test_status_shows_stats_role_and_cpu(start_node):
    node = start_node(nested("sup", steady("a", role="worker bee", args={"stats": {"queue": 3}})))
    node.up()
    eventually(lambda: node.status("a").stats.get("queue") == 3)
    status = node.status("a")
    assert status.role == "worker bee"
    assert status.stats["generation"] == 1, "the incarnation of its supervisor"
    assert status.uptime_s > 0
    assert 0 <= status.cpu_percent <= 200


def test_simple_one_for_one(start_node):
    template = steady("template", restart="transient", args={"stats": {"shared": 1}})
    node = start_node(nested("pool", template, strategy="simple_one_for_one"), steady("z"))
    node.up()
    assert node.which("pool") == []
    for id in ("w1", "w2", "w3"):
        assert node.start(ChildInstance(id=id), under="pool") == ""
    assert node.start(ChildInstance(id="w1"), under="pool") == "w1 is started already"
    assert node.start(steady("w4"), under="pool").endswith("a simple_one_for_one supervisor takes a ChildInstance")
    eventually(lambda: node.status("w2").stats.get("shared") == 1)
    os.kill(node.running("w1")[0], signal.SIGKILL)
    node.running("w1", incarnation=2)
    os.kill(node.running("w2")[0], signal.SIGUSR1)
    eventually(lambda: not node.known("w2"))
    assert node.delete("w3") == "cannot delete w3: terminate it, a dynamic child is then forgotten"
    assert node.terminate("w3") == ""
    assert not node.known("w3")
    assert node.shutdown().ok
    assert "w1 2 stop" in node.journal()


def test_simple_one_for_one_stops_all_at_once(start_node):
    template = child("template", "Stubborn", shutdown="infinity")
    node = start_node(template, strategy="simple_one_for_one")
    node.up()
    for id in ("w1", "w2"):
        assert node.start(ChildInstance(id=id)) == ""
    node.send("shutdown")
    eventually(lambda: {"w1 1 asked", "w2 1 asked"} <= set(node.journal()))
    for id in ("w1", "w2"):
        (node.run_dir / f"{id}.let_go").touch()
    assert node.ended().ok


def test_auto_shutdown_any_significant(start_node):
    children = [steady(id, restart="transient", significant=True) for id in ("a", "b")]
    node = start_node(*children, steady("z"), auto_shutdown="any_significant")
    node.up()
    os.kill(node.running("a")[0], signal.SIGKILL)  # abnormal: restarted, which is not its end
    os.kill(node.running("a", incarnation=2)[0], signal.SIGUSR1)
    result = node.ended()
    assert result.ok
    assert result.text == "significant child a has ended"
    assert node.journal()[-2:] == ["z 1 stop", "b 1 stop"]


def test_auto_shutdown_all_significant(start_node):
    children = [steady(id, restart="temporary", significant=True) for id in ("a", "b")]
    node = start_node(*children, steady("z"), auto_shutdown="all_significant")
    node.up()
    os.kill(node.running("a")[0], signal.SIGKILL)
    eventually(lambda: not node.known("a"))
    assert node.tree().state == "running"
    os.kill(node.running("z")[0], signal.SIGUSR1)
    node.running("z", incarnation=2)
    os.kill(node.running("b")[0], signal.SIGUSR1)
    assert node.ended().text == "significant child b has ended"


def test_auto_shutdown_not_by_terminate(start_node):
    node = start_node(steady("a", restart="transient", significant=True), steady("b"), auto_shutdown="any_significant")
    node.up()
    assert node.terminate("a") == ""
    assert node.tree().state == "running"
