"""Drawing tokens: each slot's sampling parameters, and what they ask to be done with a row of logits.

The logits of a row are changed in this order: penalties, bias, minimum length; then temperature, top-k, top-p and min-p
choose. A token that the row's constraint does not allow is drawn again, with another random number, from those that it
allows: without top-k, top-p and min-p that is a draw from the allowed ones, and seldom does a mask have to be made.
What ends a reasoning that is too long, or an answer that runs out of room, takes the place of the chosen token.

The random numbers of a token are a pure function of the request's seed and the token's position, and everything else
here is a function of the tokens before it, so a step that is run again draws the same tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, KeysView, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakValueDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llm_runtime import kernels
from llm_runtime.actors.actor import BadMessage
from llm_runtime.actors.grammar import GrammarCompiler
from llm_runtime.actors.messages import NewRequest, SamplingParams, TopLogprobs
from llm_runtime.actors.rank.device import to_device
from llm_runtime.actors.rank.reasoning_budget import ReasoningBudget, ReasoningBudgets
from llm_runtime.actors.rank.token_bitmasks import TokenBitmasks, allow
from llm_runtime.kernels import SamplingTensors, TokenMasks

Int32s = NDArray[np.int32]

FLOAT32_MAX = float(np.finfo(np.float32).max)


SECOND_DRAW = 1 << 32
"""Added to a token's position for the random number of its second draw."""
DENSE_BIAS = 1024
"""A bias for so many tokens is added as a vector, which slots with the same one share."""


class History:
    """The tokens of a sequence by position, and how often each different one stands among the first of them.

    Counting goes on where it ended; it begins anew when a step is run again.
    """

    def __init__(self, prompt_len: int, tokens: Int32s, max_tokens: int) -> None:
        self.prompt_len = prompt_len
        self.tokens = np.zeros(max_tokens + 1, np.int32)
        self.tokens[: len(tokens)] = tokens
        self._restart()

    def _restart(self) -> None:
        self._counted = 0
        self._entries: dict[int, int] = {}  # token → its place in the arrays below
        self._ids = np.zeros(256, np.int32)
        self._counts = np.zeros(256, np.int32)

    def entries(self, position: int) -> tuple[Int32s, Int32s]:
        """The different tokens before `position`, and how often each stands there behind the prompt."""
        if position < self._counted:
            self._restart()
        for at in range(self._counted, position):
            token = int(self.tokens[at])
            place = self._entries.setdefault(token, len(self._entries))
            if place == len(self._ids):
                self._ids, self._counts = np.tile(self._ids, 2), np.concatenate([self._counts, 0 * self._counts])
            self._ids[place] = token
            self._counts[place] += at >= self.prompt_len
        self._counted = position
        return self._ids[: len(self._entries)], self._counts[: len(self._entries)]


@dataclass(frozen=True, eq=False)
class Bias:
    """What is added to the logits of a slot with a long bias: float32 [V]."""

    vector: Tensor


_NO_TOKENS: list[int] = []


class Answer(NamedTuple):
    """A row that must keep to its constraint.

    Attributes:
        output: the slot's tokens so far, of which the `first` ones are free.
        openings: tokens that may come next whatever the constraint says.
    """

    row: int
    slot: int
    output: Int32s
    first: int
    openings: list[int]


@dataclass(frozen=True)
class Drawing:
    """How the slots of a batch are sampled: what steps with the same slots have in common."""

    slots: bytes
    params: SamplingTensors
    seeds: Tensor  # int64 [B]
    changed: list[int]  # rows whose logits are changed first
    constrained: list[int]  # rows that may draw some tokens only
    reported: NDArray[np.int64]  # rows that report logprobs
    thinking: list[int]  # rows whose output may have reasoning that makes a difference


