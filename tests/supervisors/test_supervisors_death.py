"""What survives when supervisors, zygotes and roots die, and how a hung actor is found."""

from __future__ import annotations

import os
import random
import signal
import socket

import psutil
import pytest
from supervised_tools import alive, child, nested, steady
from support import eventually

from llm_runtime.supervisors import Backoff, read_crashes


def zygotes(node) -> dict[str, int]:
    """Title to pid."""
    processes = [psutil.Process(pid) for pid in node.everything()]
    titles = {" ".join(process.cmdline()).rstrip("\0 "): process.pid for process in processes}
    return {title: pid for title, pid in titles.items() if "zygote" in title}


def test_supervisor_killed_restarts_its_subtree(start_node):
    node = start_node(nested("sup", steady("a"), nested("inner", steady("b"))), steady("z"))
    node.up()
    sup, a, inner, b, z = node.running("sup", "a", "inner", "b", "z")
    below = {process.pid for process in psutil.Process(sup).children(recursive=True)}
    assert {a, inner, b} < below
    os.kill(sup, signal.SIGKILL)
    node.running("sup", "a", "inner", "b", incarnation=2)
    eventually(lambda: not any(alive(pid) for pid in below), "the end of the old subtree")
    assert node.running("z", incarnation=1) == [z]
    assert node.status("b").stats.get("generation", 2) == 2
    node.everything()


def test_root_killed_nobody_survives(start_node):
    node = start_node(nested("sup", steady("a"), nested("inner", steady("b"))), steady("z"))
    node.up()
    everything = node.everything()
    assert len(everything) == 5 + 3, "actors and zygotes"
    for id in ("z", "b"):  # these cannot notice that their link is closed
        os.kill(node.running(id)[0], signal.SIGSTOP)
    node.process.kill()
    node.process.wait()
    eventually(lambda: not any(alive(pid) for pid in everything), "the end of all")


def test_root_killed_while_starting_nobody_survives(start_node):
    node = start_node(steady("a"), steady("b"), files=["b.hang"])
    eventually(lambda: "b 1 run" in node.journal())
    everything = node.everything()
    node.process.kill()
    node.process.wait()
    eventually(lambda: not any(alive(pid) for pid in everything), "the end of all")


def test_processes_started_by_an_actor_die_with_it(start_node):
    node = start_node(child("a", "Parent"))
    node.up()
    helper = int(node.journal()[0].split()[-1])
    assert alive(helper)
    os.kill(node.running("a")[0], signal.SIGKILL)
    node.running("a", incarnation=2)
    eventually(lambda: not alive(helper), "the end of the helper")
    helper = int(node.journal()[-1].split()[-1])
    assert node.terminate("a") == ""
    eventually(lambda: not alive(helper), "the end of the second helper")


@pytest.mark.parametrize("files", [(), ("threads",)], ids=["by a fork", "by a fresh interpreter"])
def test_zygote_lost_is_replaced(start_node, files: tuple[str, ...]):
    node = start_node(steady("a"), nested("sup", steady("b")), files=files)
    node.up()
    a, b = node.running("a", "b")
    before = zygotes(node)
    assert set(before) == {"runtime: zygote of root", "runtime: zygote of sup"}
    for pid in before.values():
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: len(node.events("zygote")) == 2)
    assert node.running("a", "b") == [a, b], "its children live on"
    os.kill(a, signal.SIGKILL)
    os.kill(b, signal.SIGKILL)
    node.running("a", "b", incarnation=2)
    assert node.tree().state == "running"
    eventually(lambda: set(zygotes(node)) == set(before))
    assert not set(zygotes(node).values()) & set(before.values())


def test_zygote_killed_with_a_start_under_way(start_node):
    node = start_node(steady("a"))
    node.up()
    (zygote,) = zygotes(node).values()
    os.kill(zygote, signal.SIGSTOP)
    os.kill(node.running("a")[0], signal.SIGKILL)
    node.in_state("a", "starting")
    os.kill(zygote, signal.SIGKILL)
    node.running("a", incarnation=2)
    assert node.journal() == ["a 1 run", "a 2 run"], "it was started once"


