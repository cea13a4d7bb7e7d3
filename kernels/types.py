"""The small records that kernels take: what a step's attention reads, how its rows are sampled, packed weights."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from llm_runtime.kernels.packing import WeightKind, check_packed, panel_rows


@dataclass(frozen=True)
class AttentionMeta:
    """Which tokens of a step belong to which sequence, and where the keys of each sequence lie.

    A step has `n` rows (sequences) and `T` new tokens, the tokens of a row side by side. Row `r` owns the tokens
    `row_offsets[r] .. row_offsets[r+1]`; the first of them stands at absolute position `row_starts[r]`, which is
    also the number of its tokens that are in the cache already. Position `p` of the row lies in page
    `page_table[row_slots[r], p // page_size]`. A row may have no new tokens. Built once a step, used by every layer.
    """

    row_offsets: Tensor  # int32 [n + 1]
    row_starts: Tensor  # int32 [n]
    row_slots: Tensor  # int32 [n]
    page_table: Tensor  # int32 [slots, max_pages], the last dimension contiguous
    num_tokens: int  # T
    max_query: int  # most new tokens in a row
    max_context: int  # most keys in a row, its new tokens included

    @classmethod
    def build(
        cls,
        starts: Sequence[int],
        lengths: Sequence[int],
        page_table: Tensor,
        slots: Sequence[int] | None = None,
    ) -> "AttentionMeta":
        """Builds the record from host lists, on the device of `page_table`.

        starts: tokens of each row that are in the cache already; lengths: new tokens of each row;
        page_table: int32 [slots, max_pages]; slots: the line of the page table of each row, 0, 1, 2 … if None.
        Raises ValueError if the lists do not fit together.
        """
        n = len(starts)
        if slots is None:
            slots = range(n)
        if len(lengths) != n or len(slots) != n:
            raise ValueError(
                f"starts, lengths and slots have {n}, {len(lengths)} and {len(slots)} items: give one a row"
            )
        if page_table.dtype != torch.int32 or page_table.dim() != 2 or page_table.stride(1) != 1:
            raise ValueError("page_table must be an int32 tensor [slots, max_pages] with contiguous lines")
        offsets = [0]
        context = 0
        for start, length in zip(starts, lengths, strict=True):
            if start < 0 or length < 0:
                raise ValueError(f"a row starts at {start} with {length} new tokens: neither may be negative")
            offsets.append(offsets[-1] + length)
            context = max(context, start + length)
        for slot in slots:
            if not 0 <= slot < page_table.shape[0]:
                raise ValueError(f"slot {slot} is not a line of the page table, which has {page_table.shape[0]}")
        # One host tensor, so that a CUDA step copies once.
        packed = torch.tensor([*offsets, *starts, *slots], dtype=torch.int32).to(page_table.device)
        return cls(
            row_offsets=packed[: n + 1],
            row_starts=packed[n + 1 : 2 * n + 1],
            row_slots=packed[2 * n + 1 :],
            page_table=page_table,
            num_tokens=offsets[-1],
            max_query=max(lengths, default=0),
            max_context=context,
        )

    @property
    def num_rows(self) -> int:
        return self.row_starts.shape[0]

    @cached_property
    def token_ranges(self) -> list[tuple[int, int]]:
        """The first token of each row and the one behind its last: asks the device."""
        offsets = self.row_offsets.tolist()
        return list(pairwise(offsets))

    @cached_property
    def slots_and_ends(self) -> list[tuple[int, int]]:
        """The line of the page table of each row, and the number of its keys: asks the device."""
        ends = self.row_starts + self.row_offsets.diff()
        return list(zip(self.row_slots.tolist(), ends.tolist(), strict=True))

    def select(self, rows: Sequence[int]) -> tuple["AttentionMeta", Tensor]:
        """The same for some of the rows alone, and the numbers of their tokens, int64, in the order of `rows`."""
        ranges = [self.token_ranges[row] for row in rows]
        lengths = [last - first for first, last in ranges]
        slots = [self.slots_and_ends[row][0] for row in rows]
        starts = [self.slots_and_ends[row][1] - length for row, length in zip(rows, lengths, strict=True)]
        tokens = [token for first, last in ranges for token in range(first, last)]
        part = AttentionMeta.build(starts, lengths, self.page_table, slots)
        return part, torch.tensor(tokens, dtype=torch.int64, device=self.page_table.device)

    @cached_property
    def row_of_token(self) -> Tensor:
        """int64 [T]: the row of each token."""
        rows = torch.arange(self.num_rows, device=self.row_starts.device)
        return torch.repeat_interleave(rows, self.row_offsets.diff().long(), output_size=self.num_tokens)

    @cached_property
    def positions(self) -> Tensor:
        """int64 [T]: the absolute position of each token."""
        tokens = torch.arange(self.num_tokens, device=self.row_starts.device)
        return tokens + (self.row_starts - self.row_offsets[:-1]).long()[self.row_of_token]


@dataclass(frozen=True)
class KVCache:
    """Cached keys and values of all layers, in pages."""

    # [num_pages, layers, 2 (key, value), page_size, Hkv, D], float32, bfloat16 or int8; of latent attention
    # [num_pages, layers, page_size, R + D], float32 or bfloat16.
    vectors: Tensor
    scales: Tensor | None  # float32 [num_pages, layers, 2, page_size, Hkv]: factors of int8 vectors

    def __len__(self) -> int:
        """The number of pages."""
        return self.vectors.shape[0]

    @property
    def device(self) -> torch.device:
        return self.vectors.device

    @property
    def nbytes(self) -> int:
        return self.vectors.nbytes + (0 if self.scales is None else self.scales.nbytes)

    @cached_property
    def layers(self) -> list[tuple[Tensor, Tensor | None]]:
        """Of each layer what `attention` takes: vectors [num_pages, 2, page_size, Hkv, D], and their scales; of latent
        attention what `mla_attention` takes, and None."""
        vectors = self.vectors.unbind(1)
        scales = [None] * len(vectors) if self.scales is None else self.scales.unbind(1)
        return list(zip(vectors, scales, strict=True))


class TokenMasks(NamedTuple):
    """Which tokens the rows of a batch may draw; see `sample`. Both on the device of the logits."""

    places: Tensor  # int32 [B]: each row's line of `words`; -1 where everything is allowed
    words: Tensor  # int32 [M, at least V / 32]: bit i of word w allows token 32 w + i


@dataclass(frozen=True)
class SamplingTensors:
    """How each row of a batch is sampled; see `sample`. All of one length B and on one device."""

    temperature: Tensor  # float32 [B]; 0 takes the most likely token
    top_k: Tensor  # int32 [B]; 0 is off
    top_p: Tensor  # float32 [B]; 1 is off
    log_min_p: Tensor  # float32 [B]: logarithm of min_p, taken once on the host; -inf is off
    all_greedy: bool  # every temperature is 0: known on the host, so that no device is asked

    @classmethod
    def build(
        cls,
        temperature: Sequence[float],
        top_k: Sequence[int] | None = None,
        top_p: Sequence[float] | None = None,
        min_p: Sequence[float] | None = None,
        device: torch.device | str = "cpu",
    ) -> "SamplingTensors":
        """Builds the tensors from host lists; a list left out is off for all rows. Raises ValueError on bad values."""
        n = len(temperature)
        top_k = [0] * n if top_k is None else top_k
        top_p = [1.0] * n if top_p is None else top_p
        min_p = [0.0] * n if min_p is None else min_p
        if not len(top_k) == len(top_p) == len(min_p) == n:
            raise ValueError("temperature, top_k, top_p and min_p must have one item a row")
        if not all(0 <= t < float("inf") for t in temperature):
            raise ValueError("temperature must be a finite number, 0 or more")
        if not all(k >= 0 for k in top_k):
            raise ValueError("top_k must be 0 (off) or more")
        if not all(0 < p <= 1 for p in top_p):
            raise ValueError("top_p must be above 0 and at most 1")
        if not all(0 <= p <= 1 for p in min_p):
            raise ValueError("min_p must be between 0 and 1")
        return cls(
            temperature=torch.tensor(temperature, dtype=torch.float32).to(device),
            top_k=torch.tensor(top_k, dtype=torch.int32).to(device),
            top_p=torch.tensor(top_p, dtype=torch.float32).to(device),
            log_min_p=torch.tensor([math.log(p) if p > 0 else -math.inf for p in min_p]).to(device),
            all_greedy=all(t == 0 for t in temperature),
        )


@dataclass(frozen=True)
class PackedWeight:
    """A weight matrix [out_features, in_features] cut into panels, in the order in which `linear` reads it.

    `panels` is one plain tensor, so it can be stored, shared and mapped like any other; `kernels.packing` says how it
    is laid out for each kind. Made by `pack_weight` and `pack_int4`, or from a tensor that one of them has filled.
    Raises ValueError if the tensor is not of the size and type that the kind and the features ask for.
    """

    panels: Tensor
    kind: WeightKind
    out_features: int
    in_features: int

    def __post_init__(self) -> None:
        check_packed(self.panels, self.kind, self.out_features, self.in_features)

    def rows(self, first: int, count: int) -> "PackedWeight":
        """Some of its output features, as a weight that shares its memory, without a copy. Raises ValueError if they do
        not begin and end where panels do."""
        return PackedWeight(
            panel_rows(self.panels, self.out_features, first, count), self.kind, count, self.in_features
        )
