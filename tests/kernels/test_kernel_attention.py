"""Attention against an independent computation in float64, and the same to the bit in whatever step a token is."""

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from llm_runtime import kernels
from llm_runtime.kernels import AttentionMeta, cpu

LAYERS = 3
Cache = tuple[Tensor, Tensor | None]
TYPES = [torch.float32, torch.bfloat16, torch.int8]


class Model:
    """One layer's shapes, a cache full of NaN, and random sequences in it."""

    def __init__(
        self,
        query_heads: int = 6,
        kv_heads: int = 2,
        dim: int = 32,
        page_size: int = 8,
        rotated: int | None = None,
        activations: torch.dtype = torch.float32,
        cached: torch.dtype = torch.float32,
        rows: int = 4,
        length: int = 300,
    ) -> None:
        self.query_heads, self.kv_heads, self.dim, self.page_size = query_heads, kv_heads, dim, page_size
        self.activations, self.cached, self.length = activations, cached, length
        pages = -(-length // page_size)
        self.table = torch.randperm(rows * pages + 3)[: rows * pages].int().view(rows, pages).contiguous()
        self.cos, self.sin = kernels.rotary_table(rotated or dim, length, 10000.0)

    def cache(self) -> Cache:
        """One layer of pages that hold several; whatever is not written poisons what reads it."""
        shape = self.table.numel() + 3, LAYERS, 2, self.page_size, self.kv_heads, self.dim
        if self.cached != torch.int8:
            return torch.full(shape, torch.nan, dtype=self.cached)[:, 1], None
        return torch.full(shape, 77, dtype=torch.int8)[:, 1], torch.full(shape[:-1], torch.nan)[:, 1]

    def dequantized(self, cache: Cache, slot: int, count: int) -> tuple[Tensor, Tensor]:
        """Keys and values [count, Hkv, D] of a sequence, in float64, as they lie in an int8 cache."""
        vectors, scales = cache
        assert scales is not None
        at = torch.arange(count)
        pages, places = self.table[slot].long()[at // self.page_size], at % self.page_size
        keys, values = (
            vectors[pages, half, places].double() * scales[pages, half, places].double()[..., None] for half in (0, 1)
        )
        return keys, values

    def tokens(self, count: int) -> Tensor:
        return torch.randn(count, (self.query_heads + 2 * self.kv_heads) * self.dim).to(self.activations)

    def step(
        self, cache: Cache, starts: list[int], parts: list[Tensor], slots: list[int], window: int | None = None
    ) -> list[Tensor]:
        """Runs one step and returns the output of each row."""
        meta = AttentionMeta.build(starts, [len(part) for part in parts], self.table, slots)
        fused = torch.cat(parts)
        heads = [self.query_heads, self.kv_heads, self.kv_heads]
        q, k, v = (x.unflatten(-1, (-1, self.dim)) for x in fused.split([n * self.dim for n in heads], dim=-1))
        out = kernels.attention(
            q,
            k,
            v,
            cache[0],
            meta,
            self.cos,
            self.sin,
            self.dim**-0.5,
            window=window,
            deterministic=True,
            cache_scales=cache[1],
        )
        assert out.dtype == self.activations
        return list(out.split([len(part) for part in parts]))

    def exact(
        self,
        tokens: Tensor,
        window: int | None = None,
        cached: tuple[Tensor, Tensor] | None = None,
        first: int = 0,
    ) -> Tensor:
        """What the tokens from `first` on should give, in float64 but for the rounding of what is cached, or over keys
        and values that are given."""
        heads = [self.query_heads, self.kv_heads, self.kv_heads]
        parts = tokens.double().split([n * self.dim for n in heads], dim=-1)
        q, k, v = (x.unflatten(-1, (-1, self.dim)) for x in parts)
        count, half = len(tokens), self.cos.shape[1]
        cos, sin = self.cos[:count, None].double(), self.sin[:count, None].double()

        def rotate(x: Tensor) -> Tensor:
            a, b = x[..., :half], x[..., half : 2 * half]
            return torch.cat([a * cos - b * sin, b * cos + a * sin, x[..., 2 * half :]], dim=-1)

        q, k = rotate(q), rotate(k)
        if cached is not None:
            k, v = cached
        elif self.cached == torch.int8:
            k, v = (torch.round(x / (most := x.abs().amax(-1, keepdim=True) / 127)) * most for x in (k, v))
        else:
            k, v = (x.to(self.cached).double() for x in (k, v))
        group = self.query_heads // self.kv_heads
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q[first:], k) * self.dim**-0.5
        at = torch.arange(count)
        seen = at[first:, None] >= at
        if window is not None:
            seen &= at > at[first:, None] - window
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, v)


