"""Real clients, unmodified, against a served model."""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor

import openai
import psutil
import pytest
from openai.types.chat import ChatCompletionMessageParam
from support import MODEL, Node, eventually

# Each token of the answer is nearly 1 ahead of the next likely one, in every type of weights.
FRANCE: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What is the capital of France?"}]


def test_a_chat_answers_paris_token_by_token(node: Node) -> None:
    stream = node.client.chat.completions.create(
        model=MODEL, messages=FRANCE, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    texts = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert "".join(texts) == "The capital of France is Paris."
    assert len(texts) >= 5
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 8
    whole = node.client.chat.completions.create(model=MODEL, messages=FRANCE, temperature=0)
    assert whole.choices[0].message.content == "".join(texts)
    assert whole.choices[0].finish_reason == "stop"


def test_n_logprobs_and_stop(node: Node) -> None:
    answer = node.client.chat.completions.create(
        model=MODEL, messages=FRANCE, temperature=0.9, seed=5, n=2, logprobs=True, top_logprobs=3, max_tokens=12
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    for choice in answer.choices:
        assert choice.logprobs is not None
        content = choice.logprobs.content
        assert content is not None
        assert all(len(entry.top_logprobs) == 3 and entry.logprob <= 0 for entry in content)
        joined = b"".join(bytes(entry.bytes or []) for entry in content).decode()
        assert joined.removesuffix("<|im_end|>") == choice.message.content
    stopped = node.client.completions.create(model=MODEL, prompt="1, 2, 3, 4,", temperature=0, max_tokens=30, stop=" 7")
    assert stopped.choices[0].text == " 5, 6,"
    assert stopped.choices[0].finish_reason == "stop"


def test_the_same_seed_gives_the_same_text_and_another_one_another(node: Node) -> None:
    def story(seed: int) -> str:
        answer = node.client.completions.create(
            model=MODEL, prompt="Once upon a time", max_tokens=24, temperature=1.0, seed=seed
        )
        return answer.choices[0].text

    assert story(1) == story(1)
    assert len({story(1), story(2), story(3)}) == 3


def test_error_classes(node: Node) -> None:
    with pytest.raises(openai.NotFoundError):
        node.client.chat.completions.create(model="nobody", messages=FRANCE)
    with pytest.raises(openai.BadRequestError) as too_long:
        node.client.completions.create(model=MODEL, prompt="word " * 9000)
    assert too_long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError):
        node.client.chat.completions.create(model=MODEL, messages=[])


def test_curl_streams(node: Node) -> None:
    body = f'{{"model": "{MODEL}", "prompt": "The sky is", "max_tokens": 6, "temperature": 0, "stream": true}}'
    command = ["curl", "-sN", "-m", "60", f"{node.url}/v1/completions", "-H", "Content-Type: application/json", "-d"]
    output = subprocess.run([*command, body], capture_output=True, text=True, timeout=90, check=True).stdout
    events = [line for line in output.splitlines() if line]
    assert all(event.startswith("data: ") for event in events)
    assert events[-1] == "data: [DONE]"
    assert len(events) >= 3, "tokens of several steps may share an event, but not all of them"


def test_two_hundred_requests_at_concurrency_32(node: Node) -> None:
    def one(number: int) -> int:
        answer = node.client.completions.create(
            model=MODEL,
            prompt=f"Request number {number}: tell me",
            max_tokens=4,
            temperature=0,
            extra_body={"ignore_eos": True},
        )
        assert answer.usage is not None
        return answer.usage.completion_tokens

    with ThreadPoolExecutor(32) as pool:
        assert list(pool.map(one, range(200))) == [4] * 200


def test_a_client_that_leaves_frees_its_pages(node: Node) -> None:
    def empty() -> bool:
        return not node.metric("sglang:num_running_reqs") and not node.metric("sglang:num_queue_reqs")

    eventually(empty, "an engine without requests")
    stream = node.client.completions.create(
        model=MODEL, prompt="Count:", max_tokens=4000, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    eventually(lambda: node.metric("sglang:num_running_reqs"), "the request to run")
    stream.close()
    eventually(empty, "its end")


def test_a_second_request_reuses_the_prefix_of_the_first(node: Node) -> None:
    prefix = "The quick brown fox jumps over the lazy dog. " * 110
    cached = 0
    for question in ("What did the fox do?", "What did the dog do?"):
        answer = node.client.completions.create(model=MODEL, prompt=prefix + question, max_tokens=1)
        assert answer.usage is not None
        assert answer.usage.prompt_tokens > 1000
        details = answer.usage.prompt_tokens_details
        assert details is not None
        cached = details.cached_tokens or 0
    assert cached >= 0.95 * answer.usage.prompt_tokens


def test_every_role_is_a_process_with_a_readable_title(node: Node) -> None:
    tree = list(node.tree().walk())
    workers = {each.name for each in tree if each.kind == "worker"}
    engine = {"main.rank0", "main.grammar", "main.scheduler"}
    assert workers == {"bootstrap", *engine, "detokenizer", "tokenizer", "ingress0"}
    assert len({each.pid for each in tree}) == len(tree)
    for parent in tree:
        for child in parent.children:
            process = psutil.Process(child.pid)
            assert process.ppid() == parent.pid
            assert process.cmdline()[0].startswith(f"runtime: {child.name}")
