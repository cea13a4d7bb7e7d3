"""With and without speculation a node gives the same answers, also when processes die while guesses are verified."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from support import DEADLINE_S, Node, eventually

LIST = "".join(f"{number}. apples, pears, plums and cherries\n" for number in range(1, 7))
PROMPTS = (
    f"The list:\n{LIST}\nThe same list again:\n{LIST[:40]}",
    "one two three four five six seven eight " * 8,
    "def add(a, b):\n    return a + b\n\n\n" * 3 + "def",
)
SAMPLINGS: tuple[dict[str, Any], ...] = ({"temperature": 0.0}, {"temperature": 0.7, "top_p": 0.9, "seed": 11})
TOKENS = 32
ROUNDS = 5


def complete(node: Node, prompt: str, sampling: Mapping[str, Any], after: Mapping[int, Callable[[], None]]) -> str:
    """A streamed answer. `after` is called when so many pieces of it have arrived."""
    body = {"model": "smollm2-135m-instruct", "prompt": prompt, "max_tokens": TOKENS, "stream": True}
    body |= {"ignore_eos": True, **sampling}
    request = urllib.request.Request(
        f"{node.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    text, pieces = "", 0
    with urllib.request.urlopen(request, timeout=DEADLINE_S) as answer:
        for line in answer:
            if line.startswith(b"data: {"):
                text += json.loads(line[6:])["choices"][0]["text"]
                pieces += 1
                if pieces in after:
                    after[pieces]()
    return text


def answers(node: Node, after: Mapping[int, Callable[[], None]]) -> list[str]:
    """All prompts with all samplings at once; `after` belongs to the first."""
    jobs = [(prompt, sampling) for sampling in SAMPLINGS for prompt in PROMPTS]
    with ThreadPoolExecutor(len(jobs)) as pool:
        futures = [pool.submit(complete, node, *job, after if not i else {}) for i, job in enumerate(jobs)]
        return [future.result(DEADLINE_S) for future in futures]


def scheduler_figure(node: Node, name: str) -> float:
    return sum(value for key, value in node.figures().items() if key.startswith(f"runtime:actor_{name}{{"))


def test_the_same_answers_with_and_without_speculation_and_with_deaths(new_node: Callable[..., Node]) -> None:
    pool = "engine.main.kv_tokens=2048"
    off = new_node("engine.main.speculation=off", pool).up()
    wanted = answers(off, {})
    assert off.down() == 0
    on = new_node("engine.main.speculation=ngram", pool).up()
    for number in range(1, ROUNDS + 1):  # the first ones measure what steps cost
        assert answers(on, {}) == wanted
        drawn = number * len(PROMPTS) * len(SAMPLINGS) * TOKENS
        eventually(lambda drawn=drawn: scheduler_figure(on, "generation_tokens") >= drawn, "figures of this round")
        if scheduler_figure(on, "spec_accepted_tokens"):
            break
    else:
        raise AssertionError("nothing was ever guessed")
    kills = {2: lambda: on.kill("main.rank0"), 5: lambda: on.kill("main.scheduler")}
    assert answers(on, kills) == wanted
    for name in ("main.rank0", "main.scheduler"):
        eventually(lambda name=name: on.actor(name).restarts >= 1, f"the restart of {name}")
