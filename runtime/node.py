"""The root process of a node: memory, listening socket and the root supervisor, from start to end."""

from __future__ import annotations

import contextlib
import errno
import gc
import importlib
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from setproctitle import setproctitle

from llm_runtime.actors.checkpoint import CheckpointError
from llm_runtime.actors.grammar import BackendName, load_backend, missing
from llm_runtime.actors.vocabulary import load_vocabulary
from llm_runtime.runtime.control import (
    ControlServer,
    Done,
    Down,
    Kill,
    NodeReport,
    NodeState,
    Question,
    Renew,
    Reply,
    Restart,
)
from llm_runtime.runtime.errors import UserError
from llm_runtime.runtime.happenings import Happenings
from llm_runtime.runtime.model_plan import ModelPlan
from llm_runtime.runtime.plan import NodePlan
from llm_runtime.runtime.progress import Begin, Happened, Note, Progress, Ready, Stopped, Tell
from llm_runtime.runtime.report import as_json
from llm_runtime.runtime.rolling import restart_all
from llm_runtime.runtime.rundir import NodeInfo, RunDirectory, read_info, running_nodes
from llm_runtime.runtime.status_socket import NAME as STATUS_SOCKET
from llm_runtime.runtime.status_socket import Reply as TellStatus
from llm_runtime.runtime.status_socket import StatusSocket
from llm_runtime.runtime.tree import LISTENER, actor_names, arena_sizes, build_tree
from llm_runtime.runtime.watch import RemovalWatch
from llm_runtime.supervisors import Event, NodeStatus, RunResult, Supervisor, SupervisorSpec, logs
from llm_runtime.supervisors.linux import thread_count
from llm_runtime.transport import Arena

logger = logging.getLogger(__name__)

_LISTEN_BACKLOG = 2048
_PORT_PATIENCE_S = 0.5


@dataclass(frozen=True)
class Owner:
    """A program for which alone a node runs.

    Attributes:
        pidfd: process descriptor of the program; the node stops when it has ended, however that comes.
        listener: the socket on which the program reaches the node, in place of one of the topology's.
    """

    pidfd: int
    listener: socket.socket


def run_node(plan: NodePlan, tell: Tell, detached: bool = False, owner: Owner | None = None) -> int:
    """Runs a node until it is stopped or gives up; the exit status of `runtime up`.

    Must run in the main thread of a process without other threads.

    Args:
        tell: told what happens.
        detached: send this process's own output to the node's `logs/root.log`.
        owner: whose node it is, if it is not to live on its own.

    Raises UserError when the run directory or the port cannot be had.
    """
    tell = _undisturbed(tell)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if detached:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    elif signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup leaves it
        signal.signal(signal.SIGHUP, signal.default_int_handler)
    run_dir = RunDirectory(plan.name, max(actor_names(plan), key=len))
    stopped, keep_logs = Stopped(), False
    file = str(plan.file.resolve())
    os.chdir("/")  # the node lives longer than the directory from which it was started
    os.environ[logs.VARIABLE] = plan.topology.node.log_format
    try:
        if detached:
            _redirect_output(run_dir)
        listener = _listener(plan, owner)
        run_dir.write_info(NodeInfo(plan.name, os.getpid(), plan.url, file, time.time()))
        result = _Root(plan, run_dir, listener, tell, owner).run()
        keep_logs = not result.ok or run_dir.has_crash_reports
        if not result.ok:
            stopped = Stopped(result.text, result.culprit.log if result.culprit else str(run_dir.root_log))
    except KeyboardInterrupt:
        pass
    except UserError:
        raise
    except Exception as error:
        keep_logs = True
        traceback.print_exc(file=logs.open_log(run_dir.root_log))
        stopped = Stopped(f"the node failed: {type(error).__name__}: {error}", str(run_dir.root_log))
    finally:
        run_dir.remove(keep_logs)
    tell(stopped)
    return 1 if stopped.error else 0


