"""Steps that are padded to a few sizes, as on CUDA devices, with a recording that just runs the function."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from rank_tools import Driver, rank_config, save_model

from llm_runtime.actors.actor import StartFailure
from llm_runtime.actors.messages import SamplingParams
from llm_runtime.actors.rank import Executor, build_executor, device
from llm_runtime.actors.rank.device import in_device_memory
from llm_runtime.actors.rank.padded import PaddedDecode, PaddedSteps, padded_rows


def test_a_full_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that comes back late is waited for; else one sentence says what to do."""
    attempts: list[int] = []

    def third_time() -> str:
        attempts.append(1)
        if len(attempts) < 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return "here"

    assert in_device_memory(third_time, "it does", "lower it") == "here"
    attempts.clear()
    monkeypatch.setattr(device, "PATIENCE_S", -1.0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**30, 2**34))
    sentence = "it does not fit into the device's memory, of which 1.0 of 16.0 GiB are free: lower it"
    with pytest.raises(StartFailure, match=sentence):
        in_device_memory(third_time, "it does", "lower it")


@pytest.mark.parametrize("most", [1, 3, 8, 17, 100, 512])
def test_padded_rows(most: int) -> None:
    sizes = padded_rows(most)
    assert sizes == sorted(set(sizes))
    assert (sizes[0], sizes[-1]) == (1, most)
    assert len(sizes) < 25
    assert all(b - a <= max(8, a // 4) for a, b in pairwise(sizes))


def record_nothing(executor: Executor) -> None:
    """Lets an executor on the CPU pad its steps; its last page is nobody's."""
    table = torch.full((executor.config.max_slots + 1, executor._page_table.shape[1]), -1, dtype=torch.int32)
    table[-1] = executor.config.num_pages - 1
    executor._page_table, executor._host_table = table, table[:-1].numpy()
    parts = executor.model, executor.cache, table, executor.config.max_model_len, lambda function: function
    with torch.inference_mode():
        executor.graphs = PaddedDecode(*parts)
        executor.small_steps = PaddedSteps(*parts, sizes=(16, 64))


def test_padding_changes_no_bit(tmp_path: Path) -> None:
    """1 to 9 rows that end one after the other, each step run twice, with their logprobs."""
    save_model(tmp_path, "LlamaForCausalLM")
    config = rank_config(tmp_path, deterministic=True, max_model_len=128, max_slots=13)
    outputs = []
    for padded in (True, False):
        executor = build_executor(config)
        executor.graphs = None
        if padded:
            record_nothing(executor)
        driver = Driver(executor)
        sequences = [
            driver.sequence(
                slot,
                list(range(20 + slot, 30 + 5 * slot)),
                SamplingParams(max_tokens=slot + 2, seed=slot, temperature=slot % 2, logprobs=3 if slot % 3 else -1),
            )
            for slot in range(9)
        ]
        driver.run(sequences, chunk=9, repeat=True)
        assert executor.decode_steps == (18 if padded else 0)
        outputs.append([(sequence.output, sequence.logprobs) for sequence in sequences])
    assert outputs[0] == outputs[1]
