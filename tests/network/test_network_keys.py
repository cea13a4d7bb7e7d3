"""`runtime keygen`, and files with keys that must not be used."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from llm_runtime.runtime.cli import main
from llm_runtime.runtime.errors import UserError
from llm_runtime.runtime.keys import read_keys, write_keys


def test_keygen_writes_a_private_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["keygen"]) == 0
    file = tmp_path / "transport.keys"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    keys = read_keys(file)
    assert len(keys.public) == len(keys.secret) == 40
    assert keys.secret not in capsys.readouterr().out
    assert keys.secret not in repr(keys)
    assert list(tmp_path.iterdir()) == [file]


def test_keygen_does_not_replace_a_file_unless_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "k"
    assert main(["keygen", str(file)]) == 0
    before = file.read_bytes()
    assert main(["keygen", str(file)]) == 1
    assert "--force" in capsys.readouterr().err
    assert file.read_bytes() == before
    file.chmod(0o644)
    assert main(["keygen", str(file), "--force"]) == 0
    assert file.read_bytes() != before
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [file]


def test_keygen_says_why_it_cannot_write(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["keygen", str(tmp_path / "none" / "k")]) == 1
    assert "cannot be written (No such file or directory)" in capsys.readouterr().err


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o644])
def test_a_file_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    file = tmp_path / "k"
    write_keys(file)
    file.chmod(mode)
    with pytest.raises(UserError, match=r"can be read or written by other users .* run `chmod 600 "):
        read_keys(file)


def test_files_without_keys_are_refused(tmp_path: Path) -> None:
    file, other = tmp_path / "k", tmp_path / "other"
    with pytest.raises(UserError, match=r"there is no file .*; copy it .* or make it with `runtime keygen "):
        read_keys(file)
    with pytest.raises(UserError, match="cannot be read"):
        read_keys(tmp_path)
    write_keys(file)
    write_keys(other)
    mixed = file.read_text().splitlines()[:-1] + other.read_text().splitlines()[-1:]
    for text in ("", "x", 'public = "a"\nsecret = "b"\n', "public = 1\nsecret = 2\n", "\n".join(mixed)):
        file.write_text(text)
        with pytest.raises(UserError, match="does not hold a key pair; make one with `runtime keygen`"):
            read_keys(file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="does not hold a key pair"):
        read_keys(file)