class _Root:
    """The root supervisor with what a node adds to it: arenas, the sockets `control` and `status`, and word of what
    happens."""

    def __init__(
        self,
        plan: NodePlan,
        run_dir: RunDirectory,
        listener: socket.socket | None,
        tell: Tell,
        owner: Owner | None,
    ) -> None:
        self.plan = plan
        self.run_dir = run_dir
        self.tell = tell
        self.listener = listener
        self.owner = owner
        spec = build_tree(plan, run_dir.path)
        self.roles = {child.id: child.role for child in spec.descendants()}
        self.ingresses = {name for name, role in self.roles.items() if role == "ingress"}
        self.waiting_for = {child.id for child in spec.descendants()}
        """Processes that have not been ready yet."""
        self.happenings = Happenings()
        self.rolling: threading.Thread | None = None
        tell(Begin(list(_with_depths(spec))))
        tell(Note("loading libraries"))
        gc.disable()
        _import_actors(spec, plan.topology.node.log_level)
        if plan.topology.tracing.endpoint and plan.placement.is_here("ingress"):
            importlib.import_module("llm_runtime.actors.ingress.span_export")
        for model in plan.models:
            if plan.placement.is_here(model.tokenizer):
                _load_vocabulary(model)
            here = [engine for engine in model.engines if plan.placement.is_here(engine.scheduler)]
            for backend in dict.fromkeys(engine.grammar_backend for engine in here):
                _load_grammars(model, backend)
        gc.freeze()  # what is here stays, and the processes that are forked need never look through it
        gc.enable()
        tell(Note("starting"))
        descriptors = _create_arenas(plan)
        if listener is not None:
            descriptors[LISTENER] = listener.fileno()
        self.supervisor = Supervisor(spec, run_dir.path, descriptors=descriptors)

    def run(self) -> RunResult:
        """Runs the tree to its end; why it ended."""
        setproctitle(f"runtime: root of {self.plan.name}")
        threads = thread_count()
        self.supervisor.start_zygote()
        _log_to(self.run_dir)  # after the fork, because children set up their own
        level = logging.INFO if threads == 1 else logging.WARNING
        logger.log(level, "forked the zygote from a process with %d thread(s)", threads)
        control = self.control = ControlServer(self.run_dir.path, self.answer)
        self.status = self.status_socket()
        extra: dict[int, Callable[[], None]] = {control.fd: control.serve, self.status.fd: self.status.serve}
        watch = self.watch_run_dir()
        if watch is not None:
            extra[watch.fd] = lambda: watch.handle(self.restore)
        if self.owner is not None:
            extra[self.owner.pidfd] = self.owner_ended
        try:
            return self.supervisor.run(on_event=self.on_event, extra=extra)
        finally:
            if watch is not None:
                watch.close()
            self.control.close()
            self.status.close()
            if self.listener is not None:
                self.listener.close()

    def on_event(self, event: Event) -> None:
        if event.kind == "stopped" and event.id in self.ingresses:
            self.ingresses.discard(event.id)
            if not self.ingresses and self.listener is not None:
                with contextlib.suppress(OSError):
                    self.listener.shutdown(socket.SHUT_RDWR)  # nobody accepts any more: refuse who connects now
        self.happenings.add(event)
        self.tell(Happened(event))
        if event.kind == "ready" and event.id in self.waiting_for:
            self.waiting_for.discard(event.id)
            if not self.waiting_for:
                plan = self.plan
                model = plan.models[0]
                self.happenings.note("the node is ready")
                self.tell(Ready(plan.name, plan.url, model.served_name, model.task))

    def owner_ended(self) -> None:
        assert self.owner is not None
        self.supervisor.unwatch(self.owner.pidfd)
        self.supervisor.shutdown()

    def status_socket(self) -> StatusSocket:
        return StatusSocket(self.run_dir.path, self.supervisor, self.answer_page)

    def answer_page(self, line: str, reply: TellStatus) -> None:
        """What an ingress worker asks for the status page."""
        word, _, name = line.partition(" ")
        if line == "status":
            reply(as_json(self.report()))
        elif line == "rolling":
            reply({"error": self.begin_rolling()})
        elif word == "restart" and name not in self.roles:
            reply({"error": f"There is no process {name!r} below the root."})
        elif word == "restart":
            self.happenings.note(f"a restart of {name} was asked for on the status page")
            self.restart(name, lambda error: reply({"error": error}))
        else:
            reply({"error": "unknown question"})

    def begin_rolling(self) -> str:
        """Begins a rolling restart; why it does not, else nothing."""
        if self.rolling is not None and self.rolling.is_alive():
            return "A rolling restart is under way already."

        def restart() -> None:
            began = time.monotonic()
            try:
                replaced = restart_all(self.run_dir.path)
                took_s = time.monotonic() - began
                self.happenings.note(f"rolling restart: {replaced} processes replaced in {took_s:.1f} s")
            except UserError as error:
                self.happenings.note(f"rolling restart: {error}")

        self.happenings.note("a rolling restart was asked for on the status page")
        self.rolling = threading.Thread(target=restart, name="rolling restart", daemon=True)
        self.rolling.start()
        return ""

    def watch_run_dir(self) -> RemovalWatch | None:
        """Somebody may clean the directories of temporary files while the node runs for months."""
        try:
            return RemovalWatch([self.run_dir.path, self.run_dir.path.parent])
        except OSError as error:
            logger.warning("removals in the run directory will not be noticed (%s)", error.strerror)
            return None

    def restore(self) -> None:
        """Makes again what was removed from the run directory. Actors see to their own sockets."""
        try:
            if not self.run_dir.restore():
                logger.error("another node has the run directory %s now", self.run_dir.path)
                return
            self.control.restore()
            if not (self.run_dir.path / STATUS_SOCKET).exists():
                status = self.status_socket()
                self.supervisor.unwatch(self.status.fd)
                self.status.close()
                self.status = status
                self.supervisor.watch(status.fd, status.serve)
        except OSError as error:
            logger.warning("the run directory cannot be restored (%s)", error.strerror)

    def answer(self, question: Question, reply: Reply) -> None:
        """Carries out one command."""

        def done(error: str) -> None:
            reply(Done(error))

        match question:
            case Restart(actor=actor):
                self.restart(actor, done)
            case Renew():
                self.supervisor.renew_zygote(done)
            case Kill(actor=actor, signal=number):
                self.supervisor.signal_child(actor, number, done=done)
            case Down():
                reply(Done())
                self.supervisor.shutdown()
            case _:
                reply(self.report())

    def restart(self, actor: str, done: Callable[[str], None]) -> None:
        # A stop would let an ingress finish or break off its answers. Its end without one hands the open connections
        # over to its next incarnation.
        self.supervisor.restart_child(actor, graceful=self.roles.get(actor) != "ingress", done=done)

    def report(self) -> NodeReport:
        tree = self.supervisor.tree()
        deterministic = all(model.settings.deterministic for model in self.plan.models if model.engines)
        happenings = self.happenings.latest()
        return NodeReport(self.plan.name, self.state(tree), self.plan.url, tree, deterministic, happenings)

    def state(self, tree: NodeStatus) -> NodeState:
        if tree.state == "stopping":
            return "stopping"
        if self.waiting_for:
            return "starting"
        return "running" if all(node.state == "running" for node in tree.walk()) else "degraded"