def assert_close(
    actual: Tensor, exact: Tensor, cached: torch.dtype = torch.float32, tolerance: float | None = None
) -> None:
    # A cached value may be rounded the other way where float32 and float64 fall on two sides of a boundary.
    if tolerance is None:
        tolerance = 4e-2 if cached == torch.int8 else 2e-5 if actual.dtype == cached == torch.float32 else 2e-2
    torch.testing.assert_close(actual.double(), exact, atol=tolerance, rtol=tolerance)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("page_size", [1, 7, 16, 64])
@pytest.mark.parametrize("activations", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cached", TYPES)
def test_prefill_in_chunks_then_decode(page_size: int, activations: torch.dtype, cached: torch.dtype) -> None:
    model = Model(page_size=page_size, activations=activations, cached=cached, length=100)
    cache = model.cache()
    sequences = [model.tokens(n) for n in (30, 100, 64, 1)]
    exact = [model.exact(tokens) for tokens in sequences]
    done = [0, 0, 0, 0]
    while any(done[row] < len(sequences[row]) for row in range(4)):
        chunks = [random.choice([0, 1, 7, 40, 80]) for _ in range(4)]
        parts = [tokens[at : at + chunk] for tokens, at, chunk in zip(sequences, done, chunks, strict=True)]
        order = random.sample(range(4), 4)
        outs = model.step(cache, [done[row] for row in order], [parts[row] for row in order], order)
        for row, out in zip(order, outs, strict=True):
            assert_close(out, exact[row][done[row] : done[row] + len(out)], cached)
            done[row] += len(out)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("query_heads", "kv_heads"), [(9, 3), (4, 4), (8, 1), (32, 1)])
@pytest.mark.parametrize("dim", [8, 24, 64, 80, 256])
@pytest.mark.parametrize("dtype", TYPES)
def test_heads(query_heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    activations = torch.float32 if dtype == torch.float32 else torch.bfloat16
    model = Model(query_heads, kv_heads, dim, activations=activations, cached=dtype, length=90)
    tokens = model.tokens(90)
    cache = model.cache()
    bounds = (0, 70), (70, 71), (71, 90)
    outs = [model.step(cache, [start], [tokens[start:end]], [2])[0] for start, end in bounds]
    assert_close(torch.cat(outs), model.exact(tokens), dtype)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("query_heads", "kv_heads"), [(4, 4), (9, 3)])
def test_int8_cache(query_heads: int, kv_heads: int) -> None:
    """Vectors are within half a step of what they were, and attention over them is near exact."""
    model = Model(query_heads, kv_heads, 64, cached=torch.int8, length=150)
    tokens = model.tokens(150)
    tokens[70] *= 10
    tokens[3, -64:] = 0
    cache = model.cache()
    outs = [model.step(cache, [start], [tokens[start:end]], [1])[0] for start, end in ((0, 149), (149, 150))]
    keys, values = model.dequantized(cache, 1, 150)
    wanted = tokens[:, -model.kv_heads * 64 :].unflatten(-1, (-1, 64)).double()
    steps = wanted.abs().amax(-1, keepdim=True) / 127
    assert ((values - wanted).abs() <= 0.5001 * steps).all()
    assert_close(torch.cat(outs), model.exact(tokens, cached=(keys, values)), tolerance=1e-2)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", TYPES)
