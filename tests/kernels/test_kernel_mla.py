"""Latent attention against an independent computation in float64, and the same to the bit in any step."""

import dataclasses
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from llm_runtime import kernels
from llm_runtime.kernels import AttentionMeta, GraphMemory, StepGraph, cpu

Tokens = tuple[Tensor, Tensor, Tensor, Tensor]  # q_latent, q_rope, latent, k_rope
TYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]


class Model:
    """One layer's shapes, pages full of NaN, and random sequences in them."""

    def __init__(
        self,
        heads: int = 6,
        rank: int = 64,
        rotated: int = 16,
        page_size: int = 16,
        interleaved: bool = True,
        activations: torch.dtype = torch.float32,
        cached: torch.dtype = torch.float32,
        rows: int = 3,
        length: int = 300,
    ) -> None:
        self.heads, self.rank, self.rotated, self.page_size = heads, rank, rotated, page_size
        self.interleaved, self.activations, self.cached = interleaved, activations, cached
        self.scale = (rank + rotated) ** -0.5
        pages = -(-length // page_size)
        self.table = torch.randperm(rows * pages + 3)[: rows * pages].int().view(rows, pages).contiguous()
        self.cos, self.sin = kernels.rotary_table(rotated, length, 10000.0)

    def cache(self) -> Tensor:
        """One layer of pages that hold several; whatever is not written poisons what reads it."""
        shape = self.table.numel() + 3, 2, self.page_size, self.rank + self.rotated
        return torch.full(shape, torch.nan, dtype=self.cached)[:, 1]

    def tokens(self, count: int) -> Tokens:
        """Parts of wider tensors, as projections leave them."""
        q = torch.randn(count, self.heads, 5 + self.rank + self.rotated).to(self.activations)
        k = torch.randn(count, self.rank + self.rotated).to(self.activations)
        return q[..., 5 : 5 + self.rank], q[..., 5 + self.rank :], k[:, : self.rank], k[:, self.rank :]

    def step(
        self, cache: Tensor, starts: list[int], parts: list[Tokens], slots: list[int], deterministic: bool = True
    ) -> list[Tensor]:
        """Runs one step and returns the output of each row."""
        lengths = [len(part[0]) for part in parts]
        meta = AttentionMeta.build(starts, lengths, self.table, slots)
        q_latent, q_rope, latent, k_rope = (
            parts[0] if len(parts) == 1 else (torch.cat(x) for x in zip(*parts, strict=True))
        )
        out = kernels.mla_attention(
            q_latent,
            q_rope,
            latent,
            k_rope,
            cache,
            meta,
            self.cos,
            self.sin,
            self.scale,
            interleaved=self.interleaved,
            deterministic=deterministic,
        )
        assert out.dtype == self.activations
        return list(out.split(lengths))

    def exact(self, tokens: Tokens, last: int | None = None) -> Tensor:
        """What the last `last` tokens of a sequence should give (None: all), in float64 but for the rounding of
        what is cached. Numbers that are rotated together are taken for complex ones."""
        q_latent, q_rope, latent, k_rope = (x.double() for x in tokens)
        count, half = len(latent), self.rotated // 2
        turn = torch.complex(self.cos[:count].double(), self.sin[:count].double())

        def rotate(x: Tensor) -> Tensor:
            pairs = x.unflatten(-1, (half, 2)) if self.interleaved else x.unflatten(-1, (2, half)).transpose(-1, -2)
            turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn[:, None])
            return turned.transpose(-1, -2).flatten(-2)

        keys = torch.cat([latent, rotate(k_rope[:, None])[:, 0]], dim=-1).to(self.cached).double()
        q = torch.cat([q_latent, rotate(q_rope)], dim=-1)
        at = torch.arange(count)
        first = 0 if last is None else count - last
        scores = torch.einsum("qhd,kd->hqk", q[first:], keys) * self.scale
        weights = scores.masked_fill(at[first:, None] < at, -torch.inf).softmax(-1)
        return torch.einsum("hqk,kd->qhd", weights, keys[:, : self.rank])


def part_of(tokens: Tokens, start: int, end: int) -> Tokens:
    q_latent, q_rope, latent, k_rope = (x[start:end] for x in tokens)
    return q_latent, q_rope, latent, k_rope


def assert_close(actual: Tensor, exact: Tensor, cached: torch.dtype = torch.float32) -> None:
    # A cached number may be rounded the other way where float32 and float64 fall on two sides of a boundary.
    tolerance = 2e-5 if actual.dtype == cached == torch.float32 else 2e-2
    torch.testing.assert_close(actual.double(), exact, atol=tolerance, rtol=tolerance)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(("activations", "cached"), TYPES)
