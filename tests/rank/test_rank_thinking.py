"""Budgets of reasoning in the rank: it ends where it must, a function of the output, whatever else happens."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from rank_tools import Driver, Sequence, i32, ints

from llm_runtime.actors.actor import BadMessage
from llm_runtime.actors.messages import SAMPLE, VERIFY, Constraint, SamplingParams, Thinking
from llm_runtime.actors.rank import Executor
from llm_runtime.actors.rank.reasoning_budget import ReasoningBudget, Spelling
from llm_runtime.actors.vocabulary import Vocabulary, load_vocabulary

# -- one output ----------------------------------------------------------------------------------------------------

TEXTS = ["<think>", "</think>", "<", "/", "</", "think", ">", ">\n", "<tool_call>", "a", " ", "\n", "b", "", "></"]
VOCABULARY = [text.encode() for text in TEXTS]
A, NEWLINE = TEXTS.index("a"), TEXTS.index("\n")
ENDS = ["</think>", "<tool_call>"]
CLOSING = [NEWLINE, TEXTS.index("</"), TEXTS.index("think"), TEXTS.index(">\n")]


def thought(thinking: Thinking) -> ReasoningBudget:
    return ReasoningBudget(thinking, VOCABULARY, Spelling(thinking.start.encode(), VOCABULARY))


def by_definition(thinking: Thinking, output: list[int]) -> tuple[int | None, int | None]:
    """The token that is forced behind an output, and how many tokens come before its answer: by looking at its text
    from the start for each token anew."""
    text, begun = "", None if thinking.start else 0
    for count in range(len(output) + 1):
        if begun is not None:
            if any(end in text for end in thinking.ends):
                return None, count
            if thinking.budget is not None and count - begun == thinking.budget:
                left = thinking.closing[len(output) - count :]
                return (left[0], None) if left else (None, count + len(thinking.closing))
        if count == len(output):
            break
        text += TEXTS[output[count]]
        if begun is None:
            text = text.lstrip()
            if text.startswith(thinking.start):
                begun, text = count + 1, text.removeprefix(thinking.start)
            elif not thinking.start.startswith(text):
                return None, 0
    return None, 0 if begun is None else None


def drawn(thinking: Thinking, chance: random.Random, length: int) -> list[int]:
    """An output drawn at random, of parts of markers above all."""
    output: list[int] = []
    if thinking.start and chance.random() < 0.8:
        output += chance.choice([[0], [NEWLINE, 0], [2, 5, 6], [2, 5, 7], [2, 5, 14, 5], [A], [2, 3]])
    follows = thought(thinking)
    while len(output) < length:
        follows.follow(np.array(output, np.int32))
        token = follows.forced(len(output))
        output.append(chance.randrange(len(TEXTS)) if token is None else token)
    return output


@pytest.mark.parametrize("start", ["", "<think>"])
@pytest.mark.parametrize("budget", [None, 0, 1, 4, 9])
def test_a_function_of_the_output(start: str, budget: int | None) -> None:
    """At each of its lengths, in any order, also when other tokens have taken the place of some."""
    chance = random.Random(f"{start}{budget}")
    thinking = Thinking(ENDS, start, budget, CLOSING if budget is not None else [])
    forced = 0
    for _ in range(60):
        output = np.array(drawn(thinking, chance, 24), np.int32)
        follows = thought(thinking)
        for _ in range(40):
            count = chance.randrange(len(output) + 1)
            if chance.random() < 0.3:
                index = chance.randrange(len(output))
                output[index:] = [chance.randrange(len(TEXTS)) for _ in output[index:]]
                follows.note(index)
            follows.follow(output[:count])
            known = output[:count].tolist()
            assert (follows.forced(count), follows.answer(count)) == by_definition(thinking, known), known
            forced += follows.forced(count) is not None
    assert bool(forced) == (budget is not None)


def test_what_ends_a_reasoning() -> None:
    thinking = Thinking(ENDS, "<think>", 3, CLOSING)

    def outcome(*texts: str) -> tuple[int | None, int | None]:
        output = np.array([TEXTS.index(text) for text in texts], np.int32)
        follows = thought(thinking)
        follows.follow(output)
        return follows.forced(len(output)), follows.answer(len(output))

    free = None
    assert outcome() == (free, 0)
    assert outcome("\n", "<think>", "a", "a") == (free, None)
    assert outcome("\n", "<think>", "a", "a", "a") == (CLOSING[0], None)
    assert outcome("<think>", "a", "a", "a", "\n", "</", "think", ">\n") == (free, 8)
    assert outcome("<think>", "a", "a", "</think>") == (free, 4)  # at the budget, and by itself
    assert outcome("<", "think", ">\n", "</", "think", ">\n", "a") == (free, 6)  # in tokens that go on behind it
    assert outcome("<think>", "a", "<tool_call>") == (free, 3)
    assert outcome("a", "<think>", "a", "a", "a") == (free, 0)  # only at the beginning
    assert outcome("<think>", "a", "<think>", "a") == (CLOSING[0], None)


def test_the_tokens_that_begin_a_reasoning() -> None:
    thinking = Thinking(ENDS, "<think>")
    whole, pieces = thought(thinking), VOCABULARY[1:]
    spelled = ReasoningBudget(thinking, pieces, Spelling(b"<think>", pieces))
    for follows, texts, wanted in (
        (whole, [], ["<think>"]),
        (whole, ["<"], ["think"]),
        (whole, ["a"], []),
        (spelled, [], ["<"]),
        (spelled, ["<", "think"], [">"]),
        (spelled, ["<", "think", ">\n"], []),
    ):
        vocabulary = VOCABULARY if follows is whole else pieces
        follows.note(0)
        follows.follow(np.array([vocabulary.index(text.encode()) for text in texts], np.int32))
        assert [vocabulary[token].decode() for token in follows.openings] == wanted


# -- in steps ------------------------------------------------------------------------------------------------------

PROMPT = [1, 4093, 198, 18243, 335, 253, 1528]
EOS, TOKENS = 2, 18


@pytest.fixture(scope="module")
def vocabulary(smollm2: Path) -> Vocabulary:
    return load_vocabulary(smollm2)


@pytest.fixture(scope="module")
def closing(vocabulary: Vocabulary) -> list[int]:
    tokens = vocabulary.encode("\n</think>\n\n", add_special=False)
    assert len(tokens) > 3  # this model has no token for it
    return tokens


def sampling(budget: int | None, closing: list[int], start: str = "", **changes: Any) -> SamplingParams:
    thinking = Thinking(["</think>"], start, budget, closing)
    defaults: dict[str, Any] = {"max_tokens": TOKENS, "seed": 7, "temperature": 0.0, "stop_token_ids": [EOS]}
    return SamplingParams(**{**defaults, **changes, "thinking": thinking})


def run(executor: Executor, params: list[SamplingParams], **how: Any) -> list[list[int]]:
    driver = Driver(executor)
    sequences = [driver.sequence(slot, PROMPT[: len(PROMPT) - slot % 3], each) for slot, each in enumerate(params)]
    driver.run(sequences, **how)
    return [sequence.output for sequence in sequences]


DIGITS = Constraint("regex", "[0-9]{3}")


@pytest.fixture(scope="module")
def params(closing: list[int]) -> list[SamplingParams]:
    return [
        sampling(6, closing, temperature=0.8),
        sampling(0, closing, temperature=0.9, repetition_penalty=1.3, logprobs=2, min_tokens=16),
        sampling(6, closing, constraint=DIGITS, temperature=1.0),
        msgspec.structs.replace(sampling(0, closing, temperature=0.8), thinking=None),
        sampling(3, closing, "<think>"),  # which this model never writes
        sampling(None, [], constraint=DIGITS, temperature=0.8),
    ]


@pytest.fixture(scope="module")
def together(deterministic: Executor, params: list[SamplingParams]) -> list[list[int]]:
    return run(deterministic, params)


def test_reasoning_ends_at_its_budget(together: list[list[int]], closing: list[int], vocabulary: Vocabulary) -> None:
    for output, budget in zip(together, (6, 0, 6), strict=False):
        assert output[budget : budget + len(closing)] == closing
    assert together[0][:6] == together[3][:6]
    assert together[0] != together[3]
    assert closing[1] not in together[3] + together[4]
    answer = vocabulary.decode([token for token in together[2][6:] if token != EOS], skip_special=False)
    assert re.fullmatch(r"\n</think>\n\n[0-9]{3}", answer)  # the form is that of the answer
    assert not set(vocabulary.encode("0123456789", add_special=False)).issuperset(together[5])  # which never comes


@pytest.mark.parametrize("how", [{"repeat": True}, {"explicit": True}, {"chunk": 3}])
def test_the_same_tokens_when_steps_are_run_again(
    deterministic: Executor, params: list[SamplingParams], together: list[list[int]], how: dict[str, Any]
) -> None:
    assert run(deterministic, params[:3], **how) == together[:3]


def test_a_rank_that_knows_nothing_goes_on_in_the_middle(
    deterministic: Executor, params: list[SamplingParams], together: list[list[int]], closing: list[int]
) -> None:
    """Before the closing, at each of its tokens, and behind it."""
    driver = Driver(deterministic)
    sequences = []
    for cut in range(5, 8 + len(closing)):
        number = 0 if cut % 2 else 2
        sequence = driver.sequence(cut, PROMPT[: len(PROMPT) - number], params[number])
        sequence.output = together[number][:cut]
        sequences.append((sequence, together[number]))
    driver.run([sequence for sequence, _ in sequences])
    assert [sequence.output for sequence, _ in sequences] == [wanted for _, wanted in sequences]


def test_guesses_beyond_the_budget_are_refused(
    deterministic: Executor, params: list[SamplingParams], together: list[list[int]]
) -> None:
    """Guesses that know nothing of the budget, and right ones of which one is wrong."""
    limited, wanted, unlimited = params[0], together[0], run(deterministic, [sampling(None, [], temperature=0.8)])[0]
    assert limited.needs_history
    assert not limited.one_by_one
    for guesses, wrong in ((unlimited, -1), (wanted, 2)):
        driver = Driver(deterministic)
        sequence = driver.sequence(0, PROMPT, limited)
        rows = [(sequence, len(PROMPT))]
        step = driver.step(rows)
        driver.apply(rows, step, deterministic.execute(step))
        accepted = []
        while len(sequence.output) < 13:
            draft = guesses[len(sequence.output) :][:5]
            if wrong >= 0:
                draft[wrong] += 1
            step = verifying(driver, sequence, draft)
            result = deterministic.execute(step)
            assert deterministic.execute(step).tokens == result.tokens
            tokens = ints(result.tokens)
            right = next((at for at, guess in enumerate(draft) if guess != tokens[at]), len(draft))
            accepted.append(right)
            sequence.output += tokens[: right + 1]
            sequence.computed = len(sequence.tokens) - 1
        assert sequence.output == wanted[: len(sequence.output)]
        if wrong < 0:
            assert accepted[:2] == [5, 0]  # up to the budget, and not across it
        else:
            assert set(accepted) == {wrong}


def verifying(driver: Driver, sequence: Sequence, draft: list[int]) -> Any:
    step = driver.step([(sequence, 1)], explicit=True)
    return msgspec.structs.replace(
        step,
        lengths=i32([1 + len(draft)]),
        flags=bytes([SAMPLE | VERIFY]),
        tokens=i32([sequence.tokens[-1], *draft]),
    )


def test_a_constraint_allows_a_reasoning_to_begin(deterministic: Executor, closing: list[int]) -> None:
    """Of a model that may reason: its output does so or keeps to the form at once, and never anything else."""
    vocabulary = load_vocabulary(Path(deterministic.config.model))
    opening = vocabulary.encode("<think>", add_special=False)
    params = [
        sampling(2, closing, "<think>", constraint=DIGITS, logit_bias=dict.fromkeys(opening, 40.0)),
        sampling(2, closing, "<think>", constraint=DIGITS, logit_bias=dict.fromkeys(opening, -100.0)),
    ]
    thinks, answers = (
        vocabulary.decode([token for token in output if token != EOS], skip_special=False)
        for output in run(deterministic, params)
    )
    assert re.fullmatch(r"<think>(?s:.)*\n</think>\n\n[0-9]{3}", thinks), thinks
    assert re.fullmatch("[0-9]{3}", answers)


def test_no_budget_costs_nothing(deterministic: Executor) -> None:
    driver = Driver(deterministic)
    deterministic.execute(driver.step([(driver.sequence(0, PROMPT), len(PROMPT))]))
    sampler = deterministic._sampler
    assert 0 not in sampler.with_history
    assert sampler.drawing(np.array([0], np.int32)).thinking == []


def test_budgets_that_make_no_sense(deterministic: Executor) -> None:
    for bad in (sampling(3, []), sampling(3, [49152])):
        driver = Driver(deterministic)
        with pytest.raises(BadMessage, match="reasoning is closed by no token"):
            deterministic.execute(driver.step([(driver.sequence(0, PROMPT, bad), len(PROMPT))]))
