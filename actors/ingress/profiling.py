"""POST /start_profile and /stop_profile, as SGLang has them: torch's profiler in every rank."""

from __future__ import annotations

import os
import time
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from llm_runtime.actors.ingress.errors import invalid
from llm_runtime.actors.ingress.exchange import Exchange
from llm_runtime.actors.ingress.output_deltas import new_rid
from llm_runtime.actors.ingress.service import Service
from llm_runtime.actors.messages import Activity, Profile


class StartProfileBody(Struct, forbid_unknown_fields=True):
    """Body of POST /start_profile; see `Profile`. The last three are not supported, and may say so."""

    output_dir: Annotated[str, Meta(max_length=4096)] | None = None
    num_steps: Annotated[int, Meta(ge=1, le=10_000)] | None = None
    activities: Annotated[list[Activity], Meta(min_length=1, max_length=2)] | None = None
    record_shapes: bool | None = None
    with_stack: bool | None = None
    start_step: None = None
    profile_by_stage: bool | None = None
    merge_profiles: bool | None = None


class StopProfileBody(Struct, forbid_unknown_fields=True):
    """Body of POST /stop_profile."""


async def start_profile(service: Service, body: StartProfileBody, exchange: Exchange) -> None:
    """Answers when the ranks have begun. With `num_steps` the profiles end by themselves."""
    if body.profile_by_stage or body.merge_profiles:
        name = "profile_by_stage" if body.profile_by_stage else "merge_profiles"
        raise invalid(f"'{name}' is not supported: leave it out.", name)
    message = Profile(
        new_rid(),
        service.name,
        True,
        f"{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(2).hex()}",
        body.output_dir or "",
        body.num_steps or 0,
        body.activities or ["CPU", "GPU"],
        bool(body.record_shapes),
        True if body.with_stack is None else body.with_stack,
    )
    await _ask(service, message, exchange, "Start profiling.")


async def stop_profile(service: Service, body: StopProfileBody, exchange: Exchange) -> None:
    """Answers when the ranks have written their profiles."""
    await _ask(service, Profile(new_rid(), service.name, False), exchange, "Stop profiling.")


async def _ask(service: Service, message: Profile, exchange: Exchange, done: str) -> None:
    infos = await service.known_engines()
    ranks = {info.scheduler: [f"{info.engine}.rank{rank}" for rank in range(info.tp)] for info in infos}
    answers = await service.control.profile(ranks, message)
    problems = [answer.error for answer in answers if answer.error]
    files = [answer.path for answer in answers if not answer.error]
    if not files:
        raise invalid(" ".join(problems))
    document: dict[str, Any] = {"message": done, "files": files}
    await exchange.answer(msgspec.json.encode(document | ({"problems": problems} if problems else {})))
