"""Names of modules: Hugging Face's, and llama.cpp's for the same."""

from __future__ import annotations

import re

GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_OF_GGUF = {gguf: name for name, gguf in GGUF_NAMES.items()}


def gguf_name(tensor: str) -> str:
    """llama.cpp's name of a tensor: "model.layers.3.mlp.up_proj.weight" is "blk.3.ffn_up.weight". Raises KeyError."""
    module, _, kind = tensor.rpartition(".")
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
    if layer:
        return f"blk.{layer[1]}.{GGUF_NAMES[layer[2]]}.{kind}"
    return f"{GGUF_NAMES[module]}.{kind}"


def module_of_gguf(tensor: str) -> str | None:
    """Hugging Face's name of the module of a weight that llama.cpp calls `tensor`; None for one that is not known."""
    found = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", tensor)
    module = _OF_GGUF.get(found[2]) if found else None
    if found is None or module is None:
        return None
    return f"model.layers.{found[1]}.{module}" if found[1] else module


def name_of_gguf(tensor: str) -> str:
    """Hugging Face's name of the tensor that llama.cpp calls `tensor`, or `tensor` where it has none."""
    stem, _, kind = tensor.rpartition(".")
    module = module_of_gguf(f"{stem}.weight")
    if module is not None:
        return f"{module}.{kind}"
    return re.sub(r"^blk\.", "model.layers.", tensor)
