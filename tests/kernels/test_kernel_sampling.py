"""Sampling, penalties and log probabilities: the implementations agree, and the distributions are as promised."""

import math
import random

import pytest
import torch
from torch import Tensor

from llm_runtime import kernels
from llm_runtime.kernels import SamplingTensors, TokenMasks, reference


def random_seeds(count: int) -> tuple[Tensor, Tensor]:
    return torch.randint(-(2**63), 2**63 - 1, (count,)), torch.randint(0, 2**40, (count,))


def random_params(count: int) -> SamplingTensors:
    return SamplingTensors.build(
        [random.choice([0, 0.01, 0.5, 1, 1.7, 100]) for _ in range(count)],
        [random.choice([0, 0, 1, 5, 50, 4000, 100000]) for _ in range(count)],
        [random.choice([1, 1, 0.99, 0.9, 0.5, 0.01]) for _ in range(count)],
        [random.choice([0, 0, 0.1, 0.01, 1e-7, 1]) for _ in range(count)],
    )


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("vocabulary", [1, 7, 16, 1000, 5003])
def test_draws_what_the_reference_draws(vocabulary: int) -> None:
    count = 400 if vocabulary < 5000 else 200
    logits = torch.randn(count, vocabulary) * torch.rand(count, 1) * 8
    logits[::5] = logits[::5].round()  # many equal ones
    logits[1] = torch.nan
    logits[2] = -torch.inf
    logits[3, random.randrange(vocabulary)] = torch.nan
    logits[4, random.randrange(vocabulary)] = torch.inf
    logits[6, : vocabulary // 2] = -torch.inf
    logits[7] = 0
    logits[8] = torch.where(torch.rand(vocabulary) < 0.5, 0.0, -0.0)
    logits[9] *= 1e37
    params = random_params(count)
    seeds, positions = random_seeds(count)
    tokens = kernels.sample(logits, params, seeds, positions)
    assert tokens.dtype == torch.int32
    assert torch.equal(tokens, reference.sample(logits, params, seeds, positions))


@pytest.mark.usefixtures("backend", "threads")
def test_row_does_not_depend_on_the_batch() -> None:
    logits = torch.randn(40, 3000) * 4
    params = random_params(40)
    seeds, positions = random_seeds(40)
    whole = kernels.sample(logits, params, seeds, positions)
    tokens = torch.randint(0, 3000, (40,), dtype=torch.int32)
    logprobs = kernels.logprobs(logits, tokens, 7)
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        for row in random.sample(range(40), 8):
            one = slice(row, row + 1)
            alone = SamplingTensors(
                params.temperature[one], params.top_k[one], params.top_p[one], params.log_min_p[one], False
            )
            assert kernels.sample(logits[one], alone, seeds[one], positions[one]) == whole[row]
            for part, all_rows in zip(kernels.logprobs(logits[one], tokens[one], 7), logprobs, strict=True):
                assert torch.equal(part[0], all_rows[row])


@pytest.mark.usefixtures("backend")
def test_greedy_takes_the_first_of_equals() -> None:
    logits = torch.randn(20, 999)
    best = logits.max() + 1
    for row in range(20):
        logits[row, random.sample(range(999), 3)] = best
    first = (logits == best).int().argmax(-1).int()
    seeds, positions = random_seeds(20)
    for temperatures in ([0.0] * 20, [0.0] * 19 + [1.0]):  # with and without the path for greedy rows alone
        tokens = kernels.sample(logits, SamplingTensors.build(temperatures), seeds, positions)
        assert torch.equal(tokens[:19], first[:19])


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, [0.4, 0.3, 0.2, 0.1]),
        ({"top_k": 2}, [0.4, 0.3]),
        ({"top_p": 0.7001}, [0.4, 0.3, 0.2]),
        ({"top_p": 0.6999}, [0.4, 0.3]),
        ({"top_p": 0.01}, [0.4]),
        ({"min_p": 0.45}, [0.4, 0.3, 0.2]),
        ({"top_k": 3, "top_p": 0.77}, [0.4, 0.3]),  # of the 0.9 that top-k leaves
        ({"top_p": 0.95, "min_p": 0.6}, [0.4, 0.3]),
    ],
)
def test_distribution(settings: dict[str, float], kept: list[float]) -> None:
    """Each token as often as it should be, within five standard deviations."""
    draws = 20000
    order = [2, 0, 3, 1]
    logits = torch.full((1, 30), -torch.inf)
    logits[0, order] = torch.tensor([0.4, 0.3, 0.2, 0.1]).log() * 0.8 + 3
    columns = {name: [value] * draws for name, value in settings.items()}
    params = SamplingTensors.build([0.8] * draws, **columns)  # type: ignore[arg-type]
    seeds = torch.full((draws,), random.randrange(2**62))
    tokens = kernels.sample(logits.expand(draws, 30).contiguous(), params, seeds, torch.arange(draws))
    counts = torch.bincount(tokens, minlength=30)
    for rank, token in enumerate(order):
        expected = kept[rank] / sum(kept) if rank < len(kept) else 0
        deviation = math.sqrt(draws * expected * (1 - expected))
        assert abs(counts[token] - draws * expected) <= 5 * deviation
    assert counts.sum() == draws


