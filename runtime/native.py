"""Compiles the CPU kernels before a node starts: the first start on a machine takes a minute, and says so."""

from __future__ import annotations

from kernels.cpu import BuildError, build, choice
from runtime.plan import NodePlan
from runtime.progress import TellNote


def build_kernels(plan: NodePlan, note: TellNote) -> None:
    """Compiles what the node's CPU engines need, if it is not there. Without a compiler they compute in plain torch."""
    devices: dict[str, str] = {each.name: each.settings.device for each in plan.engines}
    devices |= {each.name: each.settings.device for each in plan.encoders}
    if not any(device == "cpu" and plan.placement.is_here(name) for name, device in devices.items()):
        return
    try:
        backend = choice()
    except ValueError:
        return  # the rank says what is wrong with the variable
    if backend == "torch":
        return
    try:
        build(backend, lambda done, total: note("compiling the CPU kernels, once", done, total, "files"))
    except BuildError as error:
        note(f"the CPU kernels cannot be compiled ({error}); plain torch is used, which is slower")
