"""The executor's promises: the same bits whatever the batch, reproducible sampling, and no harm from any message."""

from __future__ import annotations

from collections import Counter
from itertools import cycle
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from rank_tools import PAGE_SIZE, Driver, Sequence, generate, i32, ints, rank_config, save_model

from llm_runtime.actors.actor import BadMessage, StartFailure
from llm_runtime.actors.messages import PROMPT_LOGPROBS, SAMPLE, VERIFY, NewRequest, SamplingParams, Step
from llm_runtime.actors.rank import Executor, build_executor
from llm_runtime.actors.rank.executor import BadStep

VOCABULARY = 300


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    save_model(directory, "LlamaForCausalLM")
    return directory


@pytest.fixture(
    scope="module",
    params=[
        ("float32", "float32"),
        ("bfloat16", "bfloat16"),
        ("int8", "bfloat16"),
        ("int4", "bfloat16"),
        ("float32", "int8"),
        ("int4", "int8"),
    ],
    ids="-".join,
)
def exact(request: pytest.FixtureRequest, checkpoint: Path) -> Executor:
    """A deterministic executor of a tiny model."""
    dtype, kv_dtype = request.param
    config = rank_config(checkpoint, dtype=dtype, kv_dtype=kv_dtype, deterministic=True, max_model_len=512)
    return build_executor(config)


@pytest.fixture
def tiny(checkpoint: Path) -> Executor:
    return build_executor(rank_config(checkpoint, num_pages=64, max_slots=8, max_model_len=128))


def prompts_of(*lengths: int) -> list[list[int]]:
    generator = np.random.default_rng(7)
    return [generator.integers(0, VOCABULARY, length).tolist() for length in lengths]


# -- the same bits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{"alone": True}, {"chunk": 1}, {"chunk": 13}, {"chunk": 64}, {"repeat": True}])
def test_bits_do_not_depend_on_the_batch(exact: Executor, how: dict[str, Any]) -> None:
    prompts = prompts_of(1, 2, 3, 15, 16, 17, 64, 100, 129, 250)
    sampling = SamplingParams(max_tokens=12, seed=5, logprobs=20, prompt_logprobs=2)
    expected = generate(exact, prompts, sampling)
    for sequence, other in zip(expected, generate(exact, prompts, sampling, **how), strict=True):
        assert other.output == sequence.output
        for entry, other_entry in zip(sequence.logprobs, other.logprobs, strict=True):
            assert msgspec.structs.replace(other_entry, row=entry.row) == entry
        assert i32(np.float32(other.prompt_logprobs).view(np.int32)) == i32(
            np.float32(sequence.prompt_logprobs).view(np.int32)
        )


