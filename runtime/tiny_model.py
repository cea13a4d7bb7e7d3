"""`deepseek-v3-tiny`: a small model of DeepSeek-V3's architecture, made on this machine at first use.

Its weights are random numbers, the same everywhere, so what it writes means nothing; it is there to try out and to
test what that architecture needs, without a download. It speaks with the embedded model's vocabulary.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llm_runtime.actors.vocabulary import Vocabulary, load_vocabulary

DIRECTORY = "deepseek-v3-tiny-1"
"""Under the cache directory. Another number for other content."""
SEED = 0xDEE9
HIDDEN, LAYERS, HEADS, VOCABULARY = 256, 4, 8, 49152
Q_RANK, KV_RANK, ROPE, NOPE, VALUE = 128, 64, 32, 32, 32
DENSE_LAYERS, DENSE, EXPERTS, EXPERT = 1, 512, 16, 128
_SPREAD = 73.9  # standard deviation of a random signed byte


def make_tiny_model(path: Path, vocabulary_file: Path) -> None:
    """Makes the model's directory: whole, or not at all, also if several make it at a time.

    Args:
        vocabulary_file: the checkpoint whose vocabulary it has.

    Raises OSError if it cannot be written.
    """
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        vocabulary = load_vocabulary(vocabulary_file)
        (unfinished / "tokenizer.json").write_text(vocabulary.tokenizer.to_str(), encoding="utf-8")
        _write_json(unfinished / "tokenizer_config.json", _tokenizer_config(vocabulary))
        _write_json(unfinished / "config.json", _config(vocabulary))
        _write_weights(unfinished / "model.safetensors")
        try:
            unfinished.rename(path)
        except OSError:
            if not path.is_dir():  # it is, where another process has been faster
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _tokenizer_config(vocabulary: Vocabulary) -> dict[str, Any]:
    template = {"chat_template": vocabulary.chat_templates["default"]} if vocabulary.chat_templates else {}
    return {"tokenizer_class": "PreTrainedTokenizerFast", **vocabulary.special_tokens, **template}


def _config(vocabulary: Vocabulary) -> dict[str, Any]:
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "q_lora_rank": Q_RANK,
        "kv_lora_rank": KV_RANK,
        "qk_rope_head_dim": ROPE,
        "qk_nope_head_dim": NOPE,
        "v_head_dim": VALUE,
        "attention_bias": False,
        "intermediate_size": DENSE,
        "first_k_dense_replace": DENSE_LAYERS,
        "moe_intermediate_size": EXPERT,
        "moe_layer_freq": 1,
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 1,
        "num_experts_per_tok": 4,
        "n_group": 2,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 1024,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "num_nextn_predict_layers": 0,
        "bos_token_id": vocabulary.bos_id,
        "eos_token_id": list(vocabulary.eos_ids),
    }


def _tensors() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes in the order in which they are drawn and stored; vectors are ones but for corrections."""
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        attention = prefix + "self_attn."
        yield prefix + "input_layernorm.weight", (HIDDEN,)
        yield attention + "q_a_proj.weight", (Q_RANK, HIDDEN)
        yield attention + "q_a_layernorm.weight", (Q_RANK,)
        yield attention + "q_b_proj.weight", (HEADS * (NOPE + ROPE), Q_RANK)
        yield attention + "kv_a_proj_with_mqa.weight", (KV_RANK + ROPE, HIDDEN)
        yield attention + "kv_a_layernorm.weight", (KV_RANK,)
        yield attention + "kv_b_proj.weight", (HEADS * (NOPE + VALUE), KV_RANK)
        yield attention + "o_proj.weight", (HIDDEN, HEADS * VALUE)
        yield prefix + "post_attention_layernorm.weight", (HIDDEN,)
        if layer < DENSE_LAYERS:
            mlps = [(prefix + "mlp.", DENSE)]
        else:
            yield prefix + "mlp.gate.weight", (EXPERTS, HIDDEN)
            yield prefix + "mlp.gate.e_score_correction_bias", (EXPERTS,)
            mlps = [(f"{prefix}mlp.experts.{expert}.", EXPERT) for expert in range(EXPERTS)]
            mlps.append((prefix + "mlp.shared_experts.", EXPERT))
        for mlp, size in mlps:
            yield mlp + "gate_proj.weight", (size, HIDDEN)
            yield mlp + "up_proj.weight", (size, HIDDEN)
            yield mlp + "down_proj.weight", (HIDDEN, size)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCABULARY, HIDDEN)


def _write_weights(path: Path) -> None:
    """Writes a safetensors file: its header's length, the header, and the tensors one after the other."""
    header: dict[str, Any] = {}
    end = 0
    for name, shape in _tensors():
        start, end = end, end + math.prod(shape) * 2
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    # The raw numbers of a bit generator are the same on every machine and in every version of numpy.
    random = np.random.PCG64(SEED)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name, shape in _tensors():
            file.write(_values(name, shape, random))


def _values(name: str, shape: tuple[int, ...], random: np.random.PCG64) -> bytes:
    """bfloat16 numbers: signed bytes times a power of two, which are exact in that type."""
    count = math.prod(shape)
    if "norm" in name:
        return np.full(count, 0x3F80, "<u2").tobytes()  # ones
    raw = np.asarray(random.random_raw(-(-count // 8)), "<u8").view(np.int8)[:count]
    if name in ("model.embed_tokens.weight", "lm_head.weight"):
        power = 8  # logits far enough apart, and layers that weigh as much as the token they follow
    elif len(shape) == 1:
        power = 11  # corrections of some hundredths
    else:
        power = round(math.log2(_SPREAD * math.sqrt(shape[1])))  # results about as large as what comes in
    values = np.ldexp(raw.astype("<f4"), -power)
    stored: bytes = (values.view("<u4") >> 16).astype("<u2").tobytes()
    return stored
