"""Compiles the CPU kernels before a node starts: the first start on a machine takes a minute, and says so."""

from __future__ import annotations

from llm_runtime.actors.rank.native import compile_kernels
from llm_runtime.runtime.plan import NodePlan
from llm_runtime.runtime.progress import TellNote


def build_kernels(plan: NodePlan, note: TellNote) -> None:
    """Compiles what the node's CPU engines need, if it is not there. Without a compiler they compute in plain torch."""
    devices: dict[str, str] = {each.name: each.settings.device for each in plan.engines}
    devices |= {each.name: each.settings.device for each in plan.encoders}
    if not any(device == "cpu" and plan.placement.is_here(name) for name, device in devices.items()):
        return
    problem = compile_kernels(lambda done, total: note("compiling the CPU kernels, once", done, total, "files"))
    if problem:
        note(f"the CPU kernels cannot be compiled ({problem}); plain torch is used, which is slower")
