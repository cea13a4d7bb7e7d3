"""Times the CPU kernels against plain torch on SmolLM2-135M's shapes: `python benchmarks/kernel_speed.py [name …]`.

Prints a line per operation and shape: microseconds here and in torch (median of repeats), how many times faster,
and the rate in GFLOP/s or GB/s that ours reaches. For quantized linear layers the column of torch is the floor: a bare
read of as many bytes of memory, by the same threads.
"""

import itertools
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from llm_runtime import kernels
from llm_runtime.actors.kv_format import KVFormat
from llm_runtime.kernels import reference, reference_moe_mla

QUERY_HEADS, KV_HEADS, DIM, HIDDEN, INNER, VOCABULARY = 9, 3, 64, 576, 1536, 49152
RANK, ROTATED, MLA_HEADS, NOPE = 512, 64, 16, 128  # of DeepSeek-V2-Lite, and its experts but for their width
EXPERTS, CHOSEN, MOE_HIDDEN, MOE_INNER = 64, 6, 1024, 512
SHAPES = ((HIDDEN, 960), (HIDDEN, HIDDEN), (HIDDEN, 2 * INNER), (INNER, HIDDEN))  # qkv, o, gate_up, down
PAGE = 16


@dataclass
class Case:
    name: str
    shape: str
    ours: Callable[[], object]
    torch: Callable[[], object]
    flops: float = 0
    bytes: float = 0


def microseconds(call: Callable[[], object], seconds: float = 0.25) -> float:
    call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2] * 1e6