def _create_arenas(plan: NodePlan) -> dict[str, int]:
    """The node's memory files. Raises UserError where the kernel refuses them."""
    descriptors = {}
    for name, size in arena_sizes(plan).items():
        try:
            descriptors[name] = Arena.create(name, size)
        except OSError as error:
            hint = ": raise the limit of file sizes (ulimit -f)" if error.errno == errno.EFBIG else ""
            raise UserError(f"{size:,} bytes of memory for {name} cannot be had ({error.strerror}){hint}") from None
    return descriptors


def _undisturbed(tell: Tell) -> Tell:
    """`tell` for a node that goes on when its terminal, pipe or disk takes no more words."""

    def say(progress: Progress) -> None:
        try:
            tell(progress)
        except (OSError, ValueError) as error:  # the latter: the stream is closed
            logger.debug("nobody is told of %s: %s", type(progress).__name__, error)

    return say


def _with_depths(spec: SupervisorSpec, depth: int = 0) -> Iterator[tuple[int, str]]:
    for child in spec.children:
        yield depth, child.id
        if child.supervisor is not None:
            yield from _with_depths(child.supervisor, depth + 1)


def _import_actors(spec: SupervisorSpec, log_level: str) -> None:
    """Imports what the actors need, once for all of them: they are forked from this process."""
    logging.basicConfig(level=log_level.upper(), format=logs.TEXT)  # the children take over the level
    for module in dict.fromkeys(child.entry.partition(":")[0] for child in spec.descendants()):
        importlib.import_module(module)


