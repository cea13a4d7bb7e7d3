"""Figures from measured times."""

from __future__ import annotations

from collections.abc import Sequence

from llm_runtime.runtime.bench.serving import Outcome


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which `percent` of the values lie, between neighbours in proportion. NaN if there are none."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def summary(outcomes: Sequence[Outcome], duration_s: float) -> dict[str, float]:
    """The usual figures of a serving benchmark; times in milliseconds, throughput a second."""
    good = [outcome for outcome in outcomes if not outcome.error]
    figures: dict[str, float] = {
        "requests": len(outcomes),
        "failed": len(outcomes) - len(good),
        "duration_s": duration_s,
        "requests_per_s": len(good) / duration_s,
        "input_tokens_per_s": sum(outcome.prompt_tokens for outcome in good) / duration_s,
        "output_tokens_per_s": sum(outcome.tokens for outcome in good) / duration_s,
    }
    times = {
        "ttft": [outcome.ttft for outcome in good],
        "tpot": [outcome.tpot for outcome in good if outcome.tokens > 1],
        "itl": [gap for outcome in good for gap in outcome.itl],
        "latency": [outcome.latency for outcome in good],
    }
    for name, values in times.items():
        milliseconds = [1000 * value for value in values]
        figures[f"{name}_mean_ms"] = sum(milliseconds) / len(milliseconds) if milliseconds else float("nan")
        figures[f"{name}_p50_ms"] = percentile(milliseconds, 50)
        figures[f"{name}_p99_ms"] = percentile(milliseconds, 99)
    return figures
