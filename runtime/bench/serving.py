"""Load on an OpenAI-compatible server, and the figures that the field quotes: TTFT, TPOT, ITL, throughput."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from importlib import resources
from itertools import cycle, islice
from typing import Any

import aiohttp
import msgspec

from llm_runtime.runtime.errors import UserError

Prompt = str | list[int]


@dataclass(frozen=True)
class Load:
    """What is asked of the server.

    Attributes:
        input_words: words of each prompt, a passage of prose; one is about 1.3 tokens.
        output_tokens: tokens of each answer, exactly (`ignore_eos`).
        rate: requests a second, arriving at random (Poisson); 0 sends as many at once as `concurrency` lets.
        prompt: the same prompt for all requests, in place of passages.
    """

    requests: int
    concurrency: int
    input_words: int
    output_tokens: int
    rate: float = 0.0
    seed: int = 0
    prompt: str = ""


@dataclass
class Outcome:
    """One request. Times in seconds.

    Attributes:
        arrivals: when each piece of text came, from the sending of the request on.
        tokens: output tokens, as the server counts them.
    """

    arrivals: list[float] = field(default_factory=list)
    tokens: int = 0
    prompt_tokens: int = 0
    error: str = ""

    @property
    def ttft(self) -> float:
        """Time to the first token."""
        return self.arrivals[0]

    @property
    def latency(self) -> float:
        """Time to the last token."""
        return self.arrivals[-1]

    @property
    def tpot(self) -> float:
        """Time per output token after the first."""
        return (self.arrivals[-1] - self.arrivals[0]) / max(1, self.tokens - 1)

    @property
    def itl(self) -> list[float]:
        """Times between consecutive pieces of text."""
        return [later - earlier for earlier, later in zip(self.arrivals, self.arrivals[1:], strict=False)]


def passages(count: int, words: int, draw: random.Random) -> list[str]:
    """Passages of English prose of so many words. Each begins with a number of its own: no two share a prefix."""
    text = (resources.files("llm_runtime.runtime.bench") / "prose.txt").read_text(encoding="utf-8").split()
    numbers = draw.sample(range(10**6), count)
    starts = [draw.randrange(len(text)) for _ in range(count)]
    return [
        " ".join([str(number), *islice(cycle(text), start, start + words - 1)])
        for number, start in zip(numbers, starts, strict=True)
    ]


async def run_load(url: str, model: str | None, api_key: str | None, load: Load) -> tuple[list[Outcome], float]:
    """Sends the load to a server whose API starts at `url` (".../v1"); outcomes, and seconds from first to last.

    Raises UserError when the server cannot be reached.
    """
    draw = random.Random(load.seed)
    prompts = [load.prompt] * load.requests if load.prompt else passages(load.requests, load.input_words, draw)
    return await run_prompts(
        url, model, api_key, prompts, load.concurrency, load.output_tokens, rate=load.rate, draw=draw
    )


async def run_prompts(
    url: str,
    model: str | None,
    api_key: str | None,
    prompts: Sequence[Prompt],
    concurrency: int,
    output_tokens: int,
    *,
    rate: float = 0.0,
    draw: random.Random | None = None,
    temperature: float = 0.0,
) -> tuple[list[Outcome], float]:
    """The same for given prompts: texts, or lists of token ids. `draw` gives the times between arrivals.

    Raises UserError when the server cannot be reached.
    """
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    slots = asyncio.Semaphore(concurrency)
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)
    async with aiohttp.ClientSession(
        headers=headers, timeout=timeout, connector=aiohttp.TCPConnector(limit=0)
    ) as session:
        name = model or await _first_model(session, url)

        async def one(prompt: Prompt) -> Outcome:
            async with slots:
                return await _request(session, url, name, prompt, output_tokens, temperature)

        began = time.perf_counter()
        tasks = [asyncio.create_task(one(prompt)) async for prompt in _paced(prompts, rate, draw or random.Random(0))]
        outcomes = await asyncio.gather(*tasks)
        return outcomes, time.perf_counter() - began


async def _paced(prompts: Sequence[Prompt], rate: float, draw: random.Random) -> AsyncIterator[Prompt]:
    for prompt in prompts:
        if rate:
            await asyncio.sleep(draw.expovariate(rate))
        yield prompt


async def _first_model(session: aiohttp.ClientSession, url: str) -> str:
    try:
        async with session.get(f"{url}/models") as response:
            response.raise_for_status()
            return str((await response.json())["data"][0]["id"])
    except (aiohttp.ClientError, KeyError, IndexError, ValueError, TimeoutError) as error:
        raise UserError(
            f"{url}/models does not name a model ({error}): is a server running there? Give --url and --model"
        ) from None


async def _request(
    session: aiohttp.ClientSession, url: str, model: str, prompt: Prompt, tokens: int, temperature: float
) -> Outcome:
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": temperature,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    outcome = Outcome()
    began = time.perf_counter()
    try:
        async with session.post(f"{url}/completions", json=body) as response:
            if response.status != 200:
                outcome.error = f"status {response.status}: {(await response.text())[:200]}"
                return outcome
            rest = b""
            async for piece in response.content.iter_any():  # line by line, aiohttp wakes its reader twice an event
                now = time.perf_counter() - began
                *lines, rest = (rest + piece).split(b"\n")
                for line in lines:
                    data = line.removeprefix(b"data:").strip()
                    if line.startswith(b"data:") and data != b"[DONE]":
                        _take_in(_decode(data), outcome, now)
    except (aiohttp.ClientError, TimeoutError, msgspec.MsgspecError) as error:
        outcome.error = f"{type(error).__name__}: {error}"
    if not outcome.error and not outcome.arrivals:
        outcome.error = "the answer has no text"
    return outcome


class _Choice(msgspec.Struct):
    text: str | None = ""


class _Usage(msgspec.Struct):
    completion_tokens: int
    prompt_tokens: int


class _Chunk(msgspec.Struct):
    """An event of a stream, as far as it matters here: a client on the server's cores must be cheap."""

    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Chunk).decode


def _take_in(chunk: _Chunk, outcome: Outcome, now: float) -> None:
    if chunk.error is not None:
        outcome.error = str(chunk.error)
    if chunk.choices and chunk.choices[0].text:
        outcome.arrivals.append(now)
        outcome.tokens += 1  # if the server does not count: one a piece
    if chunk.usage is not None:
        outcome.tokens = chunk.usage.completion_tokens
        outcome.prompt_tokens = chunk.usage.prompt_tokens
