"""The encoder: sequences become vectors. Only `actor` and `models` import torch."""

from llm_runtime.actors.encoder.config import EncoderConfig
from llm_runtime.actors.encoder.sizes import scratch_bytes

__all__ = ["EncoderConfig", "scratch_bytes"]