@pytest.mark.usefixtures("backend")
def test_uniform_numbers() -> None:
    # Random123's known answer for a key and counter of zeros, and of ones with a counter of two words.
    zeros = torch.zeros(1, dtype=torch.int64)
    assert kernels.counter_uniform(zeros, zeros).item() == ((0x6627E8D5 << 21) | (0xE169C58D >> 11)) * 2.0**-53
    seeds, positions = random_seeds(1000)
    numbers = kernels.counter_uniform(seeds, positions)
    assert torch.equal(numbers, reference.counter_uniform(seeds, positions))
    run = kernels.counter_uniform(torch.full((20000,), random.randrange(2**62)), torch.arange(20000))
    assert 0 <= run.min() < 0.01
    assert 0.99 < run.max() < 1
    assert abs(run.mean() - 0.5) < 5 * (1 / 12 / 20000) ** 0.5


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("vocabulary", [5, 16, 1001, 49152])
def test_logprobs(vocabulary: int) -> None:
    logits = torch.randn(6, vocabulary) * 5
    logits[2] = logits[2].round()
    logits[3, 1:4] = -torch.inf
    logits[4, 0] = torch.nan
    tokens = torch.randint(0, vocabulary, (6,), dtype=torch.int32)
    tokens[3] = 2
    exact = torch.where(logits.isnan(), -torch.inf, logits).double().log_softmax(-1)
    for top_n in (0, 1, 5, 20):
        chosen, values, ids = kernels.logprobs(logits, tokens, top_n)
        wanted, order = exact.sort(dim=-1, descending=True, stable=True)
        expected = exact.gather(-1, tokens.long()[:, None])[:, 0]
        torch.testing.assert_close(chosen.double(), expected, atol=1e-5, rtol=1e-6)
        torch.testing.assert_close(values.double(), wanted[:, :top_n], atol=1e-5, rtol=1e-6)
        assert torch.equal(ids.long(), order[:, :top_n])
        assert ids.dtype == torch.int32


@pytest.mark.usefixtures("backend")
def test_penalties_follow_their_formulas() -> None:
    logits = torch.randn(3, 50) * 3
    entries = [(row, token, random.randrange(4)) for row in range(3) for token in random.sample(range(50), 9)]
    random.shuffle(entries)
    repetition, frequency, presence = (torch.rand(3) + 0.5 for _ in range(3))
    expected = logits.clone()
    for row, token, count in entries:
        value = expected[row, token]
        value = value / repetition[row] if value > 0 else value * repetition[row]
        expected[row, token] = value - count * frequency[row] - (presence[row] if count else 0)
    columns = [torch.tensor(column, dtype=torch.int32) for column in zip(*entries, strict=True)]
    kernels.apply_penalties(logits, *columns, repetition, frequency, presence)
    assert torch.equal(logits, expected)