def test_bits_of_smollm2(deterministic: Executor, prompts: list[list[int]]) -> None:
    chosen = [prompts[index] for index in (1, 3, 9, 18)]
    sampling = SamplingParams(max_tokens=6, seed=5, logprobs=20)
    together = generate(deterministic, chosen, sampling)
    for how in ({"alone": True}, {"chunk": 50}):
        for sequence, other in zip(together, generate(deterministic, chosen, sampling, **how), strict=True):
            assert other.output == sequence.output
            assert [(e.logprobs, e.top_ids, e.top_logprobs) for e in other.logprobs] == [
                (e.logprobs, e.top_ids, e.top_logprobs) for e in sequence.logprobs
            ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("deterministic", [True, False])
def test_kernel_graphs_change_no_bit(checkpoint: Path, dtype: str, deterministic: bool) -> None:
    """1 to 17 rows that end one after the other, half of them drawn at random, with their logprobs to the bit."""
    config = rank_config(checkpoint, dtype=dtype, deterministic=deterministic, max_model_len=512)
    outputs = []
    for graphs in (True, False):
        executor = build_executor(config)
        assert executor.graphs is not None
        if not graphs:
            executor.graphs = None
        driver = Driver(executor)
        sequences = [
            driver.sequence(
                slot,
                prompt,
                SamplingParams(max_tokens=slot + 2, seed=slot, temperature=slot % 2, logprobs=20 if slot % 3 else -1),
            )
            for slot, prompt in enumerate(prompts_of(*range(1, 171, 10)))
        ]
        assert len(sequences) == 17
        driver.run(sequences, repeat=True)
        assert bool(executor.decode_steps) == graphs
        outputs.append([(sequence.output, sequence.logprobs) for sequence in sequences])
    assert outputs[0] == outputs[1]


def test_a_decode_step_may_name_its_tokens(tiny: Executor) -> None:
    prompts = prompts_of(3, 20, 33)
    left_to_the_rank = generate(tiny, prompts)
    named = generate(tiny, prompts, explicit=True)
    assert [each.output for each in named] == [each.output for each in left_to_the_rank]
    assert tiny.decode_steps > 100


# -- rows to verify ------------------------------------------------------------------------------------------------


def with_draft(step: Step, sequence: Sequence, draft: list[int]) -> Step:
    """The step with one more row: a sequence's last token, and guesses."""
    return msgspec.structs.replace(
        step,
        slots=step.slots + i32([sequence.slot]),
        starts=step.starts + i32([len(sequence.tokens) - 1]),
        lengths=step.lengths + i32([1 + len(draft)]),
        flags=step.flags + bytes([SAMPLE | VERIFY]),
        tokens=step.tokens + i32([sequence.tokens[-1], *draft]),
    )


SAMPLINGS = {
    "greedy": SamplingParams(max_tokens=24, seed=0, temperature=0.0, logprobs=3),
    "seeded": SamplingParams(max_tokens=24, seed=8, temperature=1.3, top_p=0.9, logprobs=3),
    "biased": SamplingParams(
        max_tokens=24,
        seed=9,
        temperature=0.8,
        logit_bias={17: 5.0, 18: 3.0},
        stop_token_ids=[17],
        min_tokens=11,
        logprobs=0,
    ),
}


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS.keys())
def test_verified_tokens_are_those_drawn_one_by_one(exact: Executor, sampling: SamplingParams) -> None:
    """Guesses of which one is wrong, beside a sequence that is fed its own tokens."""
    prompts = prompts_of(9, 30)
    plain, companion_plain = generate(exact, prompts, sampling)
    driver = Driver(exact)
    sequence, companion = (driver.sequence(slot, prompt, sampling) for slot, prompt in enumerate(prompts))
    rows = [(sequence, 9), (companion, 30)]
    step = driver.step(rows)
    driver.apply(rows, step, exact.execute(step))
    wrong = cycle((3, 0, 9, 1, 6))
    while len(sequence.output) < 17:
        known = len(sequence.output)
        draft = plain.output[known : known + 6]
        place = next(wrong)
        draft[place : place + 1] = [(token + 1) % VOCABULARY for token in draft[place : place + 1]]
        step = with_draft(driver.step([(companion, 1)]), sequence, draft)
        result = exact.execute(step)
        again = exact.execute(step)
        assert (again.tokens, again.logprobs) == (result.tokens, result.logprobs)
        tokens = ints(result.tokens)
        assert len(tokens) == 1 + 7
        accepted = 1 + min(place, 6)
        assert tokens[1 : 1 + accepted] == plain.output[known : known + accepted]
        entries = [entry for entry in result.logprobs if entry.row == 1]
        for entry, wanted in zip(entries, plain.logprobs[known : known + accepted], strict=False):
            assert (entry.logprobs, entry.top_logprobs) == (wanted.logprobs, wanted.top_logprobs)
        assert len(entries) == 7
        companion.computed += 1
        companion.output.append(tokens[0])
        sequence.output += tokens[1 : 1 + accepted]
        sequence.computed = len(sequence.tokens) - 1
        for explicit in (True, False):  # then the rank goes on by itself
            rows = [(sequence, 1)]
            step = driver.step(rows, explicit)
            driver.apply(rows, step, exact.execute(step))
    assert sequence.output == plain.output[: len(sequence.output)]
    assert companion.output == companion_plain.output[: len(companion.output)]


