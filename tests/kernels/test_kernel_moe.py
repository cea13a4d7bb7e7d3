"""Mixtures of experts: routing against transformers' DeepSeek-V3, products against float64, and bits that do not depend
on the other tokens."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from llm_runtime import kernels
from llm_runtime.kernels import GraphMemory, StepGraph, reference

Matrix = Tensor | kernels.PackedWeight
DTYPES = [torch.float32, torch.bfloat16]


def route(logits: Tensor, top_k: int, scoring: str = "softmax", **options: object) -> tuple[Tensor, Tensor]:
    usual = {"bias": None, "groups": 1, "top_groups": 1, "normalize": True, "scaling": 1.0}
    return kernels.route_experts(logits, top_k=top_k, scoring=scoring, **{**usual, **options})  # type: ignore[arg-type]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    ("experts", "groups", "top_groups", "top_k"), [(256, 8, 4, 8), (64, 1, 1, 6), (20, 4, 2, 3), (16, 2, 1, 8)]
)
@pytest.mark.parametrize("normalize", [True, False])
def test_routing_of_deepseek_v3(experts: int, groups: int, top_groups: int, top_k: int, normalize: bool) -> None:
    config = DeepseekV3Config(
        hidden_size=32,
        n_routed_experts=experts,
        n_group=groups,
        topk_group=top_groups,
        num_experts_per_tok=top_k,
        norm_topk_prob=normalize,
        routed_scaling_factor=2.5,
    )
    router = DeepseekV3TopkRouter(config)
    with torch.no_grad():
        router.weight.normal_()
        router.e_score_correction_bias.normal_()
        logits, expected, chosen = router(torch.randn(70, 32) / 5)
    logits = F.linear(torch.zeros(70, 32), router.weight) + logits if logits.shape != (70, experts) else logits
    ids, weights = route(
        logits.detach(),
        top_k,
        "sigmoid",
        bias=router.e_score_correction_bias,
        groups=groups,
        top_groups=top_groups,
        normalize=normalize,
        scaling=2.5,
    )
    assert ids.dtype == torch.int32
    theirs, order = chosen.sort(-1)
    ours, mine = ids.sort(-1)
    assert torch.equal(ours.long(), theirs)
    torch.testing.assert_close(weights.gather(1, mine), expected.gather(1, order), atol=1e-6, rtol=1e-5)


@pytest.mark.usefixtures("backend")
def test_softmax_and_ties() -> None:
    logits = torch.randn(40, 50)
    ids, weights = route(logits, 7, normalize=False)
    best = logits.double().softmax(-1).sort(-1, descending=True)
    assert torch.equal(ids.long(), best.indices[:, :7])
    torch.testing.assert_close(weights.double(), best.values[:, :7], atol=1e-7, rtol=1e-5)
    same = torch.zeros(3, 24)
    for scoring in ("softmax", "sigmoid"):
        assert route(same, 5, scoring)[0].tolist() == [[0, 1, 2, 3, 4]] * 3
        assert route(same, 5, scoring, groups=4, top_groups=2)[0].tolist() == [[0, 1, 2, 3, 4]] * 3
        ids, weights = route(torch.full((2, 8), torch.nan), 4, scoring)
        assert ids.min() >= 0
        assert ids.max() < 8
        assert all(len(set(row)) == 4 for row in ids.tolist())
    bias = torch.tensor([0.0, 0, 0, 1, 0, 0, 2, 0])
    ids, weights = route(torch.zeros(1, 8), 3, "sigmoid", bias=bias, normalize=False, scaling=4)
    assert ids.tolist() == [[6, 3, 0]]
    assert weights.tolist() == [[2, 2, 2]]


def matrices(
    experts: int, hidden: int, inner: int, dtype: torch.dtype, kind: kernels.WeightKind | None
) -> tuple[Matrix, Matrix]:
    gate_up = torch.randn(experts * 2 * inner, hidden).to(dtype) / hidden**0.5
    down = torch.randn(experts * hidden, inner).to(dtype) / inner**0.5
    if kind is None:
        return gate_up, down
    return kernels.pack_weight(gate_up, kind=kind), kernels.pack_weight(down, kind=kind)


def exact(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Matrix, down: Matrix) -> Tensor:
    """In float64, by gathering each token's weights."""
    wide = [(m if isinstance(m, Tensor) else reference.dequantize(m)).double() for m in (gate_up, down)]
    inner = wide[1].shape[1]
    first, second = wide[0].view(-1, 2 * inner, x.shape[1]), wide[1].view(-1, x.shape[1], inner)
    states = torch.einsum("th,tkih->tki", x.double(), first[ids.long()])
    gate, up = states.chunk(2, dim=-1)
    return torch.einsum("tki,tkhi,tk->th", F.silu(gate) * up, second[ids.long()], weights.double())


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [None, "float32", "bfloat16", "int8", "int4"])
def test_experts(dtype: torch.dtype, kind: kernels.WeightKind | None) -> None:
    count, hidden, inner = (6, 128, 96) if kind else (5, 40, 24)
    gate_up, down = matrices(count, hidden, inner, dtype, kind)
    for tokens in (0, 1, 5, 60):
        x = torch.randn(tokens, hidden + 3).to(dtype)[:, 3:]
        ids, weights = route(torch.randn(tokens, count), 3, scaling=2.0)
        for deterministic, shared in ((True, None), (False, torch.randn(tokens, hidden).to(dtype))):
            out = kernels.experts(x, ids, weights, gate_up, down, count, deterministic=deterministic, shared=shared)
            assert out.dtype == dtype
            wanted = exact(x, ids, weights, gate_up, down) + (0 if shared is None else shared.double())
            int8 = 3e-4 if deterministic else 1e-2  # activations in 16 bits, or with AMX in bfloat16
            rough = 4e-2 if kind == "int4" else 1e-2 if dtype == torch.bfloat16 else int8 if kind == "int8" else 1e-6
            assert (out.double() - wanted).norm() <= rough * wanted.norm()


