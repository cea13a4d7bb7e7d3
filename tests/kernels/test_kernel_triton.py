"""The Triton kernels without a GPU: their results in Triton's interpreter, and that they compile for one."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from llm_runtime import kernels

HERE, ROOT = Path(__file__).parent, Path(kernels.__file__).parent.parent

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def run(*arguments: str, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_in_the_interpreter() -> None:
    pytest_arguments = ("-m", "pytest", "-q", "-p", "no:cacheprovider")
    run(*pytest_arguments, str(HERE / "interpreted.py"), TRITON_INTERPRET="1", LLM_RUNTIME_KERNELS="torch")


def test_they_compile(tmp_path: Path) -> None:
    """For bfloat16 on compute capability 8.0, with the sizes of DeepSeek-V3 and Llama 3: the compiler asks more than
    the interpreter, and shared memory has an end."""
    code = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from llm_runtime.kernels.triton import attention, elementwise, experts, mla, sampling

NARROW = "latent k_rope cache q_latent q_rope out x weight between shared q k v rotated residual gate_up"
TYPES = {name: "*bf16" for name in NARROW.split()}
TYPES |= {name: "*fp32" for name in "cos sin parts part_sums factors results cache_scales".split()}
TYPES |= {"scale": "fp32", "eps": "fp32"}
TYPES |= {name: "*i64" for name in "slots positions order block_expert block_first ends".split()}
TYPES |= {name: "*i32" for name in "table row_offsets row_starts row_slots".split()}

def compiled(kernel, options, **constants):
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else TYPES.get(name, "i32") for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    target = GPUTarget("cuda", 80, 32)
    done = triton.compile(ASTSource(kernel, signature, values), target=target, options=options)
    assert done.metadata.shared <= 99 * 1024, done.metadata.shared

halves = {"INTERLEAVED": True, "BLOCK_RANK": 512, "BLOCK_HALF": 32}
splits = {"SPLITS": mla.SPLITS, "BLOCK_KEYS": 32}
compiled(mla._write_keys, {}, **halves)
compiled(
    mla._attend_part, {"num_stages": 2}, NARROW=True, BLOCK_HEADS=mla.BLOCK_HEADS, **halves, **splits
)
compiled(mla._merge_parts, {}, BLOCK_RANK=512, **splits)
sizes = {"BLOCK_ROWS": 16, "BLOCK_OUTPUTS": experts.BLOCK_OUTPUTS, "BLOCK_INPUTS": experts.BLOCK_INPUTS}
for layout in (experts.PLAIN, experts.PAIRED_PANELS):
    compiled(experts._gate_and_up, {}, LAYOUT=layout, NARROW=True, **sizes)
compiled(experts._down, {}, LAYOUT=experts.PLAIN, NARROW=True, **sizes)
for quantized in (False, True):
    cached = {"QUANTIZED": quantized, "BLOCK_DIM": 128}
    TYPES["cache"] = "*i8" if quantized else "*bf16"
    compiled(attention._rotate_and_write, {}, ONE_EACH=False, BLOCK_HEADS=8, **cached)
    kinds = {"NARROW": True, "WINDOWED": quantized, "BLOCK_KEYS": 64, **cached}
    split = {"BY_TOKEN": False, "SPLITS": 8}
    compiled(attention._attend_token, {"num_stages": 2}, BLOCK_HEADS=16, **split, **kinds)
    compiled(attention._attend_tile, {"num_stages": 2}, BLOCK_TOKENS=16, BLOCK_GROUP=4, **kinds)
compiled(attention._merge_parts, {}, WINDOWED=False, BLOCK_KEYS=64, BLOCK_DIM=128, **split)
compiled(elementwise._rms_norm, {}, ADDS=True, BLOCK=4096)
compiled(elementwise._silu_and_mul, {}, BLOCK=1024)
TYPES |= {"x": "*fp32", "top_ps": "*fp32", "log_min_ps": "*fp32", "greedy": "*i1", "top_ks": "*i32", "drawn": "*i32"}
TYPES |= {"tokens": "*i64", "seeds": "*i64"}
compiled(sampling._draw, {"enable_fp_fusion": False}, BLOCK=sampling.BLOCK)
TYPES |= {"x": "*bf16"}
compiled(experts._add_up, {}, CHOSEN=8, SHARED=True, BLOCK_OUTPUTS=256)
"""
    run("-c", code, TRITON_CACHE_DIR=str(tmp_path))
