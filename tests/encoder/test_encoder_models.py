"""Models that embed or classify, beside transformers' implementations: tiny ones with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from llm_runtime.actors.checkpoint import CheckpointError, PoolingConfig, read_pooling_config, task_of
from llm_runtime.actors.encoder.models.bert import Bert
from llm_runtime.actors.encoder.models.decoder import Decoder
from llm_runtime.actors.rank.shard import weight_bytes
from llm_runtime.transport import Arena

SIZES = {
    "vocab_size": 99,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
}
SEQUENCES = [torch.tensor(ids) for ids in ([7], [5, 6, 7], [8, 9, 10], [31, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12])]


def saved(path: Path, model: Any) -> Any:
    """The model, with noise in all weights (also those that begin as zeros or ones), as a checkpoint."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.eval().save_pretrained(path)
    return model


def decoder(path: Path, config: PoolingConfig) -> Decoder:
    assert config.decoder is not None
    arena = Arena.create("weights", weight_bytes(config.decoder, "float32", 1, 0))
    return Decoder(path, config, "float32", arena, 64, 64)


def close(found: Tensor, expected: list[Tensor]) -> None:
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "options"),
    [("Bert", {}), ("Roberta", {"pad_token_id": 1}), ("XLMRoberta", {"pad_token_id": 1, "hidden_act": "relu"})],
)
def test_encoders_are_those_of_transformers(tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    config = getattr(transformers, f"{family}Config")(**SIZES, **options)
    model = saved(tmp_path, getattr(transformers, f"{family}Model")(config))
    assert task_of(tmp_path) == "embed"
    pooling = read_pooling_config(tmp_path, "embed")
    assert pooling.max_position == (64 if family == "Bert" else 62)
    assert (pooling.pooling, pooling.normalize) == ("mean", True)
    with torch.inference_mode():
        expected = [model(each[None]).last_hidden_state[0].mean(0) for each in SEQUENCES]
        close(Bert(tmp_path, pooling).vectors(SEQUENCES, [None] * 4), expected)


@pytest.mark.parametrize(("labels", "activation"), [(1, "sigmoid"), (3, "softmax")])
def test_cross_encoders_read_two_texts(tmp_path: Path, labels: int, activation: str) -> None:
    config = transformers.BertConfig(**SIZES, num_labels=labels)
    model = saved(tmp_path, transformers.BertForSequenceClassification(config))
    assert task_of(tmp_path) == "classify"
    pooling = read_pooling_config(tmp_path, "classify")
    assert (len(pooling.labels), pooling.activation) == (labels, activation)
    types = [None, torch.tensor([0, 1, 1]), None, torch.tensor([0] * 5 + [1] * 6)]
    with torch.inference_mode():
        expected = [
            model(ids[None], token_type_ids=torch.zeros_like(ids)[None] if kinds is None else kinds[None]).logits[0]
            for ids, kinds in zip(SEQUENCES, types, strict=True)
        ]
        close(Bert(tmp_path, pooling).vectors(SEQUENCES, types), expected)


def test_roberta_classifies(tmp_path: Path) -> None:
    config = transformers.RobertaConfig(**SIZES, pad_token_id=1, id2label={0: "bad", 1: "good"})
    model = saved(tmp_path, transformers.RobertaForSequenceClassification(config))
    pooling = read_pooling_config(tmp_path, "classify")
    assert pooling.labels == ["bad", "good"]
    with torch.inference_mode():
        expected = [model(each[None]).logits[0] for each in SEQUENCES]
        close(Bert(tmp_path, pooling).vectors(SEQUENCES, [None] * 4), expected)


@pytest.mark.parametrize("pooling", ["lasttoken", "mean_tokens", "cls_token"])
def test_decoders_embed(tmp_path: Path, pooling: str) -> None:
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=False)
    model = saved(tmp_path, transformers.LlamaForCausalLM(config))
    assert task_of(tmp_path) == "generate"
    (tmp_path / "modules.json").write_text(json.dumps([{"type": "sentence_transformers.models.Pooling", "path": "1"}]))
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "config.json").write_text(json.dumps({f"pooling_mode_{pooling}": True}))
    read = read_pooling_config(tmp_path, "embed")
    assert not read.normalize
    reduce = {"lasttoken": lambda x: x[-1], "mean_tokens": lambda x: x.mean(0), "cls_token": lambda x: x[0]}[pooling]
    computed = decoder(tmp_path, read)
    with torch.inference_mode():
        expected = [reduce(model.model(each[None]).last_hidden_state[0]) for each in SEQUENCES]
        close(computed.vectors(SEQUENCES, [None] * 4), expected)


def test_decoders_classify(tmp_path: Path) -> None:
    config = transformers.Qwen2Config(**SIZES, num_key_value_heads=2, num_labels=3, pad_token_id=0)
    model = saved(tmp_path, transformers.Qwen2ForSequenceClassification(config))
    assert task_of(tmp_path) == "classify"
    read = read_pooling_config(tmp_path, "classify")
    computed = decoder(tmp_path, read)
    with torch.inference_mode():
        expected = [model(each[None]).logits[0] for each in SEQUENCES]
        close(computed.vectors(SEQUENCES, [None] * 4), expected)


def test_what_is_not_built_is_refused(tmp_path: Path) -> None:
    config = {**SIZES, "architectures": ["BertModel"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="no classification head"):
        read_pooling_config(tmp_path, "classify")
    (tmp_path / "modules.json").write_text(json.dumps([{"type": "sentence_transformers.models.Dense", "path": "2"}]))
    with pytest.raises(CheckpointError, match="a module Dense is not supported"):
        read_pooling_config(tmp_path, "embed")
    (tmp_path / "modules.json").write_text(json.dumps([{"type": "sentence_transformers.models.Pooling", "path": "1"}]))
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "config.json").write_text('{"pooling_mode_max_tokens": true}')
    with pytest.raises(CheckpointError, match="pooling max is not supported"):
        read_pooling_config(tmp_path, "embed")
    config["hidden_act"] = "swish"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="activation 'swish' is not supported"):
        read_pooling_config(tmp_path, "embed")
