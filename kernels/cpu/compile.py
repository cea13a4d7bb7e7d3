"""Builds the C++ kernels for this machine's processor, once, into the user's cache.

The library lies in `$XDG_CACHE_HOME/llm-runtime/kernels` (`~/.cache/…`; a private directory in the temporary
directory where that cannot be written). Its name holds the instruction set, a hash of sources and flags, and one of
the compiler, so whatever changes, an old library is never taken for a new one; its last 32 bytes are the SHA-256 of
the rest, so neither is a damaged one.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

SOURCES = (
    "attention.cpp",
    "elementwise.cpp",
    "experts.cpp",
    "graph.cpp",
    "heads.cpp",
    "linear.cpp",
    "mla.cpp",
    "quantize.cpp",
    "quantized.cpp",
    "sampling.cpp",
    "threads.cpp",
)
HEADERS = (
    "amx.h",
    "attention.h",
    "attention_floats.h",
    "attention_pairs.h",
    "attention_tiles.h",
    "bytes.h",
    "linear.h",
    "product.h",
    "quantized.h",
    "quantized_tiles.h",
    "quantized_vectors.h",
    "simd.h",
    "threads.h",
)
# Contraction would fuse different products in different instances of a template: results would depend on the batch.
FLAGS = (
    "-std=c++20",
    "-O3",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-strict-aliasing",
    "-fPIC",
    "-fvisibility=hidden",
    "-pthread",
)
# What each instruction set needs of the processor (names of /proc/cpuinfo), the best first.
INSTRUCTION_SETS = {
    "avx512": ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx2", "fma", "f16c"),
    "avx2": ("avx2", "fma", "f16c"),
}
# The processor whose order of instructions suits most of a set; used where the compiler knows the name.
TUNE = {"avx512": "icelake-server", "avx2": "haswell"}
# Used beside AVX-512 where processor and compiler have all of a group (names of /proc/cpuinfo, and of the compiler).
EXTENSIONS = (
    {"avx512_vnni": "avx512vnni"},
    {"avx512_bf16": "avx512bf16"},
    {"amx_tile": "amx-tile", "amx_bf16": "amx-bf16", "amx_int8": "amx-int8"},
)
COMPILE_SECONDS = 300
POLL_SECONDS = 0.05
DIGEST_BYTES = hashlib.sha256().digest_size


class BuildError(Exception):
    """The kernels cannot be built here; the message says why."""


def instruction_sets() -> list[str]:
    """The instruction sets this processor has, of those the kernels are written for, the best first."""
    flags = processor_flags()
    return [name for name, needed in INSTRUCTION_SETS.items() if flags.issuperset(needed)]


def processor_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split(":")[1].split()) for line in lines if line.startswith("flags")), set())


def build(instruction_set: str | None = None, progress: Callable[[int, int], None] = lambda done, total: None) -> Path:
    """Returns the library's path, building it if need be; processes that ask at the same time build it once.

    instruction_set: one of `instruction_sets()`, the best if None. progress: told how many of how many files are
    compiled, if any must be. Raises BuildError if there is no instruction set, or no compiler and no library, or if the
    compiler fails.
    """
    if instruction_set is None:
        known = instruction_sets()
        if not known:
            raise BuildError("the processor has neither AVX-512 nor AVX2")
        instruction_set = known[0]
    flags = [*FLAGS, *(f"-m{name}" for name in INSTRUCTION_SETS[instruction_set])]
    optional = [f"-mtune={TUNE[instruction_set]}"]
    if instruction_set == "avx512":
        processor = processor_flags()
        groups = [group for group in EXTENSIONS if processor.issuperset(group)]
        optional += [f"-m{name}" for group in groups for name in group.values()]
    here = Path(__file__).parent
    content = hashlib.sha256("\0".join([*flags, *optional]).encode())
    for name in (*SOURCES, *HEADERS):
        content.update(b"\0" + name.encode() + b"\0" + (here / name).read_bytes())
    stem = f"{instruction_set}-{content.hexdigest()[:20]}"
    directory = _cache_directory()
    compiler = _compiler()
    if compiler is None:
        # Built elsewhere or before, by a compiler that is gone.
        for path in sorted(directory.glob(f"{stem}-*.so")):
            if _is_whole(path):
                return path
        raise BuildError("no C++ compiler was found (g++, c++ or clang++, or the one named by CXX)")
    path = directory / f"{stem}-{_identity(compiler)}.so"
    if not _is_whole(path):
        with _locked(directory / "lock"):
            if not _is_whole(path):
                for left in directory.glob("build-*"):  # by a process that was killed: only one builds at a time
                    shutil.rmtree(left, ignore_errors=True)
                try:
                    _compile(compiler, [*flags, *optional], here, path, progress)
                except BuildError:  # an old compiler may not know them
                    _compile(compiler, flags, here, path, progress)
    return path


def _cache_directory() -> Path:
    """The cache directory, made if need be, that nobody else can write to. Raises BuildError if there is none."""
    configured = os.environ.get("XDG_CACHE_HOME")
    base = Path(configured) if configured else Path(os.path.expanduser("~")) / ".cache"
    reasons = []
    parents = [base / "llm-runtime", Path(tempfile.gettempdir()) / f"llm-runtime-{os.getuid()}"]
    for parent in parents if base.is_absolute() else parents[1:]:  # an account may have no home
        directory = parent / "kernels"
        try:
            parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            directory.mkdir(mode=0o700, exist_ok=True)
            status = directory.stat()
            if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise PermissionError("it belongs to or can be written by somebody else")
            if not os.access(directory, os.W_OK | os.X_OK):
                raise PermissionError("it cannot be written")
        except OSError as error:
            reasons.append(f"{directory}: {error}")
        else:
            return directory
    raise BuildError("no private directory for the kernels: " + "; ".join(reasons))


def _compiler() -> str | None:
    wanted = os.environ.get("CXX")
    if wanted:
        return shutil.which(wanted)
    return next((path for name in ("g++", "c++", "clang++") if (path := shutil.which(name))), None)


def _identity(compiler: str) -> str:
    """Changes with the compiler, and costs no start of it."""
    real = os.path.realpath(compiler)
    status = os.stat(real)
    return hashlib.sha256(f"{real} {status.st_size} {status.st_mtime_ns}".encode()).hexdigest()[:12]


def _is_whole(path: Path) -> bool:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return False
    return hashlib.sha256(content[:-DIGEST_BYTES]).digest() == content[-DIGEST_BYTES:]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(compiler: str, flags: list[str], here: Path, path: Path, progress: Callable[[int, int], None]) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as scratch:
        objects = [str(Path(scratch) / f"{name}.o") for name in SOURCES]
        library = Path(scratch) / "kernels.so"
        total = len(SOURCES) + 1
        progress(0, total)
        _run_together(
            [[compiler, *flags, "-c", str(here / name), "-o", to] for name, to in zip(SOURCES, objects, strict=True)],
            lambda done: progress(done, total),
        )
        _run_together([[compiler, *flags, "-shared", *objects, "-o", str(library)]], lambda _: progress(total, total))
        content = library.read_bytes()
        library.write_bytes(content + hashlib.sha256(content).digest())
        os.replace(library, path)


def _run_together(commands: list[list[str]], tell: Callable[[int], None]) -> None:
    """Runs commands side by side and tells how many have ended. Raises BuildError with the errors of the first that
    fails."""
    deadline = time.monotonic() + COMPILE_SECONDS
    with contextlib.ExitStack() as files:
        running: list[tuple[subprocess.Popen[bytes], IO[bytes]]] = []
        try:
            for command in commands:
                output = files.enter_context(tempfile.TemporaryFile())
                process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=output)
                running.append((process, output))
            told = 0
            while told < len(running):
                done = sum(process.poll() is not None for process, _ in running)
                if done > told:
                    tell(told := done)
                elif time.monotonic() > deadline:
                    raise BuildError(f"the compiler took more than {COMPILE_SECONDS} s")
                else:
                    time.sleep(POLL_SECONDS)
            for process, errors in running:
                if process.returncode:
                    raise BuildError(f"{commands[0][0]} failed: {_first_error(errors)}")
        except OSError as error:
            raise BuildError(f"the compiler does not run: {error}") from None
        finally:
            for process, _ in running:
                if process.poll() is None:
                    process.kill()
                    process.wait()


def _first_error(output: IO[bytes]) -> str:
    output.seek(0)
    lines = output.read().decode(errors="replace").splitlines()
    return next((line for line in lines if "error" in line), lines[0] if lines else "no message")