def test_a_token_behind_guesses_must_be_given(tiny: Executor) -> None:
    driver = Driver(tiny)
    sequence = driver.sequence(0, prompts_of(9)[0])
    rows = [(sequence, 9)]
    step = driver.step(rows)
    driver.apply(rows, step, tiny.execute(step))
    tiny.execute(with_draft(driver.step([]), sequence, [5, 6, 7]))
    sequence.output += [5, 6]
    sequence.computed = len(sequence.tokens) - 1
    with pytest.raises(BadMessage, match="not drawn here"):
        tiny.execute(driver.step([(sequence, 1)]))


# -- sampling ------------------------------------------------------------------------------------------------------


def test_samples_are_functions_of_seed_and_position(tiny: Executor) -> None:
    prompt = prompts_of(9)[0]
    sampling = SamplingParams(max_tokens=20, seed=11)
    first, other_slot = generate(tiny, [prompt, prompt], sampling)
    assert first.output == other_slot.output
    driver = Driver(tiny)
    resumed = driver.sequence(3, prompt, sampling)
    resumed.output = first.output[:7]
    driver.run([resumed])
    assert resumed.output == first.output
    (other_seed,) = generate(tiny, [prompt], SamplingParams(max_tokens=20, seed=12))
    assert other_seed.output != first.output


def test_samples_follow_the_distribution(tiny: Executor) -> None:
    prompt = prompts_of(5)[0]
    driver = Driver(tiny)
    (probe,) = generate(tiny, [prompt], SamplingParams(max_tokens=1, seed=0, logprobs=50))
    probabilities = dict(
        zip(
            ints(probe.logprobs[0].top_ids),
            np.exp(np.frombuffer(probe.logprobs[0].top_logprobs, np.float32)),
            strict=True,
        )
    )
    drawn: Counter[int] = Counter()
    for start in range(0, 1600, 8):
        driver.next_page = 0
        batch = [driver.sequence(s, prompt, SamplingParams(max_tokens=1, seed=start + s, top_k=50)) for s in range(8)]
        driver.run(batch)
        drawn.update(sequence.output[0] for sequence in batch)
    assert set(drawn) <= set(probabilities)
    total = sum(probabilities.values())
    for token, probability in list(probabilities.items())[:5]:
        share, sigma = probability / total, np.sqrt(probability / total / 1600)
        assert abs(drawn[token] / 1600 - share) < 5 * sigma


@pytest.mark.parametrize("dense", [False, True])
def test_logit_bias(tiny: Executor, monkeypatch: pytest.MonkeyPatch, dense: bool) -> None:
    """A few values are added one by one, many as a vector that is made once for all who have the same."""
    if dense:
        monkeypatch.setattr("llm_runtime.actors.rank.sampler.DENSE_BIAS", 1)
    prompt = prompts_of(9)[0]
    wanted = SamplingParams(max_tokens=5, seed=0, temperature=0.0, logit_bias={17: 1e4})
    forbidden = SamplingParams(max_tokens=5, seed=0, temperature=0.0, logit_bias={17: 1e4, 18: 2e4, 19: -1e4})
    plain = SamplingParams(max_tokens=5, seed=0, temperature=0.0)
    driver = Driver(tiny)
    batch = [driver.sequence(s, prompt, sampling) for s, sampling in enumerate((wanted, forbidden, plain))]
    batch.append(driver.sequence(3, prompt, msgspec.structs.replace(wanted, seed=1, logit_bias={17: 1e4})))
    driver.run(batch)
    assert batch[0].output == batch[3].output == [17] * 5
    vectors = {slot: tiny._sampler._dense_bias.get(slot) for slot in range(4)}
    assert vectors[0] is vectors[3]
    assert (vectors[0] is not None) == dense
    assert batch[1].output == [18] * 5
    assert batch[2].output == generate(tiny, [prompt], plain)[0].output


