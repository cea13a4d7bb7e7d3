"""`Executor`: a step in, tokens out. It knows slots and pages and nothing of requests, mailboxes or processes."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llm_runtime import kernels
from llm_runtime.actors.actor import BadMessage, StartFailure
from llm_runtime.actors.checkpoint import ModelConfig, checkpoint_identity, read_config
from llm_runtime.actors.grammar import GrammarCompiler, load_backend
from llm_runtime.actors.kv_format import KVFormat
from llm_runtime.actors.messages import PROMPT_LOGPROBS, SAMPLE, VERIFY, Step, StepResult, TopLogprobs
from llm_runtime.actors.rank.config import RankConfig
from llm_runtime.actors.rank.decode import DecodeGraphs
from llm_runtime.actors.rank.device import in_device_memory, to_device
from llm_runtime.actors.rank.hidden import HiddenGraphs
from llm_runtime.actors.rank.models import Model, model_class
from llm_runtime.actors.rank.padded import PaddedDecode, PaddedSteps, cuda_record
from llm_runtime.actors.rank.sampler import Drawing, Int32s, Sampler, prompt_logprobs
from llm_runtime.actors.rank.shard import kv_format, shard_of, split, weight_bytes
from llm_runtime.actors.rank.tp_group import TPGroup
from llm_runtime.actors.rank.weights import load_weights
from llm_runtime.actors.rank.weights_arena import contents_of
from llm_runtime.actors.vocabulary import load_vocabulary
from llm_runtime.kernels import AttentionMeta, KVCache, SamplingTensors
from llm_runtime.transport import Arena

REMEMBERED = 4
"""Of each slot, the tokens drawn for the last so many positions are kept, so that a step may be run again."""
_ONE, _UNKNOWN = (np.array([value], "<i4").tobytes() for value in (1, -1))
_SAMPLES = bytes([SAMPLE])
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


@dataclass(frozen=True)
class DecodingSlots:
    """What decode steps of the same slots have in common."""

    packed: bytes
    slots: Int32s  # [n]
    places: Int32s  # [n]: where each slot's tokens begin among those drawn
    drawing: Drawing | None  # if tokens are drawn from the logits as they are, at first at least
    plain: bool  # tokens are all that is asked for, and none depends on those before


class BadStep(BadMessage):
    """A step that makes no sense.

    Args:
        number: of the step.
        reason: the rest of a sentence.
        slots: those that are to blame; none if that cannot be told.
    """

    def __init__(self, number: int, reason: str, slots: Iterable[int] = ()) -> None:
        super().__init__(f"step {number}: {reason}")
        self.slots = sorted({slot for slot in slots if slot >= 0})


class Executor:
    """Runs steps on one rank's part of a model.

    Every rank of a group is given the same steps and changes its tables in the same way; rank 0 draws the tokens.

    Args:
        config: sizes and limits.
        model: the rank's part of the model.
        cache: the KV pages.
        group: the ranks that share the model.
        fingerprint: names model, dtype and page format; see `Attached`.
    """

    def __init__(self, config: RankConfig, model: Model, cache: KVCache, group: TPGroup, fingerprint: str) -> None:
        self.config = config
        self.model = model
        self.cache = cache
        self.group = group
        self.fingerprint = fingerprint
        self.device = cache.device
        # Of decode steps: how many, and the seconds spent with their arrays, in the model, and drawing.
        self.decode_steps = 0
        self.decode_s = np.zeros(3)
        self.vocab_size = model.config.vocab_size
        slots, max_pages = config.max_slots, -(-config.max_model_len // config.page_size)
        self._vocab_widths = [len(split(self.vocab_size, group.tp, rank, 64)) for rank in range(group.tp)]
        # On the device: what the model reads. The host keeps a copy of the page table, to check steps without asking.
        # On a CUDA device a last line names a page of nobody, behind all others; see `actors.rank.padded`.
        if self.device.type == "cpu":
            self._page_table = torch.full((slots, max_pages), -1, dtype=torch.int32)
            self._host_table = self._page_table.numpy()
        else:
            self._page_table = torch.full((slots + 1, max_pages), -1, dtype=torch.int32, device=self.device)
            self._page_table[-1] = config.num_pages
            self._host_table = np.full((slots, max_pages), -1, np.int32)
        self._drawn = np.zeros((slots, REMEMBERED), np.int64)
        self._drawn_at = np.full((slots, REMEMBERED), -1, np.int64)  # the position of each token in _drawn
        self._opened = np.zeros(slots, np.bool_)
        self._room = np.zeros(slots, np.uint32)  # positions of open slots whose pages are set, without a gap
        self._page_bounds = np.array([slots, max_pages, config.num_pages], np.uint32)
        self._one_each = np.arange(slots + 1, dtype=np.int32)
        self._decoding: DecodingSlots | None = None  # of the last decode step
        self.grammars = GrammarCompiler(
            lambda: load_backend(Path(config.model), self.vocab_size, config.grammar_backend), closings=True
        )
        grammars = self.grammars if group.rank == 0 else None
        texts = (lambda: load_vocabulary(Path(config.model)).token_bytes[: self.vocab_size]) if grammars else None
        self._sampler = Sampler(slots, self.vocab_size, config.max_model_len, self.device, grammars, texts)
        # One replayed call instead of a few hundred made from Python; on CUDA devices `warm_up` makes them. Collectives
        # stand between the kernels of a group: there decode steps go the way of all others.
        self.graphs: DecodeGraphs | PaddedDecode | None = None
        self.small_steps: HiddenGraphs | PaddedSteps | None = None
        if self.device.type == "cpu" and group.tp == 1:
            sizes = config.max_model_len, config.max_step_tokens
            self.graphs = DecodeGraphs(model, cache, self._page_table, *sizes)
            self.small_steps = HiddenGraphs(model, cache, self._page_table, *sizes)
        # States of the last tokens of chunks, by slot and position: the next chunk's first prompt logprob needs one.
        self._tails: dict[int, dict[int, Tensor]] = {}

    @property
    def weights_bytes(self) -> int:
        """Bytes of this rank's weights."""
        return self.model.nbytes

    def reset(self) -> None:
        """Closes all slots."""
        self._opened[:] = False
        self._room[:] = 0
        self._decoding = None
        self._tails.clear()

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Runs one token through the model, on a page of its own: touches the weights, starts torch's threads. On CUDA
        devices kernels are compiled and small steps recorded."""
        if self.device.type == "cuda":
            self._warm_up_cuda()
            return
        table = torch.zeros(1, 1, dtype=torch.int32, device=self.device)
        meta = AttentionMeta.build([0], [1], table)
        ids = torch.zeros(1, dtype=torch.int64, device=self.device)
        vectors, scales = self.cache.vectors, self.cache.scales
        page = KVCache(torch.zeros_like(vectors[:1]), None if scales is None else torch.zeros_like(scales[:1]))
        self.model.logits(self.model.hidden(ids, meta, page))

    def _warm_up_cuda(self) -> None:
        """Over the page of nobody."""
        table, config, device = self._page_table, self.config, self.device
        meta = AttentionMeta.build(
            [0, 0], [min(config.page_size, config.max_model_len), 1], table, [len(table) - 1] * 2
        )
        ids = torch.zeros(meta.num_tokens, dtype=torch.int64, device=device)
        logits = self.model.logits(self.model.hidden(ids, meta, self.cache))
        kernels.sample(logits, SamplingTensors.build([1.0] * len(ids), device=device), ids, ids)
        # Collectives, torch's own attention and transformers' models may do what a graph cannot hold; latent attention
        # chooses its form for each row.
        shape = self.model.config
        if self.group.tp == 1 and shape.transformers is None and kernels.triton.library():
            parts = self.model, self.cache, table, config.max_model_len, cuda_record()
            if shape.latent is None:
                self.small_steps = PaddedSteps(*parts)
            self.graphs = PaddedDecode(*parts)
        torch.cuda.synchronize()

    @torch.inference_mode()
    def execute(self, step: Step) -> StepResult:
        """Runs a step. Run again, it gives the same result, also if other steps have been run in between.

        Raises:
            BadStep: the step makes no sense. Nothing has been written to the cache, and slots are as before but for
                `new_requests` and `pages`.
        """
        started = time.perf_counter()
        decoded = None if self.graphs is None else self._decode(step, self.graphs)
        if decoded is not None:
            tokens, of_tokens = decoded
            return StepResult(step.number, tokens.tobytes(), of_tokens, [], time.perf_counter() - started)
        rows = self._check(step)
        self._open(step)
        self._check_slots(step, rows)
        ids = self._ids(rows)
        hidden = self._hidden(rows, ids)
        of_prompts = self._prompt_logprobs(rows, ids, hidden)
        tokens, of_tokens = self._sample(rows, hidden)
        return StepResult(step.number, tokens.tobytes(), of_tokens, of_prompts, time.perf_counter() - started)

    # -- decode steps ---------------------------------------------------------------------------------------------

    def _decode(self, step: Step, graphs: DecodeGraphs | PaddedDecode) -> tuple[Int32s, list[TopLogprobs]] | None:
        """Runs a step in which every row has one new token and draws the next, as a kernel graph.

        None if the step is none of that kind or in any way doubtful, or if there is no graph for it: nothing but
        `pages` has been set then, and the general way does the work or says what is wrong.
        """
        began = time.perf_counter()
        config, n = self.config, len(step.flags)
        if step.new_requests or not len(step.slots) == len(step.starts) == len(step.tokens) == 4 * n > 0:
            return None
        if step.flags.strip(_SAMPLES) or step.lengths != _ONE * n or n > config.max_step_tokens:
            return None
        batch = self._decoding
        if batch is None or batch.packed != step.slots:
            batch = self._decoding_slots(step.slots)
            if batch is None:
                return None
            graphs.slots[:n] = batch.slots
        if step.pages:
            self._set_pages(step)
        starts = np.frombuffer(step.starts, "<i4")
        # A negative start is a large one without its sign.
        if (starts.view(np.uint32) >= self._room.take(batch.slots)).any():
            return None
        places = batch.places + starts % REMEMBERED
        ids = graphs.ids[:n]
        self._drawn.take(places, out=ids, mode="clip")
        unknown = self._drawn_at.take(places) != starts
        given: Int32s | None = None
        if step.tokens != _UNKNOWN * n:
            given = np.frombuffer(step.tokens, "<i4")
            if given.min() < -1 or given.max() >= self.vocab_size:
                return None
            known = given >= 0
            np.copyto(ids, given, where=known)
            unknown &= ~known
        if unknown.any():
            return None
        graphs.starts[:n] = starts
        graphs.offsets[: n + 1] = self._one_each[: n + 1]
        ready = time.perf_counter()
        outcome = graphs.run(n, n, batch.drawing)
        if outcome is None:
            return None
        logits, tokens = outcome
        computed = time.perf_counter()
        positions = starts + 1
        if batch.plain and tokens is not None:
            drawn: Int32s = tokens.cpu().numpy()
            places = batch.places + positions % REMEMBERED
            self._drawn.put(places, drawn)
            self._drawn_at.put(places, positions)
            logprobs: list[TopLogprobs] = []
        else:
            if given is not None:
                self._note_tokens(batch.slots, starts, self._one_each, given)
            drawn, logprobs = self._draw(logits, batch.slots, positions, self._one_each[:n], tokens)
        self.decode_steps += 1
        self.decode_s += ready - began, computed - ready, time.perf_counter() - computed
        return drawn, logprobs

    def _decoding_slots(self, packed: bytes) -> DecodingSlots | None:
        """The slots of a decode step, until others are opened; None if they are not all open, or one comes twice."""
        slots: Int32s = np.frombuffer(packed, "<i4")
        if slots.min() < 0 or slots.max() >= self.config.max_slots or len(set(slots.tolist())) < len(slots):
            return None
        if not self._opened[slots].all():
            return None
        drawing = self._sampler.drawing(slots)
        plain = not len(drawing.reported) and self._sampler.with_history.isdisjoint(slots.tolist())
        self._decoding = DecodingSlots(packed, slots, slots * REMEMBERED, None if drawing.changed else drawing, plain)
        return self._decoding

    # -- from message to arrays -----------------------------------------------------------------------------------

    def _check(self, step: Step) -> Rows:
        """The step's arrays, if they make sense by themselves."""
        config, number = self.config, step.number
        slots, starts, lengths, tokens = (
            _int32s(step, array) for array in (step.slots, step.starts, step.lengths, step.tokens)
        )
        flags = np.frombuffer(step.flags, np.uint8)
        n = len(slots)
        if not n == len(starts) == len(lengths) == len(flags):
            raise BadStep(number, "slots, starts, lengths and flags differ in their number of rows")
        if n and (slots.min() < 0 or slots.max() >= config.max_slots or len(np.unique(slots)) != n):
            raise BadStep(number, f"a slot is named twice or is not in 0 … {config.max_slots - 1}")
        _refuse(
            number,
            slots[(starts < 0) | (lengths < 1) | (flags > SAMPLE | PROMPT_LOGPROBS | VERIFY)],
            "a row has a negative start, no tokens, or an unknown flag",
        )
        offsets = np.zeros(n + 1, np.int64)
        np.cumsum(lengths, dtype=np.int64, out=offsets[1:])
        ends = starts.astype(np.int64) + lengths
        if len(tokens) != offsets[-1] or len(tokens) > config.max_step_tokens:
            raise BadStep(
                number,
                f"{len(tokens)} tokens for rows of {offsets[-1]}, where at most {config.max_step_tokens} are allowed",
            )
        _refuse(number, slots[ends > config.max_model_len], f"a row ends behind max_model_len = {config.max_model_len}")
        unknown = np.flatnonzero(tokens[offsets[:-1]] == -1)
        if n and (
            tokens.max() >= self.vocab_size or tokens.min() < -1 or np.count_nonzero(tokens == -1) > len(unknown)
        ):
            wrong = (tokens >= self.vocab_size) | (tokens < 0)
            wrong[offsets[unknown]] = False
            _refuse(
                number,
                slots[np.searchsorted(offsets, np.flatnonzero(wrong), "right") - 1],
                "a token is outside the vocabulary, or -1 and not the first of its row",
            )
        self._check_pages(step)
        for opened in step.new_requests:
            if opened.slot >= config.max_slots:
                raise BadStep(number, f"slot {opened.slot} is not in 0 … {config.max_slots - 1}")
            try:
                self._sampler.check(opened)
            except BadMessage as error:
                raise BadStep(number, str(error), [opened.slot]) from None
        ends32, offsets32 = ends.astype(np.int32), offsets.astype(np.int32)
        return Rows(slots, starts, lengths, ends32, offsets32, flags, tokens, unknown)

    def _check_pages(self, step: Step) -> None:
        """Raises BadStep if the pages make no sense by themselves."""
        pages = _int32s(step, step.pages)
        if len(pages) % 3:
            raise BadStep(step.number, "pages are no triples")
        triples = pages.reshape(-1, 3)
        wrong = (triples.view(np.uint32) >= self._page_bounds).any(axis=1)
        if wrong.any():
            bounds = tuple(self._page_bounds.tolist())
            _refuse(step.number, triples[wrong, 0], f"a page entry is outside of (slot, index, page) < {bounds}")

    def _open(self, step: Step) -> None:
        """Sets up slots and pages."""
        for opened in step.new_requests:
            slot = opened.slot
            self._sampler.open(opened)
            self._decoding = None
            self._opened[slot] = True
            self._room[slot] = 0
            self._host_table[slot] = -1
            self._drawn_at[slot] = -1
            self._tails.pop(slot, None)
        if step.pages:
            self._set_pages(step)

    def _set_pages(self, step: Step) -> None:
        """Raises BadStep, before anything is set, if the pages make no sense by themselves."""
        self._check_pages(step)
        triples = _int32s(step, step.pages).reshape(-1, 3)
        slots, indices, pages = triples.T
        self._host_table[slots, indices] = pages
        if self.device.type != "cpu":
            places = slots.astype(np.int64) * self._host_table.shape[1] + indices
            entries = to_device(np.stack([places, pages]), self.device)
            self._page_table.view(-1).index_copy_(0, entries[0], entries[1].int())
        touched = np.unique(slots)
        unset = self._host_table[touched] < 0
        set_pages = np.where(unset.any(1), unset.argmax(1), unset.shape[1])
        room = np.minimum(set_pages * self.config.page_size, self.config.max_model_len)
        self._room[touched] = room * self._opened[touched]

    def _check_slots(self, step: Step, rows: Rows) -> None:
        """Raises BadStep unless the slots of all rows are ready for them."""
        number, all_slots = step.number, rows.slots
        _refuse(number, all_slots[~self._opened[all_slots]], "a row's slot is not open")
        _refuse(number, all_slots[self._room[all_slots] < rows.ends], "a row has positions without a page")
        slots, starts = all_slots[rows.unknown], rows.starts[rows.unknown]
        _refuse(
            number,
            slots[self._drawn_at[slots, starts % REMEMBERED] != starts],
            "a row refers to a token that was not drawn here",
        )
        for row in np.flatnonzero(rows.flags & VERIFY):
            slot = int(all_slots[row])
            if (
                rows.flags[row] != SAMPLE | VERIFY
                or rows.tokens[rows.offsets[row]] < 0
                or self._sampler.one_by_one([slot])
            ):
                reason = "a row to verify does not sample, has a token -1, or is of a slot with penalties"
                raise BadStep(number, reason, [slot])
        for row in np.flatnonzero(rows.flags & PROMPT_LOGPROBS):
            slot, start = int(all_slots[row]), int(rows.starts[row])
            if start and start - 1 not in self._tails.get(slot, {}):
                raise BadStep(number, "a row asks for prompt logprobs, but not so did the one before it", [slot])

    def _hidden(self, rows: Rows, ids: NDArray[np.int64]) -> Tensor:
        """States of the new tokens [T, H], valid until the next step."""
        if self.small_steps is not None:
            states = self.small_steps.run(ids, rows.offsets, rows.starts, rows.slots)
            if states is not None:
                return states
        return self.model.hidden(to_device(ids, self.device), self._meta(rows), self.cache)

    def _ids(self, rows: Rows) -> NDArray[np.int64]:
        """The new tokens, int64 [T], those that were drawn here filled in."""
        ids: NDArray[np.int64] = rows.tokens.astype(np.int64)
        if len(rows.unknown):
            slots, starts = rows.slots[rows.unknown], rows.starts[rows.unknown]
            ids[rows.offsets[rows.unknown]] = self._drawn[slots, starts % REMEMBERED]
        return ids

    def _meta(self, rows: Rows) -> AttentionMeta:
        n = len(rows.slots)
        packed = to_device(np.concatenate([rows.offsets, rows.starts, rows.slots]), self.device)
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
        self._note_tokens(rows.slots, rows.starts, rows.offsets, rows.tokens)
        drawn = self._draw(self._logits(hidden), slots, positions, sampled)
        self._drawn_at[rows.slots[verified]] = -1
        return drawn

    def _draw(
        self, logits: Tensor, slots: Int32s, positions: Int32s, rows: Int32s, first: Tensor | None = None
    ) -> tuple[Int32s, list[TopLogprobs]]:
        """Draws the tokens for `positions` of `slots`, which are `rows` of the step, and remembers them: int32 [B].

        first: as for `Sampler.sample`.
        """
        logprobs: list[TopLogprobs] = []
        if self.group.rank == 0:
            tokens = self._sampler.sample(logits, slots, positions, first)
            logprobs = self._sampler.logprobs(logits, slots, rows, tokens)
        else:
            tokens = torch.empty(len(rows), dtype=torch.int32, device=self.device)
        tokens = self.group.broadcast(tokens)
        drawn: Int32s = tokens.cpu().numpy()
        columns = positions % REMEMBERED
        self._drawn[slots, columns] = drawn
        self._drawn_at[slots, columns] = positions
        history = self._sampler.with_history
        if history:
            for slot, position, token in zip(slots.tolist(), positions.tolist(), drawn.tolist(), strict=True):
                if slot in history:
                    self._sampler.note(slot, position, token)
        return drawn, logprobs

    def _note_tokens(self, slots: Int32s, starts: Int32s, offsets: Int32s, tokens: Int32s) -> None:
        history = self._sampler.with_history
        for row, slot in enumerate(slots.tolist()) if history else ():
            new = tokens[offsets[row] : offsets[row + 1]]
            if slot in history and new[0] >= 0:
                self._sampler.note(slot, int(starts[row]), new)

    def _prompt_logprobs(self, rows: Rows, ids: NDArray[np.int64], hidden: Tensor) -> list[TopLogprobs]:
        entries = []
        for row in np.flatnonzero(rows.flags & PROMPT_LOGPROBS).tolist():
            slot, start, end = int(rows.slots[row]), int(rows.starts[row]), int(rows.ends[row])
            first, last = int(rows.offsets[row]), int(rows.offsets[row + 1])
            before = hidden[first : last - 1]
            targets = self._index(ids[first:last]).int()
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
        return to_device(array.astype(np.int64), self.device)