def test_prefill_in_chunks_then_decode(interleaved: bool, activations: torch.dtype, cached: torch.dtype) -> None:
    model = Model(
        page_size=random.choice([1, 7, 16]), interleaved=interleaved, activations=activations, cached=cached, length=140
    )
    for deterministic in (True, False):
        cache = model.cache()
        sequences = [model.tokens(n) for n in (30, 140, 1)]
        exact = [model.exact(tokens) for tokens in sequences]
        done, ends = [0, 0, 0], [30, 140, 1]
        while done != ends:
            chunks = [random.choice([0, 1, 40, 90]) for _ in range(3)]
            order = random.sample(range(3), 3)
            until = [min(ends[row], done[row] + chunks[row]) for row in range(3)]
            parts = [part_of(sequences[row], done[row], until[row]) for row in order]
            outs = model.step(cache, [done[row] for row in order], parts, order, deterministic)
            for row, out in zip(order, outs, strict=True):
                assert_close(out, exact[row][done[row] : until[row]], cached)
            done = until


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize(
    ("heads", "rank", "rotated"), [(1, 16, 2), (5, 40, 24), (16, 512, 64), (128, 48, 8), (3, 24, 8), (7, 128, 64)]
)
def test_shapes(heads: int, rank: int, rotated: int) -> None:
    """Of DeepSeek's models, and others that fill no vector, no tile and no unit of work."""
    for activations, cached in TYPES[:2]:
        model = Model(heads, rank, rotated, activations=activations, cached=cached, rows=2, length=150)
        tokens = model.tokens(150)
        cache = model.cache()
        bounds = (0, 131), (131, 132), (132, 150)
        outs = [model.step(cache, [start], [part_of(tokens, start, end)], [1])[0] for start, end in bounds]
        assert_close(torch.cat(outs), model.exact(tokens), cached)


@pytest.mark.usefixtures("native")
def test_long_context_and_many_rows() -> None:
    """Rows of very different lengths decode together, each as long as it is."""
    lengths = [1, 900, 128, 129, 400, 1, 256, 2]
    model = Model(16, rows=len(lengths), length=max(lengths))
    sequences = [model.tokens(length) for length in lengths]
    cache = model.cache()
    for row, tokens in enumerate(sequences):
        model.step(cache, [0], [part_of(tokens, 0, lengths[row] - 1)], [row])
    ends = [part_of(tokens, length - 1, length) for tokens, length in zip(sequences, lengths, strict=True)]
    outs = model.step(cache, [length - 1 for length in lengths], ends, list(range(len(lengths))))
    for out, tokens in zip(outs, sequences, strict=True):
        assert_close(out, model.exact(tokens, last=1))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("activations", "cached"), TYPES)
def test_same_bits_in_any_step(backend: str, activations: torch.dtype, cached: torch.dtype) -> None:
    """Alone and whole; in chunks; among others; token by token; on other pages; with other threads."""
    torch.set_num_threads(1)
    length, singles = (400, 10) if backend != "torch" else (45, 4)
    model = Model(16, 128, 16, activations=activations, cached=cached, rows=4, length=length)
    tokens = model.tokens(length)
    (whole,) = model.step(model.cache(), [0], [tokens], [0])
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        cuts = sorted(random.sample(range(1, length), 3))
        bounds = list(zip([0, *cuts], [*cuts, length], strict=True))
        cache, pieces = model.cache(), []
        for start, end in bounds:
            parts = [model.tokens(random.choice([0, 1, 30])) for _ in range(3)]
            starts, slots, at = [0, 0, 0], [1, 2, 3], random.randrange(4)
            parts.insert(at, part_of(tokens, start, end))
            starts.insert(at, start)
            slots.insert(at, 0)
            pieces.append(model.step(cache, starts, parts, slots)[at])
        assert torch.equal(torch.cat(pieces), whole), f"chunks {bounds} with {count} threads"

        size = random.choice([1, 7, 64])
        single = Model(16, 128, 16, size, activations=activations, cached=cached, length=length)
        cache = single.cache()
        rest = range(length - singles, length)
        single.step(cache, [0], [part_of(tokens, 0, rest.start)], [1])
        ones = [single.step(cache, [at], [part_of(tokens, at, at + 1)], [1])[0] for at in rest]
        assert torch.equal(torch.cat(ones), whole[rest.start :]), f"page size {size}, {count} threads"


