"""Mutation testing of supervisors/, transport/ and actors/scheduler/: which small faults do the tests not see?

Cosmic Ray finds the places and makes the mutants. This program runs a seeded sample of them, each against the fast
tests of its package, in a copy of the tree and a process namespace of its own: no process of a mutant is left over, and
none outside can be killed by it. It prints the survivors and how many were killed. `make mutants` runs it; it needs the
program `unshare` of util-linux.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import os
import queue
import random
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator

ROOT = Path(__file__).resolve().parents[1]
FAST_S = 2.5
"""Tests that take longer are left out."""
STUCK_S = 30.0
"""A mutant whose tests take this much longer than without it is killed: it has made something wait for ever."""

# Boundaries and opposites. Not of interest: `==` made `is`, and what fails wherever it is run, such as `None < 1`.
BINARY = (
    "Add_Sub Sub_Add Mul_Add Div_Mul FloorDiv_Mul Mod_FloorDiv LShift_RShift RShift_LShift BitOr_BitAnd BitAnd_BitOr"
)
COMPARISON = "Eq_NotEq NotEq_Eq Is_IsNot IsNot_Is Lt_LtE Lt_GtE LtE_Lt LtE_Gt Gt_GtE Gt_LtE GtE_Gt GtE_Lt"
UNARY = "USub_UAdd Delete_USub Delete_Not"
OPERATORS = (
    *(f"ReplaceBinaryOperator_{name}" for name in BINARY.split()),
    *(f"ReplaceComparisonOperator_{name}" for name in COMPARISON.split()),
    *(f"ReplaceUnaryOperator_{name}" for name in UNARY.split()),
    *("AddNot", "ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "ReplaceAndWithOr", "ReplaceOrWithAnd"),
    *("ReplaceBreakWithContinue", "ReplaceContinueWithBreak", "ExceptionReplacer", "NumberReplacer"),
    "ZeroIterationForLoop",
)

Span = tuple[tuple[int, int], tuple[int, int]]
"""Where a piece of source begins and ends: line from 1, column from 0."""


@dataclass
class Suite:
    """A package and its tests."""

    name: str
    modules: tuple[Path, ...]
    tests: tuple[Path, ...]
    choose: str = ""
    """pytest's -k."""
    slow: list[str] = field(default_factory=list)
    baseline_s: float = 0.0


@dataclass(frozen=True)
class Mutant:
    suite: Suite
    module: Path
    line: int
    operator: str
    occurrence: int


def suites() -> list[Suite]:
    def files(folder: str, *but: str, pattern: str = "*.py") -> tuple[Path, ...]:
        found = sorted(each.relative_to(ROOT) for each in (ROOT / folder).glob(pattern))
        return tuple(each for each in found if each.name not in but)

    def tests(folder: str, pattern: str = "test_*.py") -> tuple[Path, ...]:
        return files(f"tests/{folder}", pattern=pattern)

    mailboxes = (*tests("transport"), *tests("network", "test_network_mailbox.py"))
    engines = tests("transfer", "test_transfer_engines.py")
    return [
        Suite("supervisors", files("supervisors"), tests("supervisors")),
        Suite("transport", files("transport"), mailboxes),
        # Mooncake's and NIXL's libraries need not be installed.
        Suite("transport/transfer", files("transport/transfer", "mooncake.py", "nixl.py"), engines, "shm or tcp"),
        Suite("actors/scheduler", files("actors/scheduler"), tests("scheduler")),
    ]


# -- mutants -------------------------------------------------------------------------------------------------------


def left_out(source: str) -> list[Span]:
    """Pieces whose mutants say nothing: annotations, and constants of a module, most of which are times and sizes."""
    tree = ast.parse(source)
    nodes: list[ast.expr | ast.stmt] = [node for node in tree.body if isinstance(node, ast.Assign)]
    for node in ast.walk(tree):
        if isinstance(node, ast.AnnAssign | ast.arg):
            nodes += [node.annotation] if node.annotation is not None else []
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.returns is not None:
            nodes.append(node.returns)
    return [((n.lineno, n.col_offset), (n.end_lineno or 0, n.end_col_offset or 0)) for n in nodes]


def mutants_of(suite: Suite, module: Path, draw: random.Random) -> list[Mutant]:
    """One mutant of every place that can be mutated."""
    source = (ROOT / module).read_text()
    parsed, without = get_ast(source), left_out(source)
    found: dict[Span, list[Mutant]] = {}
    for name in OPERATORS:
        operator = get_operator(f"core/{name}")()
        occurrence = 0
        for node in ast_nodes(parsed):
            for span in operator.mutation_positions(node):
                if not any(start <= span[0] and span[1] <= end for start, end in without):
                    found.setdefault(span, []).append(Mutant(suite, module, span[0][0], name, occurrence))
                occurrence += 1
    return [draw.choice(each) for _, each in sorted(found.items())]


def sample(count: int, seed: int, every: list[Suite]) -> tuple[list[Mutant], int]:
    """The mutants to run, and of how many they are."""
    draw = random.Random(seed)
    found = [mutant for suite in every for module in suite.modules for mutant in mutants_of(suite, module, draw)]
    return draw.sample(found, min(count, len(found))), len(found)


# -- running them --------------------------------------------------------------------------------------------------


def copy_of_tree(directory: Path) -> Path:
    """A copy without byte code: what is mutated twice within a second would be taken for unchanged."""
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    for name in names:
        if name and os.path.lexists(ROOT / name):
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, directory / name, follow_symlinks=False)
    return directory