def test_min_tokens(tiny: Executor) -> None:
    prompt = prompts_of(9)[0]
    sampling = SamplingParams(
        max_tokens=8, seed=0, temperature=0.0, logit_bias={17: 1e4, 18: 1e3}, stop_token_ids=[17], min_tokens=3
    )
    assert generate(tiny, [prompt], sampling)[0].output == [18] * 3 + [17] * 5


def penalized(logits: torch.Tensor, prompt: list[int], output: list[int], sampling: SamplingParams) -> torch.Tensor:
    """Penalties as their definitions have them: repetition (CTRL), frequency and presence (OpenAI)."""
    logits = logits.clone()
    for token in set(prompt + output):
        value = logits[token]
        logits[token] = value / sampling.repetition_penalty if value > 0 else value * sampling.repetition_penalty
        count = output.count(token)
        logits[token] -= count * sampling.frequency_penalty + (count > 0) * sampling.presence_penalty
    return logits


@pytest.mark.parametrize("how", [{}, {"chunk": 4}, {"explicit": True}, {"repeat": True}])
def test_penalties(tmp_path: Path, how: dict[str, Any]) -> None:
    model = save_model(tmp_path, "LlamaForCausalLM")
    executor = build_executor(rank_config(tmp_path, num_pages=64, max_slots=8, max_model_len=128))
    sampling = SamplingParams(
        max_tokens=20,
        seed=0,
        temperature=0.0,
        frequency_penalty=0.3,
        presence_penalty=0.2,
        repetition_penalty=1.2,
    )
    prompts = prompts_of(9, 14)
    for sequence in generate(executor, prompts, sampling, **how):
        for index in range(len(sequence.output)):
            before = sequence.output[:index]
            with torch.inference_mode():
                logits = model(torch.tensor([sequence.prompt + before])).logits[0, -1]
            wanted = penalized(logits, sequence.prompt, before, sampling)
            assert wanted[sequence.output[index]] >= wanted.max() - 1e-4


def test_penalties_after_a_restart(tiny: Executor) -> None:
    sampling = SamplingParams(max_tokens=20, seed=3, frequency_penalty=0.7, repetition_penalty=1.3)
    prompt = prompts_of(9)[0]
    (whole,) = generate(tiny, [prompt], sampling)
    tiny.reset()
    driver = Driver(tiny)
    resumed = driver.sequence(5, prompt, sampling)
    resumed.output = whole.output[:11]
    driver.run([resumed])
    assert resumed.output == whole.output


def test_steps_can_be_repeated_out_of_order(tiny: Executor) -> None:
    """Step n again after step n + 1, with the tokens of both left to the rank."""
    driver = Driver(tiny)
    sequence = driver.sequence(0, prompts_of(6)[0], SamplingParams(max_tokens=4, seed=1, frequency_penalty=1.0))
    steps = []
    for length in (6, 1, 1):
        rows = [(sequence, length)]
        step = driver.step(rows)
        result = tiny.execute(step)
        driver.apply(rows, step, result)
        steps.append((step, result))
    for step, result in steps[1:]:
        assert tiny.execute(step).tokens == result.tokens


def test_logprobs_only_for_those_who_ask(tiny: Executor) -> None:
    prompt = prompts_of(9)[0]
    driver = Driver(tiny)
    quiet = driver.sequence(0, prompt, SamplingParams(max_tokens=2, seed=0))
    asking = driver.sequence(1, prompt, SamplingParams(max_tokens=2, seed=0, logprobs=0))
    more = driver.sequence(2, prompt, SamplingParams(max_tokens=2, seed=0, logprobs=128))
    driver.run([quiet, asking, more])
    assert not quiet.logprobs
    assert [(entry.top, entry.top_ids) for entry in asking.logprobs] == [(0, b"")] * 2
    assert [len(ints(entry.top_ids)) for entry in more.logprobs] == [128] * 2
    assert [entry.logprobs for entry in asking.logprobs] == [entry.logprobs for entry in more.logprobs]


# -- messages that make no sense -----------------------------------------------------------------------------------

OPEN = NewRequest(0, 4, SamplingParams(max_tokens=4, seed=0))
GOOD = Step(1, i32([0]), i32([0]), i32([4]), bytes([SAMPLE]), i32([5, 6, 7, 8]), i32([(0, 0, 3)]), [OPEN])