def test_hung_by_sigstop_is_killed_and_restarted(start_node):
    node = start_node(steady("a", heartbeat_timeout_ms=300), steady("b"))
    node.up()
    a, b = node.running("a", "b")
    os.kill(a, signal.SIGSTOP)
    node.running("a", incarnation=2)
    last = node.status("a").last_exit
    assert last is not None
    assert (last.kind, last.signal, last.text) == ("hung", "SIGKILL", "no sign of life for 0.3 s")
    assert node.running("b", incarnation=1) == [b]


def test_stopped_while_starting_is_killed_and_restarted(start_node):
    node = start_node(steady("a", heartbeat_timeout_ms=300))
    node.up()
    hang = node.run_dir / "a.hang"
    hang.touch()
    os.kill(node.running("a")[0], signal.SIGKILL)
    eventually(lambda: "a 2 run" in node.journal())
    stopped = node.status("a").pid
    assert stopped is not None
    os.kill(stopped, signal.SIGSTOP)
    hang.unlink()
    node.running("a", incarnation=3)
    assert [exit_.text for exit_ in node.events("exit", "a")] == ["killed by SIGKILL", "no sign of life for 0.3 s"]


def test_hung_supervisor_is_killed_and_its_subtree_restarted(start_node):
    node = start_node(nested("sup", steady("a"), heartbeat_timeout_ms=300))
    node.up()
    os.kill(node.running("sup")[0], signal.SIGSTOP)
    node.running("sup", "a", incarnation=2)
    last = node.status("sup").last_exit
    assert last is not None
    assert last.kind == "hung"


def test_stuck_main_loop_is_killed_past_its_limit(start_node):
    stuck = child("a", "Stuck", args={"what": "step 7", "limit_s": 0.3}, heartbeat_timeout_ms=400, restart="transient")
    node = start_node(stuck, backoff=Backoff(base_ms=60_000))
    node.up()
    event = eventually(lambda: node.events("exit", "a"))[0]
    assert event.text.startswith("at 'step 7' for 0.")
    assert event.text.endswith("its limit is 0.3 s")
    (report, *_) = eventually(lambda: read_crashes(node.run_dir, "a"), "the report, which is written after the event")
    assert (report.reason.kind, report.doing) == ("hung", "step 7")


def test_busy_one_is_left_alone(start_node):
    busy = child("a", "Stuck", args={"what": "prefill", "limit_s": 30.0}, heartbeat_timeout_ms=200)
    node = start_node(busy)
    node.up()
    # busy for many times the heartbeat timeout
    eventually(lambda: node.status("a").doing_s > 1.0)
    assert node.status("a").doing == "prefill"
    assert node.status("a").incarnation == 1


def test_crash_report_contents(start_node):
    node = start_node(steady("a"), nested("sup", steady("b")), backoff=Backoff(stable_ms=0))
    node.up()
    (pid,) = node.running("b")
    os.kill(pid, signal.SIGUSR2)
    node.running("b", incarnation=2)
    (report,) = read_crashes(node.run_dir, "b")
    assert (report.id, report.pid, report.incarnation) == ("b", pid, 1)
    assert report.uptime_s > 0
    reason = report.reason
    assert (reason.kind, reason.code, reason.signal, reason.text) == ("error", 1, "", "RuntimeError: told to crash")
    assert reason.when > 1_600_000_000
    assert reason.traceback.startswith("Traceback (most recent call last):")
    assert 'raise RuntimeError("told to crash")' in reason.traceback
    assert reason.log_tail[-1] == "RuntimeError: told to crash"

    for incarnation in range(1, 13):  # the report of a kill, and no more than ten of them
        os.kill(node.running("a", incarnation=incarnation)[0], signal.SIGKILL)
    node.running("a", incarnation=13)
    reports = read_crashes(node.run_dir, "a")
    assert [report.incarnation for report in reports] == list(range(3, 13))
    assert {(report.reason.kind, report.reason.code, report.reason.signal) for report in reports} == {
        ("signal", None, "SIGKILL")
    }


def test_orderly_stops_leave_no_crash_report(start_node):
    node = start_node(steady("a"))
    node.up()
    assert node.restart("a") == ""
    assert node.shutdown().ok
    assert read_crashes(node.run_dir, "a") == []


def talk(client: socket.socket, text: bytes) -> bytes:
    client.sendall(text)
    return client.recv(100)


