"""Kernel graphs: a repetition gives the bits that Python gives, and what cannot be repeated is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from llm_runtime import kernels
from llm_runtime.kernels import AttentionMeta, GraphMemory, NotRecordable, SizedGraph, StepGraph

HEADS, KV_HEADS, DIM, PAGE, PAGES, VOCABULARY, INNER = 4, 2, 32, 8, 17 * 8, 500, 96
HIDDEN = HEADS * DIM


@pytest.fixture(params=["avx512", "avx2"])
def native(request: pytest.FixtureRequest, use_backend: Callable[[str], None]) -> str:
    if request.param not in kernels.cpu.instruction_sets():
        pytest.skip(f"this processor has no {request.param}")
    use_backend(request.param)
    return request.param


class TinyModel:
    """Two layers on `rows` tokens, inputs in tensors that stay."""

    def __init__(self, rows: int, dtype: torch.dtype) -> None:
        def weight(*shape: int) -> kernels.PackedWeight:
            return kernels.pack_weight((torch.randn(shape) * 0.1).to(dtype))

        self.embedding = torch.randn(VOCABULARY, HIDDEN).to(dtype)
        self.norm = torch.rand(HIDDEN).to(dtype)
        shapes = ((HEADS + 2 * KV_HEADS) * DIM, HIDDEN), (HIDDEN, HIDDEN), (2 * INNER, HIDDEN), (HIDDEN, INNER)
        self.layers = [[weight(*shape) for shape in shapes] for _ in range(2)]
        self.head = weight(VOCABULARY, HIDDEN)
        self.cache = torch.randn(PAGES, 2, 2, PAGE, KV_HEADS, DIM).to(dtype)
        self.cos, self.sin = kernels.rotary_table(DIM, 64, 1e4)
        self.ids = torch.zeros(rows, dtype=torch.int64)
        self.meta = AttentionMeta.build([0] * rows, [1] * rows, torch.zeros(rows, 8, dtype=torch.int32))
        self.meta = dataclasses.replace(self.meta, max_context=64)
        self.greedy = kernels.SamplingTensors.build([0.0] * rows)

    def randomize(self) -> None:
        """New tokens, contexts and pages."""
        self.ids.random_(VOCABULARY)
        self.meta.row_starts.random_(64)
        self.meta.page_table.copy_(torch.randperm(PAGES)[: self.meta.page_table.numel()].view_as(self.meta.page_table))

    def run(self) -> tuple[Tensor, Tensor]:
        """Logits, and the most likely tokens."""
        logits = self.logits()
        return logits, kernels.sample(logits, self.greedy, self.ids, self.ids)

    def logits(self) -> Tensor:
        residual, rows = kernels.embedding(self.ids, self.embedding), len(self.ids)
        x = None
        for index, (qkv, o, gate_up, down) in enumerate(self.layers):
            x, residual = self.add_and_norm(x, residual)
            heads = kernels.linear(x, qkv).view(rows, -1, DIM)
            q, k, v = heads.split_with_sizes((HEADS, KV_HEADS, KV_HEADS), 1)
            cache = self.cache[:, index]
            mixed = kernels.attention(q, k, v, cache, self.meta, self.cos, self.sin, DIM**-0.5)
            x, residual = self.add_and_norm(kernels.linear(mixed.view(rows, HIDDEN), o), residual)
            x = kernels.linear(kernels.silu_and_mul(kernels.linear(x, gate_up)), down)
        x, _ = self.add_and_norm(x, residual)
        return kernels.linear(x, self.head, wide=True)

    def add_and_norm(self, x: Tensor | None, residual: Tensor) -> tuple[Tensor, Tensor]:
        if x is None:
            return kernels.rms_norm(residual, self.norm, 1e-5)
        return kernels.rms_norm(x, self.norm, 1e-5, residual)


@pytest.mark.usefixtures("native", "threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_repetition_gives_the_same_bits(dtype: torch.dtype) -> None:
    memory = GraphMemory()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        models = [TinyModel(rows, dtype) for rows in range(1, 18)]
        for model in models:
            model.randomize()
        with torch.inference_mode():
            graphs = [StepGraph(model.run, memory) for model in models]
            for _ in range(3):
                for model, graph in zip(models, graphs, strict=True):
                    model.randomize()
                    before = model.cache.clone()
                    logits, tokens = model.run()
                    written = model.cache.clone()
                    model.cache.copy_(before)
                    again, tokens_again = graph.replay()
                    assert torch.equal(again, logits)
                    assert torch.equal(tokens_again, tokens)
                    assert torch.equal(model.cache, written)


@pytest.mark.usefixtures("native")
def test_graphs_share_their_memory() -> None:
    memory = GraphMemory()
    with torch.inference_mode():
        models = [TinyModel(rows, torch.float32) for rows in (16, 9, 12, 16, 3)]
        graphs, sizes = [], []
        for model in models:
            graphs.append(StepGraph(model.run, memory))
            sizes.append(memory.nbytes)
    assert len(graphs) == len(models)
    assert sizes[3] == sizes[2]
    assert sizes[-1] < 2 * sizes[0]


@pytest.mark.usefixtures("native")
def test_what_a_function_returns_at_first_is_right() -> None:
    with torch.inference_mode():
        model = TinyModel(5, torch.float32)
        model.randomize()
        before = model.cache.clone()
        logits, tokens = model.run()
        model.cache.copy_(before)
        graph = StepGraph(model.run, GraphMemory())
        assert torch.equal(graph.result[0], logits)
        assert torch.equal(graph.result[1], tokens)
        assert len(graph.timed()) == len(graph.names) == 20
        assert torch.equal(graph.result[0], logits)


class PackedSteps:
    """Steps of several rows with several tokens each, through the layers of a TinyModel."""

    def __init__(self, rows: int, tokens: int, dtype: torch.dtype) -> None:
        self.model = TinyModel(tokens, dtype)
        self.ids = self.model.ids
        self.offsets, self.starts, self.slots = (torch.zeros(rows + 1, dtype=torch.int32) for _ in range(3))
        self.table = torch.randperm(rows * 8, dtype=torch.int32).view(rows, 8)
        self.most = tokens

    def fill(self, lengths: list[int]) -> None:
        self.ids.random_(VOCABULARY)
        self.offsets[: len(lengths) + 1] = torch.tensor([0, *lengths]).cumsum(0)
        self.starts[: len(lengths)] = torch.randint(64 - max(lengths), (len(lengths),))
        self.slots[: len(lengths)] = torch.randperm(len(self.table))[: len(lengths)]

    def run(self, sizes: tuple[int, ...]) -> Tensor:
        tokens, rows = sizes
        self.model.ids = self.ids[:tokens]
        self.model.meta = AttentionMeta(
            self.offsets[: rows + 1], self.starts[:rows], self.slots[:rows], self.table, tokens, self.most, 64
        )
        return self.model.logits()


@pytest.mark.usefixtures("native", "threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_graph_for_all_sizes_gives_the_same_bits(dtype: torch.dtype) -> None:
    steps = PackedSteps(6, 63, dtype)
    with torch.inference_mode():
        graph = SizedGraph(steps.run, GraphMemory(), (63, 6), (62, 5))
        for lengths in ([30, 1, 1, 1, 20, 10], [1], [5], [1, 1, 7], [40, 2], [1] * 6, [30, 30]):
            steps.fill(lengths)
            sizes = sum(lengths), len(lengths)
            before = steps.model.cache.clone()
            wanted = steps.run(sizes)
            written = steps.model.cache.clone()
            steps.model.cache.copy_(before)
            assert torch.equal(graph.replay(sizes)[: sizes[0]], wanted)
            assert torch.equal(steps.model.cache, written)


@pytest.mark.usefixtures("native")
def test_what_is_no_multiple_of_a_size_is_refused() -> None:
    memory = torch.randn(100, 8)
    with torch.inference_mode():
        with pytest.raises(NotRecordable, match="no multiple"):
            SizedGraph(lambda sizes: kernels.silu_and_mul(memory[: sizes[0] - 1]), GraphMemory(), (40,), (39,))
        with pytest.raises(NotRecordable, match="other kernels"):
            SizedGraph(
                lambda sizes: [kernels.silu_and_mul(memory[:1]) for _ in range(sizes[0])], GraphMemory(), (4,), (3,)
            )
        doubled = SizedGraph(lambda sizes: kernels.silu_and_mul(memory[: 2 * sizes[0]]), GraphMemory(), (40,), (39,))
        assert torch.equal(doubled.replay((10,))[:20], kernels.silu_and_mul(memory[:20]))


X = torch.randn(4, 6)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize(
    "function",
    [
        lambda: kernels.silu_and_mul(X) + 1,
        lambda: kernels.silu_and_mul(X).add_(1),
        lambda: kernels.silu_and_mul(X).clone(),
        lambda: kernels.silu_and_mul(X).bfloat16(),
        lambda: kernels.silu_and_mul(X).sum().item(),
        lambda: kernels.silu_and_mul(X.t().contiguous().t()[:, ::2].reshape(-1, 2)),
        lambda: kernels.linear(X, torch.randn(3, 6)),
        lambda: kernels.silu_and_mul(torch.tensor([[1.0, 2.0]])),
        lambda: kernels.silu_and_mul(torch.zeros(2, 2)),
        lambda: kernels.silu_and_mul(torch.cat([X, X])),
    ],
)
def test_what_computes_is_refused(function: Callable[[], object]) -> None:
    with torch.inference_mode(), pytest.raises(NotRecordable):
        StepGraph(function, GraphMemory())
    assert kernels.silu_and_mul(X).shape == (4, 3)


def test_without_kernels_there_is_no_graph(use_backend: Callable[[str], None]) -> None:
    use_backend("torch")
    with pytest.raises(NotRecordable, match="no C\\+\\+ kernels"):
        StepGraph(lambda: kernels.silu_and_mul(X), GraphMemory())


@pytest.mark.usefixtures("native")
def test_bad_input_of_a_repetition_is_an_error() -> None:
    with torch.inference_mode():
        model = TinyModel(3, torch.float32)
        graph = StepGraph(model.run, GraphMemory())
        model.ids[1] = VOCABULARY
        with pytest.raises(IndexError):
            graph.replay()
        model.ids[1] = 0
        model.meta.page_table[2] = PAGES
        with pytest.raises(IndexError):
            graph.replay()
        model.meta.page_table[2] = 0
        logits, _ = graph.replay()
        assert torch.equal(logits.clone(), model.run()[0])
