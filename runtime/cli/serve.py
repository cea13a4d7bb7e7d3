"""`runtime serve`: serve a model without a topology file."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from llm_runtime.runtime.cli.options import add_settings, topology_of
from llm_runtime.runtime.cli.up import add_detach, start
from llm_runtime.runtime.errors import UserError
from llm_runtime.runtime.models import EMBEDDED, MINILM
from llm_runtime.runtime.placement import node_to_start
from llm_runtime.runtime.topology import TopologyError

_TOPOLOGIES = {EMBEDDED: "smollm2", MINILM: "minilm"}
"""Models with a topology of their own. `serve` is that of all others."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        default=EMBEDDED,
        help=f"a name of `runtime models`, a directory, a GGUF file or a Hugging Face id; by default {EMBEDDED}",
    )
    add_settings(parser)
    add_detach(parser)
    parser.epilog = (
        "examples:\n"
        "  runtime serve\n"
        "  runtime serve Qwen/Qwen3-0.6B --port 8123 --set model.dtype=int8\n"
        "  runtime serve /models/Qwen3-0.6B --set engine.main.device=cuda --set engine.main.tp=2 --detach\n"
        "Any key of docs/topology.md can be set. Several models, engines or machines: `runtime up FILE`."
    )


def run(options: argparse.Namespace) -> int:
    file = Path(_TOPOLOGIES.get(options.model, "serve"))
    setting = f"model.path={json.dumps(options.model)}"
    try:
        loaded = topology_of(options, file, [setting])
        return start(loaded, node_to_start(loaded.topology, None), options.detach)
    except TopologyError as error:  # the user has said MODEL, not --set
        raise UserError(str(error).removeprefix(f"--set {setting}: model.path: ")) from None
