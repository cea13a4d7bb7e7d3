"""GET /health, /health_generate and /metrics."""

from __future__ import annotations

import asyncio
import time
from array import array

from prometheus_client import CONTENT_TYPE_LATEST

from llm_runtime.actors.ingress.errors import ApiError
from llm_runtime.actors.ingress.exchange import Exchange
from llm_runtime.actors.ingress.journal import ReplayState
from llm_runtime.actors.ingress.service import Service
from llm_runtime.actors.ingress.work import Work
from llm_runtime.actors.messages import SamplingParams, TextParams

HEALTH_GENERATE_TIMEOUT_S = 20.0
FRESH_S = 1.0
"""Engines are not asked again for so long."""


async def health(service: Service, exchange: Exchange) -> None:
    """This worker serves. Says nothing of engines: a busy or restarting engine is no reason to restart the server."""
    service.check_open(exchange)
    await exchange.answer(b"{}")


class HealthGenerate:
    """Asks the engines, once for all who ask at the same time or within a second."""

    def __init__(self) -> None:
        self._asking: asyncio.Task[None] | None = None
        self._until = 0.0

    async def __call__(self, service: Service, exchange: Exchange) -> None:
        """Answers when an engine of each model has made one token, or a vector of one. Raises ApiError when none of
        some model's has in time."""
        service.check_open(exchange)
        if self._asking is None or (self._asking.done() and time.monotonic() > self._until):
            self._asking = asyncio.get_running_loop().create_task(self._ask(service))
        await asyncio.shield(self._asking)
        await exchange.answer(b"{}")

    async def _ask(self, service: Service) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for model in service.models:
                    group.create_task(_try(service.about(model.name)))
        except* ApiError as errors:
            raise errors.exceptions[0] from None
        finally:
            self._until = time.monotonic() + FRESH_S


async def _try(service: Service) -> None:
    model = service.model
    token = model.eos_token_ids[0] if model.eos_token_ids else 0
    prompt = array("i", [token]).tobytes()
    sampling = SamplingParams(max_tokens=1, seed=0, temperature=0.0)
    work = Work(None, ReplayState())
    try:
        async with asyncio.timeout(HEALTH_GENERATE_TIMEOUT_S):
            if model.task != "generate":
                await service.encoders.vectors(work, [(prompt, b"")])
            else:
                with service.generate(work, [(prompt, 1)], sampling, TextParams()) as generation:
                    await generation.progress()
    except TimeoutError:
        which = f" of the model '{model.name}'" if len(service.models) > 1 else ""
        raise ApiError(503, f"No engine{which} answered within {HEALTH_GENERATE_TIMEOUT_S:g} seconds.") from None


async def metrics(service: Service, exchange: Exchange) -> None:
    """All actors' figures for Prometheus."""
    now = time.monotonic()
    service.actors.update(service.name, service.figures(), now)
    body = service.actors.render(service.model_of_actor, now)
    await exchange.answer(body, headers=[(b"content-type", CONTENT_TYPE_LATEST.encode())])