def _int32s(step: Step, data: bytes) -> Int32s:
    if len(data) % 4:
        raise BadStep(step.number, f"an array of int32 has {len(data)} bytes")
    return np.frombuffer(data, "<i4")


def _refuse(number: int, slots: Int32s, reason: str) -> None:
    """Raises BadStep if there are slots to blame."""
    if len(slots):
        raise BadStep(number, reason, slots.tolist())


def build_executor(
    config: RankConfig, weights: int | None = None, kv: int | None = None, group: TPGroup | None = None
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
    # What a former incarnation has read need not be read again, nor still be there.
    packed_before = None if weights is None else contents_of(weights)
    model_config = packed_before.config if packed_before else read_config(path)
    checkpoint = packed_before.checkpoint if packed_before else checkpoint_identity(path, model_config)
    if config.max_model_len > model_config.max_position:
        raise StartFailure(
            f"max_model_len = {config.max_model_len} is more than the model's {model_config.max_position}: lower it"
        )
    shard = shard_of(model_config, config.tp, config.rank)
    kv_dtype = config.kv_dtype or config.compute_dtype
    pages = kv_format(model_config, kv_dtype, config.page_size, config.tp, config.rank)
    group = group or TPGroup()
    if weights is None:
        weights = Arena.create("weights", weight_bytes(model_config, config.dtype, config.tp, config.rank))
    model: Model
    if model_config.transformers is not None:
        model = _load_foreign(config, model_config, pages, weights, device)
    else:
        # Panels are the form that the C++ kernels are fast with, and have one order of additions always.
        packed = config.device == "cpu" and kernels.backend() != "torch"
        loaded = in_device_memory(
            lambda: load_weights(path, model_config, config.dtype, shard, packed, weights, device),
            "the weights do",
            "choose a smaller model, or more ranks",
        )
        if device.type == "cpu":
            kernels.tune(loaded.packed)
        model = model_class(model_config.architecture)(
            model_config, shard, loaded, config.max_model_len, config.deterministic, group.reduce
        )
    if device.type == "cuda":
        cache = in_device_memory(
            lambda: pages.new_cache(config.num_pages + 1, device),  # the last is nobody's
            f"a KV pool of {config.num_pages * pages.page_bytes / 2**30:.1f} GiB does",
            "lower kv_tokens",
        )
    else:
        if kv is None:
            kv = Arena.create("kv", config.num_pages * pages.page_bytes)
        arena = Arena(kv)
        if arena.size < config.num_pages * pages.page_bytes:
            raise StartFailure(
                f"the KV arena has {arena.size} bytes and {config.num_pages * pages.page_bytes} are needed for "
                f"{config.num_pages} pages: restart the engine"
            )
        cache = pages.cache(arena.buffer, config.num_pages)
    executor = Executor(config, model, cache, group, _fingerprint(checkpoint, model_config, config))
    executor.warm_up()
    return executor


def _load_foreign(
    config: RankConfig, model_config: ModelConfig, pages: KVFormat, weights: int, device: torch.device
) -> Model:
    from llm_runtime.actors.rank.models.transformers_backend import load_transformers

    if config.deterministic:
        raise StartFailure(
            f"{model_config.architecture} is run by transformers' implementation, whose results depend on what is "
            "computed together: set deterministic to false"
        )
    path, dtype = Path(config.model), config.compute_dtype
    return load_transformers(path, model_config, dtype, pages, config.max_model_len, weights, device)


def _fingerprint(checkpoint: str, model_config: ModelConfig, config: RankConfig) -> str:
    whole = kv_format(model_config, config.kv_dtype or config.compute_dtype, config.page_size, 1, 0)
    order = ":deterministic" if config.deterministic else ""
    return f"{checkpoint}:{config.dtype}:{whole.fingerprint}{order}"
