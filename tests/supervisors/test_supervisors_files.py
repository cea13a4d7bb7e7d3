"""What is written for people only: logs and crash reports. Nobody ends because it cannot be written."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
from supervised_tools import nested, steady
from support import eventually

from llm_runtime.supervisors import logs, read_crashes
from llm_runtime.supervisors.logs import LogFile, open_log


def test_a_supervisor_lives_on_where_nothing_can_be_written(start_node):
    node = start_node(steady("a"), nested("sup", steady("b")))
    node.up()
    for name in ("logs", "crashes"):
        shutil.rmtree(node.run_dir / name)
        (node.run_dir / name).touch()  # neither a folder nor to be made one
    for incarnation in (2, 3):
        for id in ("a", "b"):
            os.kill(node.running(id)[0], signal.SIGKILL)
            node.running(id, incarnation=incarnation)
    assert node.status("root").stats == {"unwritten_reports": 2}
    os.kill(node.running("sup")[0], signal.SIGKILL)
    node.running("sup", incarnation=2)
    node.running("b", incarnation=4)
    for name in ("logs", "crashes"):
        (node.run_dir / name).unlink()
    os.kill(node.running("a")[0], signal.SIGKILL)
    node.running("a", incarnation=4)
    eventually(lambda: read_crashes(node.run_dir, "a"), "reports once there is room again")
    assert (node.run_dir / "logs" / "a.log").exists()


def test_counts_of_starts_outlive_supervisors_and_files(start_node):
    node = start_node(nested("sup", nested("inner", steady("a"), strategy="one_for_all")))
    node.up()
    os.kill(node.running("a")[0], signal.SIGKILL)
    node.running("a", incarnation=2)
    for name in ("logs", "crashes"):
        shutil.rmtree(node.run_dir / name)
    os.kill(node.running("inner")[0], signal.SIGKILL)
    node.running("a", incarnation=3)
    os.kill(node.running("sup")[0], signal.SIGKILL)
    node.running("a", incarnation=4)
    assert [node.status(id).restarts for id in ("sup", "inner", "a")] == [1, 2, 3]


def test_a_silent_child_is_seen_before_it_is_killed(start_node):
    node = start_node(steady("a", heartbeat_timeout_ms=60_000), nested("sup", steady("b", heartbeat_timeout_ms=60_000)))
    node.up()
    pids = dict(zip("ab", node.running("a", "b"), strict=True))
    for pid in pids.values():
        os.kill(pid, signal.SIGSTOP)
    for id, pid in pids.items():
        silent = node.in_state(id, "unresponsive")
        assert (silent.pid, silent.doing) == (pid, "not answering")
        assert silent.doing_s >= 2.0
        os.kill(pid, signal.SIGCONT)
    assert node.running("a", "b", incarnation=1) == list(pids.values())


def test_a_log_is_rotated_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(logs, "ROTATE_BYTES", 1000)
    path = tmp_path / "logs" / "a.log"
    log = open_log(path)
    for number in range(100):
        log.write(f"line {number:03} of fifty bytes, which is as long as it is\n")
    old, new = path.with_name("a.log.1").read_text().splitlines(), path.read_text().splitlines()
    assert 0 < len(new) <= len(old) <= 20
    assert (old + new)[-1].startswith("line 099")
    assert (old + new) == [f"line {n:03} of fifty bytes, which is as long as it is" for n in range(100)][
        -len(old + new) :
    ]
    assert sorted(each.name for each in path.parent.iterdir()) == ["a.log", "a.log.1"]


def test_words_of_clients_make_no_lines_of_a_log():
    words = "x\n2026-01-01 ERROR forged\r\x1b[2J\x85\u2028\tü"
    record = logging.LogRecord("n", logging.INFO, "f.py", 1, "GET %s", (words,), None)
    (line,) = logs.TextLines(logs.TEXT).format(record).splitlines()
    assert line.endswith("GET x\\x0a2026-01-01 ERROR forged\\x0d\\x1b[2J\\x85\\u2028\tü")
    try:
        raise ValueError("reason")
    except ValueError:
        record.exc_info = sys.exc_info()
    assert logs.TextLines(logs.TEXT).format(record).splitlines()[-1] == "ValueError: reason"


def test_a_log_that_was_removed_is_made_anew(tmp_path: Path):
    path = tmp_path / "logs" / "a.log"
    log = open_log(path)
    log.write("first\n")
    shutil.rmtree(path.parent)
    log.write("second\n")
    assert path.read_text() == "second\n"


def test_a_log_on_a_full_disk_counts_what_it_loses(tmp_path: Path):
    path = tmp_path / "a.log"
    path.symlink_to("/dev/full")
    log = LogFile(path)
    assert log.write(b"lost\n") == 5
    assert log.write(b"lost too\n") == 9
    path.unlink()
    os.close(log.fileno())
    log._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    log.write(b"kept\n")
    assert path.read_text() == "(14 bytes of this log could not be written)\nkept\n"


def test_a_log_that_cannot_be_opened_begins_when_it_can(tmp_path: Path):
    (tmp_path / "logs").touch()
    log = open_log(tmp_path / "logs" / "a.log")
    log.write("lost\n")
    (tmp_path / "logs").unlink()
    log.write("kept\n")
    assert (tmp_path / "logs" / "a.log").read_text() == "(5 bytes of this log could not be written)\nkept\n"
