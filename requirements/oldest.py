"""Prints the lower ends of the ranges in pyproject.toml as constraints for pip, for `make test-oldest`."""

import re
import sys
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
for requirement in project["dependencies"]:
    if found := re.match(r"([\w.-]+)>=([\w.]+)", requirement):
        sys.stdout.write(f"{found[1]}=={found[2]}\n")