@pytest.mark.parametrize("killed", ["a", "inner", "sup"])
def test_stored_descriptors_survive_the_actor_and_its_supervisors(start_node, killed: str):
    client, server = socket.socketpair()
    client.settimeout(20)
    storer = child("a", "Storer", descriptors=("client",))
    node = start_node(nested("sup", nested("inner", storer)), descriptors={"client": server.fileno()})
    node.up()
    server.close()
    assert talk(client, b"hello") == b"1:hello"
    before = node.ask("fds").value
    client.sendall(b"many")
    eventually(lambda: node.ask("fds").value == before + 300)  # up to the root, whose death nothing survives
    for incarnation in (2, 3):
        os.kill(node.running(killed)[0], signal.SIGKILL)
        node.running("a", incarnation=incarnation)
        assert talk(client, b"again") == b"%d:again" % incarnation
    found = [line for line in node.journal() if line.startswith("a 3 found")]
    assert sum(line == "a 3 found client first" for line in found) == 1
    assert sum(line.endswith(" copy") for line in found) == 300


def test_removed_descriptor_is_closed_above(start_node):
    client, server = socket.socketpair()
    client.settimeout(20)
    storer = child("a", "Storer", descriptors=("client",))
    node = start_node(nested("sup", storer), descriptors={"client": server.fileno()})
    server.close()
    node.up()
    before = node.ask("fds").value
    client.sendall(b"remove")
    eventually(lambda: "a 1 removed" in node.journal())
    eventually(lambda: node.ask("fds").value == before - 1)
    os.kill(node.running("a")[0], signal.SIGKILL)
    node.running("a", incarnation=2)
    assert not [line for line in node.journal() if "found" in line]


def test_stored_descriptors_are_closed_when_the_actor_is_stopped(start_node):
    client, server = socket.socketpair()
    node = start_node(
        nested("sup", child("a", "Storer", descriptors=("client",))), descriptors={"client": server.fileno()}
    )
    server.close()
    node.up()
    before = node.ask("fds").value
    assert node.terminate("a") == ""
    eventually(lambda: node.ask("fds").value == before - 1)
    client.close()


def test_descriptors_of_supervisors_stay_constant(start_node):
    inner = nested("sup", steady("a"), backoff=Backoff(stable_ms=0), intensity=1000)
    node = start_node(inner, steady("b"), backoff=Backoff(stable_ms=0), intensity=1000)
    node.up()
    (sup,) = node.running("sup")

    def open_descriptors() -> tuple[int, int]:
        return node.ask("fds").value, psutil.Process(sup).num_fds()

    before = open_descriptors()
    for incarnation in range(1, 51):
        a, b = node.running("a", "b", incarnation=incarnation)
        os.kill(a, signal.SIGKILL)
        os.kill(b, signal.SIGKILL)
    node.running("a", "b", incarnation=51)
    eventually(lambda: open_descriptors() == before)


def test_random_kills_of_anything_leave_a_whole_tree(start_node):
    """Actors, supervisors and zygotes, at any moment, also while they start."""
    patient = {"intensity": 10_000, "backoff": Backoff(base_ms=5, cap_ms=20, give_up_after=10_000)}
    group = nested("group", steady("r0"), steady("r1"), strategy="one_for_all", **patient)
    node = start_node(steady("a"), nested("sup", group, steady("b"), **patient), steady("z"), **patient)
    node.up()
    before = node.ask("fds").value
    choice = random.Random(4)
    kills = 0
    while kills < 50:
        living = sorted(pid for pid in node.everything() if alive(pid))
        if len(living) >= 6:
            kills += 1
            try:
                os.kill(choice.choice(living), signal.SIGKILL)
            except ProcessLookupError:
                pass

    def whole() -> bool:
        return all(status.state == "running" for status in node.tree().walk()) and len(node.everything()) == 7 + 3

    eventually(whole, "a whole tree without zombies")
    assert node.status("r0").incarnation == node.status("r1").incarnation
    eventually(lambda: node.ask("fds").value == before)
    starts = [line.rsplit(" ", 1)[0] for line in node.journal() if line.endswith("run")]
    assert len(starts) == len(set(starts)), "no incarnation ran twice"