def attention(rows: int, context: int, new: int, dtype: torch.dtype, kv_dtype: torch.dtype) -> Case:
    """One layer of up to 30, taken in turns so that no cache holds the keys: `rows` sequences with `new` tokens each,
    up to `context`."""
    pages = -(-context // PAGE)
    layers = max(2, min(30, 2**30 // (rows * pages * 2 * PAGE * KV_HEADS * DIM * kv_dtype.itemsize)))
    name = str(kv_dtype).removeprefix("torch.")
    kv_format = KVFormat(layers, PAGE, KV_HEADS, DIM, name)  # type: ignore[arg-type]
    cache = kv_format.new_cache(rows * pages, torch.device("cpu"))
    cache.vectors.copy_(torch.randn(1, layers, 2, PAGE, KV_HEADS, DIM) * (30 if kv_dtype == torch.int8 else 1))
    if cache.scales is not None:
        cache.scales.fill_(1 / 30)
    table = torch.randperm(rows * pages, dtype=torch.int32).view(rows, pages)
    meta = kernels.AttentionMeta.build([context - new] * rows, [new] * rows, table)
    cos, sin = kernels.rotary_table(DIM, context, 1e5)
    qkv = torch.randn(rows * new, (QUERY_HEADS + 2 * KV_HEADS) * DIM).to(dtype)
    q, k, v = (
        x.unflatten(-1, (-1, DIM)) for x in qkv.split([QUERY_HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM], dim=-1)
    )
    turn = 0

    def next_layer() -> tuple[torch.Tensor, torch.Tensor | None]:
        nonlocal turn
        turn = (turn + 1) % layers
        return cache.layers[turn]

    def ours() -> torch.Tensor:
        vectors, scales = next_layer()
        return kernels.attention(q, k, v, vectors, meta, cos, sin, DIM**-0.5, cache_scales=scales)

    def plain() -> torch.Tensor:
        vectors, scales = next_layer()
        return reference.attention(q, k, v, vectors, meta, cos, sin, DIM**-0.5, None, False, scales)

    seen = rows * sum(range(context - new + 1, context + 1))
    return Case(
        "attention",
        f"{rows} x {new} of {context}, {str(dtype)[6:]}, KV {name}",
        ours,
        plain,
        flops=4 * seen * QUERY_HEADS * DIM,
        bytes=rows * context * kv_format.token_bytes / layers if new == 1 else 0,
    )


def linear(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> Iterator[Case]:
    # Enough copies that small weights come from memory, as they do in a model.
    copies = max(1, min(30, int(2e8) // (inputs * outputs * dtype.itemsize)))
    weights = [torch.randn(outputs, inputs).to(dtype) for _ in range(copies)]
    packed = [kernels.pack_weight(weight) for weight in weights]
    x = torch.randn(rows, inputs).to(dtype)
    turn = 0

    def index() -> int:
        nonlocal turn
        turn = (turn + 1) % copies
        return turn

    shape = f"[{rows}, {inputs}] x [{inputs}, {outputs}] {str(dtype)[6:]}"
    rate = {"flops": 2.0 * rows * inputs * outputs} if rows > 1 else {"bytes": float(inputs * outputs * dtype.itemsize)}
    yield Case(
        "linear packed",
        shape,
        lambda: kernels.linear(x, packed[index()]),
        lambda: F.linear(x, weights[index()]),
        **rate,
    )
    yield Case(
        "linear rows",
        shape,
        lambda: kernels.linear(x, weights[index()], deterministic=True),
        lambda: F.linear(x, weights[index()]),
        **rate,
    )


def quantized(rows: int, inputs: int, outputs: int, kind: kernels.WeightKind) -> Case:
    first = kernels.pack_weight(torch.randn(outputs, inputs), kind=kind)
    copies = max(1, min(60, int(2e8) // first.panels.nbytes))
    return model(f"[{rows}, {inputs}] x [{inputs}, {outputs}] {kind}", rows, [first] * copies, per_layer=True)


def whole_model(rows: int, kind: kernels.WeightKind) -> Case:
    """The linear layers of a decode step, without what is between them."""
    block = [kernels.pack_weight(torch.randn(outputs, inputs), kind=kind) for inputs, outputs in SHAPES]
    head = kernels.pack_weight(torch.randn(VOCABULARY, HIDDEN), kind=kind)
    return model(f"all layers, {rows} rows, {kind}", rows, [*block * 30, head], per_layer=False)


def model(shape: str, rows: int, layers: list[kernels.PackedWeight], per_layer: bool) -> Case:
    """Layers that follow each other in one arena; a call takes the next, or all of them."""
    arena = torch.cat([layer.panels for layer in layers])
    ends = list(itertools.accumulate(layer.panels.numel() for layer in layers))
    placed = [
        kernels.PackedWeight(arena[end - layer.panels.numel() : end], layer.kind, layer.out_features, layer.in_features)
        for end, layer in zip(ends, layers, strict=True)
    ]
    kernels.tune(placed)
    x = {layer.in_features: torch.randn(rows, layer.in_features) for layer in placed}
    words = arena.view(torch.int64)
    if not per_layer:
        return Case(
            "quantized",
            shape,
            lambda: [kernels.linear(x[layer.in_features], layer) for layer in placed],
            lambda: words.sum(),
            bytes=float(arena.nbytes),
        )
    turns = itertools.cycle(range(len(placed)))

    def read() -> torch.Tensor:
        panels = placed[next(turns)].panels
        return panels.view(torch.int64).sum()

    def ours() -> torch.Tensor:
        layer = placed[next(turns)]
        return kernels.linear(x[layer.in_features], layer)

    return Case("quantized", shape, ours, read, bytes=float(placed[0].panels.nbytes))


def mla_attention(rows: int, context: int, new: int, dtype: torch.dtype) -> Case:
    """One layer of several, taken in turns: `rows` sequences with `new` tokens each, up to `context`."""
    pages, dim = -(-context // PAGE), RANK + ROTATED
    layers = max(2, min(30, 2**29 // (rows * pages * PAGE * dim * dtype.itemsize)))
    caches = [torch.randn(rows * pages, PAGE, dim).to(dtype) for _ in range(layers)]
    table = torch.randperm(rows * pages, dtype=torch.int32).view(rows, pages)
    meta = kernels.AttentionMeta.build([context - new] * rows, [new] * rows, table)
    cos, sin = kernels.rotary_table(ROTATED, context, 1e4)
    tokens = rows * new
    q_latent, q_rope = torch.randn(tokens, MLA_HEADS, RANK).to(dtype), torch.randn(tokens, MLA_HEADS, ROTATED).to(dtype)
    latent, k_rope = torch.randn(tokens, RANK).to(dtype), torch.randn(tokens, ROTATED).to(dtype)
    turns = itertools.cycle(caches)

    def run(function: Callable[..., torch.Tensor]) -> torch.Tensor:
        cache = next(turns)
        return function(
            q_latent, q_rope, latent, k_rope, cache, meta, cos, sin, 0.07, interleaved=True, deterministic=False
        )

    seen = rows * sum(range(context - new + 1, context + 1))
    return Case(
        "mla_attention",
        f"{rows} x {new} of {context}, {str(dtype)[6:]}",
        lambda: run(kernels.mla_attention),
        lambda: run(reference_moe_mla.mla_attention),
        flops=2 * seen * MLA_HEADS * (2 * RANK + ROTATED),
        bytes=rows * context * dim * dtype.itemsize if new == 1 else 0,
    )


def linear_heads(rows: int, dtype: torch.dtype, up: bool) -> Case:
    inputs, outputs = (RANK, NOPE) if up else (NOPE, RANK)
    weights = itertools.cycle([torch.randn(MLA_HEADS, outputs, inputs).to(dtype) for _ in range(30)])
    x = torch.randn(rows, MLA_HEADS, inputs).to(dtype)
    size = MLA_HEADS * outputs * inputs
    return Case(
        "linear_heads",
        f"[{rows}, {MLA_HEADS}, {inputs}] to {outputs}, {str(dtype)[6:]}",
        lambda: kernels.linear_heads(x, next(weights), deterministic=False),
        lambda: reference_moe_mla.linear_heads(x, next(weights), deterministic=False),
        bytes=float(size * dtype.itemsize) if rows < 32 else 0,
        flops=2.0 * rows * size,
    )


def experts(rows: int, dtype: torch.dtype, kind: kernels.WeightKind | None) -> Case:
    """The experts of one layer of two. Other ones are chosen in each turn, so that their weights come from memory."""
    gate_up = torch.randn(EXPERTS * 2 * MOE_INNER, MOE_HIDDEN).to(dtype) / MOE_HIDDEN**0.5
    down = torch.randn(EXPERTS * MOE_HIDDEN, MOE_INNER).to(dtype) / MOE_INNER**0.5
    layers: list[list[torch.Tensor | kernels.PackedWeight]] = [[gate_up, down], [gate_up.clone(), down.clone()]]
    if kind is not None:
        layers = [[kernels.pack_weight(weight, kind=kind) for weight in (gate_up, down)] for _ in range(2)]
    sizes = [w.nbytes if isinstance(w, torch.Tensor) else w.panels.nbytes for w in layers[0]]
    x = torch.randn(rows, MOE_HIDDEN).to(dtype)
    steps = [
        kernels.route_experts(
            torch.randn(rows, EXPERTS),
            top_k=CHOSEN,
            scoring="softmax",
            bias=None,
            groups=1,
            top_groups=1,
            normalize=True,
            scaling=1.0,
        )
        for _ in range(20)
    ]
    turns = itertools.cycle(itertools.product(steps, layers))
    hit = sum(len(ids.unique()) for ids, _ in steps) / len(steps)

    def run(function: Callable[..., torch.Tensor]) -> torch.Tensor:
        (ids, weights), (up, down) = next(turns)
        return function(x, ids, weights, up, down, EXPERTS, deterministic=False, shared=None)

    return Case(
        "experts",
        f"{rows} rows, {CHOSEN} of {EXPERTS}, {str(dtype)[6:]}, {kind or 'plain'}",
        lambda: run(kernels.experts),
        lambda: run(reference_moe_mla.experts),
        bytes=hit / EXPERTS * sum(sizes) if rows < 64 else 0,
        flops=6.0 * rows * CHOSEN * MOE_HIDDEN * MOE_INNER,
    )


def route_experts(rows: int, experts: int, groups: int) -> Case:
    logits, bias = torch.randn(rows, experts), torch.randn(experts)

    def run(function: Callable[..., object]) -> object:
        return function(
            logits,
            top_k=8,
            scoring="sigmoid",
            bias=bias,
            groups=groups,
            top_groups=(groups + 1) // 2,
            normalize=True,
            scaling=2.5,
        )

    return Case(
        "route_experts",
        f"{rows} rows, 8 of {experts} in {groups} groups",
        lambda: run(kernels.route_experts),
        lambda: run(reference_moe_mla.route_experts),
    )


def rms_norm(rows: int, dtype: torch.dtype) -> Case:
    x, residual = torch.randn(rows, HIDDEN).to(dtype), torch.zeros(rows, HIDDEN).to(dtype)
    weight = torch.ones(HIDDEN, dtype=dtype)
    return Case(
        "rms_norm",
        f"[{rows}, {HIDDEN}] {str(dtype)[6:]}",
        lambda: kernels.rms_norm(x, weight, 1e-5, residual),
        lambda: reference.rms_norm(x, weight, 1e-5, residual),
    )


def silu_and_mul(rows: int, dtype: torch.dtype) -> Case:
    x = torch.randn(rows, 2 * INNER).to(dtype)
    return Case(
        "silu_and_mul",
        f"[{rows}, {2 * INNER}] {str(dtype)[6:]}",
        lambda: kernels.silu_and_mul(x),
        lambda: reference.silu_and_mul(x),
    )


def sample(rows: int, label: str, **params: list[float]) -> Case:
    logits = torch.randn(rows, VOCABULARY) * 2.5
    tensors = kernels.SamplingTensors.build(**params)  # type: ignore[arg-type]
    seeds, positions = torch.arange(rows), torch.arange(rows)
    turn = 0

    def next_positions() -> torch.Tensor:
        nonlocal turn
        turn += 1
        return positions + turn

    return Case(
        "sample",
        f"[{rows}, {VOCABULARY}] {label}",
        lambda: kernels.sample(logits, tensors, seeds, next_positions()),
        lambda: reference.sample(logits, tensors, seeds, next_positions()),
    )


def logprobs(rows: int) -> Case:
    logits, tokens = torch.randn(rows, VOCABULARY) * 2.5, torch.zeros(rows, dtype=torch.int32)
    return Case(
        "logprobs",
        f"[{rows}, {VOCABULARY}] top 5",
        lambda: kernels.logprobs(logits, tokens, 5),
        lambda: reference.logprobs(logits, tokens, 5),
    )


def memory_rate() -> float:
    """GB/s at which this machine's memory is read."""
    block = torch.ones(64 * 2**20)
    return block.nbytes / microseconds(lambda: block.sum(), 1.0) / 1e3


def attention_cases() -> Iterator[Case]:
    for dtype, kv_dtype in (
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.int8),
    ):
        for rows, context in itertools.product((1, 4, 16, 64), (384, 1500)):
            yield attention(rows, context, 1, dtype, kv_dtype)
        for context, new in ((256, 256), (512, 512), (4096, 256)):
            yield attention(1, context, new, dtype, kv_dtype)


def linear_cases() -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        for rows in (1, 16, 256):
            for inputs, outputs in SHAPES:
                yield from linear(rows, inputs, outputs, dtype)
        yield from linear(1, HIDDEN, VOCABULARY, dtype)


def quantized_cases() -> Iterator[Case]:
    kinds: tuple[kernels.WeightKind, ...] = ("int8", "int4")
    for kind in kinds:
        for rows in (1, 4, 16, 64, 256):
            for inputs, outputs in (*SHAPES, (HIDDEN, VOCABULARY)):
                yield quantized(rows, inputs, outputs, kind)
            yield whole_model(rows, kind)


def elementwise_cases() -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        for rows in (1, 16, 256):
            yield rms_norm(rows, dtype)
            yield silu_and_mul(rows, dtype)


def mla_cases() -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        for rows, context in itertools.product((1, 16), (384, 4096)):
            yield mla_attention(rows, context, 1, dtype)
        yield mla_attention(1, 512, 512, dtype)
        for rows, up in itertools.product((1, 16, 256), (False, True)):
            yield linear_heads(rows, dtype, up)


def expert_cases() -> Iterator[Case]:
    kinds: tuple[kernels.WeightKind | None, ...] = (None, "bfloat16", "int8", "int4")
    for rows in (1, 16, 256):
        yield experts(rows, torch.float32, "float32")
        for kind in kinds:
            yield experts(rows, torch.bfloat16, kind)
        yield route_experts(rows, 64, 1)
        yield route_experts(rows, 256, 8)


def sampling_cases() -> Iterator[Case]:
    for rows in (1, 16):
        yield sample(rows, "greedy", temperature=[0.0] * rows)
        yield sample(rows, "temperature 1", temperature=[1.0] * rows)
        yield sample(rows, "top_p 0.95", temperature=[0.7] * rows, top_p=[0.95] * rows)
        yield sample(rows, "top_k 50", temperature=[0.7] * rows, top_k=[50] * rows)
        yield logprobs(rows)


CASES = {
    "attention": attention_cases,
    "linear": linear_cases,
    "quantized": quantized_cases,
    "elementwise": elementwise_cases,
    "experts": expert_cases,
    "mla": mla_cases,
    "sampling": sampling_cases,
}


def main() -> None:
    wanted = sys.argv[1:] or list(CASES)
    if unknown := set(wanted) - CASES.keys():
        sys.exit(f"there are no cases named {', '.join(unknown)}: use some of {', '.join(CASES)}")
    print(f"backend {kernels.backend()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    floor = memory_rate()
    print(f"memory: {floor:.1f} GB/s read by torch from all threads")
    print(f"{'operation':14} {'shape':42} {'ours, us':>10} {'torch, us':>10} {'ratio':>6}  rate")
    torch.manual_seed(0)
    with torch.inference_mode():
        for case in itertools.chain.from_iterable(CASES[name]() for name in wanted):
            ours, plain = microseconds(case.ours), microseconds(case.torch)
            rate = ""
            if case.bytes:
                rate = f"{case.bytes / ours / 1e3:.1f} GB/s, floor {case.bytes / floor / 1e3:.1f} us"
            elif case.flops:
                rate = f"{case.flops / ours / 1e3:.0f} GFLOP/s"
            print(f"{case.name:14} {case.shape:42} {ours:10.1f} {plain:10.1f} {plain / ours:6.2f}  {rate}", flush=True)


if __name__ == "__main__":
    main()
