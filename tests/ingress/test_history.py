"""The figures that the status page shows over time."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llm_runtime.actors import ingress
from llm_runtime.actors.histogram import QUEUE_TIME_BOUNDS, Histogram
from llm_runtime.actors.ingress.history import KEPT, NAMES, WINDOW, History
from llm_runtime.actors.ingress.metrics import HISTOGRAMS, IngressMetrics

SGLANG_TTFT = (0.1, 0.2, 0.4, 0.6, 0.8, 1, 2, 4, 6, 8, 10, 20, 40, 60, 80, 100, 200, 400)
SGLANG_E2E = (*SGLANG_TTFT, 600, 1200, 1800, 2400)
SGLANG_ITL = (
    *(0.002, 0.004, 0.006, 0.008, 0.010, 0.015, 0.020, 0.025, 0.030, 0.035, 0.040, 0.060, 0.080),
    *(0.1, 0.2, 0.4, 0.6, 0.8, 1, 2, 4, 6, 8),
)
SGLANG_QUEUE = (0.000, 0.1, 0.2, 0.5, 1, 2, 3, 4, 5, 10, 15, 20, 30, 40, 50, 60, 70, 80, 90, 100, 200, 300, 1000)


def last(history: History, name: str) -> float | None:
    return history.points(0)[-1][1 + NAMES.index(name)]


def test_bounds_are_those_of_sglang_and_finer_ones() -> None:
    for name, theirs in (
        ("time_to_first_token_seconds", SGLANG_TTFT),
        ("e2e_request_latency_seconds", SGLANG_E2E),
        ("inter_token_latency_seconds", SGLANG_ITL),
    ):
        ours = HISTOGRAMS[name][1]
        assert set(theirs) <= set(ours)
        assert list(ours) == sorted(set(ours))
    assert set(SGLANG_QUEUE) <= set(QUEUE_TIME_BOUNDS)
    assert list(QUEUE_TIME_BOUNDS) == sorted(set(QUEUE_TIME_BOUNDS))


@pytest.mark.parametrize("measured", [0.003, 0.007, 0.0149, 0.022, 0.045, 0.09, 0.33, 3.2])
def test_a_quantile_is_near_what_was_measured(measured: float) -> None:
    metrics, history = IngressMetrics(["a", "b"]), History()
    history.add(1.0, {"ingress0": metrics.figures()})
    for model in ("a", "b"):
        metrics.of(model).time_to_first_token.observe(measured, 10)
    history.add(2.0, {"ingress0": metrics.figures()})
    shown = history.times()["ttft_p50"]
    assert shown == last(history, "ttft_p50")
    assert shown is not None
    assert abs(shown - measured) <= 0.34 * measured


def test_points_tell_what_a_second_brought() -> None:
    metrics, history = IngressMetrics(["a"]), History()
    counters = metrics.of("a").counters
    counters["generation_tokens"] = 1000
    history.add(1.0, {"ingress0": metrics.figures()})  # what there was before is nobody's
    assert last(history, "tokens") == 0
    counters["generation_tokens"] += 7
    metrics.response(404)
    history.add(2.0, {"ingress0": metrics.figures(), "main.scheduler": {"num_running_reqs": 2.0}})
    assert (last(history, "tokens"), last(history, "running")) == (7, 2)
    begun_anew = IngressMetrics(["a"])
    begun_anew.of("a").counters["generation_tokens"] = 3
    history.add(3.0, {"ingress0": begun_anew.figures()})
    assert (last(history, "tokens"), last(history, "running")) == (3, 0)
    assert history.responses() == {"last_minute": {"404": 1}, "kept": {"404": 1}}
    assert [point[0] for point in history.points(1.0)] == [2.0, 3.0]


def test_what_is_shown_gets_old_and_what_is_kept_is_bounded() -> None:
    queue, history = Histogram(QUEUE_TIME_BOUNDS), History()
    history.add(0.0, {"main.scheduler": queue.figures("queue_time_seconds")})
    queue.observe(0.015)
    for second in range(1, KEPT + 50):
        if second == WINDOW + 2:
            assert history.times()["queue_p99"] is None
        history.add(float(second), {"main.scheduler": queue.figures("queue_time_seconds")})
        if second == 1:
            assert history.times()["queue_p50"] == pytest.approx(0.0125)
    assert len(history.points(0)) == KEPT


def luminance(colour: str) -> float:
    """WCAG 2.2's relative luminance of #rrggbb."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_the_page_is_readable() -> None:
    """WCAG AA: 4.5 to 1 for text, in both themes."""
    page = (Path(ingress.__file__).parent / "status_page.html").read_text()
    light, dark = (
        dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", each)) for each in page.split("prefers-color-scheme")
    )
    for theme in (light, dark):
        backs = [theme["back"], theme["card"]]
        pairs = [(theme[name], back) for name in ("text", "dim", "good", "changing", "bad", "plot") for back in backs]
        pairs += [(theme["on-plot"], theme["plot"]), (theme["back"], theme["bad"])]
        pairs += [(theme[name], theme["bad-back"]) for name in ("text", "bad", "plot")]
        for pair in pairs:
            darker, lighter = sorted(map(luminance, pair))
            assert (lighter + 0.05) / (darker + 0.05) >= 4.5, pair
