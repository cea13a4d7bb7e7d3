"""A chaos run as tables for people and as JSON for programs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from llm_runtime.runtime.bench.figures import percentile
from llm_runtime.runtime.chaos.pauses import STOPPED_WINDOW_S, WINDOW_S, pauses, typical_gap
from llm_runtime.runtime.chaos.run import Outcome

NOBODY = "nobody (for comparison)"
_ANSWERS_PROBES = "tokenizer"
"""The role whose pauses are seen by calls to /tokenize."""


def figures(outcome: Outcome) -> dict[str, Any]:
    """Everything that was measured; times in seconds."""
    return {
        "ok": outcome.ok,
        "compared": outcome.deterministic,
        "duration_s": outcome.duration_s,
        "faults": len(outcome.faults),
        "requests": outcome.requests,
        "tokens": outcome.tokens,
        "failed": len(outcome.failures),
        "lost": outcome.difference.lost,
        "repeated": outcome.difference.repeated,
        "changed": outcome.difference.changed,
        "settled": outcome.settled,
        "retractions": outcome.retractions,
        "failures": outcome.failures[:20],
        "first_difference": outcome.difference.text,
        "restarts": outcome.restarts,
        "pauses": {who: _figures(values) for who, values in pauses_by_role(outcome).items()},
        "kills": [
            {"at_s": each.at - outcome.faults[0].at, "actor": each.actor, "signal": each.signal, "double": each.double}
            for each in outcome.faults
        ],
    }


def pauses_by_role(outcome: Outcome) -> dict[str, list[float]]:
    """The pauses of all faults by role; processes that were stopped and not killed apart. Faults of a pair are booked
    under both roles together. The first entry says how long "pauses" are under the same load when nothing is killed."""
    typical_s = typical_gap(outcome.undisturbed)
    found = {NOBODY: _known(pauses(outcome.controls, outcome.disturbed, typical_s))}
    groups: list[tuple[float, str]] = []
    for fault in outcome.faults:
        who = fault.role + (" (stopped)" if fault.signal == "STOP" else "")
        if fault.double and groups:
            groups[-1] = (groups[-1][0], " + ".join(sorted((groups[-1][1], who))))
        else:
            groups.append((fault.at, who))
    times = [at for at, _ in groups]
    window_s = STOPPED_WINDOW_S if any(fault.signal == "STOP" for fault in outcome.faults) else WINDOW_S
    by_streams = pauses(times, outcome.disturbed, typical_s, window_s)
    by_probes = pauses(times, [outcome.probes], typical_gap([outcome.probes]))
    roles: dict[str, list[float]] = defaultdict(list)
    for (_, who), stream, probe in zip(groups, by_streams, by_probes, strict=True):
        pause = probe if who.startswith(_ANSWERS_PROBES) else stream
        if pause is not None:
            roles[who].append(pause)
    return found | dict(sorted(roles.items()))


def _known(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _figures(values: Sequence[float]) -> dict[str, float]:
    return {
        "count": len(values),
        "p50_s": percentile(values, 50),
        "p99_s": percentile(values, 99),
        "max_s": max(values, default=float("nan")),
    }


def show(outcome: Outcome, console: Console) -> None:
    """Prints the tables."""
    said, measured = figures(outcome), pauses_by_role(outcome)
    summary = Table(title="chaos", title_justify="left", show_header=False)
    for name in ("faults", "requests", "failed", "lost", "repeated", "changed", "tokens", "retractions", "duration_s"):
        value = said[name]
        if name == "changed" and not outcome.deterministic:
            value = "not compared: the node is not deterministic"
        summary.add_row(name.removesuffix("_s"), f"{value:.0f} s" if name == "duration_s" else str(value))
    console.print(summary)

    waits = Table(title="longest pause of any stream after a fault (s)", title_justify="left")
    waits.add_column("killed")
    for column in ("faults", "p50", "p99", "max"):
        waits.add_column(column, justify="right")
    for who, values in measured.items():
        each = _figures(values)
        if values:
            waits.add_row(who, str(len(values)), *(f"{each[key]:.3f}" for key in ("p50_s", "p99_s", "max_s")))
    console.print(waits)

    restarts = Table(title="restarts", title_justify="left")
    restarts.add_column("process")
    restarts.add_column("restarts", justify="right")
    for name, count in outcome.restarts.items():
        if count:
            restarts.add_row(name, str(count))
    if restarts.row_count:
        console.print(restarts)

    for failure in outcome.failures[:10]:
        console.print(f"failed: {failure}", markup=False, soft_wrap=True)
    if outcome.difference.any:
        console.print(f"first difference: {outcome.difference.text}", markup=False, soft_wrap=True)
    if not outcome.settled:
        console.print("not all processes run again; see `runtime status`")
    console.print("nothing was lost" if outcome.ok else "something was lost")
