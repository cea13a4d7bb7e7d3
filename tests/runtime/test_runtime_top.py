"""What `runtime top` shows, in terminals of several widths."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from llm_runtime.runtime.cli.top import frame
from llm_runtime.runtime.control import NodeReport
from llm_runtime.runtime.figures import Sample
from llm_runtime.runtime.happenings import Happening
from llm_runtime.supervisors.exits import ExitReason
from llm_runtime.supervisors.status import NodeStatus

METRICS = ("time_to_first_token", "inter_token_latency", "queue_time", "e2e_request_latency")


def report() -> NodeReport:
    gone = ExitReason(kind="error", code=1, text="ValueError: " + "a long reason " * 10, when=1.0)
    rank = NodeStatus(
        name="prefill.rank10", kind="worker", pid=4194304, state="unresponsive", restarts=12, last_exit=gone,
        doing="not answering", doing_s=3.0, cpu_percent=1600, pss_bytes=90_000 * 2**20,
    )  # fmt: skip
    ranks = NodeStatus(name="prefill.ranks", kind="supervisor", pid=1, state="running", children=[rank])
    engine = NodeStatus(name="prefill", kind="supervisor", pid=2, state="running", children=[ranks])
    root = NodeStatus(name="root", kind="supervisor", pid=3, state="running", children=[engine])
    event = Happening(when=1.0, name="prefill.rank10", kind="exit", text="killed by SIGKILL", crash=True, away_s=0.043)
    return NodeReport("n", "degraded", "http://127.0.0.1:8000", root, events=[event] * 9)


def sample(at: float, count: float) -> Sample:
    buckets = {f"sglang:{name}_seconds": {0.01: 0.0, 0.02: count, float("inf"): count} for name in METRICS}
    return Sample(at, {"sglang:generation_tokens_total": 100 * count}, buckets)


def shown(width: int, past: list[Sample]) -> list[str]:
    output = io.StringIO()
    Console(file=output, width=width, highlight=False).print(frame(report(), sample(10.0, 4.0), past, width))
    return output.getvalue().splitlines()


@pytest.mark.parametrize("width", [80, 100, 140])
def test_a_frame_fits_and_says_who_is_ill(width: int) -> None:
    lines = shown(width, [sample(8.0, 0.0), sample(9.0, 2.0)])
    assert max(map(len, lines)) <= width
    (row,) = [line for line in lines if "4194304" in line]
    for cell in ("prefill.rank10", "unresponsive", "1600%", "90000M", "12"):
        assert cell in row.split()
    text = " ".join(" ".join(lines).split())
    assert "200 tokens/s" in text
    assert "TTFT p50 15 ms p99" in text
    assert text.count("killed by SIGKILL, away 43 ms") == 5
    assert ("not answering 3.0 s" in row) == (width == 140)


def test_old_times_are_not_shown() -> None:
    text = " ".join(shown(140, [sample(9.0, 4.0)]))
    assert "TTFT -" in text
