"""The settings of an encoder actor."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from llm_runtime.actors.dtypes import WeightDType

MAX_SEQUENCES = 256
"""Sequences that are computed at once, at most."""

Count = Annotated[int, Meta(ge=1, lt=2**31)]


class EncoderConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """Settings of an encoder.

    Attributes:
        model: GGUF file or Hugging Face directory.
        task: what the model is for.
        dtype: of the weights.
        weights_arena: name of the inherited descriptor of the arena of weights; empty for a model whose file is mapped.
        max_model_len: tokens of the longest sequence.
        chunk_tokens: most tokens that are computed at once, unless a single sequence has more.
        max_queue: requests that may wait.
        threads: of torch; 0 leaves that to torch.
    """

    model: str
    task: Literal["embed", "classify"]
    dtype: WeightDType
    max_model_len: Count
    weights_arena: str = ""
    chunk_tokens: Count = 2048
    max_queue: Count = 1024
    threads: Annotated[int, Meta(ge=0, le=1024)] = 0
