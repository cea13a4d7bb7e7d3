"""`runtime check`: is a topology file right?"""

from __future__ import annotations

import argparse

from llm_runtime.runtime.cli.options import add_topology, topology_of
from llm_runtime.runtime.cli.output import complain, say
from llm_runtime.runtime.http_limits import describe_http, http_warnings
from llm_runtime.runtime.models import NotLocal
from llm_runtime.runtime.plan import NodePlan, plan_node
from llm_runtime.runtime.ports import check_ports, listening
from llm_runtime.runtime.resource_check import describe_encoders, describe_engines, describe_needs
from llm_runtime.runtime.tree import actor_names


def configure(parser: argparse.ArgumentParser) -> None:
    add_topology(parser)
    parser.epilog = "example: runtime check topology/smollm2.toml --set engine.main.tp=2"


def run(options: argparse.Namespace) -> int:
    loaded = topology_of(options)
    try:
        plan = plan_node(loaded, download=False)
    except NotLocal as missing:
        say(f"{loaded.file}: the keys are right; {missing}")
        return 0
    check_ports(loaded, plan)
    say(f"{loaded.file}: right")
    if plan.placement.machines:
        _say_nodes(plan)
    else:
        say(f"  node    {plan.name}, {plan.url}")
    for model in plan.models:
        say(f"  model   {model.served_name}, {model.model.path}, requests of up to {model.max_model_len} tokens")
        for line in (
            *describe_engines(model.engines, model.settings.dtype),
            *describe_encoders(model.encoders, model.settings.dtype),
        ):
            say(f"  {line}")
    whole = not plan.placement.machines
    here = plan.engines if whole or plan.placement.here else []
    here = [engine for engine in here if plan.placement.is_here(engine.name)]
    for line in describe_needs(here, plan.encoders if whole else []):
        say(f"  {line}")
    if plan.url:
        say(f"  {describe_http(plan)}")
        for warning in http_warnings(plan):
            complain(f"warning: {warning}")
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
