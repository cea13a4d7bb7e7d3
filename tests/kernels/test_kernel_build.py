"""Building, caching and choosing the C++ library, in processes of their own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llm_runtime import kernels
from llm_runtime.kernels import cpu
from llm_runtime.kernels.cpu import compile

ROOT = Path(kernels.__file__).parent.parent
USE = """
import torch, kernels
out, _ = kernels.rms_norm(torch.ones(2, 40), torch.ones(40), 0.0)
assert torch.equal(out, torch.ones(2, 40))
print(kernels.backend())
"""

pytestmark = pytest.mark.skipif(not cpu.instruction_sets(), reason="the kernels are not written for this processor")


def start(cache: Path, code: str = USE, **variables: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(ROOT / "src"), **variables}
    environment.pop("LLM_RUNTIME_KERNELS", None)
    environment.update({name: value for name, value in variables.items() if name == "LLM_RUNTIME_KERNELS"})
    return subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return out.strip(), errors


def libraries(cache: Path) -> list[Path]:
    return sorted((cache / "llm-runtime" / "kernels").glob("*.so"))


# Notes its calls. Compiles one file, and that once, which is long enough for others to come in between. The library
# that it links is the one that the other tests of the kernels use, all of which was compiled.
COMPILER = """#!/bin/sh
echo "$@" >> {directory}/calls
for argument; do [ "$previous" = -o ] && output=$argument; previous=$argument; done
case " $* " in
*" -shared "*) exec cp {directory}/linked.so "$output";;
*/sampling.cpp*) [ -e {directory}/compiled ] || {{ touch {directory}/compiled; exec {compiler} "$@"; }};;
esac
exec touch "$output"
"""


OLD_COMPILER = """#!/bin/sh
case " $* " in *" {option}"*) echo "error: {option} is not known" >&2; exit 1;; esac
case " $* " in *" -shared "*) made={library};; *) made=/dev/null;; esac
for argument; do [ "$previous" = -o ] && output=$argument; previous=$argument; done
exec cp $made "$output"
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that two processes have built at the same time."""
    cache = tmp_path_factory.mktemp("cache")
    real = next(path for name in ("g++", "c++", "clang++") if (path := shutil.which(name)))
    compiler = cache / "compiler"
    compiler.write_text(COMPILER.format(directory=cache, compiler=real))
    compiler.chmod(0o755)
    (cache / "linked.so").write_bytes(compile.build().read_bytes()[: -compile.DIGEST_BYTES])
    processes = [start(cache, CXX=str(compiler)) for _ in range(2)]
    best = cpu.instruction_sets()[0]
    assert [finish(process)[0] for process in processes] == [best, best]
    return cache


def test_two_processes_build_once(built: Path) -> None:
    calls = (built / "calls").read_text().splitlines()
    assert len([call for call in calls if " -shared " in f" {call} "]) == 1
    assert len([call for call in calls if " -c " in f" {call} "]) == len(compile.SOURCES)
    assert (built / "compiled").exists()
    (library,) = libraries(built)
    directory = library.parent
    assert directory.stat().st_mode & 0o777 == 0o700
    assert sorted(path.name for path in directory.iterdir()) == sorted([library.name, "lock"])


def test_damaged_library_is_built_again(built: Path) -> None:
    (library,) = libraries(built)
    whole = library.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:5000] + bytes(1000) + whole[6000:], b""):
        library.write_bytes(damaged)
        assert finish(start(built, CXX=str(built / "compiler")))[0] == cpu.instruction_sets()[0]
        assert library.read_bytes() == whole


def test_library_without_a_compiler(built: Path, tmp_path: Path) -> None:
    """A library built before, or copied into an image, is used; without one there is one warning and torch."""
    nowhere = str(tmp_path)
    out, errors = finish(start(built, PATH=nowhere))
    assert out in cpu.instruction_sets()
    assert "Warning" not in errors
    out, errors = finish(start(tmp_path / "empty", USE * 2, PATH=nowhere))
    assert out.split() == ["torch", "torch"]
    assert errors.count("no C++ compiler was found") == 1


def test_failing_compiler(tmp_path: Path) -> None:
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\necho 'fatal error: out of luck' >&2\nexit 1\n")
    compiler.chmod(0o755)
    out, errors = finish(start(tmp_path, CXX=str(compiler)))
    assert out == "torch"
    assert errors.count("out of luck") == 1
    assert not libraries(tmp_path)


@pytest.mark.parametrize("option", ["-mtune=", "-mavx512vnni"])
def test_compiler_that_does_not_know_an_option(built: Path, tmp_path: Path, option: str) -> None:
    """What only makes the kernels faster is left out then."""
    if option == "-mavx512vnni" and "avx512_vnni" not in compile.processor_flags():
        pytest.skip("this processor has no products of bytes")
    compiler = tmp_path / "old"
    compiler.write_text(OLD_COMPILER.format(option=option, library=built / "linked.so"))
    compiler.chmod(0o755)
    out, errors = finish(start(tmp_path, CXX=str(compiler)))
    assert out == cpu.instruction_sets()[0]
    assert "Warning" not in errors
    assert len(libraries(tmp_path)) == 1


def test_directory_of_others_is_not_used(tmp_path: Path) -> None:
    directory = tmp_path / "llm-runtime" / "kernels"
    directory.mkdir(parents=True)
    directory.chmod(0o777)
    elsewhere = tmp_path / "temporary"
    elsewhere.mkdir()
    finish(start(tmp_path, TMPDIR=str(elsewhere), LLM_RUNTIME_KERNELS="torch"))
    code = "from llm_runtime.kernels.cpu.compile import _cache_directory; print(_cache_directory())"
    out, _ = finish(start(tmp_path, code, TMPDIR=str(elsewhere)))
    assert Path(out).parent.parent == elsewhere


@pytest.mark.parametrize("name", ["torch", *cpu.INSTRUCTION_SETS])
def test_environment_chooses(name: str) -> None:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    process = start(cache, "import kernels; print(kernels.backend())", LLM_RUNTIME_KERNELS=name)
    if name == "torch" or name in cpu.instruction_sets():
        assert finish(process)[0] == name
    else:
        _, errors = process.communicate(timeout=60)
        assert "this processor has no such instructions" in errors


def test_environment_is_checked(tmp_path: Path) -> None:
    process = start(tmp_path, LLM_RUNTIME_KERNELS="avx1024")
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "ValueError: LLM_RUNTIME_KERNELS is 'avx1024': use one of torch, avx2, avx512" in errors
