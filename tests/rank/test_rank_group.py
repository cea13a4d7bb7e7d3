"""Tensor parallelism with real processes: the tokens of one process, and the same bits whatever the batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from rank_tools import generate, rank_config, save_model
from support import eventually

from llm_runtime.actors.messages import SamplingParams
from llm_runtime.actors.rank import build_executor
from llm_runtime.actors.rank.tp_group import TPGroup

HERE = Path(__file__).parent
GREEDY = {"max_tokens": 64, "seed": 0, "temperature": 0.0}


def run_group(model: Path, directory: Path, tp: int, runs: list[dict[str, Any]], **settings: Any) -> list[Any]:
    """Runs all ranks and returns rank 0's results."""
    environment = {**os.environ, "PYTHONPATH": f"{HERE.parents[1]}/src:{HERE}"}
    processes = []
    for rank in range(tp):
        config = rank_config(model, tp=tp, rank=rank, process_group_dir=str(directory / "group"), **settings)
        process = subprocess.Popen(
            [sys.executable, str(HERE / "tp_worker.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert process.stdin is not None
        process.stdin.write(json.dumps({"config": msgspec.to_builtins(config), "runs": runs}))
        process.stdin.close()
        process.stdin = None
        processes.append(process)
    try:
        outputs = [process.communicate(timeout=170)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * tp
    return json.loads(outputs[0])  # type: ignore[no-any-return]


def test_smollm2_on_two_ranks(
    smollm2: Path, prompts: list[list[int]], expected: list[list[int]], tmp_path: Path
) -> None:
    """9 query heads and 3 key-value heads: 6 and 2 on rank 0, 3 and 1 on rank 1."""
    chosen = list(range(18))
    run = {"prompts": [prompts[index] for index in chosen], "sampling": {**GREEDY, "max_tokens": 32}, "how": {}}
    (results,) = run_group(smollm2, tmp_path, 2, [{**run, "how": {"chunk": 15}}])
    assert [output for output, _ in results] == [expected[index][:32] for index in chosen]


@pytest.mark.parametrize(("tp", "dtype"), [(2, "float32"), (3, "bfloat16")])
def test_bits_do_not_depend_on_the_batch(tmp_path: Path, tp: int, dtype: str) -> None:
    """Also the tokens are those of one process."""
    model = tmp_path / "model"
    save_model(model, "Qwen2ForCausalLM", num_key_value_heads=3, vocab_size=290)
    generator = np.random.default_rng(2)
    prompts = [generator.integers(0, 290, length).tolist() for length in (3, 40, 17, 64, 33)]
    sampling = {"max_tokens": 8, "seed": 3, "temperature": 0.0, "logprobs": 5}
    runs = [
        {"prompts": prompts, "sampling": sampling, "how": how}
        for how in ({}, {"alone": True}, {"chunk": 7}, {"repeat": True})
    ]
    settings = {"dtype": dtype, "max_model_len": 128}
    together, *others = run_group(model, tmp_path, tp, runs, deterministic=True, **settings)
    for other in others:
        assert other == together
    if dtype == "float32":
        alone = generate(build_executor(rank_config(model, **settings)), prompts, SamplingParams(**sampling))
        assert [output for output, _ in together] == [sequence.output for sequence in alone]


def test_biases_are_added_once(tmp_path: Path) -> None:
    model = tmp_path / "model"
    save_model(model, "LlamaForCausalLM", attention_bias=True, mlp_bias=True)
    prompts = [list(range(30)), list(range(100, 150))]
    sampling = {"max_tokens": 8, "seed": 3, "temperature": 0.0, "logprobs": 0, "frequency_penalty": 0.5}
    (results,) = run_group(
        model, tmp_path, 2, [{"prompts": prompts, "sampling": sampling, "how": {}}], max_model_len=128
    )
    alone = generate(build_executor(rank_config(model, max_model_len=128)), prompts, SamplingParams(**sampling))
    for (output, logprobs), sequence in zip(results, alone, strict=True):
        assert output == sequence.output
        got = [np.frombuffer(bytes.fromhex(entry), np.float32)[0] for entry in logprobs]
        np.testing.assert_allclose(
            got, [np.frombuffer(e.logprobs, np.float32)[0] for e in sequence.logprobs], atol=1e-4
        )


def test_meetings_of_the_past_are_not_joined(tmp_path: Path) -> None:
    """A rank waits for a rank 0 that is alive, not for files that a killed one has left."""
    script = (
        "import sys, os, signal; from pathlib import Path; from llm_runtime.actors.rank.tp_group import TPGroup;"
        "TPGroup(2, 0, Path(sys.argv[1]))._open_meeting(Path(sys.argv[1])); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False, cwd=HERE.parents[1], timeout=60)
    left = (tmp_path / "current").read_text()
    found: list[str] = []
    looks = 0

    def stopped() -> bool:
        nonlocal looks
        looks += 1
        return False

    waiting = threading.Thread(
        target=lambda: found.append(TPGroup(2, 1, tmp_path)._find_meeting(tmp_path, stopped).name), daemon=True
    )
    waiting.start()
    eventually(lambda: looks >= 3, "three looks")
    assert not found
    leader = TPGroup(2, 0, tmp_path)
    meeting = leader._open_meeting(tmp_path)
    waiting.join(30)
    assert found == [meeting.name] != [left]
    assert not (tmp_path / left).exists()


def test_a_rank_that_waits_can_be_stopped(tmp_path: Path) -> None:
    with pytest.raises(InterruptedError):
        TPGroup(2, 1, tmp_path).join(torch.device("cpu"), lambda: True)
