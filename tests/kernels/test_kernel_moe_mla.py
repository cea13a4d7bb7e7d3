"""Latent attention and mixtures of experts against plain loops in double precision."""

from __future__ import annotations

import math

import pytest
import torch

from llm_runtime import kernels
from llm_runtime.kernels import AttentionMeta, PackedWeight
from llm_runtime.kernels.reference import dequantize

PAGE = 4
HEADS, RANK, ROPE, NOPE, VALUE = 3, 64, 8, 12, 10


class Step:
    """Rows (tokens cached, new tokens), their pages in random order, and a cache of noise."""

    def __init__(self, rows: list[tuple[int, int]], dtype: torch.dtype = torch.float32) -> None:
        starts, lengths = [start for start, _ in rows], [length for _, length in rows]
        longest = max(start + length for start, length in rows)
        pages = -(-longest // PAGE)
        self.table = torch.randperm(len(rows) * pages, dtype=torch.int32).view(len(rows), pages)
        self.meta = AttentionMeta.build(starts, lengths, self.table)
        whole = torch.randn(self.table.numel() + 2, 2, PAGE, RANK + ROPE)
        self.cache = whole[:, 1].to(dtype)  # one of two layers
        self.cos, self.sin = kernels.rotary_table(ROPE, longest, 10000.0)
        tokens = sum(lengths)
        self.q = torch.randn(tokens, HEADS, NOPE + ROPE)
        self.kv = torch.randn(tokens, RANK + ROPE + 5)[:, :-5]  # a part of wider rows
        self.keys, self.values = torch.randn(HEADS, RANK, NOPE) / 8, torch.randn(HEADS, VALUE, RANK) / 8
        self.scale = 0.3

    def parts(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.q[..., NOPE:], self.kv[:, :RANK], self.kv[:, RANK:]

    def absorbed(self, interleaved: bool, deterministic: bool = False) -> torch.Tensor:
        latents = kernels.linear_heads(self.q[..., :NOPE], self.keys, deterministic=deterministic)
        mixed = kernels.mla_attention(
            latents, *self.parts(), self.cache, self.meta, self.cos, self.sin, self.scale,
            interleaved=interleaved, deterministic=deterministic,
        )  # fmt: skip
        return kernels.linear_heads(mixed, self.values, deterministic=deterministic)

    def expanded(self, interleaved: bool) -> torch.Tensor:
        return kernels.mla_prefill(
            self.q[..., :NOPE], *self.parts(), self.cache, self.meta, self.cos, self.sin, self.scale,
            self.keys, self.values, interleaved=interleaved,
        )  # fmt: skip

    def wanted(self, interleaved: bool) -> torch.Tensor:
        """Token by token, in double precision; the cache is as it was before, but for the new tokens."""
        out = torch.empty(len(self.q), HEADS, VALUE, dtype=torch.float64)
        cache = self.cache.double()
        token = 0
        for row in range(self.meta.num_rows):
            start = int(self.meta.row_starts[row])
            for position in range(start, start + int(self.meta.row_offsets.diff()[row])):
                page = int(self.table[row, position // PAGE])
                new = torch.cat([self.kv[token, :RANK], self.turned(self.kv[token, RANK:], position, interleaved)])
                cache[page, position % PAGE] = new.to(self.cache.dtype)
                context = cache[self.table[row].long()].flatten(0, 1)[: position + 1]
                for head in range(HEADS):
                    latents, rotated = context[:, :RANK], context[:, RANK:]
                    keys = torch.cat([latents @ self.keys[head].double(), rotated], dim=1)
                    query = self.q[token, head, NOPE:]
                    query = torch.cat([self.q[token, head, :NOPE], self.turned(query, position, interleaved)]).double()
                    weights = (keys @ query * self.scale).softmax(0)
                    out[token, head] = self.values[head].double() @ (weights @ latents)
                token += 1
        return out

    def turned(self, x: torch.Tensor, position: int, interleaved: bool) -> torch.Tensor:
        """In halves, whatever the pairs were."""
        pairs = x.view(-1, 2).unbind(1) if interleaved else x.chunk(2)
        turned = torch.complex(*pairs) * torch.complex(self.cos[position], self.sin[position])
        return torch.cat([turned.real, turned.imag])


ROWS = [[(0, 1), (13, 1), (70, 1)], [(0, 9)], [(5, 3), (0, 1), (9, 0), (64, 70)]]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("form", ["absorbed", "deterministic", "expanded"])
def test_latent_attention(rows: list[tuple[int, int]], interleaved: bool, form: str) -> None:
    step = Step(rows)
    wanted = step.wanted(interleaved)
    got = step.expanded(interleaved) if form == "expanded" else step.absorbed(interleaved, form == "deterministic")
    torch.testing.assert_close(got.double(), wanted, atol=1e-4, rtol=1e-4)
    again = step.wanted(interleaved)  # from the cache as it has been written
    torch.testing.assert_close(again, wanted, atol=1e-4, rtol=1e-4)


def test_latents_of_bfloat16() -> None:
    step = Step([(3, 6), (20, 1)], torch.bfloat16)
    wanted = step.wanted(True)
    for got in (step.absorbed(True), step.expanded(True)):
        torch.testing.assert_close(got.double(), wanted, atol=1e-3, rtol=1e-3)


def test_rows_alone_have_the_same_bits() -> None:
    step = Step([(5, 3), (0, 1), (64, 70)])
    whole = step.absorbed(True, deterministic=True)
    first = 0
    for row in range(3):
        part, tokens = step.meta.select([row])
        alone = Step([(0, 1)])
        alone.__dict__ |= {**step.__dict__, "meta": part, "q": step.q[tokens], "kv": step.kv[tokens]}
        got = alone.absorbed(True, deterministic=True)
        assert torch.equal(got, whole[first : first + len(tokens)])
        first += len(tokens)


def test_latent_shapes_that_do_not_fit() -> None:
    step = Step([(0, 4)])
    step.cache = step.cache[..., :-1]
    with pytest.raises(ValueError, match="do not fit each other"):
        step.expanded(True)
    step = Step([(0, 4)])
    with pytest.raises(ValueError, match="does not fit the weight"):
        kernels.linear_heads(step.q, step.keys, deterministic=False)
    step.cos, step.sin = step.cos[:2], step.sin[:2]
    with pytest.raises(ValueError, match="exceeds 2 positions"):
        step.absorbed(True)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("groups", "top_groups"), [(1, 1), (4, 2), (4, 4)])
@pytest.mark.parametrize("biased", [True, False])
def test_routing(scoring: str, groups: int, top_groups: int, biased: bool) -> None:
    """Also among equals, of which there are many: logits are a few numbers, without symmetries that would make other
    equals but for rounding."""
    count, top_k, scaling = 16, 3, 2.5
    logits = torch.tensor([-2.0, -0.7, 0.1, 0.45, 1.3])[torch.randint(5, (40, count))]
    # One correction for all of a group: sums that differ in the order of their rounding alone are no equals.
    bias = torch.randint(0, 2, (4,)).repeat_interleave(count // 4) / 4 if biased else None
    for normalize in (True, False):
        ids, weights = kernels.route_experts(
            logits, top_k=top_k, scoring=scoring, bias=bias, groups=groups, top_groups=top_groups,  # type: ignore[arg-type]
            normalize=normalize, scaling=scaling,
        )  # fmt: skip
        assert (ids.dtype, weights.dtype) == (torch.int32, torch.float32)
        for token in range(len(logits)):
            row = logits[token].tolist()
            exponentials = [math.exp(value) for value in row]
            scores = [
                value / sum(exponentials) if scoring == "softmax" else value / (1 + value) for value in exponentials
            ]
            choice = [round(score + (float(bias[expert]) if biased else 0), 5) for expert, score in enumerate(scores)]  # type: ignore[index]
            size = count // groups
            parts = [sorted(choice[group * size : (group + 1) * size])[-2:] for group in range(groups)]
            best = sorted(range(groups), key=lambda group: (-round(sum(parts[group]), 4), group))[:top_groups]
            allowed = [expert for expert in range(count) if expert // size in best]
            chosen = sorted(allowed, key=lambda expert: (-choice[expert], expert))[:top_k]
            assert ids[token].tolist() == chosen
            total = sum(scores[expert] for expert in chosen) if normalize else 1
            wanted = torch.tensor([scores[expert] / total * scaling for expert in chosen])
            torch.testing.assert_close(weights[token], wanted)


@pytest.mark.parametrize("kind", ["plain", "float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("tokens", [0, 1, 37])
def test_experts(kind: str, tokens: int) -> None:
    count, hidden, inner, slots = 5, 64, 96, 2
    gate_up = torch.randn(count * 2 * inner, hidden) / 8
    down = torch.randn(count * hidden, inner) / 8
    x = torch.randn(tokens, hidden)
    ids = (
        torch.stack([torch.randperm(count)[:slots] for _ in range(tokens)]).int()
        if tokens
        else torch.empty(0, slots).int()
    )
    ids[ids == 3] = 4 if slots > 1 else 0  # one expert has nothing to do, and another may come twice
    weights = torch.rand(tokens, slots)
    matrices = (
        [gate_up, down] if kind == "plain" else [kernels.pack_weight(each, kind=kind) for each in (gate_up, down)]
    )  # type: ignore[arg-type]
    first, second = (
        (dequantize(each) if isinstance(each, PackedWeight) else each).double().unflatten(0, (count, -1))
        for each in matrices
    )
    wanted = torch.zeros(tokens, hidden, dtype=torch.float64)
    for token in range(tokens):
        for slot in range(slots):
            gate, up = (first[ids[token, slot]] @ x[token].double()).chunk(2)
            wanted[token] += weights[token, slot] * (second[ids[token, slot]] @ (torch.nn.functional.silu(gate) * up))
    got = kernels.experts(x, ids, weights, matrices[0], matrices[1], count, deterministic=False)
    assert got.dtype == torch.float32
    limit = {"plain": 1e-5, "float32": 1e-5}.get(kind, 0.03)
    if tokens:
        assert (got - wanted).abs().max() < limit * wanted.abs().max() + 1e-6
    whole = kernels.experts(x, ids, weights, matrices[0], matrices[1], count, deterministic=True)
    for token in range(min(tokens, 5)):
        one = slice(token, token + 1)
        alone = kernels.experts(x[one], ids[one], weights[one], matrices[0], matrices[1], count, deterministic=True)
        assert torch.equal(alone, whole[one])


def test_experts_that_are_no_whole_panels() -> None:
    packed = kernels.pack_weight(torch.randn(4 * 80, 64))
    with pytest.raises(ValueError, match="not whole panels"):
        kernels.experts(
            torch.randn(1, 64), torch.ones(1, 1).int(), torch.ones(1, 1), packed, packed, 4, deterministic=True
        )
