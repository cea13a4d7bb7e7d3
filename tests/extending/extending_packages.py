"""Packages outside of the tree, as pip would install them, and the recipes of docs/extending.md as such packages."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/extending.md"


class Recipe(NamedTuple):
    """A section of the page.

    Attributes:
        module, code: the file. project: its pyproject.toml. topology: the keys that choose it, as `--set` arguments.
    """

    module: str
    code: str
    project: dict[str, Any]
    topology: list[str]


def recipe(title: str) -> Recipe:
    """The section of this title."""
    section = PAGE.read_text().split(f"\n## {title}\n")[1].partition("\n## ")[0]
    (module,) = re.findall(r"^`(\w+)\.py`$", section, re.MULTILINE)
    (code,) = re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    project, *topology = map(tomllib.loads, re.findall(r"^```toml\n(.*?)^```$", section, re.MULTILINE | re.DOTALL))
    return Recipe(module, code, project["project"], [each for table in topology for each in _settings(table)])


def install(directory: Path, module: str, code: str, group: str, **points: str) -> None:
    """Puts a package into a directory that is on the path: its module, and metadata with its entry points."""
    (directory / f"{module}.py").write_text(code)
    metadata = directory / f"{module}-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1\n")
    lines = [f"[{group}]", *(f"{name} = {value}" for name, value in points.items())]
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")


def install_recipe(directory: Path, title: str) -> list[str]:
    """Installs a recipe; returns its `--set` arguments."""
    found = recipe(title)
    ((group, points),) = found.project["entry-points"].items()
    install(directory, found.module, found.code, group, **points)
    return found.topology


def _settings(table: dict[str, Any], prefix: str = "") -> list[str]:
    """The keys of a topology as arguments."""
    settings: list[str] = []
    for key, value in table.items():
        settings += _settings(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}={value}"]
    return settings
