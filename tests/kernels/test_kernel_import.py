"""Importing the package: nothing runs, forked children work, and transformers does not take it for PyPI's `kernels`."""

import os
import subprocess
import sys
from pathlib import Path

from llm_runtime import kernels

ROOT = Path(kernels.__file__).parent.parent


def run(code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_beside_transformers() -> None:
    """transformers probes for a package of this name, and must run a model with ours in its place."""
    code = """
import torch, transformers; from llm_runtime import kernels
from transformers import LlamaConfig, LlamaForCausalLM
config = LlamaConfig(vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
model = LlamaForCausalLM(config).eval()
ids = torch.tensor([[1, 2, 3]])
with torch.no_grad():
    assert model(ids).logits.shape == (1, 3, 99)
    assert model.generate(ids, min_new_tokens=3, max_new_tokens=3, do_sample=False).shape == (1, 6)
print(kernels.__file__)
"""
    assert Path(run(code).splitlines()[-1]) == ROOT / "kernels" / "__init__.py"


def test_import_starts_nothing() -> None:
    """A process that forks others imports this: no thread may start, no library load and no torch operation run."""
    code = """
import os, sys, torch
from torch.overrides import TorchFunctionMode
tasks = os.listdir("/proc/self/task")
class Refuse(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        raise AssertionError(f"{function} ran")
with Refuse():
    from llm_runtime import kernels
assert os.listdir("/proc/self/task") == tasks
assert "triton" not in sys.modules
assert not any("llm-runtime/kernels" in line for line in open("/proc/self/maps"))
print("imported")
"""
    assert run(code) == "imported"


def test_child_of_a_process_that_has_used_them() -> None:
    """Threads do not survive a fork; the child makes its own."""
    code = """
import os, torch, kernels
torch.set_num_threads(2)
x, weight = torch.randn(200, 256), kernels.pack_weight(torch.randn(512, 256))
expected = kernels.linear(x, weight).numpy().tobytes()  # torch's own threads would hang after the fork
child = os.fork()
if not child:
    os._exit(0 if all(kernels.linear(x, weight).numpy().tobytes() == expected for _ in range(20)) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
print("same")
"""
    assert run(code) == "same"


def test_several_threads_at_once() -> None:
    code = """
import threading, torch, kernels
torch.set_num_threads(2)
x, weight = torch.randn(100, 256), kernels.pack_weight(torch.randn(512, 256))
expected = kernels.linear(x, weight)
wrong = []
def work():
    for _ in range(50):
        if not torch.equal(kernels.linear(x, weight), expected):
            wrong.append(1)
threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert not wrong
print("same")
"""
    assert run(code) == "same"


def test_recording_imports_no_compiler() -> None:
    """torch has a way of importing torch._dynamo, and with it sympy, where a mode sees its first operation."""
    code = """
import sys, torch, kernels
x = torch.randn(4, 8)
try:
    graph = kernels.StepGraph(lambda: kernels.silu_and_mul(x.view(2, 16)), kernels.GraphMemory())
except kernels.NotRecordable:
    pass
assert "torch._dynamo" not in sys.modules
print("recorded")
"""
    assert run(code) == "recorded"