def test_long_context_and_many_rows(dtype: torch.dtype, backend: str) -> None:
    """Rows of very different lengths decode together, each as long as it is."""
    activations = torch.float32 if dtype == torch.float32 else torch.bfloat16
    lengths = [1, 1500, 64, 65, 700, 1, 130, 2] if backend != "torch" else [1, 300, 64, 65]
    rows, longest = len(lengths), max(lengths)
    model = Model(9, 3, 64, page_size=16, activations=activations, cached=dtype, rows=rows, length=longest)
    sequences = [model.tokens(length) for length in lengths]
    cache = model.cache()
    for row, tokens in enumerate(sequences):
        model.step(cache, [0], [tokens[:-1]], [row])
    ends = [tokens[-1:] for tokens in sequences]
    outs = model.step(cache, [length - 1 for length in lengths], ends, list(range(rows)))
    for out, tokens in zip(outs, sequences, strict=True):
        assert_close(out, model.exact(tokens, first=len(tokens) - 1), dtype)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("rotated", [8, 24, 64])
def test_partial_rotary(rotated: int) -> None:
    model = Model(dim=64, rotated=rotated, length=40)
    tokens = model.tokens(40)
    assert_close(model.step(model.cache(), [0], [tokens], [1])[0], model.exact(tokens))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("window", [1, 7, 64, 100, 1000])
@pytest.mark.parametrize("dtype", TYPES)
def test_window(window: int, dtype: torch.dtype) -> None:
    model = Model(activations=torch.float32 if dtype == torch.float32 else torch.bfloat16, cached=dtype, length=200)
    tokens = model.tokens(200)
    cache = model.cache()
    bounds = (0, 150), (150, 151), (151, 200)
    parts = [model.step(cache, [start], [tokens[start:end]], [0], window)[0] for start, end in bounds]
    assert_close(torch.cat(parts), model.exact(tokens, window), dtype)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("window", [None, 90])
@pytest.mark.parametrize(
    ("activations", "cached"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.int8),
        (torch.float32, torch.int8),
    ],
)
def test_same_bits_in_any_step(backend: str, activations: torch.dtype, cached: torch.dtype, window: int | None) -> None:
    """Alone and whole; in chunks; among others; token by token; on other pages; with other threads."""
    torch.set_num_threads(1)
    length, singles = (200, 20) if backend != "torch" else (50, 6)
    if window and backend == "torch":
        window = 20
    model = Model(9, 3, 64, page_size=16, activations=activations, cached=cached, length=length)
    tokens = model.tokens(length)
    (whole,) = model.step(model.cache(), [0], [tokens], [0], window)

    for count in (1, 2, 3):
        torch.set_num_threads(count)
        cuts = sorted(random.sample(range(1, length), 3))
        bounds = list(zip([0, *cuts], [*cuts, length], strict=True))
        cache = model.cache()
        pieces = []
        for start, end in bounds:
            others = [model.tokens(random.choice([0, 1, 30])) for _ in range(3)]
            at = random.randrange(4)
            parts, starts, slots = [*others], [0, 0, 0], [1, 2, 3]
            parts.insert(at, tokens[start:end])
            starts.insert(at, start)
            slots.insert(at, 0)
            pieces.append(model.step(cache, starts, parts, slots, window)[at])
        assert torch.equal(torch.cat(pieces), whole), f"chunks {bounds} with {count} threads"

        size = random.choice([1, 7, 64])
        single = Model(9, 3, 64, page_size=size, activations=activations, cached=cached, length=length)
        cache = single.cache()
        rest = range(length - singles, length)
        single.step(cache, [0], [tokens[: rest.start]], [1], window)
        ones = [single.step(cache, [at], [tokens[at : at + 1]], [1], window)[0] for at in rest]
        assert torch.equal(torch.cat(ones), whole[rest.start :]), f"page size {single.page_size}, {count} threads"


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("cached", TYPES)
def test_a_step_again_gives_the_same_bits_and_cache(cached: torch.dtype) -> None:
    model = Model(cached=cached, length=100)
    tokens = model.tokens(100)
    cache = model.cache()
    first = model.step(cache, [0], [tokens], [0])[0]
    kept = [x.clone() for x in cache if x is not None]
    assert torch.equal(model.step(cache, [0], [tokens], [0])[0], first)
    for before, after in zip(kept, cache, strict=False):
        assert after is not None
        assert torch.equal(after.nan_to_num(7), before.nan_to_num(7))


