"""The topology files that come with the runtime: in a checkout its folder `topology`, else where pip has put them."""

from __future__ import annotations

import importlib.metadata
from functools import cache
from pathlib import Path

_DISTRIBUTION = "llm-runtime"
_FOLDER = "share/llm-runtime/topology"


@cache
def topologies() -> dict[str, Path]:
    """Each topology's file by its name, such as "smollm2"."""
    here = Path(__file__)
    # Of a checkout, and of `pip install --target`.
    folders = [here.resolve().parents[1] / "topology", here.parents[2] / _FOLDER]
    files = [file for folder in folders for file in folder.glob("*.toml")]
    if not files:
        try:
            recorded = importlib.metadata.files(_DISTRIBUTION) or []
        except importlib.metadata.PackageNotFoundError:
            recorded = []
        files = [Path(str(each.locate())) for each in recorded if _FOLDER in each.as_posix() and each.suffix == ".toml"]
    return {file.stem: file.resolve() for file in sorted(files)}


def find_topology(file: Path) -> Path:
    """The file itself if it exists; else the one with that name that comes with the runtime, if there is one, for
    "smollm2", "smollm2.toml" and "topology/smollm2.toml"."""
    if file.exists() or file.parent not in (Path(), Path("topology")):
        return file
    return topologies().get(file.name.removesuffix(".toml"), file)
