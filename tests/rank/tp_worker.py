"""One rank of a group in a process of its own, for test_rank_group: runs the same generations as the others.

Reads a JSON text from the standard input: {"config": RankConfig's fields, "runs": [{"prompts", "sampling", "how"}]}.
Rank 0 prints a list of [output, logprobs in hexadecimal] a prompt for each run.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import msgspec
import torch
from rank_tools import generate

from llm_runtime.actors.messages import SamplingParams
from llm_runtime.actors.rank import RankConfig, build_executor
from llm_runtime.actors.rank.tp_group import TPGroup


def main() -> None:
    torch.set_num_threads(1)
    task = json.load(sys.stdin)
    config = msgspec.convert(task["config"], RankConfig)
    group = TPGroup(config.tp, config.rank, Path(config.process_group_dir), config.deterministic)
    executor = build_executor(config, group=group)
    group.join(executor.device, lambda: False)
    results = []
    for run in task["runs"]:
        sequences = generate(executor, run["prompts"], SamplingParams(**run["sampling"]), **run["how"])
        results.append(
            [
                [sequence.output, [(entry.logprobs + entry.top_logprobs).hex() for entry in sequence.logprobs]]
                for sequence in sequences
            ]
        )
        executor.reset()
    group.leave()
    if config.rank == 0:
        json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
