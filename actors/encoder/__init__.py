"""The encoder: sequences become vectors. Only `actor` and `models` import torch."""

from actors.encoder.config import EncoderConfig
from actors.encoder.sizes import scratch_bytes

__all__ = ["EncoderConfig", "scratch_bytes"]
