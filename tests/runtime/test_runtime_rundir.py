"""Run directories and the control socket."""

from __future__ import annotations

import os
import select
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from llm_runtime.runtime.control import (
    ControlServer,
    Done,
    Down,
    Kill,
    NodeReport,
    Question,
    Reply,
    Status,
    ask,
    command,
)
from llm_runtime.runtime.errors import UserError
from llm_runtime.runtime.rundir import NodeInfo, RunDirectory, base_directory, find_node, is_running
from llm_runtime.runtime.watch import RemovalWatch
from llm_runtime.supervisors import NodeStatus

ROOT = Path(__file__).parents[2]


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RUNTIME_DIR", str(tmp_path / "r"))
    return tmp_path / "r"


def node(name: str) -> RunDirectory:
    run_dir = RunDirectory(name, "main.scheduler")
    run_dir.write_info(NodeInfo(name, os.getpid(), "http://x", "t.toml", 0.0))
    return run_dir


def test_where_run_directories_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNTIME_DIR", "/a/b")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    assert base_directory() == Path("/a/b")
    monkeypatch.delenv("RUNTIME_DIR")
    assert base_directory() == Path("/run/user/7/llm-runtime")
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert base_directory() == Path(f"/tmp/llm-runtime-{os.getuid()}")


def test_it_is_private_and_goes_without_a_trace(base: Path) -> None:
    run_dir = node("n")
    assert {path.name for path in run_dir.path.iterdir()} == {
        "node.json",
        "sockets",
        "logs",
        "crashes",
    }
    assert {path.stat().st_mode & 0o777 for path in (base, run_dir.path, run_dir.path / "sockets")} == {0o700}
    assert is_running(run_dir.path)
    assert find_node("n") == find_node(None) == run_dir.path
    run_dir.remove(keep_logs=False)
    assert not base.exists()


def test_logs_of_a_crashed_node_stay_and_can_be_found(base: Path) -> None:
    run_dir = node("n")
    run_dir.root_log.write_text("why\n")
    run_dir.remove(keep_logs=True)
    assert {path.name for path in run_dir.path.iterdir()} == {"node.json", "logs", "crashes"}
    with pytest.raises(UserError, match="no node is running"):
        find_node(None)
    assert find_node(None, dead_too=True) == find_node("n", dead_too=True) == run_dir.path
    again = node("n")
    assert not again.root_log.exists()
    again.remove(keep_logs=False)


