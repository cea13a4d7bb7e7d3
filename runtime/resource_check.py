"""What the engines of a topology need of a machine: memory and devices, and whether it has them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llm_runtime.runtime.cgroups import memory_bytes
from llm_runtime.runtime.encoder_plan import EncoderPlan
from llm_runtime.runtime.engine_plan import EnginePlan
from llm_runtime.runtime.topology import LoadedTopology

_GPUS = Path("/proc/driver/nvidia/gpus")
_RDMA = Path("/sys/class/infiniband")


def arena_sizes_of(engines: Sequence[EnginePlan]) -> dict[str, int]:
    """Bytes of the arenas of weights and KV pages of engines on the CPU, by name: what several share comes once."""
    return {
        name: size
        for engine in engines
        for name, size in zip(
            (*engine.weight_arenas, *engine.kv_arenas), (*engine.weight_bytes, *engine.kv_bytes), strict=True
        )
        if engine.settings.device == "cpu"
    }


def encoder_bytes(encoders: Sequence[EncoderPlan]) -> int:
    """Memory of engines that embed or classify."""
    return sum(each.weight_bytes + each.scratch_bytes for each in encoders)


def check_needs(loaded: LoadedTopology, engines: Sequence[EnginePlan], encoders: Sequence[EncoderPlan] = ()) -> None:
    """Raises TopologyError unless this machine can hold weights and KV pools, which are used up to the last byte under
    load, and has as many GPUs as an engine has ranks."""
    memory = memory_bytes() - encoder_bytes(encoders)
    if memory < 0:
        raise loaded.error(
            f"{max(encoders, key=lambda each: each.weight_bytes + each.scratch_bytes).model_key}.path",
            f"needs {gib(encoder_bytes(encoders))} of memory, and this machine has {gib(memory_bytes())}; choose a "
            "smaller model, or lower its max_model_len",
        )
    for engine in engines:
        gpus = len(list(_GPUS.iterdir())) if _GPUS.is_dir() else 0
        if engine.settings.device == "cuda" and 0 < gpus < engine.settings.tp:
            raise loaded.error(
                f"engine.{engine.name}.tp",
                f"is {engine.settings.tp}, and this machine has {gpus} GPUs; give at most that",
            )
    _check_rdma(loaded)
    on_cpu = [engine for engine in engines if engine.settings.device == "cpu"]
    needed = sum(arena_sizes_of(on_cpu).values())
    if needed <= memory:
        return
    weights = sum(size for name, size in arena_sizes_of(on_cpu).items() if name.endswith(".weights"))
    problem = (
        f"needs {gib(needed)} of memory, {gib(weights)} for weights ({_a_rank(on_cpu)}) and {gib(needed - weights)} "
        f"for KV pools, and this machine has {gib(memory)}"
    )
    largest = _largest_pool(on_cpu)
    left = tokens_that_fit(largest, memory - (needed - sum(largest.kv_bytes)))
    if left < largest.settings.page_size:
        smaller = "" if largest.dtype == "int4" else f', or {largest.model_key}.dtype = "int4"'
        raise loaded.error(
            f"{largest.model_key}.path", f"{problem}; choose a smaller model{smaller}, or spread the engines over nodes"
        )
    key = f"engine.{largest.name}.kv_tokens"
    raise loaded.error(key, f"is {largest.settings.kv_tokens}, which {problem}; give at most {left}")


def _check_rdma(loaded: LoadedTopology) -> None:
    """Mooncake takes TCP without a word where there is no RDMA: somebody would believe to have it."""
    transfer = loaded.topology.transfer
    if transfer.protocol != "rdma":
        return
    devices = sorted(each.name for each in _RDMA.iterdir()) if _RDMA.is_dir() else []
    if not devices:
        raise loaded.error("transfer.protocol", 'is "rdma", and this machine has no RDMA device; give "tcp"')
    if transfer.device and transfer.device not in devices:
        raise loaded.error("transfer.device", f'is "{transfer.device}"; this machine has {", ".join(devices)}')


def describe_encoders(encoders: Sequence[EncoderPlan], wanted: str) -> list[str]:
    """Lines for `runtime check` about a model's engines that embed or classify; as `describe_engines`."""
    auto = " (auto)" if wanted == "auto" else ""
    lines = []
    for each in encoders:
        scratch = f", and {mib(each.scratch_bytes)} for the keys and values of a batch" if each.scratch_bytes else ""
        lines.append(
            f"engine  {each.name}: an encoder with {each.threads} thread(s); it maps {mib(each.weight_bytes)} of "
            f"{each.dtype}{auto} weights{scratch}"
        )
    return lines


def describe_engines(engines: Sequence[EnginePlan], wanted: str) -> list[str]:
    """Lines for `runtime check`: the needs of each of a model's engines.

    Args:
        wanted: `dtype` of the model in the topology.
    """
    auto = " (auto)" if wanted == "auto" else ""
    lines = []
    for engine in engines:
        settings = engine.settings
        owners = (arenas[0].partition(".")[0] for arenas in (engine.weight_arenas, engine.kv_arenas))
        weights, kv = (f", those of {owner}" if owner != engine.name else "" for owner in owners)
        pool = "" if engine.shared_kv and engine.role == "prefill" else f" with {engine.num_pages} pages of its own"
        lines.append(
            f"engine  {engine.name}: {engine.role}, {settings.tp} rank(s) on {settings.device}; a rank maps "
            f"{mib(max(engine.weight_bytes))} of {engine.dtype}{auto} weights{weights}, and "
            f"{mib(max(engine.kv_bytes))} of {engine.kv_dtype} KV{kv}{pool}"
        )
    return lines


def describe_needs(engines: Sequence[EnginePlan], encoders: Sequence[EncoderPlan]) -> list[str]:
    """Lines for `runtime check`: what the engines of this machine need together."""
    lines = []
    on_cpu = [engine for engine in engines if engine.settings.device == "cpu"]
    memory, needed = memory_bytes(), sum(arena_sizes_of(on_cpu).values()) + encoder_bytes(encoders)
    if on_cpu:
        largest = _largest_pool(on_cpu)
        fit = tokens_that_fit(largest, memory - (needed - sum(largest.kv_bytes)))
        lines.append(
            f"memory  {mib(needed)} of {mib(memory)}; beside the rest, {fit:,} KV tokens of {largest.name} would fit"
        )
    elif encoders:
        lines.append(f"memory  {mib(needed)} of {mib(memory)}")
    gpus = max((engine.settings.tp for engine in engines if engine.settings.device == "cuda"), default=0)
    if gpus:
        lines.append(f"devices {gpus} GPU(s), one a rank")
    return lines


def tokens_that_fit(engine: EnginePlan, memory: int) -> int:
    """Tokens of an engine's KV pool for which a machine has room, in whole pages."""
    page = sum(engine.kv_bytes) // engine.arena_pages
    return max(0, memory) // page * engine.settings.page_size


def gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"


def mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"


def _largest_pool(engines: Sequence[EnginePlan]) -> EnginePlan:
    return max(engines, key=lambda engine: (sum(engine.kv_bytes), engine.role != "prefill", engine.num_pages))


def _a_rank(engines: Sequence[EnginePlan]) -> str:
    return ", ".join(
        f"{engine.name} {gib(max(engine.weight_bytes))} a rank"
        for engine in {engine.weight_arenas[0]: engine for engine in engines}.values()
    )
