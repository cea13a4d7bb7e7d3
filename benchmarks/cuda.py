"""A model of random weights on a CUDA device: the bare executor loop, a served node, and transformers' `generate`.

    python benchmarks/cuda.py model DIR [--shape llama-8b]    # writes it; needs a CUDA device and a tokenizer
    python benchmarks/cuda.py bare DIR [--profile FILE]       # executor alone: TPOT, TTFT, tok/s, prefill TFLOP/s
    python benchmarks/cuda.py node DIR                        # the same batches over HTTP
    python benchmarks/cuda.py peer DIR                        # the same batches by transformers

Batches of 1, 16 and 64 requests, 256 tokens in and 128 out, greedy, all sent at once; over HTTP one at a time are four.
Weights mean nothing, so only times do. Each part prints its figures as one line of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

INPUT, OUTPUT, CHUNK_TOKENS, LONG = 256, 128, 2048, 4096
BATCHES = (1, 16, 64)
SPOKEN = 49_000
"""Tokens of the tokenizer: rows of the output layer above are zeros, so that nothing else is drawn."""
SHAPES: dict[str, dict[str, int]] = {
    "llama-8b": {
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "small": {
        "vocab_size": 49_152,
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
}


def make_model(options: argparse.Namespace) -> None:
    """Writes config.json, safetensors files of bfloat16 numbers, and a tokenizer."""
    import torch
    from safetensors.torch import save_file

    began, shape = time.perf_counter(), SHAPES[options.shape]
    path: Path = options.directory
    path.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
        **shape,
    }
    (path / "config.json").write_text(json.dumps(config))
    for file in options.tokenizer.glob("tokenizer*.json"):
        shutil.copy(file, path)
    hidden, inner, vocabulary = shape["hidden_size"], shape["intermediate_size"], shape["vocab_size"]
    kv = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    layer_shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    generator = torch.Generator("cuda").manual_seed(0)

    def drawn(*size: int) -> torch.Tensor:
        scale = size[-1] ** -0.5
        return (torch.randn(size, device="cuda", dtype=torch.bfloat16, generator=generator) * scale).cpu()

    def ones() -> torch.Tensor:
        return torch.ones(hidden, dtype=torch.bfloat16)

    embedding, head = drawn(vocabulary, hidden), drawn(vocabulary, hidden)
    head[SPOKEN:] = 0
    files = [{"model.embed_tokens.weight": embedding, "lm_head.weight": head, "model.norm.weight": ones()}]
    for layer in range(shape["num_hidden_layers"]):
        if layer % 8 == 0:
            files.append({})
        prefix = f"model.layers.{layer}."
        files[-1] |= {f"{prefix}{name}.weight": drawn(*size) for name, size in layer_shapes.items()}
        files[-1] |= {f"{prefix}{name}.weight": ones() for name in ("input_layernorm", "post_attention_layernorm")}
    names = [f"model-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1)]
    index = {name: file for file, tensors in zip(names, files, strict=True) for name in tensors}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    with ThreadPoolExecutor() as pool:
        for _ in pool.map(lambda tensors, name: save_file(tensors, path / name, {"format": "pt"}), files, names):
            pass
    print(json.dumps({"part": "model", "seconds": round(time.perf_counter() - began, 1)}))


def weights_of(directory: Path) -> tuple[float, float]:
    """Billions of weights of the layers, and gigabytes that a decode step reads of them and of the output layer."""
    config = json.loads((directory / "config.json").read_text())
    hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    layer = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner
    count = config["num_hidden_layers"] * layer
    return count / 1e9, 2 * (count + vocabulary * hidden) / 1e9


def bare(options: argparse.Namespace) -> None:
    """The executor in this process."""
    import torch

    from llm_runtime import kernels
    from llm_runtime.actors.rank.config import RankConfig
    from llm_runtime.actors.rank.executor import build_executor
    from llm_runtime.runtime.bench.executor import Batch, run_batch

    began = time.perf_counter()
    config = RankConfig(
        model=str(options.directory),
        dtype="bfloat16",
        num_pages=BATCHES[-1] * (INPUT + OUTPUT) // 16 + 512,
        max_slots=BATCHES[-1],
        max_model_len=LONG + 64,
        max_step_tokens=LONG + BATCHES[-1],
        device="cuda",
    )
    executor = build_executor(config)
    if options.eager:
        executor.graphs = None
    billions, gigabytes = weights_of(options.directory)
    figures: dict[str, Any] = {
        "part": "bare", "device": torch.cuda.get_device_name(), "start_s": time.perf_counter() - began,
        "copy_GB/s": copy_speed(), "weights_GB": gigabytes,
    }  # fmt: skip
    for count in BATCHES:
        run_batch(executor, Batch(count, count, INPUT, 24, CHUNK_TOKENS, seed=1))
        rounds = [run_batch(executor, Batch(count, count, INPUT, OUTPUT, CHUNK_TOKENS, seed=2 + i)) for i in range(2)]
        timings = min(rounds, key=lambda each: sum(step.duration_s for step in each))
        seconds = sum(step.duration_s for step in timings)
        decode = median(step.duration_s for step in timings if not step.prefilled)
        figures |= {f"c{count}_tok/s": count * OUTPUT / seconds, f"c{count}_TPOT_ms": 1e3 * decode}
        drawn = run_batch(executor, Batch(count, count, INPUT, 40, CHUNK_TOKENS, seed=5, temperature=1.0))
        figures[f"c{count}_random_TPOT_ms"] = 1e3 * median(step.duration_s for step in drawn if not step.prefilled)
        if count == 1:
            figures |= {"c1_TTFT_ms": 1e3 * timings[0].duration_s, "c1_GB/s": gigabytes / decode}
    for length in (512, 2048, LONG):
        once = [run_batch(executor, Batch(1, 1, length, 1, LONG, seed=9 + i))[0].duration_s for i in range(3)]
        figures[f"prefill_{length}_ms"] = 1e3 * min(once)
        figures[f"prefill_{length}_TFLOP/s"] = 2e-3 * billions * length / min(once)
    one = run_batch(executor, Batch(1, 1, LONG, 32, LONG, seed=3))
    figures[f"c1_TPOT_after_{LONG}_ms"] = 1e3 * median(step.duration_s for step in one if not step.prefilled)
    logits = torch.randn(64, executor.vocab_size, device="cuda")
    numbers = torch.arange(64, device="cuda")
    for name, how in (("greedy", [0.0]), ("random", [1.0])):
        params = kernels.SamplingTensors.build(how * 64, device="cuda")
        figures[f"sample_64_{name}_ms"] = 1e3 * timed(lambda p=params: kernels.sample(logits, p, numbers, numbers))
    print(json.dumps({name: round(each, 3) if isinstance(each, float) else each for name, each in figures.items()}))
    if options.profile:
        profile(executor, options.profile)


def profile(executor: Any, path: Path) -> None:
    """Writes where the device's time goes in decode steps and in prefills."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    from llm_runtime.runtime.bench.executor import Batch, run_batch

    with path.open("w") as file:
        for title, batch in (
            ("decode of 1", Batch(1, 1, INPUT, 33, CHUNK_TOKENS)),
            ("decode of 64", Batch(64, 64, 16, 33, CHUNK_TOKENS)),
            ("prefill of 2048", Batch(1, 1, 2048, 1, CHUNK_TOKENS)),
        ):
            with torch_profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
                run_batch(executor, batch)
            table = seen.key_averages().table(sort_by="self_cuda_time_total", row_limit=22, max_name_column_width=70)
            print(title, table, sep="\n", file=file)


