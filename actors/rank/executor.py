"""`Executor`: a step in, tokens out. It knows slots and pages and nothing of requests, mailboxes or processes."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import kernels
from actors.actor import BadMessage, StartFailure
from actors.checkpoint import ModelConfig, checkpoint_identity, read_config
from actors.messages import PROMPT_LOGPROBS, SAMPLE, VERIFY, Step, StepResult, TopLogprobs
from actors.rank.config import RankConfig
from actors.rank.group import Group
from actors.rank.models import MODELS, Llama
from actors.rank.sampler import Int32s, Sampler, prompt_logprobs
from actors.rank.shard import kv_format, shard_of, split, weight_bytes
from actors.rank.weights import load_weights
from kernels import AttentionMeta
from transport import Arena

REMEMBERED = 4
"""Of each slot, the tokens drawn for the last so many positions are kept, so that a step may be run again."""
PROMPT_ROWS = 128
"""Positions whose logits are held at a time for prompt logprobs."""


@dataclass(frozen=True)
class Rows:
    """A step's arrays, checked: `n` rows with `T` new tokens."""

    slots: Int32s  # [n]
    starts: Int32s  # [n]
    lengths: Int32s  # [n]
    ends: Int32s  # [n]: positions behind the new tokens
    offsets: Int32s  # [n + 1]: where each row's tokens begin
    flags: NDArray[np.uint8]  # [n]
    tokens: Int32s  # [T]
    unknown: NDArray[np.int64]  # rows whose first token is one that was drawn here


