"""Figures of an ingress worker, and all actors' figures in the text format of Prometheus.

Every actor reports its figures to every ingress worker once a second, ingress workers among themselves too. So
whichever worker a scrape reaches can answer for all of them; each series carries its actor's name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from llm_runtime.actors.histogram import QUEUE_TIME_BOUNDS, Histogram

FORGET_AFTER_S = 30.0
"""Figures of an actor that has not reported for so long are no longer shown."""

# Bucket bounds in seconds: SGLang's defaults, and more below them, since a small model answers in milliseconds.
_SHORT_TIMES = (0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.06, 0.08)
_LONG_TIMES = (0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1, 1.5, 2, 3, 4, 6, 8, 10, 20, 40, 60, 80, 100, 200, 400)
HISTOGRAMS: dict[str, tuple[str, tuple[float, ...]]] = {
    "time_to_first_token_seconds": (
        "Time from a request's arrival to its first token.",
        (*_SHORT_TIMES, *_LONG_TIMES),
    ),
    "inter_token_latency_seconds": (
        "Time between two tokens of a request.",
        (
            *(0.0002, 0.0005, 0.001, 0.0015, 0.002, 0.003, 0.004, 0.005, 0.006, 0.008),
            *(0.01, 0.015, 0.02, 0.025, 0.03, 0.035, 0.04, 0.05, 0.06, 0.08),
            *(0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1, 2, 4, 6, 8),
        ),
    ),
    "e2e_request_latency_seconds": (
        "Time from a request's arrival to its last token.",
        (*_SHORT_TIMES, *_LONG_TIMES, 600, 1200, 1800, 2400),
    ),
}
COUNTERS: dict[str, tuple[str, str]] = {
    "prompt_tokens": ("sglang", "Prompt tokens of finished requests."),
    "generation_tokens": ("sglang", "Tokens that have arrived from engines."),
    "cached_tokens": ("sglang", "Prompt tokens found in the prefix cache."),
    "num_requests": ("sglang", "Requests that have finished."),
    "num_aborted_requests": ("sglang", "Requests that ended before their last token."),
    "recoveries": ("runtime", "Requests handed to an engine again after it was restarted, lost or had forgotten them."),
    "resends": ("runtime", "Times that missing tokens were asked for."),
    "attempts": ("runtime", "Times that a request was handed to an engine."),
    "repeats": ("runtime", "Token events dropped because they had been received before or belong to an old attempt."),
}
CONNECTION_COUNTERS: dict[str, tuple[str, str]] = {
    "connections_resumed": ("runtime", "Connections that an earlier incarnation has left and that went on."),
    "connections_lost": ("runtime", "Connections that an earlier incarnation has left and that could not go on."),
    "connections_unprotected": ("runtime", "Requests whose connection would have ended with this worker."),
    "connections_refused": ("runtime", "Connections refused because this worker had no descriptors left."),
}
SCHEDULER_GAUGES = (
    *("num_running_reqs", "num_queue_reqs", "num_grammar_queue_reqs", "token_usage", "num_used_tokens"),
    *("max_total_num_tokens", "cache_hit_rate", "gen_throughput", "spec_accept_rate", "spec_accept_length"),
    *("num_prefill_inflight_queue_reqs", "num_decode_transfer_queue_reqs"),
)
SCHEDULER_COUNTERS = {
    "retractions": ("sglang:num_retracted_requests", "Requests that had to wait again as KV pages ran out."),
    "transfers_failed": ("sglang:num_transfer_failed_reqs", "KV transfers that failed and were begun anew."),
}
QUEUE_TIME = "queue_time_seconds"
MESSAGE_ERRORS = ("bad", "malformed", "oversized", "stale", "lost", "unknown_sender", "undelivered", "refused")
"""Kinds of messages that an actor has not sent, received or understood; see `MailboxCounters`."""
INCARNATION = "incarnation"
"""Among an actor's figures: how often it has been started."""
_RESPONSES = "http_responses:"
_OF_MODEL = "@"
"""Between a figure's name and the model whose requests it counts."""
_NOT_IN_A_NAME = re.compile(r"[^a-zA-Z0-9_]")


class RequestMetrics:
    """What one ingress worker counts of the requests to one model."""

    def __init__(self) -> None:
        self.time_to_first_token, self.inter_token_latency, self.e2e_latency = (
            Histogram(bounds) for _, bounds in HISTOGRAMS.values()
        )
        self.counters = dict.fromkeys(COUNTERS, 0)

    def figures(self) -> dict[str, float]:
        """Everything as one flat mapping."""
        figures = {name: float(count) for name, count in self.counters.items()}
        histograms = (self.time_to_first_token, self.inter_token_latency, self.e2e_latency)
        for name, histogram in zip(HISTOGRAMS, histograms, strict=True):
            figures |= histogram.figures(name)
        return figures