def test_avx2_and_avx512_give_the_same_bits(use_backend: Callable[[str], None]) -> None:
    if cpu.instruction_sets() != ["avx512", "avx2"]:
        pytest.skip("this processor has not both")
    model = Model(9, 3, 80, length=150)
    tokens = model.tokens(150)
    outs = []
    for name in ("avx512", "avx2"):
        use_backend(name)
        outs.append(model.step(model.cache(), [0], [tokens], [0])[0])
    assert torch.equal(*outs)


@pytest.mark.usefixtures("backend")
def test_step_of_no_tokens() -> None:
    model = Model()
    assert model.step(model.cache(), [5, 0], [model.tokens(0), model.tokens(0)], [1, 2])[0].shape == (0, 6, 32)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("cached", TYPES)
def test_fast_torch_path_agrees(cached: torch.dtype) -> None:
    model = Model(cached=cached, length=120)
    tokens = model.tokens(120)
    heads = [model.query_heads * 32, model.kv_heads * 32, model.kv_heads * 32]
    meta = AttentionMeta.build([0, 0], [120, 0], model.table, [3, 1])
    q, k, v = (x.unflatten(-1, (-1, 32)) for x in tokens.split(heads, dim=-1))
    for window in (None, 33):
        cache, scales = model.cache()
        out = kernels.attention(q, k, v, cache, meta, model.cos, model.sin, 32**-0.5, window, cache_scales=scales)
        assert_close(out, model.exact(tokens, window), cached)


@pytest.mark.usefixtures("backend")
def test_rejects_what_does_not_fit() -> None:
    model = Model(length=16)
    q, kv = torch.randn(4, 6, 32), torch.randn(4, 2, 32)
    (cache, _), scale = model.cache(), 1.0

    def run(meta: AttentionMeta, q: Tensor = q, k: Tensor = kv, window: int | None = None) -> None:
        kernels.attention(q, k, k, cache, meta, model.cos, model.sin, scale, window)

    good = AttentionMeta.build([0], [4], model.table)
    with pytest.raises(ValueError, match="exceeds"):
        run(AttentionMeta.build([13], [4], model.table))
    with pytest.raises(ValueError, match="a step of 3"):
        run(AttentionMeta.build([0], [3], model.table))
    with pytest.raises(ValueError, match="share"):
        run(good, q=torch.randn(4, 5, 32))
    with pytest.raises(ValueError, match="do not fit each other"):
        run(good, k=torch.randn(4, 3, 32))
    with pytest.raises(ValueError, match="scales"):
        kernels.attention(q, kv, kv, cache.to(torch.int8), good, model.cos, model.sin, scale)
    with pytest.raises(ValueError, match="window"):
        run(good, window=0)
    with pytest.raises(IndexError):
        run(AttentionMeta.build([0], [4], torch.full_like(model.table, 10**6)))
    for starts, lengths, slots in (([-1], [1], [0]), ([0], [1], [99]), ([0], [1, 2], [0])):
        with pytest.raises(ValueError):
            AttentionMeta.build(starts, lengths, model.table, slots)
