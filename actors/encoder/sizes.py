"""The memory in which a decoder that embeds keeps the keys and values of the batch that it computes."""

from __future__ import annotations

from llm_runtime.actors.checkpoint import ModelConfig
from llm_runtime.actors.dtypes import WeightDType, compute_dtype
from llm_runtime.actors.encoder.config import MAX_SEQUENCES
from llm_runtime.actors.kv_format import KVFormat
from llm_runtime.actors.rank.shard import kv_format

PAGE_SIZE = 16


def scratch_format(config: ModelConfig, dtype: WeightDType) -> KVFormat:
    """The layout of its pages."""
    return kv_format(config, compute_dtype(dtype), PAGE_SIZE, 1, 0)


def scratch_pages(max_tokens: int) -> int:
    """Pages for a batch of so many tokens; each sequence begins one."""
    return max_tokens // PAGE_SIZE + MAX_SEQUENCES


def scratch_bytes(config: ModelConfig, dtype: WeightDType, max_tokens: int) -> int:
    """Bytes of a batch's keys and values; the next batch uses them again."""
    return scratch_pages(max_tokens) * scratch_format(config, dtype).page_bytes