@pytest.mark.usefixtures("backend")
def test_bias() -> None:
    logits = torch.zeros(2, 10)
    rows, tokens = (torch.tensor(x, dtype=torch.int32) for x in ([0, 1, 1], [3, 0, 9]))
    kernels.add_bias(logits, rows, tokens, torch.tensor([1.5, -torch.inf, -2.0]))
    assert logits[0].tolist() == [0, 0, 0, 1.5, 0, 0, 0, 0, 0, 0]
    assert logits[1].tolist() == [-torch.inf, 0, 0, 0, 0, 0, 0, 0, 0, -2]


@pytest.mark.usefixtures("backend", "threads")
@pytest.mark.parametrize("vocabulary", [1, 31, 32, 1000])
def test_masks(vocabulary: int) -> None:
    logits = torch.randn(60, vocabulary + 3)[:, :vocabulary]
    logits[0, 0] = torch.nan
    allowed = torch.rand(3, -(-vocabulary // 32) * 32) < torch.tensor([[0.5], [0.02], [1.0]])
    allowed[1, : allowed.shape[1] // 2] = False
    bits = allowed.view(3, -1, 32).long() << torch.arange(32)
    masks = bits.sum(-1).to(torch.int32)  # bit 31 makes a negative number
    places = torch.tensor([1, -1, 0, 2, 1, -1] * 10, dtype=torch.int32)
    seen = torch.where((places >= 0)[:, None], allowed[places.clamp(min=0), :vocabulary], True)
    seeds, positions = random_seeds(60)
    for params in (random_params(60), SamplingTensors.build([0.0] * 60)):
        tokens = kernels.sample(logits, params, seeds, positions, TokenMasks(places, masks))
        without = torch.where(seen, logits, -torch.inf)
        assert torch.equal(tokens, reference.sample(without, params, seeds, positions))


@pytest.mark.usefixtures("backend")
def test_rejects_what_does_not_fit() -> None:
    logits, bad = torch.zeros(2, 10), torch.tensor([10], dtype=torch.int32)
    zero, ones = torch.zeros(1, dtype=torch.int32), torch.ones(2)
    with pytest.raises(IndexError):
        kernels.add_bias(logits, zero, bad, torch.ones(1))
    with pytest.raises(IndexError):
        kernels.apply_penalties(logits, zero, bad, zero, ones, ones, ones)
    with pytest.raises((IndexError, RuntimeError)):
        kernels.logprobs(logits, torch.tensor([0, 10], dtype=torch.int32), 1)
    masks = TokenMasks(torch.tensor([0, 1], dtype=torch.int32), zero[None])
    with pytest.raises((IndexError, RuntimeError)):
        kernels.sample(logits, SamplingTensors.build([1.0] * 2), *random_seeds(2), masks)
    with pytest.raises(ValueError):
        kernels.sample(torch.zeros(1, 33), SamplingTensors.build([1.0]), *random_seeds(1), TokenMasks(zero, zero[None]))
    with pytest.raises(ValueError):
        kernels.sample(logits, SamplingTensors.build([1.0]), *random_seeds(2))
    for settings in ({"temperature": [-1.0]}, {"temperature": [math.nan]}, {"temperature": [1.0], "top_p": [0.0]}):
        with pytest.raises(ValueError):
            SamplingTensors.build(**settings)
    for settings in ({"top_k": [-1]}, {"min_p": [1.5]}, {"top_p": [1.0, 1.0]}):
        with pytest.raises(ValueError):
            SamplingTensors.build([1.0], **settings)  # type: ignore[arg-type]
