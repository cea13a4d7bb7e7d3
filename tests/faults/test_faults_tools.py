"""The tools themselves: that a loss would be seen, how pauses are measured, what the commands print."""

from __future__ import annotations

import copy
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT, Node, eventually

from llm_runtime.runtime.chaos.client import Answer, Choice
from llm_runtime.runtime.chaos.compare import check, compare
from llm_runtime.runtime.chaos.corpus import Request, build_corpus
from llm_runtime.runtime.chaos.inject import matching, read_schedule
from llm_runtime.runtime.chaos.pauses import pauses, typical_gap
from llm_runtime.runtime.errors import UserError
from llm_runtime.runtime.figures import parse, rate, recent_quantile
from llm_runtime.supervisors.status import NodeStatus

REQUEST = Request("completion", "test", {"stream": True}, tokens=6, shows_tokens=True)


def answer(tokens: str = "abcdef", **fields: object) -> Answer:
    choice = Choice(tokens, list(tokens), [-1.0] * len(tokens), [], "length")
    made = Answer([choice], 0.0, counted=len(tokens))
    for name, value in fields.items():
        setattr(choice, name, value)
    return made


@pytest.mark.parametrize(
    ("got", "wanted"),
    [
        (answer(), (0, 0, 0)),
        (answer("abcef"), (1, 0, 0)),
        (answer("abccdef"), (0, 1, 0)),
        (answer("abXdef"), (0, 0, 1)),
        (answer("acdXf"), (1, 0, 1)),
        (answer(text="abcde"), (0, 0, 1)),
        (answer(finish="stop"), (0, 0, 1)),
        (answer(logprobs=[-1.0, -1.0, -2.0, -1.0, -1.0, -1.0]), (0, 0, 1)),
        (answer(prompt_logprobs=[-1.0]), (0, 0, 1)),
    ],
)
def test_every_difference_is_seen(got: Answer, wanted: tuple[int, int, int]) -> None:
    found = compare(REQUEST, got, answer())
    assert (found.lost, found.repeated, found.changed) == wanted
    assert bool(found.text) == any(wanted)


def test_contradictions_within_an_answer_are_seen() -> None:
    assert not check(REQUEST, answer()).any
    assert check(REQUEST, answer("abcde")).lost == 2, "shown and counted"
    assert check(REQUEST, answer("abcdefg")).repeated == 2
    short = copy.deepcopy(answer())
    short.choices[0].logprobs.pop()
    assert check(REQUEST, short).lost == 1
    short.protocol = "an event takes back what the one before had said"
    assert check(REQUEST, short).changed == 1


def test_the_corpus_is_the_same_for_the_same_seed() -> None:
    corpus = build_corpus(16, 20, 60, seed=1, show_tokens=False)
    assert corpus == build_corpus(16, 20, 60, seed=1, show_tokens=False)
    assert corpus != build_corpus(16, 20, 60, seed=2, show_tokens=False)
    assert {each.kind for each in corpus} == {"completion", "chat", "native"}
    assert {each.choices for each in corpus} == {1, 2}
    assert {each.streamed for each in corpus} == {False, True}
    assert all(each.shows_tokens for each in build_corpus(16, 20, 60, seed=1, show_tokens=True))


def test_the_pause_of_a_fault_is_its_longest_gap_less_the_typical_one() -> None:
    steady = [0.1 * i for i in range(100)]
    late = [*steady[:30], *(at + 0.4 for at in steady[30:])]
    assert typical_gap([steady]) == pytest.approx(0.1)
    assert pauses([2.95], [steady, late], 0.1) == [pytest.approx(0.4)]
    assert pauses([1.05], [late], 0.1) == [pytest.approx(0.4)], "in its window"
    assert pauses([0.55], [late], 0.1) == [pytest.approx(0.0)], "out of its window"
    assert pauses([1.05, 2.95], [late], 0.1) == [pytest.approx(0.0), pytest.approx(0.4)], "nearer to the second"
    assert pauses([2.92, 3.1], [late], 0.1) == [pytest.approx(0.4), pytest.approx(0.0)], "of the first within the gap"
    assert pauses([50.0], [late], 0.1) == [None]


