"""A node whose run directory is full, or is cleaned by somebody else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest
from support import DEADLINE_S, ROOT, Node, eventually, require_model

from llm_runtime.runtime.chaos.inject import node_report

ACTORS = ("main.rank0", "main.scheduler", "tokenizer", "detokenizer", "bootstrap", "ingress0")
QUESTION = {"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """Its run directory is on a file system of its own of 4 MiB, where tests may mount one."""
    require_model()
    base = tmp_path_factory.mktemp("r")
    mounted = (
        os.getuid() == 0
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=4m,mode=700", "tmpfs", base], capture_output=True
        ).returncode
    )
    node = Node(base, "engine.main.kv_tokens=2048")
    node.mounted = mounted  # type: ignore[attr-defined]
    try:
        yield node.up()
    finally:
        node.close()
        if mounted:
            subprocess.run(["umount", "-l", base], check=True)


def answer(node: Node) -> str:
    status, _, body = node.ask("/v1/completions", QUESTION)
    assert status == 200, body
    return str(body["choices"][0]["text"])


def kill(node: Node, *names: str) -> None:
    """Kills actors at once, and waits until all are there again."""
    before = {name: node.incarnation(name) for name in names}
    for name in names:
        node.kill(name)
    eventually(
        lambda: all(node.incarnation(name) > before[name] for name in names) and node.running(), f"restarts of {names}"
    )


def test_a_full_run_directory(node: Node) -> None:
    if not node.mounted:  # type: ignore[attr-defined]
        pytest.skip("needs root, to mount a small file system")
    right = answer(node)
    filler = node.run_dir.parent / "filler"
    with pytest.raises(OSError, match="No space left"):
        filler.write_bytes(bytes(8 * 2**20))
    kill(node, *ACTORS)
    assert answer(node) == right
    root = node_report(node.run_dir).tree
    assert root.stats["unwritten_reports"] >= 3
    filler.unlink()
    kill(node, "detokenizer")
    assert (node.run_dir / "crashes" / "detokenizer.json").exists()


@pytest.mark.parametrize("how", ["files", "node", "base"])
def test_a_cleaned_run_directory(node: Node, how: str) -> None:
    right = answer(node)
    if how == "files":
        for path in [*node.run_dir.glob("sockets/*"), *node.run_dir.iterdir()]:
            if not path.is_dir():
                path.unlink()
    elif how == "node":
        shutil.rmtree(node.run_dir, ignore_errors=True)  # it comes back meanwhile
    else:
        for path in node.run_dir.parent.iterdir():
            shutil.rmtree(path, ignore_errors=True)
    eventually(lambda: (node.run_dir / "status").exists() and node.running(), "the sockets of the root")
    again = subprocess.run(
        [sys.executable, "-m", "llm_runtime", "up", "topology/smollm2.toml", "--set", "node.name=n", "--port", "1"],
        cwd=ROOT, env=node.environment, capture_output=True, text=True, timeout=DEADLINE_S,
    )  # fmt: skip
    assert "the node n is running already" in again.stderr
    assert "stop it with `runtime down --node n`" in again.stderr
    assert "n: running" in node.run("status")
    eventually(lambda: all((node.run_dir / "sockets" / name).exists() for name in ACTORS), "the sockets of the actors")
    assert answer(node) == right
    kill(node, *ACTORS)
    assert answer(node) == right
