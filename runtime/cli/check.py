"""`runtime check`: is a topology file right?"""

from __future__ import annotations

import argparse

from runtime.cli.options import add_topology, topology_of
from runtime.cli.output import say
from runtime.models import NotLocal
from runtime.plan import NodePlan, plan_node
from runtime.ports import check_ports, listening
from runtime.tree import actor_names


def configure(parser: argparse.ArgumentParser) -> None:
    add_topology(parser)
    parser.epilog = "example: runtime check topology/smollm2.toml --set engine.main.tp=2"


def run(options: argparse.Namespace) -> int:
    loaded = topology_of(options)
    try:
        plan = plan_node(loaded, download=False)
    except NotLocal as missing:
        say(f"{options.file}: the keys are right; {missing}")
        return 0
    check_ports(loaded, plan)
    say(f"{options.file}: right")
    if plan.placement.machines:
        _say_nodes(plan)
    else:
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


def _say_nodes(plan: NodePlan) -> None:
    """Which actors live where, and on which ports those listen that hear from other nodes."""
    placement, ports = plan.placement, listening(plan)
    for node, machine in placement.machines.items():
        url = f", {plan.url}" if node == placement.ingress else ""
        say(f"  node    {node} at {machine.address}{url}")
        for actor in actor_names(plan):
            if placement.node_of(actor) == node:
                say(f"            {actor:<20}" + (f" port {ports[actor]}" if actor in ports else ""))
