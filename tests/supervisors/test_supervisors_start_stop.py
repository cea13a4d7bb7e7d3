"""How children start and stop: OTP's start returns, shutdown values, and the order of both."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from supervised_tools import alive, child, nested, steady
from support import eventually

from llm_runtime.supervisors import read_crashes


def test_start_normal_left_to_right_and_stop_right_to_left(start_node):
    node = start_node(steady("a"), nested("sup", steady("b"), steady("c")), steady("d"))
    tree = node.up()
    assert [n.name for n in tree.walk()] == ["root", "a", "sup", "b", "c", "d"]
    assert {n.state for n in tree.walk()} == {"running"}
    assert all(n.pid and alive(n.pid) and n.rss_bytes > 1_000_000 and n.incarnation == 1 for n in tree.walk())
    assert len({n.pid for n in tree.walk()}) == 6
    node.everything()
    result = node.shutdown()
    assert result.ok
    assert node.journal() == [f"{id} 1 run" for id in "abcd"] + [f"{id} 1 stop" for id in "dcba"]
    stops = {event.id: event.text for event in node.events("exit")}
    assert stops == dict.fromkeys(("a", "b", "c", "d", "sup"), "stopped as asked")


def test_start_waits_for_ready(start_node):
    node = start_node(steady("a"), steady("b"), files=["a.hang"])
    eventually(lambda: node.journal() == ["a 1 run"])
    tree = node.tree()
    assert (tree.state, [c.state for c in tree.children]) == ("starting", ["starting", "stopped"])


def test_start_ignore(start_node):
    node = start_node(child("a", "Ignoring"), steady("b"), child("c", "Ignoring", restart="temporary"))
    tree = node.up()
    assert [(c.name, c.state, c.pid is None) for c in tree.children] == [
        ("a", "stopped", True),
        ("b", "running", False),
    ]
    assert [event.text for event in node.events("ignored", "a")] == ["nothing to do here"]
    assert node.journal() == ["a 1 ignore", "b 1 run", "c 1 ignore"]


def test_start_fail_stops_the_tree_with_the_sentence(start_node):
    node = start_node(steady("a"), child("b", "Failing"), steady("c"))
    result = node.ended()
    sentence = "the model file is missing; fetch it with `make model`"
    assert not result.ok
    assert result.text == f"b could not start: {sentence}"
    assert result.culprit is not None
    assert (result.culprit.id, result.culprit.reason.text) == ("b", sentence)
    assert result.culprit.log == str(node.run_dir / "logs" / "b.log")
    assert node.journal() == ["a 1 run", "a 1 stop"]


def test_start_fail_below_names_the_actor(start_node):
    node = start_node(steady("a"), nested("sup", steady("b"), nested("inner", child("c", "Failing"))))
    result = node.ended()
    assert not result.ok
    assert result.text.startswith("sup could not start: inner could not start: c could not start: the model file")
    assert result.culprit is not None
    assert result.culprit.id == "c"
    assert node.journal() == ["a 1 run", "b 1 run", "b 1 stop", "a 1 stop"]


def test_start_error_of_an_exception(start_node):
    node = start_node(child("a", "Raising"))
    result = node.ended()
    assert result.text == "a could not start: ZeroDivisionError: integer division or modulo by zero"
    assert result.culprit is not None
    assert "1 // context.args" in result.culprit.reason.traceback
    assert len(read_crashes(node.run_dir, "a")) == 1, "it was tried once"


def test_start_error_of_returning_too_early(start_node):
    result = start_node(child("a", "Quitting")).ended()
    assert result.text == "a could not start: ended with exit code 0 before it was ready"


def test_start_error_of_a_missing_class(start_node):
    result = start_node(child("a", "NoSuchClass")).ended()
    assert result.text == "a could not start: AttributeError: module 'supervised' has no attribute 'NoSuchClass'"


def test_start_timeout(start_node):
    node = start_node(steady("a", start_timeout_ms=300), files=["a.hang"])
    result = node.ended()
    assert result.text == "a could not start: was not ready within 0.3 s"
    assert result.culprit is not None
    assert result.culprit.reason.kind == "start_timeout"


def test_stop_while_starting(start_node):
    node = start_node(steady("a"), nested("sup", steady("b"), steady("c")), files=["c.hang"])
    eventually(lambda: "c 1 run" in node.journal())
    node.everything()
    result = node.shutdown()
    assert result.ok
    assert node.journal()[-2:] == ["b 1 stop", "a 1 stop"]


def test_shutdown_timeout_kills(start_node):
    node = start_node(child("a", "Stubborn", shutdown=200))
    node.up()
    assert node.terminate("a") == ""
    last = node.status("a").last_exit
    assert last is not None
    assert (last.kind, last.signal, last.text) == ("killed", "SIGKILL", "did not stop within 0.2 s")
    assert node.journal() == ["a 1 run", "a 1 asked"]


def test_shutdown_infinity_waits(start_node):
    node = start_node(child("a", "Stubborn", shutdown="infinity"))
    node.up()
    node.send("terminate", "a")
    eventually(lambda: "a 1 asked" in node.journal())
    (node.run_dir / "a.let_go").touch()
    assert node.answer().error == ""
    last = node.status("a").last_exit
    assert last is not None
    assert last.kind == "shutdown"
    assert node.journal()[-1] == "a 1 stop"


def test_shutdown_brutal_kill(start_node):
    node = start_node(steady("a", shutdown="brutal_kill"))
    node.up()
    assert node.terminate("a") == ""
    last = node.status("a").last_exit
    assert last is not None
    assert (last.kind, last.signal) == ("killed", "SIGKILL")
    assert node.journal() == ["a 1 run"], "it was not asked to stop"


def test_sigterm_stops_in_order_and_a_second_sigint_kills(start_node):
    node = start_node(steady("a"), steady("b"))
    node.up()
    node.everything()
    node.process.terminate()
    assert node.ended().ok
    assert node.journal()[2:] == ["b 1 stop", "a 1 stop"]

    stuck = start_node(steady("a"), nested("sup", child("b", "Stubborn", shutdown="infinity")))
    stuck.up()
    stuck.everything()
    stuck.process.send_signal(signal.SIGINT)
    eventually(lambda: "b 1 asked" in stuck.journal())
    stuck.process.send_signal(signal.SIGINT)
    assert stuck.ended().ok
    assert "a 1 stop" not in stuck.journal()


def test_child_starts_clean(start_node, tmp_path: Path):
    """Own session, default signals, no descriptor but its own, output in its log."""
    (tmp_path / "data").write_text("content")
    fd = os.open(tmp_path / "data", os.O_RDONLY)
    other = os.open(tmp_path / "data", os.O_RDONLY)
    spec = child("a", "Environment", descriptors=("file",))
    node = start_node(nested("sup", spec), descriptors={"file": fd, "other": other})
    node.up()
    os.close(fd)
    os.close(other)
    log = node.run_dir / "logs" / "a.log"
    # standard streams, the link, the shutdown event, "file"
    expected = ["session True", "descriptors ['file'] b'content'", "open 6", "sigterm True"]
    assert node.journal() == [f"a 1 {line}" for line in expected]
    assert eventually(log.read_text) == "a line on standard output\n"
    (pid,) = node.running("a")
    assert Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0") == b"runtime: a"


def test_log_is_rotated_at_start(start_node):
    node = start_node(
        child("a", "Environment", descriptors=("file",)), descriptors={"file": os.open(os.devnull, os.O_RDONLY)}
    )
    node.up()
    log = node.run_dir / "logs" / "a.log"
    assert node.terminate("a") == ""
    with log.open("ab") as file:
        file.truncate(17 << 20)
    assert node.restart("a") == ""
    assert log.with_name("a.log.1").stat().st_size == 17 << 20
    assert log.read_text() == "a line on standard output\n"


def test_killed_while_others_to_its_right_stop_is_started_again(start_node):
    """What still stops may need it: an HTTP server that finishes its answers needs the engine."""
    node = start_node(steady("a"), child("b", "Stubborn", shutdown="infinity"))
    node.up()
    assert node.ask("shutdown").error == ""
    eventually(lambda: "b 1 asked" in node.journal())
    os.kill(node.running("a")[0], signal.SIGKILL)
    node.running("a", incarnation=2)
    (node.run_dir / "b.let_go").touch()
    assert node.ended().ok
    assert node.journal() == ["a 1 run", "b 1 run", "b 1 asked", "a 2 run", "b 1 stop", "a 2 stop"]
