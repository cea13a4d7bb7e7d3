"""Runs clients and frameworks that the development extra does not have, unmodified, against this server.

    python tests/clients/release/run.py                    # all of them, before a release
    python tests/clients/release/run.py agents node        # some of them
    python tests/clients/release/run.py --list

Each group gets an environment of its own below --environments (made once, or again with --fresh), never in the tree. A
group's scripts are `GROUP_*.py` or `GROUP_*.mjs` beside this file. The environment names them a server whose model is
scripted (BASE_URL, MODEL, OPENAI_BASE_URL, OPENAI_API_KEY; `scripted.py`) and a node with the embedded model (NODE_URL,
NODE_MODEL). Exit status 1 if one of them fails.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from llm_runtime.actors.vocabulary import load_vocabulary
from llm_runtime.runtime.models import resolve_model

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
NODE_MODEL = "smollm2-135m-instruct"
LIMIT_S = 300
"""Of one script."""


class Group(NamedTuple):
    """Packages that go together in one environment: of PyPI, or of npm."""

    packages: tuple[str, ...]
    npm: bool = False


GROUPS = {
    "agents": Group(
        (
            *("openai", "openai-agents", "pydantic-ai-slim[openai]", "instructor", "langchain-openai", "langgraph"),
            *("smolagents[openai]", "litellm"),
        )
    ),
    "index": Group(("llama-index-llms-openai-like", "dspy")),
    "inspect": Group(("inspect-ai", "openai")),
    "eval": Group(("lm-eval[api]",)),
    "guidellm": Group(("guidellm",)),
    "aiperf": Group(("aiperf",)),
    "langchain": Group(("langchain-anthropic", "langchain-ollama")),
    "anthropic": Group(("@anthropic-ai/sdk", "zod"), npm=True),
    "ollama": Group(("ollama",), npm=True),
    "node": Group(("openai", "ai", "@ai-sdk/openai", "@ai-sdk/openai-compatible", "zod"), npm=True),
}


def prepare(name: str, base: Path, fresh: bool) -> Path:
    """The directory of a group's environment, made if it is not there."""
    directory, group = base / name, GROUPS[name]
    done = directory / "ok"
    if done.exists() and not fresh:
        return directory
    print(f"{name}: installing {', '.join(group.packages)}", flush=True)
    if group.npm:
        directory.mkdir(parents=True, exist_ok=True)
        run = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(directory), *group.packages]
        subprocess.run(run, check=True, timeout=1200)
    else:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(directory)], check=True, timeout=300)
        pip = [str(directory / "bin/python"), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        subprocess.run([*pip, *group.packages], check=True, timeout=2400)
    done.touch()
    return directory


@contextmanager
def scripted() -> Iterator[str]:
    """URL of a server with the scripted model."""
    with tempfile.TemporaryDirectory(prefix="c-") as directory:
        command = [sys.executable, str(HERE / "scripted.py"), directory]
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}/src:{ROOT / 'tests'}"}
        with subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                yield process.stdout.readline().strip()
            finally:
                process.stdin.close()
                process.wait(30)


@contextmanager
def node() -> Iterator[str]:
    """URL of a node with the embedded model."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    with tempfile.TemporaryDirectory(prefix="n-") as directory:
        environment = {**os.environ, "RUNTIME_DIR": directory, "PYTHONPATH": str(ROOT / "src")}
        environment.pop("RUNTIME_API_KEY", None)
        command = [sys.executable, "-m", "llm_runtime"]
        up = ["up", str(ROOT / "topology/smollm2.toml"), "--port", port, "--detach"]
        subprocess.run([*command, *up], env=environment, check=True, timeout=300)
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            subprocess.run([*command, "down"], env=environment, check=True, timeout=60)


def tokenizer(directory: Path) -> None:
    """Writes the embedded model's tokenizer as tools want it that count tokens themselves."""
    vocabulary = load_vocabulary(resolve_model(NODE_MODEL, Path(), download=False).path)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **vocabulary.special_tokens}
    settings["chat_template"] = vocabulary.chat_templates["default"]
    (directory / "tokenizer.json").write_text(vocabulary.tokenizer.to_str())
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def run(name: str, directory: Path, url: str, node_url: str) -> list[str]:
    """Runs a group's scripts; the names of those that fail."""
    npm, failed = GROUPS[name].npm, []
    own = {"BASE_URL": url, "MODEL": "fake", "OPENAI_BASE_URL": f"{url}/v1", "OPENAI_API_KEY": "none"}
    own |= {"NODE_URL": node_url, "NODE_MODEL": NODE_MODEL, "PATH": f"{directory / 'bin'}:{os.environ['PATH']}"}
    for script in sorted(HERE.glob(f"{name}_*.mjs" if npm else f"{name}_*.py")):
        with tempfile.TemporaryDirectory(prefix="w-") as work:
            if npm:  # packages are looked for beside the script
                (Path(work) / script.name).write_text(script.read_text())
                (Path(work) / "node_modules").symlink_to(directory / "node_modules")
            if "PROCESSOR" in Path(script).read_text():
                tokenizer(Path(work))
            command = ["node", script.name] if npm else [str(directory / "bin/python"), str(script)]
            try:
                code = subprocess.run(command, env={**os.environ, **own}, cwd=work, timeout=LIMIT_S).returncode
            except subprocess.TimeoutExpired:
                code = -1
        print(f"{script.name}: {'ok' if code == 0 else 'FAILED'}", flush=True)
        if code:
            failed.append(script.name)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", metavar="GROUP", help="default: all")
    parser.add_argument("--environments", type=Path, default=Path(tempfile.gettempdir()) / "llm-runtime-clients")
    parser.add_argument("--fresh", action="store_true", help="make the environments again, with today's versions")
    parser.add_argument("--list", action="store_true", help="name the groups and their packages")
    options = parser.parse_args()
    if options.list:
        for name, group in GROUPS.items():
            print(f"{name}: {' '.join(group.packages)}")
        return
    names = options.groups or list(GROUPS)
    for name in names:
        if name not in GROUPS:
            parser.error(f"there is no group {name!r}: choose from {', '.join(GROUPS)}")
    failed: list[str] = []
    with scripted() as url, node() as node_url:
        for name in names:
            failed += run(name, prepare(name, options.environments, options.fresh), url, node_url)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