def changed(**fields: Any) -> Step:
    return msgspec.structs.replace(GOOD, **fields)


def opening(slot: int = 0, history: bytes = b"", **sampling: Any) -> list[NewRequest]:
    return [NewRequest(slot, 4, SamplingParams(**{"max_tokens": 4, "seed": 0, **sampling}), history)]


HOSTILE = {
    "odd bytes": changed(slots=b"\0\0\0"),
    "odd bytes of tokens": changed(tokens=b"\0" * 17),
    "odd bytes of pages": changed(pages=b"\0" * 13),
    "more rows than flags": changed(slots=i32([0, 1])),
    "more flags than rows": changed(flags=bytes(2)),
    "more starts than rows": changed(starts=i32([0, 0])),
    "fewer tokens than lengths": changed(lengths=i32([5])),
    "more tokens than lengths": changed(lengths=i32([3])),
    "lengths that overflow": changed(
        slots=i32([0, 1, 2]),
        starts=i32([0] * 3),
        lengths=i32([2**31 - 1, 2**31 - 1, 6]),
        flags=bytes(3),
    ),
    "negative slot": changed(slots=i32([-1])),
    "slot out of range": changed(slots=i32([8])),
    "slot twice": changed(slots=i32([0, 0]), starts=i32([0, 4]), lengths=i32([2, 2]), flags=bytes([0, SAMPLE])),
    "slot that is not open": changed(slots=i32([1]), pages=i32([(1, 0, 3)])),
    "negative start": changed(starts=i32([-1])),
    "start that overflows": changed(starts=i32([2**31 - 2])),
    "behind max_model_len": changed(starts=i32([125])),
    "no tokens in a row": changed(lengths=i32([0]), tokens=b""),
    "negative length": changed(lengths=i32([-4]), tokens=b""),
    "unknown flag": changed(flags=bytes([8])),
    "to verify, but not to sample": changed(flags=bytes([VERIFY])),
    "to verify a prompt": changed(flags=bytes([SAMPLE | VERIFY | PROMPT_LOGPROBS])),
    "-1 to verify": changed(flags=bytes([SAMPLE | VERIFY]), tokens=i32([-1, 6, 7, 8])),
    "to verify with penalties": changed(
        flags=bytes([SAMPLE | VERIFY]), new_requests=opening(presence_penalty=1.0, history=i32([5, 6]))
    ),
    "token out of range": changed(tokens=i32([5, 6, 7, VOCABULARY])),
    "token below -1": changed(tokens=i32([-2, 6, 7, 8])),
    "-1 without a drawn token": changed(tokens=i32([-1, 6, 7, 8])),
    "-1 inside a row": changed(tokens=i32([5, 6, -1, 8])),
    "pages no triples": changed(pages=i32([0, 0])),
    "page out of range": changed(pages=i32([(0, 0, 64)])),
    "negative page": changed(pages=i32([(0, 0, -1)])),
    "page index out of range": changed(pages=i32([(0, 8, 3)])),
    "page slot out of range": changed(pages=i32([(8, 0, 3)])),
    "no page": changed(pages=b""),
    "a gap in the pages": changed(starts=i32([PAGE_SIZE]), pages=i32([(0, 1, 3)])),
    "page behind the row's end missing": changed(starts=i32([PAGE_SIZE - 1])),
    "opened slot out of range": changed(new_requests=opening(8)),
    "odd history": changed(new_requests=opening(history=b"\0")),
    "long history": changed(new_requests=opening(history=bytes(4 * 129))),
    "history out of range": changed(new_requests=opening(history=i32([VOCABULARY]))),
    "negative history": changed(new_requests=opening(history=i32([-1]))),
    "bias out of range": changed(new_requests=opening(logit_bias={VOCABULARY: 1.0})),
    "bias not a number": changed(new_requests=opening(logit_bias={1: float("nan")})),
    "infinite temperature": changed(new_requests=opening(temperature=float("inf"))),
    "infinite penalty": changed(new_requests=opening(presence_penalty=float("-inf"))),
    "prompt logprobs from nowhere": changed(starts=i32([4]), flags=bytes([PROMPT_LOGPROBS])),
}
OF_NO_SLOT = {
    "odd bytes",
    "odd bytes of tokens",
    "odd bytes of pages",
    "more rows than flags",
    "more flags than rows",
    "more starts than rows",
    "fewer tokens than lengths",
    "more tokens than lengths",
    "lengths that overflow",
    "negative slot",
    "slot out of range",
    "slot twice",
    "pages no triples",
    "opened slot out of range",
}
"""Of these nobody can say which slot is to blame."""


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_steps(tiny: Executor, name: str) -> None:
    step = HOSTILE[name]
    before = tiny.cache.vectors.clone()
    with pytest.raises(BadStep) as refused:
        tiny.execute(step)
    assert bool(refused.value.slots) == (name not in OF_NO_SLOT)
    assert torch.equal(tiny.cache.vectors, before)
    tokens = tiny.execute(GOOD).tokens
    tiny.reset()
    assert tiny.execute(GOOD).tokens == tokens


