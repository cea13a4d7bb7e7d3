"""`runtime up`: start a node, in the foreground or detached."""

from __future__ import annotations

import argparse
import http.client
import os
import signal
import sys
import time
import urllib.parse
from pathlib import Path
from typing import NoReturn

from llm_runtime.runtime.cli.options import add_topology, topology_of
from llm_runtime.runtime.cli.output import complain
from llm_runtime.runtime.control import NodeReport, Status, ask
from llm_runtime.runtime.display import Display
from llm_runtime.runtime.errors import UserError
from llm_runtime.runtime.http_limits import http_warnings
from llm_runtime.runtime.native import build_kernels
from llm_runtime.runtime.node import run_node
from llm_runtime.runtime.placement import node_to_start
from llm_runtime.runtime.plan import NodePlan, plan_node
from llm_runtime.runtime.ports import check_machine, check_ports
from llm_runtime.runtime.progress import Ready, Stopped, notes_to, pipe_writer, read_progress
from llm_runtime.runtime.rundir import base_directory, is_running
from llm_runtime.runtime.topology import LoadedTopology

_PATIENCE_S = 30.0


def configure(parser: argparse.ArgumentParser) -> None:
    add_topology(parser)
    parser.add_argument("--node", metavar="NAME", help="start the part of [node.NAME]; needed where there are several")
    add_detach(parser)
    parser.epilog = (
        "examples:\n"
        "  runtime up topology/smollm2.toml\n"
        "  runtime up topology/smollm2.toml --port 8123 --set engine.main.kv_tokens=65536 --detach\n"
        "  runtime up pair.toml --node a"
    )


def add_detach(parser: argparse.ArgumentParser) -> None:
    """--detach."""
    parser.add_argument(
        "--detach", action="store_true", help="return once the server answers and leave it running in the background"
    )


def run(options: argparse.Namespace) -> int:
    loaded = topology_of(options)
    return start(loaded, node_to_start(loaded.topology, options.node), options.detach)


def start(loaded: LoadedTopology, node: str | None, detach: bool) -> int:
    """Starts a node, in the foreground until it ends; the exit status. Raises UserError."""
    display = Display()
    try:
        plan = plan_node(loaded, note=notes_to(display.show), node=node)
        check_ports(loaded, plan)
        if not is_running(base_directory() / plan.name):
            check_machine(loaded, plan)
            for warning in http_warnings(plan) if plan.url else ():
                complain(f"warning: {warning}")
            build_kernels(plan, notes_to(display.show))
    except BaseException:
        display.close()
        raise
    return _detach(plan, display) if detach else run_node(plan, display.show)


def _detach(plan: NodePlan, display: Display) -> int:
    """Starts the node in a session of its own and waits until the server answers or the node has ended."""
    read, write = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        _become_root(plan, write)
    os.close(write)
    try:
        with open(read, "rb") as pipe:
            for progress in read_progress(pipe):
                display.show(progress)
                if isinstance(progress, Stopped):
                    return 1
                if isinstance(progress, Ready):
                    _wait_until_it_answers(plan, pid)
                    return 0
        raise UserError("the node ended without a word while it was starting")
    except (UserError, KeyboardInterrupt):
        _stop(pid)
        raise


def _stop(pid: int) -> None:
    """Stops the node that did not come up, unless it has ended already."""
    try:
        os.kill(pid, signal.SIGTERM)
        os.waitpid(pid, 0)
    except (ProcessLookupError, ChildProcessError):
        pass


def _become_root(plan: NodePlan, write: int) -> NoReturn:
    status = 1
    tell = pipe_writer(write)
    try:
        os.setsid()
        status = run_node(plan, tell, detached=True)
    except UserError as error:
        tell(Stopped(str(error)))
    finally:
        os._exit(status)


def _wait_until_it_answers(plan: NodePlan, pid: int) -> None:
    """Returns when all processes run and, if the ingress is here, GET /health is answered with 200. Raises UserError if
    that does not come."""
    deadline = time.monotonic() + _PATIENCE_S
    while problem := (plan.url and _health_problem(plan.url)) or _state_problem(base_directory() / plan.name):
        if os.waitpid(pid, os.WNOHANG) != (0, 0):
            raise UserError("the node ended just after it had started; see `runtime logs`")
        if time.monotonic() > deadline:
            raise UserError(f"the node has started, but {problem}; see `runtime logs`")
        time.sleep(0.02)


def _health_problem(url: str) -> str:
    """What is wrong with the answer to GET /health; empty if nothing is."""
    address = urllib.parse.urlsplit(url)
    assert address.hostname is not None
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=5)
    try:
        connection.request("GET", "/health")
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        return f"{url}/health does not answer ({error or type(error).__name__})"
    finally:
        connection.close()
    return "" if status == 200 else f"{url}/health answers with status {status}"


def _state_problem(run_dir: Path) -> str:
    report = ask(run_dir, Status())
    return "" if isinstance(report, NodeReport) and report.state == "running" else "not all of its processes run"
