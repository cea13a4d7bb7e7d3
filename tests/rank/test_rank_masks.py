"""Constraints in the rank: every drawn token is allowed, and a function of the request, whatever else happens."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec import structs
from rank_tools import Driver, Sequence, rank_config

from llm_runtime.actors.grammar import Backend, closing, load_backend
from llm_runtime.actors.messages import Constraint, NewRequest, SamplingParams
from llm_runtime.actors.rank import Executor, build_executor
from llm_runtime.actors.rank.token_bitmasks import allow, unpacked

EOS = 2
PROMPT = [1, 4093, 198, 18243, 335, 253, 1528]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "ü", "🙂"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
}
CONSTRAINTS = [
    Constraint("json_schema", json.dumps(PERSON)),
    Constraint("regex", "[0-9]{2,4}(-[a-f]{1,5})?"),
    Constraint("choice", json.dumps(["yes", "no", "perhaps"])),
]


def sampling(constraint: Constraint | None, **changes: Any) -> SamplingParams:
    defaults: dict[str, Any] = {"max_tokens": 56, "seed": 7, "temperature": 1.0, "stop_token_ids": [EOS]}
    return SamplingParams(**{**defaults, **changes, "constraint": constraint})


@pytest.fixture(scope="module")
def compiler(smollm2: Path) -> Backend:
    return load_backend(smollm2, 49152)


def check(compiler: Backend, sequence: Sequence) -> None:
    """The output is allowed up to its first end, and complete there; behind it there is nothing but ends."""
    assert sequence.sampling.constraint is not None
    matcher = compiler.compile(sequence.sampling.constraint).matcher([EOS])
    ended = False
    for token in sequence.output:
        if ended:
            assert token == EOS
        else:
            assert matcher.accept(token)
            ended = token == EOS


def text(compiler: Backend, sequence: Sequence) -> str:
    vocabulary = compiler.tokens.texts
    return b"".join(vocabulary[token] for token in sequence.output if token != EOS).decode()


def run(executor: Executor, params: list[SamplingParams], **how: Any) -> list[Sequence]:
    driver = Driver(executor)
    sequences = [driver.sequence(slot, PROMPT[: len(PROMPT) - slot % 3], each) for slot, each in enumerate(params)]
    driver.run(sequences, **how)
    return sequences


PARAMS = [
    *(sampling(constraint) for constraint in CONSTRAINTS),
    sampling(None),
    sampling(CONSTRAINTS[0], temperature=0.0),
    sampling(CONSTRAINTS[0], repetition_penalty=1.2, presence_penalty=0.5, seed=9),
    sampling(None, temperature=0.0),
]


@pytest.fixture(scope="module")
def together(deterministic: Executor) -> list[Sequence]:
    return run(deterministic, PARAMS)


def test_every_token_is_allowed(compiler: Backend, together: list[Sequence]) -> None:
    constrained = [each for each in together if each.sampling.constraint is not None]
    for sequence in constrained:
        check(compiler, sequence)
    assert [each for each in constrained[:3] if each.output[-1] != EOS] == [], [
        text(compiler, each) for each in constrained
    ]
    person = json.loads(text(compiler, together[0]))
    assert list(person)[:3] == ["name", "age", "tags"], "what is required, and then whatever else"
    assert re.fullmatch("[0-9]{2,4}(-[a-f]{1,5})?", text(compiler, together[1]))
    assert text(compiler, together[2]) in ("yes", "no", "perhaps")
    assert together[3].output != together[0].output


def test_others_in_the_batch_draw_what_they_would_alone(deterministic: Executor, together: list[Sequence]) -> None:
    driver = Driver(deterministic)
    alone = driver.sequence(0, PROMPT, PARAMS[6])
    driver.run([alone])
    assert alone.output == together[6].output


@pytest.mark.parametrize("how", [{"repeat": True}, {"explicit": True}, {"chunk": 3}])
def test_the_same_tokens_when_steps_are_run_again(
    deterministic: Executor, together: list[Sequence], how: dict[str, Any]
) -> None:
    assert [each.output for each in run(deterministic, PARAMS[:3], **how)] == [each.output for each in together[:3]]


def test_a_rank_that_knows_nothing_goes_on_in_the_middle(smollm2: Path, together: list[Sequence]) -> None:
    fresh = build_executor(rank_config(smollm2, deterministic=True))
    driver = Driver(fresh)
    sequences = []
    for slot, known in enumerate(together[:3]):
        for position in (1, 5):
            sequence = driver.sequence(2 * slot + position // 5, known.prompt, known.sampling)
            sequence.output = known.output[:position]
            sequences.append((sequence, known))
    driver.run([sequence for sequence, _ in sequences])
    assert [sequence.output for sequence, _ in sequences] == [known.output for _, known in sequences]


def test_an_older_step_is_run_again(deterministic: Executor, together: list[Sequence]) -> None:
    driver = Driver(deterministic)
    sequence = driver.sequence(0, PROMPT, PARAMS[0])
    steps = []
    for _ in range(8):
        rows = [(sequence, len(sequence.tokens) - sequence.computed)]
        step = driver.step(rows)
        result = deterministic.execute(step)
        steps.append((step, result))
        driver.apply(rows, step, result)
    for step, result in [*steps[-2:], *steps[-3:]]:
        assert deterministic.execute(step).tokens == result.tokens
    assert sequence.output == together[0].output[:8]


def test_bias_and_minimum_length_give_way_to_the_constraint(deterministic: Executor, compiler: Backend) -> None:
    digits = Constraint("regex", "[0-9]+")
    yes = Constraint("choice", '["yes"]')
    word = {token: 100.0 for token, each in enumerate(compiler.tokens.texts) if each == b"the"}
    params = [
        sampling(digits, min_tokens=20, max_tokens=24, logit_bias=word),  # could end at once, and may not
        sampling(yes, min_tokens=20, max_tokens=4),  # must end, and does
        sampling(yes, stop_token_ids=[], max_tokens=4),
        sampling(
            digits, max_tokens=8, temperature=0.0, logit_bias={token: -100.0 for token in range(300) if token != 33}
        ),
    ]
    sequences = run(deterministic, params)
    for sequence in sequences:
        check(compiler, sequence)
    assert EOS not in sequences[0].output[:20]
    assert text(compiler, sequences[1]) == text(compiler, sequences[2]) == "yes"
    assert sequences[2].output[-1] == EOS


def test_an_output_that_breaks_its_constraint_ends(deterministic: Executor) -> None:
    driver = Driver(deterministic)
    sequence = driver.sequence(0, PROMPT, structs.replace(PARAMS[1], max_tokens=6))
    sequence.output = PROMPT[2:5]
    driver.run([sequence])
    assert sequence.output[3:] == [EOS] * 3


TREE = {
    "$defs": {"node": {"type": "object", "properties": {"a": {"$ref": "#/$defs/node"}, "b": {"type": "string"}}}},
    "type": "object",
    "properties": {"name": {"type": "string"}, "tree": {"$ref": "#/$defs/node"}, "n": {"type": "number"}},
    "required": ["name", "tree", "n"],
}
ENDLESS = [
    Constraint("json"),
    Constraint("json_schema", json.dumps(TREE)),
    Constraint("json_schema", '{"type": "array", "minItems": 2}'),
    Constraint("json_schema", '{"type": "string", "pattern": "^(ab)*x"}'),
    Constraint("regex", "[a-z ]*(\\.[a-z ]{3,})+"),
    Constraint("ebnf", 'root ::= "[" (root ("," root)*)? "]"'),
]
"""Nothing of these has to end."""


@pytest.fixture(scope="module")
def cut_short(deterministic: Executor) -> list[Sequence]:
    params = [sampling(each, max_tokens=16 + 5 * at, seed=at) for at, each in enumerate(ENDLESS)]
    return run(deterministic, params)


def test_an_answer_that_runs_out_of_room_is_complete(compiler: Backend, cut_short: list[Sequence]) -> None:
    for sequence in cut_short:
        check(compiler, sequence)
        assert sequence.output[-1] == EOS, text(compiler, sequence)


def test_the_same_end_when_steps_are_run_again(deterministic: Executor, cut_short: list[Sequence]) -> None:
    params = [each.sampling for each in cut_short]
    assert [each.output for each in run(deterministic, params, repeat=True)] == [each.output for each in cut_short]


def test_the_same_end_in_a_rank_that_knows_nothing(smollm2: Path, cut_short: list[Sequence]) -> None:
    driver = Driver(build_executor(rank_config(smollm2, deterministic=True)))
    sequences = [driver.sequence(slot, each.prompt, each.sampling) for slot, each in enumerate(cut_short)]
    for sequence, known in zip(sequences, cut_short, strict=True):
        sequence.output = known.output[: len(known.output) * 2 // 3]
    driver.run(sequences)
    assert [each.output for each in sequences] == [each.output for each in cut_short]


def test_an_answer_with_no_room_at_all_is_only_cut(deterministic: Executor, compiler: Backend) -> None:
    (sequence,) = run(deterministic, [sampling(CONSTRAINTS[0], max_tokens=5)])
    check(compiler, sequence)
    assert EOS not in sequence.output


HIDDEN = [  # the masks do not show how far an answer has come
    r"^pbj:([a-z0-9-]+):([a-z0-9.-]+):([a-z0-9-]+)?:([a-z0-9-]+):([0-9]+-[0-9]+-[0-9]+)$",
    "rocket_font|arrow_font",
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}\.[0-9]+Z",
    r"\\{3}\"[^a-z]?é+\u00e9",
]
RECURSIVE = {
    "$defs": {
        "part": {
            "type": "object",
            "properties": {"parts": {"type": "array", "items": {"$ref": "#/$defs/part"}}, "id": {"type": "string"}},
            "required": ["id"],
        }
    },
    "$ref": "#/$defs/part",
}


@pytest.mark.parametrize(
    ("constraint", "begun"),
    [
        *((each, "") for each in (*CONSTRAINTS, *ENDLESS)),
        *((Constraint("json_schema", json.dumps({"type": "string", "pattern": each})), "") for each in HIDDEN),
        *((Constraint("regex", f"(?s:.*)({each.strip('^$')})"), "abc") for each in HIDDEN),
        (Constraint("json_schema", json.dumps({"type": "string", "pattern": HIDDEN[0]})), '"pbj:x:'),
        (Constraint("json_schema", json.dumps({"type": "string", "pattern": HIDDEN[2]})), '"on 2024-01-02T0'),
        (Constraint("json_schema", json.dumps(RECURSIVE)), '{"parts": [{"parts": [{"parts": ['),
    ],
)
def test_closings_complete(compiler: Backend, constraint: Constraint, begun: str) -> None:
    compiled = compiler.compile(constraint)
    matcher = compiled.matcher([EOS])
    assert all(matcher.accept(token) for token in compiler.tokens.spell(begun.encode()))
    found = closing(matcher, compiler.tokens, compiled.endings)
    assert found is not None
    assert not matcher.complete or found == b""
    assert all(matcher.accept(token) for token in compiler.tokens.spell(found))
    assert matcher.complete


def test_compiling_beside_the_steps(deterministic: Executor) -> None:
    constraint = Constraint("regex", "[a-z]{3}!")
    grammars = deterministic.grammars
    grammars.submit(constraint, "main.scheduler")
    grammars.submit(constraint, "main.scheduler")
    grammars.submit(Constraint("regex", "("), "main.scheduler")
    answers: list[Any] = []
    while len(answers) < 2:
        answers += grammars.finished()
    assert {asker for asker, _ in answers} == {"main.scheduler"}
    assert [bool(answer.error) for _, answer in sorted(answers, key=lambda each: bool(each[1].error))] == [False, True]
    before = grammars.compiled
    assert run(deterministic, [sampling(constraint, max_tokens=4)])[0].output
    assert grammars.compiled == before


def test_masks_are_those_of_the_library(compiler: Backend, deterministic: Executor) -> None:
    masks = deterministic._sampler._masks
    assert masks is not None
    driver = Driver(deterministic)
    deterministic.execute(driver.step([(driver.sequence(3, PROMPT, PARAMS[1]), len(PROMPT))]))
    matcher = compiler.compile(CONSTRAINTS[1]).matcher([EOS])
    (allowed,) = masks.allowed([3], [np.empty(0, np.int32)])
    words = np.zeros(49152 // 32, np.int32)
    matcher.fill(words)
    assert np.array_equal(words, allowed)
    added = np.array([0, 31, 32, 49151], np.int32)
    allow(allowed, added)
    expected = {token for token in range(49152) if words[token // 32] >> (token % 32) & 1} | set(added.tolist())
    assert np.flatnonzero(unpacked(allowed, 49152)).tolist() == sorted(expected)


def test_draws_have_the_odds_of_the_allowed_tokens(deterministic: Executor, compiler: Backend) -> None:
    sampler = deterministic._sampler
    constraint = Constraint("choice", json.dumps(["no", "yes", "yeah", "perhaps"]))
    firsts = [compiler.tokens.spell(text)[0] for text in (b"no", b"yes", b"yeah", b"perhaps")]
    allowed = np.zeros(49152 // 32, np.int32)
    compiler.compile(constraint).matcher([EOS]).fill(allowed)
    logits = torch.full((8, 49152), -3.0)
    logits[:, 77] = 5.0  # what the constraint does not allow has most of the odds
    logits[:, firsts] = torch.tensor([3.0, 4.0, 2.0, 3.5])
    bits = unpacked(allowed, 49152)
    weights = np.where(bits, np.exp(logits[0].double().numpy()), 0.0)
    odds = weights / weights.sum()
    slots, at = np.arange(8, dtype=np.int32), np.full(8, len(PROMPT), np.int32)
    counts = np.zeros(49152)
    rounds = 250
    for turn in range(rounds):
        for slot in range(8):
            params = sampling(constraint, seed=8 * turn + slot)
            sampler.open(NewRequest(slot, len(PROMPT), params, np.array(PROMPT, "<i4").tobytes()))
        drawn = sampler.sample(logits, slots, at)
        assert torch.equal(drawn, sampler.sample(logits, slots, at)), "asked again, they are the same"
        counts += np.bincount(drawn.numpy(), minlength=49152)
    draws = 8 * rounds
    assert not counts[~bits].any()
    for token in firsts:
        deviation = math.sqrt(draws * odds[token] * (1 - odds[token]))
        assert abs(counts[token] - draws * odds[token]) < 4 * deviation
