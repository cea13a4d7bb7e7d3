"""GET /health, /health_generate and /metrics."""

from __future__ import annotations

import asyncio
import time
from array import array

from prometheus_client import CONTENT_TYPE_LATEST

from actors.ingress.errors import ApiError
from actors.ingress.exchange import Exchange
from actors.ingress.service import Service
from actors.messages import SamplingParams, TextParams

HEALTH_GENERATE_TIMEOUT_S = 20.0


async def health(service: Service, exchange: Exchange) -> None:
    """This worker serves. Says nothing of engines: a busy or restarting engine is no reason to restart the server."""
    await exchange.answer(b"{}")


async def health_generate(service: Service, exchange: Exchange) -> None:
    """Answers when an engine has made one token, or a vector of one. Raises ApiError when none has in time."""
    config = service.config
    token = config.eos_token_ids[0] if config.eos_token_ids else 0
    prompt = array("i", [token]).tobytes()
    sampling = SamplingParams(max_tokens=1, seed=0, temperature=0.0)
    try:
        async with asyncio.timeout(HEALTH_GENERATE_TIMEOUT_S):
            if config.task != "generate":
                await service.encoders.vectors(exchange.work, [(prompt, b"")])
            else:
                with service.generate(exchange, [(prompt, 1)], sampling, TextParams()) as generation:
                    await generation.progress()
    except TimeoutError:
        raise ApiError(503, f"No engine answered within {HEALTH_GENERATE_TIMEOUT_S:g} seconds.") from None
    await exchange.answer(b"{}")


async def metrics(service: Service, exchange: Exchange) -> None:
    """All actors' figures for Prometheus."""
    now = time.monotonic()
    service.actors.update(service.name, service.figures(), now)
    body = service.actors.render(service.config.served_model_names[0], now)
    await exchange.answer(body, headers=[(b"content-type", CONTENT_TYPE_LATEST.encode())])
