"""The servers that `serving.py` compares: how each is started, paused and stopped, and the model that vLLM needs.

    python benchmarks/peers.py --make-model DIR

writes SmolLM2-135M-Instruct as a Hugging Face directory in bfloat16, made from the embedded GGUF file (needs the
`dev` dependencies).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EMBEDDED = "smollm2-135m-instruct"
_STOP_S = 20.0


@dataclass
class Server:
    """An OpenAI-compatible server that this program starts.

    Attributes:
        command, environment: how it is started.
        url: where its API starts.
        pausable: it is stopped (SIGSTOP) while others are measured. A server that watches its processes is not.
        start_s: from its start to the first token of an answer.
    """

    name: str
    command: list[str]
    port: int
    environment: Mapping[str, str] = field(default_factory=dict)
    pausable: bool = True
    log: Path = Path(os.devnull)
    start_s: float = 0.0
    _process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self, limit_s: float) -> None:
        """Starts it and waits for its first token. Raises RuntimeError when that does not come in time."""
        began = time.monotonic()
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.command, env=os.environ | self.environment, stdout=log, stderr=log, start_new_session=True
            )
        while not self._answers():
            if self._process.poll() is not None:
                raise RuntimeError(f"{self.name} ended while it was starting: see {self.log}")
            if time.monotonic() - began > limit_s:
                raise RuntimeError(f"{self.name} was not ready within {limit_s:.0f} s: see {self.log}")
            time.sleep(0.05)
        self.start_s = time.monotonic() - began

    def pause(self) -> None:
        """Keeps it from running while another server is measured."""
        if self.pausable:
            self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        if self.pausable:
            self._signal(signal.SIGCONT)

    def stop(self) -> None:
        """Ends it: first as it wishes, then by force. Nothing but its own processes is touched."""
        if self._process is None:
            return
        self.resume()
        pids = list(self.pids())
        self._process.terminate()
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            pass
        for pid in pids:
            if os.path.exists(f"/proc/{pid}") and os.getsid(pid) == self._process.pid:
                os.kill(pid, signal.SIGKILL)
        self._process.wait()

    def pids(self) -> Iterator[int]:
        """Of its processes."""
        todo = [self._process.pid] if self._process is not None and self._process.poll() is None else []
        while todo:
            pid = todo.pop()
            yield pid
            try:
                for task in os.listdir(f"/proc/{pid}/task"):
                    todo += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())
            except OSError:
                continue

    def pss_bytes(self) -> int:
        """Memory of all its processes, what they share counted once."""
        total = 0
        for pid in self.pids():
            try:
                lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            except OSError:
                continue
            total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
        return total

    def cpu_seconds(self) -> float:
        """CPU time of all its processes that run now."""
        ticks = 0
        for pid in self.pids():
            try:
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/models", timeout=5) as response:
                model = json.load(response)["data"][0]["id"]
            body = json.dumps({"model": model, "prompt": "Hello", "max_tokens": 1, "temperature": 0}).encode()
            question = urllib.request.Request(f"{self.url}/completions", body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(question, timeout=60) as response:
                return response.status == 200
        except (OSError, urllib.error.URLError, ValueError, LookupError):
            return False

    def _signal(self, number: int) -> None:
        for pid in self.pids():
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                pass


def ours(port: int, settings: list[str], log: Path, root: Path = ROOT, name: str = "runtime") -> Server:
    """This runtime with the embedded model, from this working tree or another one."""
    source, module = root / "src", "llm_runtime"
    if not source.is_dir():  # a tree of before 2026-12 has its packages at the top
        source, module = root, "runtime"
    command = [sys.executable, "-P", "-m", module, "up", str(root / "topology" / "smollm2.toml"), "--port", str(port)]
    for setting in [f"node.name=serving-{name}-{os.getpid()}", *settings]:
        command += ["--set", setting]
    return Server(name, command, port, {"PYTHONPATH": str(source)}, pausable=False, log=log)


def vllm(binary: str, model: Path, port: int, log: Path) -> Server:
    """vLLM on the CPU, in bfloat16, with its prefix cache on."""
    command = [binary, "serve", str(model), "--dtype", "bfloat16", "--max-model-len", "4096", "--port", str(port)]
    environment = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "2", "PYTHONPATH": ""}
    return Server("vLLM", command, port, environment, log=log)


def llama_server(binary: str, gguf: Path, port: int, log: Path, more: list[str]) -> Server:
    """llama.cpp's server with the GGUF file as it is, 16 slots, and more options."""
    cores = str(len(os.sched_getaffinity(0)))
    command = [binary, "-m", str(gguf), "-t", cores, "-tb", cores, "-c", "32768", "-np", "16", "--port", str(port)]
    return Server("llama.cpp", command + more, port, log=log)


def embedded_gguf() -> Path:
    """The embedded model's file."""
    sys.path.insert(0, str(ROOT / "src"))
    from llm_runtime.runtime.models import resolve_model

    return resolve_model(EMBEDDED, ROOT).path


def make_model(directory: Path) -> None:
    """Writes config, weights (bfloat16, safetensors) and tokenizer of the embedded model."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory.mkdir(parents=True, exist_ok=True)
    gguf = embedded_gguf()
    source, name = str(gguf.parent), gguf.name
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.bfloat16)
    weights = {key: value.contiguous() for key, value in model.state_dict().items()}
    config = model.config
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    if hasattr(config, "quantization_config"):  # the weights have been dequantized
        del config.quantization_config
    config.architectures = [type(model).__name__]
    config.save_pretrained(directory)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--make-model", type=Path, metavar="DIR", required=True)
    make_model(parser.parse_args().make_model)


if __name__ == "__main__":
    main()
