"""The settings of a rank. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta, Struct

from llm_runtime.actors.actor import StartFailure
from llm_runtime.actors.dtypes import ComputeDType, WeightDType, compute_dtype
from llm_runtime.actors.kv_format import KVDType

Positive = Annotated[int, Meta(ge=1, lt=2**31)]


class RankConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """`args.config` of a rank's child spec.

    Attributes:
        model: a GGUF file or a Hugging Face directory.
        dtype: of the weights; activations are float32 beside float32 weights, else bfloat16.
        kv_dtype: of cached keys and values; None for that of the activations.
        deterministic: a token's logits do not depend on what else is in the step, nor on chunking.
        rank: of this process among the `tp` of its group, from 0.
        page_size: tokens in a page. num_pages: pages in this rank's KV arena.
        max_slots: requests that may be open at a time.
        max_model_len: positions that a sequence may have.
        max_step_tokens: new tokens that a step may have.
        threads: of torch in this process; 0 leaves torch's own choice.
        weights_arena, kv_arena: names of the descriptors of its arenas; without them memory is made anew at each start.
        grammar_backend: the library that compiles constraints.
        profile_dir: where profiles go, or directories below it; empty for `profiles` in the run directory.
        process_group_dir: where the ranks of a group meet; needed if tp is above 1.
    """

    model: str
    dtype: WeightDType
    num_pages: Positive
    max_slots: Positive
    max_model_len: Positive
    kv_dtype: KVDType | None = None
    page_size: Annotated[int, Meta(ge=1, le=1024)] = 16
    max_step_tokens: Positive = 16_384
    deterministic: bool = False
    device: Literal["cpu", "cuda"] = "cpu"
    tp: Annotated[int, Meta(ge=1, le=64)] = 1
    rank: Annotated[int, Meta(ge=0, le=63)] = 0
    threads: Annotated[int, Meta(ge=0, le=1024)] = 0
    weights_arena: str = ""
    kv_arena: str = ""
    grammar_backend: Literal["llguidance", "xgrammar"] = "llguidance"
    process_group_dir: str = ""
    profile_dir: str = ""

    @property
    def compute_dtype(self) -> ComputeDType:
        """The type of activations."""
        return compute_dtype(self.dtype)

    def check(self) -> None:
        """Raises StartFailure for settings that do not fit together."""
        if self.rank >= self.tp:
            raise StartFailure(f"rank {self.rank} does not exist in a group of {self.tp}")
        if self.tp > 1 and not Path(self.process_group_dir).is_absolute():
            raise StartFailure("tp is above 1: process_group_dir must be an absolute path")
        if self.device == "cuda" and self.dtype in ("int8", "int4"):
            raise StartFailure(f"{self.dtype} weights are for the CPU: set dtype to bfloat16 where device is cuda")
