"""Figures of ingress workers as Prometheus gets them."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from llm_runtime.actors.ingress.metrics import ActorFigures, IngressMetrics


def requests_by_model(metrics: IngressMetrics, all_models: str) -> dict[str, tuple[float, float]]:
    """Model label to (requests, repeats)."""
    actors = ActorFigures()
    actors.update("ingress0", metrics.figures(), 0.0)
    values: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(actors.render(lambda actor: all_models, 0.0).decode()):
        for sample in family.samples:
            if sample.name in ("sglang:num_requests_total", "runtime:repeats_total"):
                key = sample.labels["model_name"], sample.name
                assert key not in values
                values[key] = sample.value
    models = {model for model, _ in values}
    return {
        model: (values[model, "sglang:num_requests_total"], values[model, "runtime:repeats_total"]) for model in models
    }


def test_requests_of_each_model_and_what_belongs_to_none() -> None:
    metrics = IngressMetrics(["a", "b"])
    metrics.of("a").counters["num_requests"] += 2
    assert requests_by_model(metrics, "a,b") == {"a": (2, 0), "b": (0, 0)}
    metrics.of("").counters["repeats"] += 1
    assert requests_by_model(metrics, "a,b") == {"a": (2, 0), "b": (0, 0), "a,b": (0, 1)}


def test_what_belongs_to_no_model_is_the_only_one_s() -> None:
    metrics = IngressMetrics(["a"])
    metrics.of("a").counters["num_requests"] += 2
    metrics.of("a").counters["repeats"] += 1
    metrics.of("").counters["repeats"] += 1
    assert requests_by_model(metrics, "a") == {"a": (2, 2)}