def test_a_living_node_keeps_its_directory(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_runtime.runtime.rundir._LOCK_PATIENCE_S", 0.1)
    first, second = node("a"), node("b")
    with pytest.raises(UserError, match=r"the node a is running already.*: stop it with `runtime down --node a`"):
        RunDirectory("a", "x")
    with pytest.raises(UserError, match=r"choose one with --node a\|b"):
        find_node(None)
    with pytest.raises(UserError, match="no node c is running; running: a, b"):
        find_node("c")
    first.remove(keep_logs=False)
    assert find_node(None) == second.path
    second.remove(keep_logs=False)


def test_what_a_killed_node_left_is_cleaned(base: Path) -> None:
    code = (
        "import os, signal; from llm_runtime.runtime.rundir import *; d = RunDirectory('n', 'x');"
        "d.write_info(NodeInfo('n', 1, '', '', 0.0)); (d.path / 'sockets/stale').touch();"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    died = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=False)
    assert died.returncode == -9
    assert (base / "n/sockets/stale").exists()
    assert not is_running(base / "n")
    run_dir = node("n")
    assert not (base / "n/sockets/stale").exists()
    run_dir.remove(keep_logs=False)


def test_a_directory_that_others_can_write_to_is_refused(base: Path) -> None:
    base.mkdir()
    base.chmod(0o777)
    with pytest.raises(UserError, match="can be written by others: run `chmod 700"):
        RunDirectory("n", "x")
    base.rmdir()
    base.symlink_to("/tmp")
    with pytest.raises(UserError, match="belongs to another user or can be written"):
        RunDirectory("n", "x")


def test_a_path_too_long_for_a_socket_is_refused(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNTIME_DIR", f"/tmp/{'x' * 90}")
    with pytest.raises(UserError, match="set RUNTIME_DIR to a shorter directory"):
        RunDirectory("n", "main.scheduler")


def lost(base: Path, how: str) -> None:
    if how == "files":
        for path in (base / "n").iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif how == "node":
        shutil.rmtree(base / "n")
    elif how == "all":
        shutil.rmtree(base)
    else:
        base.rename(base.with_name("moved"))


@pytest.mark.parametrize("how", ["files", "node", "all", "renamed"])
def test_what_is_removed_is_made_again(base: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_runtime.runtime.rundir._LOCK_PATIENCE_S", 0.1)
    run_dir = node("n")
    watch = RemovalWatch([run_dir.path, base])
    made: list[bool] = []
    assert not select.select([watch.fd], [], [], 0)[0]
    for _ in range(2):
        lost(base, how)
        assert select.select([watch.fd], [], [], 10)[0]
        watch.handle(lambda: made.append(run_dir.restore()))
        assert made.pop()
        assert {path.name for path in run_dir.path.iterdir()} == {"node.json", "sockets", "logs", "crashes"}
        assert {path.stat().st_mode & 0o777 for path in (base, run_dir.path)} == {0o700}
        assert find_node("n") == run_dir.path
        with pytest.raises(UserError, match="is running already"):
            RunDirectory("n", "x")
        shutil.rmtree(base.with_name("moved"), ignore_errors=True)
    watch.close()
    run_dir.remove(keep_logs=False)
    assert not base.exists()


@pytest.mark.parametrize("how", ["files", "node", "all"])
def test_what_is_removed_while_it_is_made_again(base: Path, how: str) -> None:
    """Whoever cleans the directory has not ended yet."""
    run_dir = node("n")
    watch = RemovalWatch([run_dir.path, base])
    calls = 0

    def restore() -> None:
        nonlocal calls
        calls += 1
        assert run_dir.restore()
        if calls == 1:
            lost(base, "files")

    lost(base, how)
    while select.select([watch.fd], [], [], 0)[0]:
        watch.handle(restore)
    assert {path.name for path in run_dir.path.iterdir()} == {"node.json", "sockets", "logs", "crashes"}
    watch.close()
    run_dir.remove(keep_logs=False)


def test_a_node_without_its_file_is_found_by_its_lock(base: Path) -> None:
    run_dir = node("n")
    (run_dir.path / "node.json").unlink()
    assert find_node(None) == find_node("n") == run_dir.path
    run_dir.remove(keep_logs=False)


def test_a_directory_that_another_node_has_taken_is_left_alone(base: Path) -> None:
    first = node("n")
    shutil.rmtree(base)
    second = node("n")
    assert not first.restore()
    assert is_running(second.path)
    first.remove(keep_logs=True)
    assert find_node("n") == second.path
    second.remove(keep_logs=False)


class Server:
    """A control server in a thread, which answers as a node would."""

    def __init__(self, run_dir: Path) -> None:
        self.questions: list[Question] = []
        self._server = ControlServer(run_dir, self._answer)
        self._stop, self._wake = os.pipe()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _answer(self, question: Question, reply: Reply) -> None:
        self.questions.append(question)
        match question:
            case Status():
                reply(NodeReport("n", "running", "http://x", NodeStatus(name="root", kind="supervisor")))
            case Kill(actor="nobody"):
                reply(Done("there is no actor 'nobody'"))
            case Kill(actor="silent"):
                pass
            case _:
                reply(Done())

    def _run(self) -> None:
        while self._stop not in select.select([self._server.fd, self._stop], [], [])[0]:
            self._server.serve()
        self._server.close()

    def close(self) -> None:
        os.write(self._wake, b"x")
        self._thread.join(10)
        os.close(self._stop)
        os.close(self._wake)


def test_a_control_socket_whose_directory_is_gone(tmp_path: Path) -> None:
    directory = tmp_path / "n"
    directory.mkdir()
    control = ControlServer(directory, lambda question, reply: reply(Done()))
    shutil.rmtree(directory)
    with pytest.raises(OSError, match="No such file"):
        control.restore()
    directory.mkdir()
    control.restore()
    assert (directory / "control").exists()
    control.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    yield server
    server.close()


def test_questions_and_answers(server: Server, tmp_path: Path) -> None:
    report = ask(tmp_path, Status())
    assert isinstance(report, NodeReport)
    assert (report.node, report.tree.name) == ("n", "root")
    command(tmp_path, Down())
    with pytest.raises(UserError, match="there is no actor 'nobody'"):
        command(tmp_path, Kill("nobody", 9))
    assert server.questions == [Status(), Down(), Kill("nobody", 9)]
    assert (tmp_path / "control").stat().st_mode & 0o777 == 0o600


def test_a_node_that_does_not_answer(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not answer; look at `runtime logs root"):
        command(tmp_path, Kill("silent", 9), timeout_s=0.1)


def test_junk_is_dropped(server: Server, tmp_path: Path) -> None:
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.connect(f"ipc://{tmp_path}/control")
    for junk in (b"", b"\xc1", b"\x81\xa4type\xa6Reboot", b"\x93\x01\x02\x03", b"x" * 1_000_000):
        socket.send(junk)
    socket.send_multipart([b"a", b"b", b"c"])
    socket.send(b"\x83\xa4type\xa4Kill\xa5actor\xa1a\xa6signal\xcd\x03\xe8")  # signal 1000
    assert isinstance(ask(tmp_path, Status()), NodeReport)
    socket.close(0)
    context.term()
    assert server.questions == [Status()]
