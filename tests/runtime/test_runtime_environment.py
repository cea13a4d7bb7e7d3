"""Accounts without a home, closed streams, terminals without UTF-8, directories that are gone."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from llm_runtime.runtime import environment
from llm_runtime.runtime.models import cache_dir

ROOT = Path(__file__).parents[2]
TOPOLOGY = ROOT / "topology/smollm2.toml"


def run(script: str, **settings: str | None) -> subprocess.CompletedProcess[str]:
    """A shell script in which $RUNTIME is the command and $FILE a topology; a setting of None is not set at all."""
    given = {
        "RUNTIME": f"{sys.executable} -m llm_runtime",
        "FILE": str(TOPOLOGY),
        "PYTHONPATH": str(ROOT / "src"),
        **settings,
    }
    values = {**os.environ, **{name: value for name, value in given.items() if value is not None}}
    for name, value in given.items():
        if value is None:
            values.pop(name, None)
    return subprocess.run(["bash", "-c", script], env=values, capture_output=True, text=True, timeout=120, check=False)


def test_a_number_without_a_name_and_a_home():
    command = "unshare --user --map-user=4242"
    if run(f"{command} true").returncode:
        pytest.skip("needs unprivileged user namespaces")
    show = "import getpass, pathlib, os; from llm_runtime.runtime.environment import prepare; prepare();"
    show += "print(os.getuid(), getpass.getuser(), pathlib.Path.home().stat().st_uid)"
    answer = run(
        f"{command} {sys.executable} -c '{show}'", HOME=None, LOGNAME=None, USER=None, LNAME=None, USERNAME=None
    )
    assert answer.stdout.split() == ["4242"] * 3, answer.stderr
    answer = run(f"{command} $RUNTIME check $FILE", HOME=None, LOGNAME=None, USER=None)
    assert answer.returncode == 0, answer.stderr
    assert "engine  main" in answer.stdout


@pytest.mark.parametrize(
    ("script", "settings"),
    [
        ("$RUNTIME check $FILE <&- >&- 2>&-", {}),
        ("$RUNTIME check $FILE", {"HOME": "/proc", "XDG_CACHE_HOME": None}),
        ("$RUNTIME check $FILE", {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii", "TMPDIR": "/nowhere"}),
        ("mkdir $GONE && cd $GONE && rmdir $GONE && $RUNTIME check $FILE", {}),
    ],
    ids=["closed streams", "home that cannot be written", "ascii", "directory gone"],
)
def test_commands_work(script: str, settings: dict[str, str | None], tmp_path: Path):
    answer = run(script, GONE=str(tmp_path / "gone"), **settings)
    assert (answer.returncode, answer.stderr) == (0, "")


def test_what_is_opened_first_does_not_get_the_number_of_a_closed_stream():
    prepare = "import os; from llm_runtime.runtime.environment import prepare; prepare()"
    show = f"{prepare}; assert os.open('/', os.O_RDONLY) > 2"
    answer = run(f'{sys.executable} -c "{show}" <&- >&- 2>&-')
    assert answer.returncode == 0


def test_caches_go_where_they_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "new" / "cache"))
    assert cache_dir() == tmp_path / "new" / "cache" / "llm-runtime"
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/caches")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    private = tmp_path / f"llm-runtime-{os.getuid()}"
    assert cache_dir() == private
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    private.chmod(0o777)  # others may have prepared it
    assert environment.private_directory() is None
