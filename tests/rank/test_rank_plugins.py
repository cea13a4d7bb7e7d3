"""Models of other packages: an installed package with an entry point, and its checkpoint."""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np
import pytest
from rank_tools import generate, rank_config, save_model

from llm_runtime.actors.checkpoint import CheckpointError, read_config
from llm_runtime.actors.messages import SamplingParams
from llm_runtime.actors.rank import build_executor

SAMPLING = SamplingParams(max_tokens=3, seed=0, temperature=0.0, logprobs=0)


def install(directory: Path, monkeypatch: pytest.MonkeyPatch, entry: str) -> None:
    """As pip would: a module, and metadata that name it."""
    (directory / "warm_llama.py").write_text(
        textwrap.dedent(
            """
            from llm_runtime.actors.rank.models import Llama

            class WarmLlama(Llama):
                reads_as = "LlamaForCausalLM"

                def logits(self, hidden):
                    return super().logits(hidden) / 2

                def decode(self, ids, meta, cache):
                    return self.logits(self.hidden(ids, meta, cache))

            class Odd:
                reads_as = "OddForCausalLM"
            """
        )
    )
    metadata = directory / "warm_llama-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: warm-llama\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text(f"[llm_runtime.models]\nWarmLlamaForCausalLM = {entry}\n")
    monkeypatch.syspath_prepend(directory)


def checkpoint(directory: Path, architecture: str) -> Path:
    directory.mkdir()
    save_model(directory, "LlamaForCausalLM")
    config = directory / "config.json"
    config.write_text(config.read_text().replace("LlamaForCausalLM", architecture))
    return directory


def test_a_model_of_another_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, "warm_llama:WarmLlama")
    plain, warm = (checkpoint(tmp_path / name, f"{name}ForCausalLM") for name in ("Llama", "WarmLlama"))
    assert read_config(warm).architecture == "WarmLlamaForCausalLM"
    settings = {"max_model_len": 64, "num_pages": 8}
    first, second = (
        generate(build_executor(rank_config(path, **settings)), [[5, 6, 7]], SAMPLING)[0] for path in (plain, warm)
    )
    assert first.output == second.output
    ours, theirs = (
        np.array([np.frombuffer(entry.logprobs, np.float32)[0] for entry in each.logprobs]) for each in (first, second)
    )
    assert (ours > theirs).all()  # less sure of the same tokens


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ("no_such_module:Model", "the package for architecture WarmLlamaForCausalLM cannot be used"),
        ("warm_llama:NoSuchModel", "the package for architecture WarmLlamaForCausalLM cannot be used"),
        ("warm_llama:Odd", "reads checkpoints as 'OddForCausalLM'; supported are LlamaForCausalLM"),
    ],
)
def test_packages_that_cannot_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: str, sentence: str
) -> None:
    install(tmp_path, monkeypatch, entry)
    with pytest.raises(CheckpointError, match=sentence):
        read_config(checkpoint(tmp_path / "model", "WarmLlamaForCausalLM"))