class IngressMetrics:
    """What one ingress worker counts.

    Args:
        models: names of those that it serves.
    """

    def __init__(self, models: Iterable[str] = ()) -> None:
        self.counters = dict.fromkeys(CONNECTION_COUNTERS, 0)
        self.responses: dict[int, int] = {}
        self._of_models = {model: RequestMetrics() for model in models}

    def of(self, model: str) -> RequestMetrics:
        """What is counted of the requests to a model; those to any model have an empty name."""
        found = self._of_models.get(model)
        if found is None:
            found = self._of_models[model] = RequestMetrics()
        return found

    def response(self, status: int) -> None:
        """Counts an HTTP response."""
        self.responses[status] = self.responses.get(status, 0) + 1

    def figures(self) -> dict[str, float]:
        """Everything as one flat mapping, for `ActorStats`."""
        figures = {name: float(count) for name, count in self.counters.items()}
        figures |= {f"{_RESPONSES}{status}": float(count) for status, count in self.responses.items()}
        for model, metrics in self._of_models.items():
            figures |= {f"{name}{_OF_MODEL}{model}": value for name, value in metrics.figures().items()}
        return figures


class ActorFigures:
    """The last figures of every actor."""

    def __init__(self) -> None:
        self._figures: dict[str, tuple[float, dict[str, float]]] = {}

    def update(self, actor: str, figures: dict[str, float], now: float) -> None:
        """Replaces the figures of one actor."""
        self._figures[actor] = (now, figures)

    def of(self, actor: str) -> dict[str, float]:
        """The last figures of one actor, empty if it has not reported."""
        return self._figures.get(actor, (0.0, {}))[1]

    def since(self, moment: float) -> dict[str, dict[str, float]]:
        """The last figures of all actors that have reported since a moment, by name."""
        return {actor: figures for actor, (at, figures) in self._figures.items() if at >= moment}

    def render(self, model_of: Callable[[str], str], now: float) -> bytes:
        """All figures in Prometheus' text format.

        Args:
            model_of: the model that an actor works for.
        """
        current = {
            actor: figures for actor, (at, figures) in sorted(self._figures.items()) if now - at <= FORGET_AFTER_S
        }
        registry = CollectorRegistry()
        registry.register(_Exposition(current, model_of))
        return generate_latest(registry)


