"""The arrows of the house: imports point down only."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAME = "llm_runtime"
PACKAGES = ("transport", "kernels", "supervisors", "actors", "runtime")
MAY_IMPORT = {
    "transport": set(),
    "kernels": set(),
    "supervisors": set(),
    "actors": {"transport", "kernels"},
    "runtime": {"supervisors", "actors", "transport"},
}
NEVER = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"}
NEVER_CALLED = {"eval", "exec", "torch.load", "numpy.load", "np.load"}


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(tree: ast.AST, package: tuple[str, ...]) -> Iterator[str]:
    """Names of the modules that a file imports anywhere, relative imports resolved, ours as from the top folders."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            names = [".".join([*base, *([node.module] if node.module else [])])]
            if names == [NAME]:
                names = [f"{NAME}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name.removeprefix(f"{NAME}.") for name in names)


def called(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_down_only(package: str) -> None:
    files = modules(package)
    assert files
    wrong = [
        f"{file.relative_to(ROOT)} imports {name}"
        for file in files
        for name in imported(ast.parse(file.read_text()), file.relative_to(ROOT).parent.parts)
        if (top := name.partition(".")[0]) in PACKAGES and top != package and top not in MAY_IMPORT[package]
    ]
    assert wrong == []


@pytest.mark.parametrize("package", PACKAGES)
def test_nothing_that_runs_what_it_reads(package: str) -> None:
    wrong = []
    for file in modules(package):
        tree = ast.parse(file.read_text())
        names = {name.partition(".")[0] for name in imported(tree, file.relative_to(ROOT).parent.parts)}
        wrong += [
            f"{file.relative_to(ROOT)} uses {name}" for name in (names & NEVER) | (set(called(tree)) & NEVER_CALLED)
        ]
    assert wrong == []


def test_the_arrows_would_be_found() -> None:
    source = "from llm_runtime.actors.rank import Rank\nfrom .. import wire\nimport llm_runtime.kernels.cpu as k\n"
    source += "from llm_runtime import runtime\neval('1')\n"
    tree = ast.parse(source)
    assert set(imported(tree, ("supervisors", "inner"))) == {"actors.rank", "supervisors", "kernels.cpu", "runtime"}
    assert set(called(tree)) == {"eval"}


def test_kernels_stands_beside_transformers() -> None:
    """`transformers` probes for a package of the name `kernels`, which ours is not."""
    code = (
        "import llm_runtime.kernels, transformers, transformers.integrations; print(transformers.AutoConfig.__name__)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert ran.stdout.strip() == "AutoConfig", ran.stderr


def test_looking_at_a_node_needs_no_torch() -> None:
    """`runtime status` and its like start in a fraction of a second."""
    code = "import sys; from llm_runtime.runtime.cli import status, check, logs; print('torch' in sys.modules)"
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.stdout.strip() == "False", ran.stderr