def timed(function: Any) -> float:
    """Seconds that a call takes on the device: the median of twenty."""
    import torch

    times = []
    for _ in range(23):
        torch.cuda.synchronize()
        began = time.perf_counter()
        function()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return median(times[3:])


def copy_speed() -> float:
    """Gigabytes a second of a large copy on the device, read and written."""
    import torch

    source = torch.randint(0, 255, (2**31,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / 1e9 / timed(lambda: target.copy_(source))


def prompts_of(count: int, seed: int) -> list[list[int]]:
    drawn: list[list[int]] = np.random.default_rng(seed).integers(100, SPOKEN, (count, INPUT)).tolist()
    return drawn


def node(options: argparse.Namespace) -> None:
    """A whole node, asked over HTTP."""
    from llm_runtime.runtime.bench.figures import percentile
    from llm_runtime.runtime.bench.serving import run_prompts
    from llm_runtime.runtime.rundir import base_directory

    name = f"cuda-{os.getpid()}"
    settings = f"""
[model]
path = "{options.directory}"
dtype = "bfloat16"
[node]
name = "{name}"
[ingress]
port = {options.port}
[engine.main]
device = "cuda"
kv_tokens = {BATCHES[-1] * (INPUT + OUTPUT) + 8192}
chunk_tokens = {CHUNK_TOKENS}
max_running = {BATCHES[-1]}
max_step_ms = 0
speculation = "off"
"""
    figures: dict[str, Any] = {"part": "node"}
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "cuda.toml"
        file.write_text(settings)
        runtime = [sys.executable, "-m", "llm_runtime"]
        environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
        began = time.perf_counter()
        subprocess.run([*runtime, "up", str(file), "--detach"], check=True, env=environment)
        figures["start_s"] = time.perf_counter() - began
        try:
            url = f"http://127.0.0.1:{options.port}/v1"
            for count in BATCHES:
                rounds = []
                for turn in range(3):
                    prompts = prompts_of(max(count, 4), 100 * count + turn)
                    rounds.append(asyncio.run(run_prompts(url, None, None, prompts, count, OUTPUT)))
                outcomes, seconds = min(rounds[1:], key=lambda each: each[1])
                failed = [each.error for each in outcomes if each.error]
                good = [each for each in outcomes if not each.error]
                figures |= {
                    f"c{count}_failed": failed[:1] or 0,
                    f"c{count}_tok/s": sum(each.tokens for each in good) / seconds,
                    f"c{count}_TTFT_ms": 1e3 * percentile([each.ttft for each in good], 50),
                    f"c{count}_TPOT_ms": 1e3 * percentile([each.tpot for each in good], 50),
                    f"c{count}_ITL_p99_ms": 1e3 * percentile([gap for each in good for gap in each.itl], 99),
                }
            figures |= asyncio.run(kill_the_rank(url, base_directory() / name))
        finally:
            subprocess.run([*runtime, "down", "--node", name], env=environment, stdout=subprocess.DEVNULL)
    print(json.dumps({name: round(each, 3) if isinstance(each, float) else each for name, each in figures.items()}))


async def kill_the_rank(url: str, run_dir: Path) -> dict[str, Any]:
    """Four streams, during which the rank is killed: the longest pause, and what was lost."""
    from llm_runtime.runtime.bench.serving import run_prompts
    from llm_runtime.runtime.chaos.inject import node_report

    output = 400
    running = asyncio.create_task(run_prompts(url, None, None, prompts_of(4, 7), 4, output))
    await asyncio.sleep(1.0)
    report = await asyncio.to_thread(node_report, run_dir)
    pid = next(each.pid for each in report.tree.walk() if each.name == "main.rank0")
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    outcomes, _ = await asyncio.wait_for(running, 60)
    return {
        "killed_pause_s": max(gap for each in outcomes for gap in each.itl),
        "killed_failed": sum(bool(each.error) for each in outcomes),
        "killed_tokens_lost": sum(output - each.tokens for each in outcomes),
    }


def peer(options: argparse.Namespace) -> None:
    """transformers, whole batches at a time."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        options.directory, dtype=torch.bfloat16, device_map="cuda"
    ).eval()
    figures: dict[str, Any] = {"part": "peer", "transformers": transformers.__version__}

    def seconds(count: int, output: int) -> float:
        ids = torch.tensor(prompts_of(count, count), device="cuda")
        torch.cuda.synchronize()
        began = time.perf_counter()
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=output, min_new_tokens=output, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip
        torch.cuda.synchronize()
        assert made.shape == (count, INPUT + output)
        return time.perf_counter() - began

    for count in BATCHES:
        seconds(count, 4)
        first, whole = seconds(count, 1), seconds(count, OUTPUT)
        figures |= {
            f"c{count}_tok/s": round(count * OUTPUT / whole, 1),
            f"c{count}_TTFT_ms": round(1e3 * first, 2),
            f"c{count}_TPOT_ms": round(1e3 * (whole - first) / (OUTPUT - 1), 3),
        }
    print(json.dumps(figures))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"model": make_model, "bare": bare, "node": node, "peer": peer}
    parser.add_argument("part", choices=parts)
    parser.add_argument("directory", type=Path, help="of the model")
    parser.add_argument("--shape", choices=SHAPES, default="llama-8b")
    parser.add_argument("--tokenizer", type=Path, help="directory of tokenizer*.json, of 49,000 tokens or more")
    parser.add_argument("--profile", type=Path, help="write a table of kernels there")
    parser.add_argument("--eager", action="store_true", help="decode without recorded graphs")
    parser.add_argument("--port", type=int, default=8970)
    options = parser.parse_args()
    if options.part == "model" and options.tokenizer is None:
        parser.error("give --tokenizer")
    parts[options.part](options)


if __name__ == "__main__":
    main()