class _Exposition(Collector):
    """Sorts actors' figures into metric families."""

    def __init__(self, figures: dict[str, dict[str, float]], model_of: Callable[[str], str]) -> None:
        self._figures = figures
        self._model_of = model_of

    def collect(self) -> Iterator[Metric]:
        labels = ["model_name", "actor"]
        ingresses = {actor: figures for actor, figures in self._figures.items() if "connections_lost" in figures}
        for name, (prefix, text) in CONNECTION_COUNTERS.items():
            counter = CounterMetricFamily(f"{prefix}:{name}", text, labels=labels)
            for actor, figures in ingresses.items():
                counter.add_metric([self._model_of(actor), actor], figures[name])
            yield counter
        yield from self._requests(labels, ingresses)
        responses = CounterMetricFamily("runtime:http_responses", "HTTP responses.", labels=["status", "actor"])
        for actor, figures in ingresses.items():
            for name, value in figures.items():
                if name.startswith(_RESPONSES):
                    responses.add_metric([name.removeprefix(_RESPONSES), actor], value)
        yield responses
        yield from self._schedulers(labels)
        yield from self._actors(labels)
        yield from self._gauges(labels, set(ingresses))

    def _requests(self, labels: list[str], ingresses: dict[str, dict[str, float]]) -> Iterator[Metric]:
        """What ingress workers count of each model's requests."""
        of_models: dict[tuple[str, str], dict[str, float]] = {}
        for actor, figures in ingresses.items():
            for name, value in figures.items():
                name, of_model, model = name.partition(_OF_MODEL)
                if of_model:  # what is counted of no model in particular has all of them in its label, or the only one
                    counted = of_models.setdefault((model or self._model_of(actor), actor), {})
                    counted[name] = counted.get(name, 0.0) + value
        for name, (prefix, text) in COUNTERS.items():
            counter = CounterMetricFamily(f"{prefix}:{name}", text, labels=labels)
            for values, figures in of_models.items():
                counter.add_metric(values, figures.get(name, 0.0))
            yield counter
        for name, (text, bounds) in HISTOGRAMS.items():
            histogram = HistogramMetricFamily(f"sglang:{name}", text, labels=labels)
            for values, figures in of_models.items():
                histogram.add_metric(values, _cumulative(figures, name, bounds), figures.get(f"{name}:sum", 0.0))
            yield histogram

    def _schedulers(self, labels: list[str]) -> Iterator[Metric]:
        """What SGLang's schedulers count; as there, the label `engine_type` says what an engine does."""
        labels = [*labels, "engine_type"]
        schedulers = {
            actor: ([self._model_of(actor), actor, _engine_type(figures)], figures)
            for actor, figures in self._figures.items()
            if not figures.keys().isdisjoint(SCHEDULER_GAUGES)
        }
        for name in SCHEDULER_GAUGES:
            gauge = GaugeMetricFamily(f"sglang:{name}", f"{name} of an engine.", labels=labels)
            for values, figures in schedulers.values():
                if name in figures:
                    gauge.add_metric(values, figures[name])
            yield gauge
        for name, (full_name, text) in SCHEDULER_COUNTERS.items():
            counter = CounterMetricFamily(full_name, text, labels=labels)
            for values, figures in schedulers.values():
                counter.add_metric(values, figures.get(name, 0.0))
            yield counter
        histogram = HistogramMetricFamily(f"sglang:{QUEUE_TIME}", "Time until a request gets a slot.", labels=labels)
        for values, figures in schedulers.values():
            buckets = _cumulative(figures, QUEUE_TIME, QUEUE_TIME_BOUNDS)
            histogram.add_metric(values, buckets, figures.get(f"{QUEUE_TIME}:sum", 0.0))
        yield histogram

    def _actors(self, labels: list[str]) -> Iterator[Metric]:
        """What all actors count."""
        restarts = CounterMetricFamily("runtime:actor_restarts", "Times that an actor was started anew.", labels=labels)
        text = "Messages of an actor that were lost, late, refused or not understood."
        errors = CounterMetricFamily("runtime:message_errors", text, labels=[*labels, "kind"])
        for actor, figures in self._figures.items():
            restarts.add_metric([self._model_of(actor), actor], max(0.0, figures.get(INCARNATION, 1.0) - 1.0))
            for kind in MESSAGE_ERRORS:
                errors.add_metric([self._model_of(actor), actor, kind], figures.get(f"messages_{kind}", 0.0))
        yield restarts
        yield errors

    def _gauges(self, labels: list[str], ingresses: set[str]) -> Iterator[Metric]:
        families: dict[str, GaugeMetricFamily] = {}
        for actor, figures in self._figures.items():
            for name, value in figures.items():
                if ":" in name or _OF_MODEL in name or name in SCHEDULER_GAUGES or name == INCARNATION:
                    continue  # shown above
                if actor in ingresses and name in CONNECTION_COUNTERS:
                    continue
                full_name = f"runtime:actor_{_NOT_IN_A_NAME.sub('_', name)}"
                family = families.setdefault(
                    full_name, GaugeMetricFamily(full_name, f"{name} of an actor.", labels=labels)
                )
                family.add_metric([self._model_of(actor), actor], value)
        yield from families.values()


def figures_of_models(figures: Mapping[str, float]) -> dict[str, float]:
    """What an ingress worker counts of requests, summed over the models."""
    total: dict[str, float] = {}
    for name, value in figures.items():
        name, of_model, _ = name.partition(_OF_MODEL)
        if of_model:
            total[name] = total.get(name, 0.0) + value
    return total


def responses_of(figures: Mapping[str, float]) -> dict[str, float]:
    """An ingress worker's counts of HTTP answers, as `http_responses:STATUS`."""
    return {name: value for name, value in figures.items() if name.startswith(_RESPONSES)}


def _engine_type(figures: dict[str, float]) -> str:
    """The role of a scheduler's engine, by figures that only such schedulers have."""
    if "prefills" in figures:
        return "prefill"
    return "decode" if "prefill_engines" in figures else "unified"


def _cumulative(figures: dict[str, float], name: str, bounds: Iterable[float]) -> list[tuple[str, float]]:
    """Buckets as Prometheus wants them: each counts all values up to its bound."""
    total, buckets = 0.0, []
    for i, bound in enumerate([*map(str, map(float, bounds)), "+Inf"]):
        total += figures.get(f"{name}:{i}", 0.0)
        buckets.append((bound, total))
    return buckets