def _load_vocabulary(plan: ModelPlan) -> None:
    """Loads the vocabulary once for all: tokenizer and detokenizer are forked with it and start again in no time."""
    try:
        _ = load_vocabulary(plan.model.path).tokenizer
    except CheckpointError:
        pass  # the actor that needs it says what is wrong


def _load_grammars(plan: ModelPlan, backend: BackendName) -> None:
    """The same for what compiles constraints: a rank that draws the first constrained token has no time to load it."""
    if missing(backend):
        return
    try:
        load_backend(plan.model.path, plan.config.vocab_size, backend)
    except CheckpointError:
        pass


def _log_to(run_dir: RunDirectory) -> None:
    handler = logging.StreamHandler(logs.open_log(run_dir.root_log))
    handler.setFormatter(logs.formatter("root", 1))
    logging.root.handlers[:] = [handler]


def _redirect_output(run_dir: RunDirectory) -> None:
    """Standard output and error of this process to its log, standard input from nowhere."""
    sys.stdout.flush()
    sys.stderr.flush()
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    sys.stdout = sys.stderr = logs.open_log(run_dir.root_log, descriptors=(1, 2))


def _listener(plan: NodePlan, owner: Owner | None) -> socket.socket | None:
    """The HTTP listening socket, if this node has the ingress."""
    if owner is not None:
        return owner.listener
    ingress = plan.topology.ingress
    return _listen(ingress.host, ingress.port) if plan.placement.is_here("ingress") else None


def _listen(host: str, port: int) -> socket.socket:
    """The HTTP listening socket. It outlives every ingress, so that connections never find it closed."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror:
        raise UserError(
            f'there is no address "{host}" on this machine: set ingress.host, for example to 127.0.0.1'
        ) from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _bind(listener, address)
        listener.listen(_LISTEN_BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise UserError(_port_in_use(host, port)) from None
        raise UserError(
            f"cannot listen on {host} port {port} ({error.strerror}): choose others with --port or ingress.host"
        ) from None
    return listener


def _port_in_use(host: str, port: int) -> str:
    for path in running_nodes():
        info = read_info(path)
        if info is not None and urllib.parse.urlsplit(info.url).port == port:
            return (
                f"port {port} of {host} is in use by your node {path.name}: stop it with `runtime down --node "
                f"{path.name}`, or choose another port with --port"
            )
    return f"port {port} of {host} is in use by another program: choose one with --port"


def _bind(listener: socket.socket, address: Any) -> None:
    """Binds the socket; gives the processes of a node that was killed a moment to let the port go."""
    deadline = time.monotonic() + _PORT_PATIENCE_S
    while True:
        try:
            return listener.bind(address)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                raise
        time.sleep(0.02)