class Executor:
    """Runs steps on one rank's part of a model.

    Every rank of a group is given the same steps and changes its tables in the same way; rank 0 draws the tokens.

    Args:
        config: sizes and limits.
        model: the rank's part of the model.
        cache: the KV pages [num_pages, layers, 2, page_size, kv_heads, head_dim].
        group: the ranks that share the model.
        fingerprint: names model, dtype and page format; see `Attached`.
    """

    def __init__(self, config: RankConfig, model: Llama, cache: Tensor, group: Group, fingerprint: str) -> None:
        self.config = config
        self.model = model
        self.cache = cache
        self.group = group
        self.fingerprint = fingerprint
        self.device = cache.device
        self.vocab_size = model.config.vocab_size
        slots, max_pages = config.max_slots, -(-config.max_model_len // config.page_size)
        self._vocab_widths = [len(split(self.vocab_size, group.tp, rank, 64)) for rank in range(group.tp)]
        # On the device: what the model reads. The host keeps a copy of the page table, to check steps without asking.
        self._page_table = torch.full((slots, max_pages), -1, dtype=torch.int32, device=self.device)
        self._host_table = self._page_table.numpy() if self.device.type == "cpu" else self._page_table.cpu().numpy()
        self._drawn = torch.zeros(slots, REMEMBERED, dtype=torch.int64, device=self.device)
        self._drawn_at = np.full((slots, REMEMBERED), -1, np.int64)  # the position of each token in _drawn
        self._opened = np.zeros(slots, np.bool_)
        self._pages_set = np.zeros(slots, np.int64)  # pages of the slot's table that are set, without a gap
        self._sampler = Sampler(slots, self.vocab_size, config.max_model_len, self.device)
        # States of the last tokens of chunks, by slot and position: the next chunk's first prompt logprob needs one.
        self._tails: dict[int, dict[int, Tensor]] = {}

    @property
    def weights_bytes(self) -> int:
        """Bytes of this rank's weights."""
        return self.model.weights.nbytes

    def reset(self) -> None:
        """Closes all slots."""
        self._opened[:] = False
        self._tails.clear()

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Runs one token through the model, on a page of its own: touches the weights, starts torch's threads."""
        table = torch.zeros(1, 1, dtype=torch.int32, device=self.device)
        meta = AttentionMeta.build([0], [1], table)
        ids = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.model.logits(self.model.hidden(ids, meta, torch.zeros_like(self.cache[:1])))

    @torch.inference_mode()
    def execute(self, step: Step) -> StepResult:
        """Runs a step. Run again, it gives the same result, also if other steps have been run in between.

        Raises:
            BadMessage: the step makes no sense. Nothing has been written to the cache, and slots are as before but for
                `opens` and `pages`.
        """
        started = time.perf_counter()
        rows = self._check(step)
        self._open(step)
        self._check_slots(rows)
        ids = self._ids(rows)
        hidden = self.model.hidden(ids, self._meta(rows), self.cache)
        of_prompts = self._prompt_logprobs(rows, ids, hidden)
        tokens, of_tokens = self._sample(rows, hidden)
        return StepResult(step.number, tokens.tobytes(), of_tokens, of_prompts, time.perf_counter() - started)

    # -- from message to arrays -----------------------------------------------------------------------------------

    def _check(self, step: Step) -> Rows:
        """The step's arrays, if they make sense by themselves."""
        config = self.config
        slots, starts, lengths, tokens = map(_int32s, (step.slots, step.starts, step.lengths, step.tokens))
        flags = np.frombuffer(step.flags, np.uint8)
        n = len(slots)
        if not n == len(starts) == len(lengths) == len(flags):
            raise BadMessage(f"step {step.number}: slots, starts, lengths and flags differ in their number of rows")
        if n and (slots.min() < 0 or slots.max() >= config.max_slots or len(np.unique(slots)) != n):
            raise BadMessage(f"step {step.number}: a slot is named twice or is not in 0 … {config.max_slots - 1}")
        if n and (starts.min() < 0 or lengths.min() < 1 or flags.max() > SAMPLE | PROMPT_LOGPROBS | VERIFY):
            raise BadMessage(f"step {step.number}: a row has a negative start, no tokens, or an unknown flag")
        offsets = np.zeros(n + 1, np.int64)
        np.cumsum(lengths, dtype=np.int64, out=offsets[1:])
        ends = starts.astype(np.int64) + lengths
        if len(tokens) != offsets[-1] or len(tokens) > config.max_step_tokens:
            raise BadMessage(
                f"step {step.number}: {len(tokens)} tokens for rows of {offsets[-1]}, where at most "
                f"{config.max_step_tokens} are allowed"
            )
        if n and ends.max() > config.max_model_len:
            raise BadMessage(f"step {step.number}: a row ends behind max_model_len = {config.max_model_len}")
        unknown = np.flatnonzero(tokens[offsets[:-1]] == -1)
        if n and (
            tokens.max() >= self.vocab_size or tokens.min() < -1 or np.count_nonzero(tokens == -1) > len(unknown)
        ):
            raise BadMessage(
                f"step {step.number}: a token is outside the vocabulary, or -1 and not the first of its row"
            )
        pages = _int32s(step.pages)
        if len(pages) % 3:
            raise BadMessage(f"step {step.number}: pages are no triples")
        if len(pages):
            bounds = (config.max_slots, self._page_table.shape[1], len(self.cache))
            if pages.min() < 0 or (pages.reshape(-1, 3).max(axis=0) >= bounds).any():
                raise BadMessage(f"step {step.number}: a page entry is outside of (slot, index, page) < {bounds}")
        for opened in step.opens:
            if opened.slot >= config.max_slots:
                raise BadMessage(f"step {step.number}: slot {opened.slot} is not in 0 … {config.max_slots - 1}")
            self._sampler.check(opened)
        ends32, offsets32 = ends.astype(np.int32), offsets.astype(np.int32)
        return Rows(slots, starts, lengths, ends32, offsets32, flags, tokens, unknown)

    def _open(self, step: Step) -> None:
        """Sets up slots and pages."""
        for opened in step.opens:
            slot = opened.slot
            self._sampler.open(opened)
            self._opened[slot] = True
            self._pages_set[slot] = 0
            self._host_table[slot] = -1
            self._drawn_at[slot] = -1
            self._tails.pop(slot, None)
        if not step.pages:
            return
        triples = _int32s(step.pages).reshape(-1, 3)
        slots, indices, pages = triples.T
        self._host_table[slots, indices] = pages
        if self.device.type != "cpu":
            entries = torch.from_numpy(triples.copy()).to(self.device).long()
            self._page_table[entries[:, 0], entries[:, 1]] = entries[:, 2].int()
        for slot in np.unique(slots):
            unset = self._host_table[slot] < 0
            self._pages_set[slot] = unset.argmax() if unset.any() else len(unset)

    def _check_slots(self, rows: Rows) -> None:
        """Raises BadMessage unless the slots of all rows are ready for them."""
        if not self._opened[rows.slots].all():
            raise BadMessage("a row's slot is not open")
        if (self._pages_set[rows.slots] * self.config.page_size < rows.ends).any():
            raise BadMessage("a row has positions without a page")
        slots, starts = rows.slots[rows.unknown], rows.starts[rows.unknown]
        if (self._drawn_at[slots, starts % REMEMBERED] != starts).any():
            raise BadMessage("a row refers to a token that was not drawn here")
        verified = np.flatnonzero(rows.flags & VERIFY)
        if len(verified) and (
            (rows.flags[verified] != SAMPLE | VERIFY).any()
            or (rows.tokens[rows.offsets[verified]] < 0).any()
            or not self._sampler.with_history.isdisjoint(rows.slots[verified].tolist())
        ):
            raise BadMessage("a row to verify does not sample, has a token -1, or is of a slot with penalties")
        for row in np.flatnonzero(rows.flags & PROMPT_LOGPROBS):
            slot, start = int(rows.slots[row]), int(rows.starts[row])
            if start and start - 1 not in self._tails.get(slot, {}):
                raise BadMessage("a row asks for prompt logprobs, but not so did the one before it")

    def _ids(self, rows: Rows) -> Tensor:
        """The new tokens, int64 [T], those that were drawn here filled in."""
        ids = torch.from_numpy(rows.tokens.astype(np.int64)).to(self.device)
        if len(rows.unknown):
            slots, starts = rows.slots[rows.unknown], rows.starts[rows.unknown]
            drawn = self._drawn[self._index(slots), self._index(starts % REMEMBERED)]
            if len(rows.unknown) == len(ids):
                return drawn
            ids[self._index(rows.offsets[rows.unknown])] = drawn
        return ids

    def _meta(self, rows: Rows) -> AttentionMeta:
        n = len(rows.slots)
        packed = torch.from_numpy(np.concatenate([rows.offsets, rows.starts, rows.slots])).to(self.device)
        return AttentionMeta(
            row_offsets=packed[: n + 1],
            row_starts=packed[n + 1 : 2 * n + 1],
            row_slots=packed[2 * n + 1 :],
            page_table=self._page_table,
            num_tokens=len(rows.tokens),
            max_query=int(rows.lengths.max(initial=0)),
            max_context=int(rows.ends.max(initial=0)),
        )

    # -- from states to tokens ------------------------------------------------------------------------------------

    def _logits(self, hidden: Tensor) -> Tensor:
        """float32 [B, vocabulary] on rank 0; a part of it on others, which take no interest in it."""
        return self.group.gather(self.model.logits(hidden), self._vocab_widths)

    def _sample(self, rows: Rows, hidden: Tensor) -> tuple[Int32s, list[TopLogprobs]]:
        """Draws the tokens of all rows flagged SAMPLE, and remembers those of rows not to verify: int32 [B]."""
        sampled = np.flatnonzero(rows.flags & SAMPLE).astype(np.int32)
        if not len(sampled):
            return np.empty(0, np.int32), []
        before = np.zeros(len(sampled), np.int32)  # how many tokens before the row's end
        verified = np.flatnonzero(rows.flags & VERIFY)
        if len(verified):
            counts = np.where(rows.flags[sampled] & VERIFY, rows.lengths[sampled], 1)
            before = np.concatenate([np.arange(count, dtype=np.int32)[::-1] for count in counts])
            sampled = np.repeat(sampled, counts)
        if len(sampled) != len(hidden):
            hidden = hidden[self._index(rows.offsets[sampled + 1] - 1 - before)]
        slots, positions = rows.slots[sampled], rows.ends[sampled] - before
        history = self._sampler.with_history
        if history:
            self._note_tokens(rows, history)
        logits = self._logits(hidden)
        logprobs: list[TopLogprobs] = []
        if self.group.rank == 0:
            tokens = self._sampler.sample(logits, slots, positions)
            logprobs = self._sampler.logprobs(logits, slots, sampled, tokens)
        else:
            tokens = torch.empty(len(sampled), dtype=torch.int32, device=self.device)
        tokens = self.group.broadcast(tokens)
        self._drawn[self._index(slots), self._index(positions % REMEMBERED)] = tokens.long()
        self._drawn_at[slots, positions % REMEMBERED] = positions
        self._drawn_at[rows.slots[verified]] = -1
        drawn: Int32s = tokens.cpu().numpy()
        for slot, position, token in zip(slots, positions, drawn, strict=True) if history else ():
            if int(slot) in history:
                self._sampler.note(int(slot), int(position), np.array([token]))
        return drawn, logprobs

    def _note_tokens(self, rows: Rows, history: set[int]) -> None:
        for row, slot in enumerate(rows.slots.tolist()):
            tokens = rows.tokens[rows.offsets[row] : rows.offsets[row + 1]]
            if slot in history and tokens[0] >= 0:
                self._sampler.note(slot, int(rows.starts[row]), tokens)

    def _prompt_logprobs(self, rows: Rows, ids: Tensor, hidden: Tensor) -> list[TopLogprobs]:
        entries = []
        for row in np.flatnonzero(rows.flags & PROMPT_LOGPROBS).tolist():
            slot, start, end = int(rows.slots[row]), int(rows.starts[row]), int(rows.ends[row])
            first, last = int(rows.offsets[row]), int(rows.offsets[row + 1])
            before = hidden[first : last - 1]
            targets = ids[first:last].int()
            tails = self._tails.setdefault(slot, {})
            if start:
                before = torch.cat([tails[start - 1], before])
            else:
                targets = targets[1:]
            tails[end - 1] = hidden[last - 1 : last].clone()
            if len(tails) > REMEMBERED:
                del tails[next(iter(tails))]
            top = self._sampler.prompt_top(slot)
            values, top_values, top_ids = self._logprobs_of(before, targets, top)
            if self.group.rank:
                continue
            if not start:  # nothing stands before a sequence's first token
                values = torch.cat([values.new_full((1,), torch.nan), values])
                top_values = torch.cat([top_values.new_full((1, top), torch.nan), top_values])
                top_ids = torch.cat([top_ids.new_zeros(1, top), top_ids])
            entries.append(prompt_logprobs(row, values, top_values, top_ids))
        return entries

    def _logprobs_of(self, hidden: Tensor, targets: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
        """Logprobs of tokens int32 [k] after states [k, H], and of the most probable; on rank 0."""
        values = torch.empty(len(targets), device=self.device)
        top_values = torch.empty(len(targets), top, device=self.device)
        top_ids = torch.empty(len(targets), top, dtype=torch.int32, device=self.device)
        for at in range(0, len(targets), PROMPT_ROWS):
            part = slice(at, at + PROMPT_ROWS)
            logits = self._logits(hidden[part])
            if self.group.rank == 0:
                values[part], top_values[part], top_ids[part] = kernels.logprobs(logits, targets[part], top)
        return values, top_values, top_ids

    def _index(self, array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array.astype(np.int64)).to(self.device)


def _int32s(data: bytes) -> Int32s:
    if len(data) % 4:
        raise BadMessage(f"an array of int32 has {len(data)} bytes")
    return np.frombuffer(data, "<i4")


def build_executor(
    config: RankConfig, weights: int | None = None, kv: int | None = None, group: Group | None = None
) -> Executor:
    """An executor ready for steps, its weights loaded.

    Args:
        weights, kv: descriptors of the rank's arenas; None makes new ones, for use without a supervisor.
        group: None for a group of one.

    Raises:
        StartFailure: the configuration cannot be served here.
        CheckpointError: the checkpoint is damaged or not supported.
    """
    config.check()
    if config.device == "cuda" and not torch.cuda.is_available():
        raise StartFailure("device is cuda, but torch finds no CUDA device here: set device to cpu")
    device = torch.device(config.device, config.rank) if config.device == "cuda" else torch.device("cpu")
    path = Path(config.model)
    model_config = read_config(path)
    if config.max_model_len > model_config.max_position:
        raise StartFailure(
            f"max_model_len = {config.max_model_len} is more than the model's {model_config.max_position}: lower it"
        )
    shard = shard_of(model_config, config.tp, config.rank)
    pages = kv_format(model_config, config.dtype, config.page_size, config.tp, config.rank)
    group = group or Group()
    if weights is None:
        weights = Arena.create("weights", weight_bytes(model_config, config.dtype, config.tp, config.rank))
    # Panels are the fast form in float32, and the exact one in both types; torch's bfloat16 products are faster still.
    exact = config.deterministic or config.dtype == "float32"
    packed = exact and config.device == "cpu" and kernels.backend() != "torch"
    loaded = load_weights(path, model_config, config.dtype, shard, packed, weights, device)
    if device.type == "cuda":
        shape = (config.num_pages, pages.layers, 2, pages.page_size, pages.kv_heads, pages.head_dim)
        cache = torch.zeros(shape, dtype=getattr(torch, config.dtype), device=device)
    else:
        if kv is None:
            kv = Arena.create("kv", config.num_pages * pages.page_bytes)
        arena = Arena(kv)
        if arena.size < config.num_pages * pages.page_bytes:
            raise StartFailure(
                f"the KV arena has {arena.size} bytes and {config.num_pages * pages.page_bytes} are needed for "
                f"{config.num_pages} pages: restart the engine"
            )
        cache = pages.tensor(arena.buffer, config.num_pages)
    model = MODELS[model_config.architecture](
        model_config, shard, loaded, config.max_model_len, config.deterministic, group.reduce
    )
    executor = Executor(config, model, cache, group, _fingerprint(path, model_config, config))
    executor.warm_up()
    return executor


def _fingerprint(path: Path, model_config: ModelConfig, config: RankConfig) -> str:
    whole = kv_format(model_config, config.dtype, config.page_size, 1, 0)
    order = ":deterministic" if config.deterministic else ""
    return f"{checkpoint_identity(path, model_config)}:{whole.fingerprint}{order}"
