"""`runtime up`: start a node, in the foreground or detached."""

from __future__ import annotations

import argparse
import http.client
import os
import sys
import time
import urllib.parse
from typing import NoReturn

from runtime.cli.options import add_topology, topology_of
from runtime.display import Display
from runtime.errors import UserError
from runtime.node import run_node
from runtime.plan import NodePlan, plan_node
from runtime.progress import Note, Ready, Stopped, pipe_writer, read_progress

_HEALTH_PATIENCE_S = 30.0


def configure(parser: argparse.ArgumentParser) -> None:
    add_topology(parser)
    parser.add_argument(
        "--detach", action="store_true", help="return once the server answers and leave it running in the background"
    )
    parser.epilog = (
        "examples:\n"
        "  runtime up topology/smollm2.toml\n"
        "  runtime up topology/smollm2.toml --port 8123 --set engine.main.kv_tokens=65536 --detach"
    )


def run(options: argparse.Namespace) -> int:
    display = Display()
    plan = plan_node(topology_of(options), note=lambda text: display.show(Note(text)))
    return _detach(plan, display) if options.detach else run_node(plan, display.show)


def _detach(plan: NodePlan, display: Display) -> int:
    """Starts the node in a session of its own and waits until the server answers or the node has ended."""
    read, write = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        _become_root(plan, write)
    os.close(write)
    with open(read, "rb") as pipe:
        for progress in read_progress(pipe):
            display.show(progress)
            match progress:
                case Ready():
                    break
                case Stopped(error=error):
                    return 1 if error else 130
        else:
            raise UserError("the node ended without a word while it was starting")
    _wait_for_health(plan.url, pid)
    return 0


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


def _wait_for_health(url: str, pid: int) -> None:
    """Returns when GET /health is answered with 200. Raises UserError if that does not come."""
    address = urllib.parse.urlsplit(url)
    assert address.hostname is not None
    deadline = time.monotonic() + _HEALTH_PATIENCE_S
    problem = ""
    while time.monotonic() < deadline:
        connection = http.client.HTTPConnection(address.hostname, address.port, timeout=5)
        try:
            connection.request("GET", "/health")
            answer = connection.getresponse()
            if answer.status == 200:
                return
            problem = f"answered with status {answer.status}"
        except (OSError, http.client.HTTPException) as error:
            problem = str(error) or type(error).__name__
        finally:
            connection.close()
        if os.waitpid(pid, os.WNOHANG) != (0, 0):
            raise UserError("the node ended just after it had started; see `runtime logs`")
        time.sleep(0.05)
    raise UserError(f"{url}/health does not answer ({problem}); see `runtime logs`")
