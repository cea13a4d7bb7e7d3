"""`LLM`: the use of a model from Python, with the embedded one."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
from llm_tools import private_tree
from support import MODEL, ROOT, eventually

from llm_runtime import LLM, SamplingParams, UserError
from llm_runtime.runtime.offline.settings import as_arguments

STORIES = [f"Story {number}: once upon a time" for number in range(8)]
GREEDY = SamplingParams(max_tokens=8, temperature=0)


def python(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_importing_the_package_imports_nothing() -> None:
    code = "import sys; import runtime; print(sorted(m for m in sys.modules if m.startswith(('runtime.', 'torch'))))"
    out, _ = python(code).communicate(timeout=60)
    assert out == "[]\n"


def test_results_are_in_order_with_all_that_belongs_to_them(llm: LLM) -> None:
    results = llm.generate(STORIES, GREEDY)
    assert [each.prompt for each in results] == STORIES
    alone = [llm.generate(prompt, GREEDY)[0] for prompt in STORIES[:3]]
    assert [each.token_ids for each in results[:3]] == [each.token_ids for each in alone]
    assert len({tuple(each.token_ids) for each in results}) > 1
    for each in results:
        assert each.finish_reason == "length"
        assert len(each.token_ids) == each.usage.completion_tokens == 8
        assert each.usage.prompt_tokens > 4
    of_ids = llm.generate([504, 3575, 282], GREEDY)
    assert (len(of_ids), of_ids[0].usage.prompt_tokens) == (1, 3)


def test_fields_pass_through(llm: LLM) -> None:
    params = SamplingParams(max_tokens=6, n=2, seed=7, temperature=1, logprobs=2)
    first, again = llm.generate([STORIES[0]] * 2, params)
    assert [each.token_ids for each in first.completions] == [each.token_ids for each in again.completions]
    other = llm.generate(STORIES[0], SamplingParams(max_tokens=6, seed=99, temperature=1))[0]
    assert other.token_ids not in [each.token_ids for each in first.completions]
    assert (len(first.completions), first.usage.completion_tokens) == (2, 12)
    for completion in first.completions:
        assert completion.logprobs is not None
        assert [each.token_id for each in completion.logprobs] == completion.token_ids
        assert all(each.logprob <= 0 and len(each.top) == 2 for each in completion.logprobs)
    each_its_own = [SamplingParams(max_tokens=count, temperature=0, ignore_eos=True) for count in (1, 3)]
    assert [len(each.token_ids) for each in llm.generate(STORIES[:2], each_its_own)] == [1, 3]
    stopped = llm.generate("1, 2, 3, 4, 5, 6,", SamplingParams(max_tokens=20, temperature=0, stop=["9"]))[0]
    assert (stopped.finish_reason, stopped.completions[0].stop_reason) == ("stop", "9")
    assert "8" in stopped.text
    assert "9" not in stopped.text


def test_structured_output(llm: LLM) -> None:
    schema = {"type": "object", "properties": {"old": {"type": "boolean"}}, "required": ["old"]}
    results = llm.generate(
        ["A castle in JSON: ", "The year: "],
        [
            SamplingParams(max_tokens=40, temperature=0, json_schema={**schema, "additionalProperties": False}),
            SamplingParams(max_tokens=20, temperature=0, regex="1[0-9]{3}"),
        ],
    )
    assert type(json.loads(results[0].text)["old"]) is bool
    assert results[1].text.isdigit()


def test_chat(llm: LLM) -> None:
    question = [{"role": "user", "content": "What is the capital of France?"}]
    (result,) = llm.chat(question, SamplingParams(max_tokens=16, temperature=0))
    assert "Paris" in result.text
    assert result.finish_reason == "stop"
    assert [each.text for each in llm.chat([question] * 2, SamplingParams(temperature=0))] == [result.text] * 2


def test_the_death_of_a_rank_changes_nothing(llm: LLM) -> None:
    params = SamplingParams(max_tokens=32, temperature=1, seed=3, ignore_eos=True)
    before = llm.generate(STORIES, params)
    rank = private_tree(llm)["main.rank0"]

    def busy() -> bool:
        return private_tree(llm)["main.rank0"]["doing"] != ""

    after = []
    generating = threading.Thread(target=lambda: after.extend(llm.generate(STORIES, params)))
    generating.start()
    eventually(busy, "the rank to compute")
    os.kill(rank["pid"], signal.SIGKILL)
    generating.join(120)
    assert [each.token_ids for each in after] == [each.token_ids for each in before]
    assert [each.text for each in after] == [each.text for each in before]

    def restarted() -> bool:
        now = private_tree(llm)["main.rank0"]
        return now["incarnation"] == rank["incarnation"] + 1 and now["state"] == "running"

    eventually(restarted, "the rank to run again")


def test_names_of_vllm_and_sglang_are_understood(llm: LLM) -> None:
    ours = SamplingParams(max_tokens=5, seed=4, temperature=1, include_stop_str_in_output=True)
    theirs = SamplingParams(max_new_tokens=5, sampling_seed=4, temperature=1, no_stop_trim=True)
    assert ours.native() == theirs.native()
    assert len(llm.generate("The node", SamplingParams(max_new_tokens=3, ignore_eos=True))[0].token_ids) == 3
    names = {"tensor_parallel_size": 2, "max_num_seqs": 4, "enable_prefix_caching": False, "context_length": 512}
    assert as_arguments(names, {}, None) == [
        "engine.main.tp=2",
        "engine.main.max_running=4",
        "engine.main.prefix_cache=false",
        "model.max_model_len=512",
    ]


def test_names_that_there_are_not() -> None:
    neutral = {"trust_remote_code": False, "quantization": None, "data_parallel_size": 1, "enforce_eager": False}
    assert as_arguments({**neutral, "tp_size": 2}, {}, None) == ["engine.main.tp=2"]
    for name, value in (("trust_remote_code", True), ("quantization", "awq"), ("data_parallel_size", 2)):
        with pytest.raises(UserError, match=f"there is no argument {name}: "):
            as_arguments({name: value}, {}, None)
    theirs: dict[str, Any] = {"guided_decoding": {}}
    with pytest.raises(UserError, match="no sampling parameter guided_decoding: give json_schema="):
        SamplingParams(**theirs)
    with pytest.raises(UserError, match=r"no sampling parameter temprature: did you mean temperature\?"):
        SamplingParams(**{"temprature": 1.0})  # type: ignore[arg-type]
    changed = dataclasses.replace(copy.copy(SamplingParams(n=2)), seed=1)
    assert (changed.n, changed.seed, pickle.loads(pickle.dumps(changed))) == (2, 1, changed)


def test_refusals_are_one_sentence(llm: LLM, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^prompt 1: .*maximum context length"):
        llm.generate(["short", "long"], [GREEDY, SamplingParams(max_tokens=9000)])
    with pytest.raises(UserError, match="2 prompts but 1 sampling parameters"):
        llm.generate(["a", "b"], [SamplingParams()])
    with pytest.raises(UserError, match=r"no key kv_token .*did you mean kv_tokens"):
        LLM(MODEL, kv_token=1)
    with pytest.raises(UserError, match="tensor_parallel_size is another name of tp: give one of them"):
        LLM(MODEL, tensor_parallel_size=2, tp=2)
    with pytest.raises(UserError, match="there is no argument gpu_memory_utilization: give kv_tokens=N"):
        LLM(MODEL, gpu_memory_utilization=0.9)
    with pytest.raises(UserError, match="max_new_tokens is another name of max_tokens: give one of them"):
        SamplingParams(max_tokens=1, max_new_tokens=1)
    (tmp_path / "bad.toml").write_text('[model]\npath = "m"\n[engine.main]\ntp = 99\n')
    with pytest.raises(UserError, match=r"bad.toml:4: engine.main.tp: is 99; give an integer from 1 to 64"):
        LLM(topology=tmp_path / "bad.toml")
    assert llm.generate([]) == []
    assert llm.generate("The node", GREEDY)  # still serves


def test_no_process_outlives_the_program(llm: LLM) -> None:
    """Nor does its run directory. Neither program closes its LLM: one ends by itself, the other is killed."""
    code = (
        f"from llm_runtime import LLM\nllm = LLM({MODEL!r}, kv_tokens=1024)\n"
        "print(llm.node._process.pid, llm.node.directory, flush=True)\ninput()\n"
    )
    programs = [python(code), python(code)]
    started = [program.stdout.readline().split() for program in programs if program.stdout is not None]
    roots = [psutil.Process(int(pid)) for pid, _ in started]
    processes = [*roots, *(child for root in roots for child in root.children(recursive=True))]
    assert len(processes) > 16
    programs[1].kill()
    for program in programs:
        program.communicate("\n", timeout=60)
    assert [program.returncode for program in programs] == [0, -signal.SIGKILL]
    psutil.wait_procs(processes, timeout=60)
    assert not [each for each in processes if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]
    for _, directory in started:
        eventually(lambda path=Path(directory): not path.exists(), "the run directory to go")  # type: ignore[misc]