class Sampler:
    """Sampling parameters by slot. Every rank of a group has one, and rank 0 draws.

    Args:
        max_slots, vocab_size, max_model_len: bounds of what may be asked for.
        device: of the logits.
        grammars: compiles constraints. token_bytes: gives the text of each token, by id; may raise CheckpointError.
            Both are None on ranks that do not draw.
    """

    def __init__(
        self,
        max_slots: int,
        vocab_size: int,
        max_model_len: int,
        device: torch.device,
        grammars: GrammarCompiler | None = None,
        token_bytes: Callable[[], Sequence[bytes]] | None = None,
    ) -> None:
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        self.device = device
        self._temperature = np.zeros(max_slots, np.float32)
        self._top_k = np.zeros(max_slots, np.int32)
        self._top_p = np.ones(max_slots, np.float32)
        self._log_min_p = np.full(max_slots, -np.inf, np.float32)
        self._seeds = np.zeros(max_slots, np.int64)
        # Slots whose logits need more than these, and slots that report logprobs, so that others cost nothing.
        self._changes = np.zeros(max_slots, np.bool_)
        self._logprobs = np.full(max_slots, -1, np.int32)
        self._params: dict[int, SamplingParams] = {}
        self._bias: dict[int, tuple[Int32s, NDArray[np.float32]]] = {}
        self._dense_bias: dict[int, Bias] = {}
        self._biases: WeakValueDictionary[bytes, Bias] = WeakValueDictionary()
        self._histories: dict[int, History] = {}
        self._min_lengths: dict[int, tuple[int, Int32s]] = {}
        self._masks = None if grammars is None else TokenBitmasks(grammars, vocab_size)
        self._reasonings = None if token_bytes is None else ReasoningBudgets(token_bytes)
        self._last_drawing: Drawing | None = None

    def check(self, opened: NewRequest) -> None:
        """Raises BadMessage for parameters that cannot be served."""
        sampling = opened.sampling
        if len(opened.history) % 4 or len(opened.history) // 4 > self.max_model_len:
            raise BadMessage(f"slot {opened.slot}: a history of {len(opened.history)} bytes")
        history = np.frombuffer(opened.history, "<i4")
        if len(history) and not 0 <= history.min() <= history.max() < self.vocab_size:
            raise BadMessage(f"slot {opened.slot}: the history holds a token outside the vocabulary")
        if any(token >= self.vocab_size for token in sampling.logit_bias):
            raise BadMessage(f"slot {opened.slot}: logit_bias names a token outside the vocabulary")
        if not all(value < math.inf for value in sampling.logit_bias.values()):
            raise BadMessage(f"slot {opened.slot}: a logit_bias is not a number below infinity")
        thinking = sampling.thinking
        if thinking is not None and (
            any(token >= self.vocab_size for token in thinking.closing)
            or (thinking.budget is not None and not thinking.closing)
        ):
            raise BadMessage(f"slot {opened.slot}: reasoning is closed by no token, or one outside the vocabulary")
        numbers = (sampling.temperature, sampling.frequency_penalty, sampling.presence_penalty)
        if not all(map(math.isfinite, (*numbers, sampling.repetition_penalty))):
            raise BadMessage(f"slot {opened.slot}: a sampling parameter is not a finite number")

    def open(self, opened: NewRequest) -> None:
        """Sets up a slot, whose parameters `check` has accepted."""
        slot, sampling = opened.slot, opened.sampling
        self._last_drawing = None
        self._params[slot] = sampling
        self._temperature[slot] = min(sampling.temperature, FLOAT32_MAX)
        self._top_k[slot] = min(sampling.top_k, self.vocab_size)
        self._top_p[slot] = sampling.top_p
        self._log_min_p[slot] = math.log(sampling.min_p) if sampling.min_p > 0 else -math.inf
        self._seeds[slot] = sampling.seed
        self._logprobs[slot] = sampling.logprobs
        for table in (self._bias, self._dense_bias, self._histories, self._min_lengths):
            table.pop(slot, None)
        if sampling.logit_bias:
            values = np.clip(list(sampling.logit_bias.values()), -FLOAT32_MAX, FLOAT32_MAX).astype(np.float32)
            ids = np.array(list(sampling.logit_bias), np.int32)
            if len(ids) < DENSE_BIAS:
                self._bias[slot] = ids, values
            else:
                self._dense_bias[slot] = self._shared_bias(ids, values)
        if sampling.needs_history:
            tokens = np.frombuffer(opened.history, "<i4")
            self._histories[slot] = History(opened.prompt_len, tokens, self.max_model_len)
        stops = np.array([token for token in sampling.stop_token_ids if token < self.vocab_size], np.int32)
        if sampling.min_tokens and len(stops):
            self._min_lengths[slot] = opened.prompt_len + sampling.min_tokens, stops
        if self._masks is not None:
            self._masks.open(opened)
        if self._reasonings is not None:
            self._reasonings.open(opened)
        self._changes[slot] = sampling.penalizes or bool(sampling.logit_bias) or slot in self._min_lengths

    def _shared_bias(self, ids: Int32s, values: NDArray[np.float32]) -> Bias:
        """All answers to one prompt, say, have the same."""
        key = ids.tobytes() + values.tobytes()
        bias = self._biases.get(key)
        if bias is None:
            vector = np.zeros(self.vocab_size, np.float32)
            vector[ids] = values
            bias = self._biases[key] = Bias(self._to_device(vector))
        return bias

    def note(self, slot: int, start: int, tokens: Int32s | int) -> None:
        """Tells a slot its tokens, or one, from position `start` on. Only slots in `with_history` want to know."""
        history = self._histories[slot]
        history.tokens[start : start + (1 if isinstance(tokens, int) else len(tokens))] = tokens
        index = start - history.prompt_len
        if self._masks is not None and slot in self._masks:
            self._masks.note(slot, index, [tokens] if isinstance(tokens, int) else tokens.tolist())
        reasoning = self._reasoning(slot)
        if reasoning is not None:
            reasoning.note(index)

    @property
    def with_history(self) -> KeysView[int]:
        """Slots whose tokens depend on those before."""
        return self._histories.keys()

    def one_by_one(self, slots: Iterable[int]) -> bool:
        """Whether one of the slots draws no more than one token in a step."""
        return any(slot in self._histories and self._params[slot].one_by_one for slot in slots)

    def sample(self, logits: Tensor, slots: Int32s, positions: Int32s, first: Tensor | None = None) -> Tensor:
        """Draws a token for each row: int32 [B].

        Args:
            logits: float32 [B, V], not changed.
            slots, positions: [B], each row's slot and the position of its token.
            first: what `drawing` draws from the logits as they are, int32 [B], if that is done.
        """
        drawing = self.drawing(slots)
        if first is None:
            changed = self._changed(drawing.changed, logits, slots, positions)
            at = self._to_device(positions.astype(np.int64))
            first = kernels.sample(changed, drawing.params, drawing.seeds, at)
        if not drawing.constrained and not drawing.thinking:
            return first
        answers = self._answers(drawing.constrained, slots, positions)
        drawn: Int32s = first.cpu().numpy()
        refused = [answer for answer in answers if not self._takes(answer, int(drawn[answer.row]))]
        if refused:
            drawn = drawn.copy()
            drawn[[answer.row for answer in refused]] = self._drawn_again(refused, logits, slots, positions)
        replaced = self._closing(answers, drawn) + self._forced(drawing.thinking, slots, positions)
        if replaced:
            rows, tokens = zip(*replaced, strict=True)
            drawn = drawn.copy()
            drawn[list(rows)] = tokens
        return self._to_device(drawn) if refused or replaced else first

    def _takes(self, answer: Answer, token: int) -> bool:
        assert self._masks is not None
        taken = self._masks.takes(answer.slot, token, answer.output, answer.first)
        if answer.openings:
            return token in answer.openings or (taken and not self._masks.lost(answer.slot))
        return taken

    def _drawn_again(self, answers: list[Answer], logits: Tensor, slots: Int32s, positions: Int32s) -> Int32s:
        """Tokens that the rows' constraints allow: int32 [len(answers)]."""
        masks = self._masks
        assert masks is not None
        allowed = masks.allowed(
            [each.slot for each in answers], [each.output for each in answers], [each.first for each in answers]
        )
        ended = set()
        for at, answer in enumerate(answers):
            if answer.openings:
                if masks.lost(answer.slot):
                    allowed[at] = 0
                allow(allowed[at], np.array(answer.openings, np.int32))
            if answer.slot in self._min_lengths and masks.over(answer.slot, allowed[at]):
                ended.add(answer.slot)  # a constraint that leaves nothing to say ends the answer, however short it is
        rows = np.array([answer.row for answer in answers])
        slots, positions = slots[rows], positions[rows]
        changed = np.flatnonzero(self._changes[slots]).tolist()
        one = answers[0].row  # mostly there is but one, and a slice copies nothing
        logits = logits[one : one + 1] if len(rows) == 1 else logits[self._to_device(rows)]
        logits = self._changed(changed, logits, slots, positions, ended)
        tokens = kernels.sample(
            logits,
            self._params_of(slots),
            self._to_device(self._seeds[slots]),
            self._to_device(positions.astype(np.int64) + SECOND_DRAW),
            TokenMasks(self._to_device(np.arange(len(rows), dtype=np.int32)), self._to_device(allowed)),
        )
        drawn: Int32s = tokens.cpu().numpy()
        return drawn

    def drawing(self, slots: Int32s) -> Drawing:
        """How slots are sampled. The same object for the slots of the step before, as long as none is opened."""
        key = slots.tobytes()
        if self._last_drawing is None or self._last_drawing.slots != key:
            self._last_drawing = Drawing(
                key,
                self._params_of(slots),
                self._to_device(self._seeds[slots]),
                np.flatnonzero(self._changes[slots]).tolist(),
                [row for row, slot in enumerate(slots.tolist()) if self._masks and slot in self._masks],
                np.flatnonzero(self._logprobs[slots] >= 0),
                [row for row, slot in enumerate(slots.tolist()) if self._reasonings and slot in self._reasonings.slots],
            )
        return self._last_drawing

    def _params_of(self, slots: Int32s) -> SamplingTensors:
        return SamplingTensors(
            temperature=self._to_device(self._temperature[slots]),
            top_k=self._to_device(self._top_k[slots]),
            top_p=self._to_device(self._top_p[slots]),
            log_min_p=self._to_device(self._log_min_p[slots]),
            all_greedy=not self._temperature[slots].any(),
        )

    def logprobs(self, logits: Tensor, slots: Int32s, rows: Int32s, tokens: Tensor) -> list[TopLogprobs]:
        """What the slots ask to know of their drawn tokens, from the logits as the model gave them.

        logits: float32 [B, V]; slots, rows: [B], `rows` being each row's number in the step; tokens: int32 [B].
        """
        wanted = self.drawing(slots).reported
        if not len(wanted):
            return []
        tops = np.minimum(self._logprobs[slots[wanted]], self.vocab_size)
        index = self._to_device(wanted)
        values, top_values, top_ids = kernels.logprobs(logits[index], tokens[index], int(tops.max()))
        values, top_values, top_ids = values.cpu(), top_values.cpu(), top_ids.cpu()
        return [
            _entry(int(rows[row]), values[i : i + 1], int(top), top_ids[i : i + 1], top_values[i : i + 1])
            for i, (row, top) in enumerate(zip(wanted, tops, strict=True))
        ]

    def prompt_top(self, slot: int) -> int:
        """How many of the most probable tokens a slot wants to know for each token of its prompt."""
        return min(max(self._params[slot].prompt_logprobs, 0), self.vocab_size)

    def _changed(
        self, rows: list[int], logits: Tensor, slots: Int32s, positions: Int32s, ended: Container[int] = ()
    ) -> Tensor:
        """The logits, or a copy with what the slots of `rows` want to have changed.

        ended: slots that have no minimum length.
        """
        penalized: list[tuple[int, Int32s, Int32s]] = []
        biased: list[tuple[int, Int32s, NDArray[np.float32]]] = []
        for row in rows:
            slot, position = int(slots[row]), int(positions[row])
            if self._params[slot].penalizes:
                penalized.append((row, *self._histories[slot].entries(position)))
            if slot in self._bias:
                biased.append((row, *self._bias[slot]))
            if slot in self._min_lengths and position < self._min_lengths[slot][0] and slot not in ended:
                stops = self._min_lengths[slot][1]
                biased.append((row, stops, np.full(len(stops), -np.inf, np.float32)))
        dense = [(row, self._dense_bias[slot]) for row in rows if (slot := int(slots[row])) in self._dense_bias]
        if penalized or biased or dense:
            logits = logits.clone()
        if penalized:
            sampling = [self._params[int(slot)] for slot in slots]
            kernels.apply_penalties(
                logits,
                *self._entries(penalized),
                torch.tensor([each.repetition_penalty for each in sampling], dtype=torch.float32, device=self.device),
                torch.tensor([each.frequency_penalty for each in sampling], dtype=torch.float32, device=self.device),
                torch.tensor([each.presence_penalty for each in sampling], dtype=torch.float32, device=self.device),
            )
        for row, bias in dense:
            logits[row].add_(bias.vector)
        if biased:
            kernels.add_bias(logits, *self._entries(biased))
        return logits

    def _answers(self, constrained: list[int], slots: Int32s, positions: Int32s) -> list[Answer]:
        """Of the constrained rows those that are not free to reason."""
        answers = []
        for row in constrained:
            slot = int(slots[row])
            output, first, openings = self._output(slot, int(positions[row])), 0, _NO_TOKENS
            reasoning = self._reasoning(slot)
            if reasoning is not None:
                reasoning.follow(output)
                before = reasoning.answer(len(output))
                if before is None:
                    continue
                first, openings = before, reasoning.openings
            answers.append(Answer(row, slot, output, first, openings))
        return answers

    def _closing(self, answers: list[Answer], drawn: Int32s) -> list[tuple[int, int]]:
        """The rows whose drawn token would leave no room to end the answer, with the token that takes its place."""
        masks = self._masks
        if masks is None:
            return []
        found = []
        for answer in answers:
            if not masks.near_end(answer.slot) or drawn[answer.row] in answer.openings:
                continue
            token = masks.closing(answer.slot, int(drawn[answer.row]))
            if token is not None:
                found.append((answer.row, token))
        return found

    def _forced(self, rows: Sequence[int], slots: Int32s, positions: Int32s) -> list[tuple[int, int]]:
        """Of the rows that may reason, those whose next token is not theirs to choose, with that token."""
        forced = []
        for row in rows:
            slot = int(slots[row])
            reasoning, output = self._reasoning(slot), self._output(slot, int(positions[row]))
            assert reasoning is not None
            reasoning.follow(output)
            token = reasoning.forced(len(output))
            if token is not None:
                forced.append((row, token))
        return forced

    def _reasoning(self, slot: int) -> ReasoningBudget | None:
        """A slot's reasoning, if it makes a difference."""
        return None if self._reasonings is None else self._reasonings.slots.get(slot)

    def _output(self, slot: int, position: int) -> Int32s:
        """A slot's output tokens before a position."""
        history = self._histories[slot]
        return history.tokens[history.prompt_len : position]

    def _entries(self, rows: Sequence[tuple[int, Int32s, NDArray[np.generic]]]) -> tuple[Tensor, Tensor, Tensor]:
        """(row, token ids, values) of each row as three tensors with an entry a token."""
        return (
            self._to_device(
                np.repeat(np.array([row for row, _, _ in rows], np.int32), [len(ids) for _, ids, _ in rows])
            ),
            self._to_device(np.concatenate([ids for _, ids, _ in rows])),
            self._to_device(np.concatenate([values for _, _, values in rows])),
        )

    def _to_device(self, array: NDArray[np.generic]) -> Tensor:
        return to_device(array, self.device)


def prompt_logprobs(row: int, logprobs: Tensor, top_values: Tensor, top_ids: Tensor) -> TopLogprobs:
    """The entry of one row of a step: float32 [k], float32 [k, top], int32 [k, top]."""
    return _entry(row, logprobs.cpu(), top_ids.shape[1], top_ids.cpu(), top_values.cpu())


def _entry(row: int, logprobs: Tensor, top: int, top_ids: Tensor, top_values: Tensor) -> TopLogprobs:
    return TopLogprobs(
        row=row,
        logprobs=logprobs.numpy().tobytes(),
        top=top,
        top_ids=top_ids[:, :top].numpy().tobytes(),
        top_logprobs=top_values[:, :top].numpy().tobytes(),
    )