def test_odd_but_valid_parameters(tiny: Executor) -> None:
    result = tiny.execute(
        changed(
            new_requests=opening(
                temperature=1e300,
                top_k=2**62,
                min_tokens=2**62,
                stop_token_ids=[2**31 - 1, 5],
                logit_bias={1: float("-inf"), 2: -1e300},
                repetition_penalty=1e-300,
                logprobs=128,
                seed=2**63 - 1,
            )
        )
    )
    (token,) = np.frombuffer(result.tokens, np.int32).tolist()
    assert 0 <= token < VOCABULARY
    assert token not in (1, 5), "one is forbidden, and the other would end the answer"
    (told,) = result.logprobs
    assert told.top == min(128, VOCABULARY)


def test_random_steps_do_no_harm(tiny: Executor) -> None:
    """Steps of random numbers near the bounds: each runs or is refused, and the executor goes on."""
    generator = np.random.default_rng(1)
    outcomes: Counter[bool] = Counter()

    def near(bound: int, size: Any) -> Any:
        return np.where(
            generator.random(size) < 0.1, generator.integers(-2, bound + 2, size), generator.integers(0, 8, size)
        )

    for number in range(400):
        rows = int(generator.integers(0, 4))
        lengths = near(5, rows)
        step = Step(
            number,
            i32(near(8, rows)),
            i32(near(128, rows)),
            i32(lengths),
            generator.integers(0, 8, rows).astype(np.uint8).tobytes(),
            i32(near(VOCABULARY, max(0, int(lengths.sum())))),
            i32(near(64, (int(generator.integers(0, 6)), 3))),
            [NewRequest(int(slot), 2, OPEN.sampling) for slot in generator.integers(0, 8, 2)],
        )
        try:
            tiny.execute(step)
            outcomes[True] += 1
        except BadMessage:
            outcomes[False] += 1
    assert min(outcomes[True], outcomes[False]) > 10


def test_empty_step(tiny: Executor) -> None:
    result = tiny.execute(Step(7, b"", b"", b"", b"", b"", i32([(0, 0, 3)]), [OPEN]))
    assert (result.number, result.tokens) == (7, b"")
    tiny.execute(changed(new_requests=[], pages=b""))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"device": "cuda"}, "device is cuda"),
        ({"max_model_len": 513}, "max_model_len = 513 is more than the model's 512"),
        ({"tp": 3, "process_group_dir": "/x"}, "2 key-value heads"),
        ({"tp": 2, "rank": 1}, "process_group_dir"),
        ({"rank": 1}, "rank 1 does not exist"),
    ],
)
def test_configurations_that_cannot_be_served(checkpoint: Path, settings: dict[str, Any], sentence: str) -> None:
    if settings.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(StartFailure, match=sentence):
        build_executor(rank_config(checkpoint, **{"max_model_len": 128, **settings}))