def test_avx2_and_avx512_give_the_same_bits(use_backend: Callable[[str], None]) -> None:
    if cpu.instruction_sets() != ["avx512", "avx2"]:
        pytest.skip("this processor has not both")
    for activations, cached in TYPES:
        model = Model(9, 72, 24, activations=activations, cached=cached, length=150)
        tokens = model.tokens(150)
        outs = []
        for name in ("avx512", "avx2"):
            use_backend(name)
            outs.append(model.step(model.cache(), [0], [tokens], [0])[0])
        assert torch.equal(*outs)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_as_a_graph(dtype: torch.dtype) -> None:
    """Absorbed queries, attention and values of a decode step, recorded and repeated on other content."""
    rows, heads, rank, rotated, inner, page_size = 5, 4, 64, 16, 48, 8
    table = torch.zeros(rows, 10, dtype=torch.int32)
    meta = dataclasses.replace(AttentionMeta.build([0] * rows, [1] * rows, table), max_context=80)
    cos, sin = kernels.rotary_table(rotated, 80, 1e4)
    q, k = torch.empty(rows, heads, inner + rotated, dtype=dtype), torch.empty(rows, rank + rotated, dtype=dtype)
    norm = torch.rand(rank).to(dtype)
    up, values = torch.randn(heads, rank, inner).to(dtype), torch.randn(heads, inner, rank).to(dtype)
    cache = torch.randn(rows * 10, page_size, rank + rotated).to(dtype)

    def layer() -> Tensor:
        latent, _ = kernels.rms_norm(k[:, :rank].unsqueeze(1), norm, 1e-6)
        mixed = kernels.mla_attention(
            kernels.linear_heads(q[..., :inner], up, deterministic=False),
            q[..., inner:],
            latent[:, 0],
            k[:, rank:],
            cache,
            meta,
            cos,
            sin,
            0.1,
            interleaved=True,
            deterministic=False,
        )
        return kernels.linear_heads(mixed, values, deterministic=False)

    def randomize() -> None:
        q.normal_()
        k.normal_()
        table.copy_(torch.randperm(rows * 10).view(rows, 10))
        meta.row_starts.random_(80)

    with torch.inference_mode():
        randomize()
        graph = StepGraph(layer, GraphMemory())
        assert graph.names == ["rms_norm", "linear_heads", "mla_attention", "linear_heads"]
        for _ in range(3):
            randomize()
            before = cache.clone()
            expected, written = layer(), cache.clone()
            cache.copy_(before)
            assert torch.equal(graph.replay(), expected)
            assert torch.equal(cache, written)
        table[1] = 99
        with pytest.raises(IndexError):
            graph.replay()


@pytest.mark.usefixtures("backend")
def test_step_of_no_tokens() -> None:
    model = Model()
    assert model.step(model.cache(), [5, 0], [model.tokens(0), model.tokens(0)], [1, 2])[0].shape == (0, 6, 64)


@pytest.mark.usefixtures("backend")
def test_attention_rejects_what_does_not_fit() -> None:
    model = Model(length=16)
    tokens, cache = model.tokens(4), model.cache()
    with pytest.raises(ValueError, match="exceeds"):
        model.step(cache, [13], [tokens], [0])
    with pytest.raises(ValueError, match="do not fit"):
        model.step(cache, [0], [(*tokens[:3], tokens[2])], [0])
    model.cos = model.cos[:, :3]
    with pytest.raises(ValueError, match="rotated dimensions do not fit"):
        model.step(cache, [0], [tokens], [0])
    model = Model(length=16)
    with pytest.raises(ValueError, match="q_latent"):
        model.step(cache, [0], [(tokens[0][:, :, 1:], *tokens[1:])], [0])
    model.table.fill_(10**6)
    with pytest.raises(IndexError):
        model.step(cache, [0], [tokens], [0])


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "outputs", "inputs"), [(3, 72, 96), (2, 7, 24), (16, 128, 64), (1, 33, 100)])
def test_linear_heads(backend: str, dtype: torch.dtype, heads: int, outputs: int, inputs: int) -> None:
    weight = torch.randn(heads, outputs, inputs).to(dtype)
    x = torch.randn(70, heads, inputs + 7).to(dtype)[..., 7:]
    torch.set_num_threads(1)
    whole = kernels.linear_heads(x, weight, deterministic=True)
    assert whole.dtype == dtype
    exact = torch.einsum("thk,hnk->thn", x.double(), weight.double())
    rounding = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(whole.double(), exact, atol=1e-5 * inputs**0.5, rtol=rounding)
    for count in (1, 2, 3) if backend != "torch" else (1, 1, 1):  # torch shares out small products as it likes
        torch.set_num_threads(count)
        start = random.randrange(70)
        end = random.randint(start, 70)
        assert torch.equal(kernels.linear_heads(x[start:end], weight, deterministic=True), whole[start:end])
    torch.testing.assert_close(
        kernels.linear_heads(x, weight, deterministic=False).double(), exact, atol=1e-2, rtol=1e-2
    )
