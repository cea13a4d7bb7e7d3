"""One request over HTTP, read as a client reads it: what arrived, and when."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from llm_runtime.runtime.chaos.corpus import Request

Token = int | str


@dataclass
class Choice:
    """One answer. `tokens` are ids or texts, empty where the answer does not show them."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)
    prompt_logprobs: list[float | None] = field(default_factory=list)
    finish: str = ""


@dataclass
class Answer:
    """What a client got.

    Attributes:
        arrivals: when each piece of a stream came, monotonic seconds.
        counted: output tokens of all choices, as the server counts them.
        error: why the request failed; empty if it did not.
        protocol: what contradicts itself in the answer, such as text that a client had already seen and that changed.
    """

    choices: list[Choice]
    began: float
    arrivals: list[float] = field(default_factory=list)
    counted: int = 0
    error: str = ""
    protocol: str = ""


async def send(session: aiohttp.ClientSession, url: str, request: Request, timeout_s: float) -> Answer:
    """Sends a request and reads its answer to the end. Failures are in `Answer.error`."""
    answer = Answer([Choice() for _ in range(request.choices)], time.monotonic())
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    try:
        async with session.post(url + request.path, json=request.body, timeout=timeout) as response:
            if response.status != 200:
                answer.error = f"status {response.status}: {(await response.text())[:200]}"
            elif request.streamed:
                await _read_stream(response, request, answer)
            else:
                _take(json.loads(await response.read()), request, answer)
    except TimeoutError:
        answer.error = f"no end after {timeout_s:g} s"
    except (aiohttp.ClientError, ValueError, LookupError, TypeError) as error:
        answer.error = f"{type(error).__name__}: {error}"
    if not answer.error and not all(choice.finish for choice in answer.choices):
        answer.error = "the answer ended without a finish reason"
    return answer


async def _read_stream(response: aiohttp.ClientResponse, request: Request, answer: Answer) -> None:
    done = False
    async for line in response.content:
        if not line.startswith(b"data:"):
            continue
        data = line.removeprefix(b"data:").strip()
        if data == b"[DONE]":
            done = True
            continue
        event = json.loads(data)
        if "error" in event:
            answer.error = f"the stream ended with {event['error']}"
            return
        answer.arrivals.append(time.monotonic())
        _take(event, request, answer)
    if not done:
        answer.error = "the stream ended without [DONE]"


def _take(event: dict[str, Any], request: Request, answer: Answer) -> None:
    """Adds an event, or a whole document, to the answer."""
    if request.kind == "native":
        _take_native(event, answer)
        return
    if event.get("usage"):
        answer.counted = int(event["usage"]["completion_tokens"])
    for each in event["choices"]:
        choice = answer.choices[each["index"]]
        if choice.finish:
            answer.protocol = "text after the finish reason"
        if request.kind == "chat":
            message = each.get("delta") or each.get("message") or {}
            choice.text += message.get("content") or ""
            for call in message.get("tool_calls") or ():
                choice.text += call["function"].get("name") or ""
                choice.text += call["function"].get("arguments") or ""
            for entry in (each.get("logprobs") or {}).get("content") or ():
                choice.tokens.append(entry["token"])
                choice.logprobs.append(entry["logprob"])
        else:
            choice.text += each["text"]
            logprobs = each.get("logprobs") or {}
            choice.tokens += logprobs.get("tokens") or ()
            choice.logprobs += logprobs.get("token_logprobs") or ()
        choice.finish = each["finish_reason"] or ""


def _take_native(event: dict[str, Any], answer: Answer) -> None:
    """Each event holds the whole answer so far: it must continue the one before."""
    choice, meta = answer.choices[0], event["meta_info"]
    ids, text = event["output_ids"], event["text"]
    if ids[: len(choice.tokens)] != choice.tokens or not text.startswith(choice.text):
        answer.protocol = "an event takes back what the one before had said"
    choice.text, choice.tokens = text, ids
    choice.logprobs = [each[0] for each in meta.get("output_token_logprobs") or ()]
    choice.prompt_logprobs = [each[0] for each in meta.get("input_token_logprobs") or ()]
    choice.finish = (meta["finish_reason"] or {}).get("type", "")
    answer.counted = int(meta["completion_tokens"])