def run_tests(
    python: Path, tree: Path, suite: Suite, limit_s: float, module: Path | None = None, *more: str
) -> int | None:
    """pytest's exit status; None if it took longer. Tests that name the module come first."""
    dotted = "" if module is None else ".".join(module.with_suffix("").parts)
    tests = sorted(suite.tests, key=lambda file: dotted not in (tree / file).read_text())
    base = tempfile.mkdtemp(prefix="m-", dir="/tmp")  # short, for the names of sockets
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    command = ["unshare", *user, "--pid", "--fork", "--mount-proc", "--kill-child"]
    command += ["sh", "-c", '"$@"; exit $?', "sh"]  # the namespace's first process reaps what is left behind
    command += [str(python), "-m", "pytest", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", f"--basetemp={base}/t"]
    command += ["--timeout=60", *(["-k", suite.choose] if suite.choose else [])]
    command += [f"--deselect={name}" for name in suite.slow]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(tree / "src")}
    environment.pop("CI", None)
    try:
        ran = subprocess.run(
            [*command, *more, *map(str, tests)],
            cwd=tree,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=limit_s,
        )
    except subprocess.TimeoutExpired:
        return None
    finally:
        shutil.rmtree(base, ignore_errors=True)
    return ran.returncode


def measure(python: Path, tree: Path, suite: Suite) -> None:
    """Runs a package's tests without a mutant: they must pass, and fail when the package cannot be imported."""
    report = tree / "report.xml"
    if run_tests(python, tree, suite, 600, None, f"--junitxml={report}"):
        raise SystemExit(f"the tests of {suite.name} fail without a mutant")
    for case in ET.parse(report).iter("testcase"):
        name = "{}.py::{}".format(str(case.get("classname")).replace(".", "/"), case.get("name"))
        if float(case.get("time", 0)) > FAST_S:
            suite.slow.append(name)
        else:
            suite.baseline_s += float(case.get("time", 0))
    for module in suite.modules:
        if module.name == "__init__.py":
            source = (tree / module).read_text()
            (tree / module).write_text(f"{source}\nraise ImportError\n")
            if run_tests(python, tree, suite, 600) == 0:
                raise SystemExit(f"the tests of {suite.name} do not use the copy of the tree that is mutated")
            (tree / module).write_text(source)


def survives(python: Path, tree: Path, mutant: Mutant) -> tuple[str, str]:
    """What became of a mutant ("killed", "stuck", "survived"), and its difference from the source."""
    source = (tree / mutant.module).read_text()
    mutated = mutate_code(source, get_operator(f"core/{mutant.operator}")(), mutant.occurrence)
    lines = difflib.unified_diff(source.splitlines(), mutated.splitlines(), lineterm="", n=0)
    changed = "\n".join(line for line in lines if line[:2] not in ("--", "++", "@@"))
    (tree / mutant.module).write_text(mutated)
    try:
        status = run_tests(python, tree, mutant.suite, 2 * mutant.suite.baseline_s + STUCK_S, mutant.module)
    finally:
        (tree / mutant.module).write_text(source)
    return ("stuck" if status is None else "killed" if status else "survived"), changed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", type=Path, required=True, help="the interpreter that runs the tests")
    parser.add_argument("--sample", type=int, default=200, help="how many mutants (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="which ones (%(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="how many at a time (%(default)s)")
    parser.add_argument("--minutes", type=float, default=19, help="no mutant begins later than this (%(default)s)")
    parser.add_argument("--only", default="", help="packages whose name has this in it")
    arguments = parser.parse_args()
    if shutil.which("unshare") is None:
        raise SystemExit("this needs the program unshare: install util-linux")
    python = arguments.python.absolute()  # not resolved: it would leave its virtual environment
    end = time.monotonic() + 60 * arguments.minutes
    every = [suite for suite in suites() if arguments.only in suite.name]
    chosen, total = sample(arguments.sample, arguments.seed, every)
    outcomes: dict[str, Counter[str]] = {suite.name: Counter() for suite in every}
    with tempfile.TemporaryDirectory(prefix="mutants-") as directory, ThreadPoolExecutor(arguments.workers) as pool:
        trees: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for number in range(arguments.workers):
            trees.put(copy_of_tree(Path(directory) / str(number)))

        def baseline(suite: Suite) -> None:
            tree = trees.get()
            measure(python, tree, suite)
            trees.put(tree)

        def one(mutant: Mutant) -> None:
            if time.monotonic() > end:
                outcomes[mutant.suite.name]["not run"] += 1
                return
            tree = trees.get()
            outcome, changed = survives(python, tree, mutant)
            trees.put(tree)
            outcomes[mutant.suite.name][outcome] += 1
            if outcome == "survived":
                print(f"{mutant.module}:{mutant.line}\n{changed}", flush=True)

        list(pool.map(baseline, every))
        list(pool.map(one, chosen))
    print(f"\n{len(chosen)} of {total} mutants, seed {arguments.seed}")
    print(f"{'package':20}{'killed':>8}{'stuck':>8}{'survived':>10}{'not run':>9}")
    for name, counts in outcomes.items():
        print(f"{name:20}" + "".join(f"{counts[key]:{width}}" for key, width in WIDTHS.items()))
    done = sum((counts for counts in outcomes.values()), Counter())
    caught = done["killed"] + done["stuck"]
    print(f"{caught} of {caught + done['survived']} killed: {caught / max(1, caught + done['survived']):.0%}")


WIDTHS = {"killed": 8, "stuck": 8, "survived": 10, "not run": 9}

if __name__ == "__main__":
    sys.exit(main())
