"""The figures of a running node, from its /metrics, as `runtime top` shows them."""

from __future__ import annotations

import math
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families

Buckets = dict[float, float]


@dataclass
class Sample:
    """What /metrics said at a time, summed over the actors.

    Attributes:
        at: seconds, by any clock that is used for all samples.
        values: by the name of the metric.
        buckets: of histograms: how many values were at most so large, by the name and the bound.
    """

    at: float
    values: dict[str, float] = field(default_factory=dict)
    buckets: dict[str, Buckets] = field(default_factory=dict)


def read_metrics(url: str, at: float, timeout_s: float = 2.0) -> Sample | None:
    """The figures of the node at a URL; None while its ingress does not answer."""
    try:
        with urllib.request.urlopen(f"{url}/metrics", timeout=timeout_s) as response:
            return parse(response.read().decode(), at)
    except (OSError, urllib.error.URLError, ValueError):
        return None


def parse(text: str, at: float) -> Sample:
    """Sums Prometheus' text format up. Raises ValueError for what is not that."""
    values: dict[str, float] = defaultdict(float)
    buckets: dict[str, Buckets] = defaultdict(lambda: defaultdict(float))
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.endswith("_bucket"):
                buckets[family.name][float(sample.labels["le"])] += sample.value
            else:
                values[sample.name] += sample.value
    return Sample(at, dict(values), {name: dict(each) for name, each in buckets.items()})


def rate(now: Sample, before: Sample | None, name: str) -> float:
    """How fast a counter grows, a second; NaN where that is not known, as after a restart of an ingress."""
    if before is None or now.at <= before.at or name not in now.values or name not in before.values:
        return math.nan
    grown = now.values[name] - before.values[name]
    return grown / (now.at - before.at) if grown >= 0 else math.nan


def recent_quantile(now: Sample, before: Sample | None, name: str, part: float) -> float:
    """A quantile of what a histogram has taken in between two samples; NaN if that is nothing, or there is no earlier
    sample. After a restart of an ingress: of all since. Within a bucket values count as evenly spread."""
    buckets = now.buckets.get(name, {})
    if before is None or not buckets:
        return math.nan
    since = before.buckets.get(name, {})
    recent = {bound: count - since.get(bound, 0.0) for bound, count in buckets.items()}
    return _quantile(buckets if min(recent.values()) < 0 else recent, part)


def _quantile(buckets: Mapping[float, float], part: float) -> float:
    total = max(buckets.values(), default=0.0)
    if not total:
        return math.nan
    lower = below = 0.0
    for bound, count in sorted(buckets.items()):
        if count >= part * total:
            if math.isinf(bound):
                return lower
            return lower + (bound - lower) * (part * total - below) / (count - below or 1.0)
        lower, below = bound, count
    return lower