def test_schedules_and_patterns(tmp_path: Path) -> None:
    file = tmp_path / "schedule"
    file.write_text("2.5 main.rank0 KILL  # the rank\n\n0.5 tokenizer sigstop\n")
    first, second = read_schedule(file)
    assert (first.after_s, first.actor, first.signal) == (0.5, "tokenizer", signal.SIGSTOP)
    assert second.actor == "main.rank0"
    file.write_text("soon main.rank0 KILL\n")
    with pytest.raises(UserError, match=r"schedule:1: write SECONDS ACTOR SIGNAL"):
        read_schedule(file)
    tree = NodeStatus(
        name="root",
        kind="supervisor",
        children=[
            NodeStatus(name="main.rank0", kind="worker", role="rank"),
            NodeStatus(name="ingress0", kind="worker", role="ingress"),
        ],
    )
    assert [each.name for each in matching(tree, [])] == ["main.rank0"]
    assert [each.name for each in matching(tree, ["ingress*", "rank"])] == ["main.rank0", "ingress0"]


def test_figures_of_metrics() -> None:
    text = (
        "# TYPE t_seconds histogram\n"
        't_seconds_bucket{{actor="a",le="0.1"}} {0}\nt_seconds_bucket{{actor="a",le="0.2"}} {1}\n'
        't_seconds_bucket{{actor="a",le="+Inf"}} {1}\n'
        '# TYPE g counter\ng_total{{actor="a"}} {1}\ng_total{{actor="b"}} 2\n'
    )
    before, now = parse(text.format(10, 10), 0.0), parse(text.format(10, 20), 2.0)
    assert rate(now, before, "g_total") == 5.0
    assert recent_quantile(now, before, "t_seconds", 0.5) == pytest.approx(0.15), "of what has come between the two"
    assert math.isnan(recent_quantile(now, None, "t_seconds", 0.5)), "of nothing"
    assert math.isnan(recent_quantile(now, now, "t_seconds", 0.5)), "nothing has come: what was before is old"
    assert recent_quantile(before, now, "t_seconds", 0.5) == pytest.approx(0.05), "an ingress has begun anew"


def command(node: Node, *arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "llm_runtime", *arguments]
    return subprocess.run(
        line, cwd=ROOT, env=node.environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_top_prints_a_frame(node: Node) -> None:
    pid = node.pid("tokenizer")
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: node.state() == "running" and node.actor("tokenizer").pid != pid)
    ran = command(node, "top", "--once", "--interval", "0.2")
    assert ran.returncode == 0, ran.stderr
    head, table, events = ran.stdout.strip("\n").split("\n\n")
    assert head.startswith("n  running at http://127.0.0.1:")
    for word in ("tokens/s", "running", "waiting", "KV", "TTFT", "ITL"):
        assert word in head
    lines = {row.split()[0]: row for row in table.splitlines()}
    assert set(lines) - {"process"} == {each.name for each in node.tree().walk()}
    assert "killed by SIGKILL" in lines["tokenizer"]
    assert "tokenizer" in events


def test_chaos_prints_what_clients_saw(node: Node) -> None:
    load = ("--controls", "1", "--streams", "4", "--tokens", "12", "--long-prompt", "30")
    ran = command(node, "chaos", "--kills", "2", "--actors", "rank,detok*", "--every", "1s", "--json", *load)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    figures = json.loads(ran.stdout)
    assert (figures["ok"], figures["compared"], figures["failed"], figures["faults"]) == (True, True, 0, 2)
    assert {kill["actor"] for kill in figures["kills"]} <= {"main.rank0", "detokenizer"}
    assert figures["requests"] >= 4
    assert figures["pauses"]["nobody (for comparison)"]["count"] == 1
    ran = command(node, "chaos", "--actors", "nobody", "--for", "2s", *load)
    assert ran.returncode == 1
    assert "no running actor matches nobody" in ran.stdout
    ran = command(node, "chaos", "--drop-rate", "0.1")
    assert ran.returncode == 1
    assert "give a topology FILE" in ran.stderr


def test_a_rolling_restart_replaces_every_process_and_fails_no_request(node: Node) -> None:
    before = {each.name: each.pid for each in node.tree().walk()}
    ran = command(node, "chaos", "--rolling", "--controls", "0", "--tokens", "16", "--long-prompt", "30", "--json")
    figures = json.loads(ran.stdout)
    assert ran.returncode == 0, figures["failures"]
    after = {each.name: each.pid for each in node.tree().walk()}
    assert after.keys() == before.keys()
    assert [name for name in before if before[name] == after[name]] == ["root"]