@pytest.mark.usefixtures("backend", "threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [None, "float32", "bfloat16", "int8", "int4"])
def test_same_bits_in_any_step(dtype: torch.dtype, kind: kernels.WeightKind | None) -> None:
    count, tokens = 8, 90
    gate_up, down = matrices(count, 128, 64, dtype, kind)
    x = torch.randn(tokens, 128).to(dtype)
    ids, weights = route(torch.randn(tokens, count), 3)
    torch.set_num_threads(1)
    whole = kernels.experts(x, ids, weights, gate_up, down, count, deterministic=True)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for _ in range(2):
            some = torch.randperm(tokens)[: random.choice([1, 2, 30])]
            out = kernels.experts(x[some], ids[some], weights[some], gate_up, down, count, deterministic=True)
            assert torch.equal(out, whole[some]), f"{len(some)} tokens, {threads} threads"


@pytest.mark.usefixtures("native")
def test_more_tokens_than_are_held_at_a_time() -> None:
    gate_up, down = matrices(4, 64, 32, torch.float32, "float32")
    x = torch.randn(1100, 64)
    ids, weights = route(torch.randn(1100, 4), 2)
    out = kernels.experts(x, ids, weights, gate_up, down, 4, deterministic=False)
    torch.testing.assert_close(out.double(), exact(x, ids, weights, gate_up, down), atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("kind", [None, "bfloat16", "int4"])
def test_a_layer_as_a_graph(kind: kernels.WeightKind | None) -> None:
    rows, count, hidden, inner = 4, 8, 128, 64
    gate_up, down = matrices(count, hidden, inner, torch.bfloat16, kind)
    gate = kernels.pack_weight(torch.randn(count, hidden), kind="float32")
    x, bias = torch.empty(rows, hidden, dtype=torch.bfloat16), torch.randn(count)

    def layer() -> Tensor:
        ids, weights = route(kernels.linear(kernels.widen(x), gate), 3, "sigmoid", bias=bias, groups=4, top_groups=2)
        return kernels.experts(x, ids, weights, gate_up, down, count, deterministic=True)

    with torch.inference_mode():
        x.normal_()
        graph = StepGraph(layer, GraphMemory())
        assert graph.names == ["widen", "linear", "route_experts", "experts"]
        for _ in range(3):
            x.normal_()
            assert torch.equal(graph.replay(), layer())


@pytest.mark.usefixtures("backend")
def test_rejects_what_does_not_fit() -> None:
    gate_up, down = matrices(4, 64, 32, torch.float32, "float32")
    x, (ids, weights) = torch.randn(3, 64), route(torch.randn(3, 4), 2)

    def run(x: Tensor = x, ids: Tensor = ids, up: Matrix = gate_up, down: Matrix = down, count: int = 4) -> None:
        kernels.experts(x, ids, weights, up, down, count, deterministic=True)

    with pytest.raises(ValueError, match="are not 2 experts"):
        run(down=matrices(2, 64, 32, torch.float32, "float32")[1], count=2)
    with pytest.raises(ValueError, match="are not 4 experts"):
        run(x=torch.randn(3, 63))
    with pytest.raises(ValueError, match="do not fit 3 tokens"):
        run(ids=ids[:, :1])
    with pytest.raises(ValueError, match="x's type"):
        run(up=reference.dequantize(gate_up).bfloat16())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not whole panels"):
        kernels.experts(
            torch.randn(3, 48), ids, weights, *matrices(4, 48, 32, torch.float32, "float32"), 4, deterministic=True
        )
    for bad in (-1, 4):
        with pytest.raises(IndexError, match="among the 4"):
            run(ids=torch.full_like(ids, bad))
    logits = torch.randn(3, 12)
    for top_k, options in (
        (0, {}),
        (13, {}),
        (7, {"groups": 2}),
        (2, {"groups": 5}),
        (2, {"groups": 2, "top_groups": 3}),
        (2, {"groups": 0}),
        (2, {"bias": torch.randn(11)}),
        (2, {"scoring": "tanh"}),
    ):
        with pytest.raises(ValueError, match="route_experts"):
            route(logits, top_k, **options)
