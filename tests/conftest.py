"""What holds for all tests: skipped ones are listed with their reasons, and where CI=true none is skipped for want of
something that this kind of machine can have."""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from typing import Any

import pytest

UNAVOIDABLE = re.compile(
    r"CUDA|GPU|this processor|the kernels are not written for this processor"
    r"|sentence_transformers"  # large; only to compare with it
    r"|does not allow network namespaces"
)
"""Reasons that no package removes."""
if sys.version_info >= (3, 14):  # Mooncake has no wheel for it
    UNAVOIDABLE = re.compile(f"{UNAVOIDABLE.pattern}|mooncake")


def skips(reporter: Any) -> Counter[str]:
    """How many tests were skipped for each reason."""
    reasons: Counter[str] = Counter()
    for report in reporter.stats.get("skipped", []):
        place = report.longrepr
        reasons[(place[2] if isinstance(place, tuple) else str(place)).removeprefix("Skipped: ")] += 1
    return reasons


def avoidable(reasons: Counter[str]) -> list[str]:
    return [reason for reason in reasons if not UNAVOIDABLE.search(reason)]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    reasons = skips(terminalreporter)
    if not reasons:
        return
    terminalreporter.section("skipped")
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"{count:4}  {reason}")
    if os.environ.get("CI") == "true" and (missing := avoidable(reasons)):
        terminalreporter.write_line("With CI=true nothing may be missing that can be installed:", red=True)
        for reason in missing:
            terminalreporter.write_line(f"      {reason}", red=True)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or hasattr(session.config, "workerinput") or os.environ.get("CI") != "true":
        return
    if avoidable(skips(reporter)) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
