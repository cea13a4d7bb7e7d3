"""`runtime check`: is a topology file right?"""

from __future__ import annotations

import argparse

from runtime.cli.options import add_topology, topology_of
from runtime.cli.output import say
from runtime.models import NotLocal
from runtime.plan import plan_node


def configure(parser: argparse.ArgumentParser) -> None:
    add_topology(parser)
    parser.epilog = "example: runtime check topology/smollm2.toml --set engine.main.tp=2"


def run(options: argparse.Namespace) -> int:
    try:
        plan = plan_node(topology_of(options), download=False)
    except NotLocal as missing:
        say(f"{options.file}: the keys are right; {missing}")
        return 0
    say(f"{options.file}: right")
    say(f"  node    {plan.name}, {plan.url}")
    say(f"  model   {plan.served_name}, {plan.model.path}, requests of up to {plan.max_model_len} tokens")
    chosen = " (auto)" if plan.topology.model.dtype == "auto" else ""
    for engine in plan.engines:
        weights, kv = sum(engine.weight_bytes) / 2**20, sum(engine.kv_bytes) / 2**20
        say(
            f"  engine  {engine.name}: {engine.settings.tp} rank(s) on {engine.settings.device}, "
            f"{engine.dtype}{chosen} weights {weights:,.0f} MiB, "
            f"{engine.kv_dtype} KV {kv:,.0f} MiB in {engine.num_pages} pages of {engine.settings.page_size}"
        )
    return 0
