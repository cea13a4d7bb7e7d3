"""The supervisor process: its event loop, its commands, and its link to the supervisor above."""

from __future__ import annotations

import itertools
import logging
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from llm_runtime.supervisors import linux, messages
from llm_runtime.supervisors.child import Child, Done
from llm_runtime.supervisors.children import Children
from llm_runtime.supervisors.link import Link
from llm_runtime.supervisors.loop import Loop
from llm_runtime.supervisors.messages import Call, Up
from llm_runtime.supervisors.parent import Parent
from llm_runtime.supervisors.process import Process
from llm_runtime.supervisors.spawner import Spawner
from llm_runtime.supervisors.spec import (
    NESTED_SUPERVISOR,
    ChildInstance,
    ChildSpec,
    SpecError,
    SupervisorSpec,
    validate,
)
from llm_runtime.supervisors.status import ChildCounts, ChildInfo, Event, NodeStatus, RunResult, Sampler
from llm_runtime.supervisors.zygote import Zygote

LATE_S = 0.5
"""A supervisor that wakes so much later than it should was stopped itself, or the whole machine was."""

_NO_CHANGE = messages.Heartbeat | messages.StoreFd | messages.RemoveFd | messages.Counted | messages.Reply
"""Messages of children after which their state is what it was."""

_log = logging.getLogger(__name__)
_LEVELS = {"gave_up": logging.ERROR, "backoff": logging.WARNING, "zygote": logging.WARNING}


class Supervisor:
    """Starts, watches, restarts and stops the children of a SupervisorSpec.

    For the root of a tree:

        supervisor = Supervisor(spec, run_dir, descriptors={"listen": fd})
        supervisor.start_zygote()      # before any thread or ZMQ context; what is imported by now, children share
        result = supervisor.run(on_event=print)

    All other methods are for callbacks that run inside `run`: they return at once and tell the outcome to `done`, an
    error sentence or "". They take the id of any child of the tree.
    """

    def __init__(
        self,
        spec: SupervisorSpec,
        run_dir: Path,
        *,
        name: str = "root",
        descriptors: Mapping[str, int] | None = None,
        generation: int = 1,
        incarnations: Mapping[str, int] | None = None,
        link: Link | None = None,
    ) -> None:
        """`generation`, `incarnations` and `link` are for nested supervisors. Raises SpecError for a faulty
        specification."""
        descriptors = descriptors or {}
        validate(spec)
        if any(child.id == name for child in spec.descendants()):
            raise SpecError(f"child {name!r} has the name of its supervisor; give it another id")
        for child in spec.children:
            for wanted in child.inherited():
                if wanted not in descriptors:
                    raise SpecError(f"child {child.id!r}: no descriptor named {wanted!r} was given to the supervisor")
        self.name = name
        self._run_dir = run_dir
        self._generation = generation
        self._on_event: Callable[[Event], None] | None = None
        self._children = Children(
            spec,
            run_dir,
            generation,
            descriptors,
            incarnations or {},
            report=self._report,
            pass_on=self._pass_on,
            pass_up=self._pass_up,
            replied=self._replied,
            gone=self._fail_calls,
        )
        modules = [child.entry.partition(":")[0] for child in spec.descendants()]
        self._zygote = Zygote(name, [NESTED_SUPERVISOR.partition(":")[0], *modules])
        self._calls: dict[int, tuple[Child, Done]] = {}
        self._call_numbers = itertools.count(1)
        self._loop = Loop()
        self._sampler = Sampler()
        self._started_at = time.monotonic()
        self._parent: Parent | None = None
        if link is not None:
            self._parent = Parent(link, self._loop, lambda: self._tree().children, self.shutdown, self._called)

    def start_zygote(self) -> None:
        """Forks the process that will fork the children. Raises RuntimeError if this process has threads already."""
        for folder in ("logs", "crashes"):
            try:
                (self._run_dir / folder).mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as error:
                _log.warning("%s cannot be made: %s", self._run_dir / folder, error.strerror)
        linux.raise_descriptor_limit()
        linux.become_subreaper()
        self._zygote.start()

    def adopt_stored_fds(self, stored_fds: Mapping[str, tuple[int, bytes]]) -> None:
        """Takes over what an earlier incarnation of this supervisor kept: "owner/name" to (descriptor, meta)."""
        for key, (fd, meta) in stored_fds.items():
            owner, _, name = key.partition("/")
            self._children.adopt_stored_fds(owner, name, fd, meta)

    def run(
        self,
        on_event: Callable[[Event], None] | None = None,
        extra: Mapping[int, Callable[[], None]] | None = None,
    ) -> RunResult:
        """Supervises until a shutdown or failure; returns when no child has a process any more.

        Must run in the main thread, which must live on: the children die with it. `extra` maps descriptors to
        callbacks for when they are readable. SIGTERM, SIGINT and, at the root, SIGHUP unless it is ignored, stop the
        tree; a second SIGINT kills it.
        """
        if self._zygote.channel is None:
            self.start_zygote()
        self._on_event = on_event
        children = self._children
        spawner = Spawner(self._zygote, self._loop, self._on_message, self._on_exit, self._zygote_lost)
        self._spawner = spawner
        children.attach(spawner)
        callbacks: dict[int, Callable[[], None]] = {
            signal.SIGCHLD: spawner.child_ended,
            signal.SIGTERM: self.shutdown,
            signal.SIGINT: self._interrupted,
        }
        if self._parent is None and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            callbacks[signal.SIGHUP] = self.shutdown
        self._loop.watch_signals(callbacks)
        for fd, callback in (extra or {}).items():
            self.watch(fd, callback)
        try:
            children.step()
            while not children.over:
                if self._parent is not None:
                    self._parent.tell(children.started)
                self._poll(spawner)
                now = time.monotonic()
                spawner.check(now)
                children.check()
            assert children.result is not None
            return children.result
        finally:
            children.kill_all()
            spawner.close()
            self._loop.close()

    # Commands, by the id of any child of the tree

    def start_child(self, new: ChildSpec | ChildInstance, *, under: str = "", done: Done | None = None) -> None:
        """Starts one more child of the supervisor `under` (default: this one); a ChildInstance if that is
        simple_one_for_one. If it cannot start, it is forgotten."""
        done = done or _warn
        ids = [new.id] if isinstance(new, ChildInstance) else [spec.id for spec in _with_descendants(new)]
        elsewhere = {self.name}  # a sibling of the same id is found by the children
        for node in self._tree().walk():
            if node.name != (under or self.name):
                elsewhere.update(child.name for child in node.children)
        if taken := [id for id in ids if id in elsewhere]:
            done(f"the id {taken[0]!r} is taken by another actor of the tree")
        elif under in ("", self.name):
            self._children.add(new, done)
            self._changed()
        elif isinstance(new, ChildInstance):
            self._command("start", under, done, instance=new)
        else:
            self._command("start", under, done, spec=new)

    def terminate_child(self, id: str, done: Done | None = None) -> None:
        """Stops a child for good; it stays known, and may be restarted or deleted (a temporary one is forgotten)."""
        self._command("terminate", id, done)

    def restart_child(self, id: str, graceful: bool = True, done: Done | None = None) -> None:
        """Starts a stopped child, or stops and starts a running one, with the siblings its strategy demands."""
        self._command("restart", id, done, graceful=graceful)

    def delete_child(self, id: str, done: Done | None = None) -> None:
        """Forgets a stopped child."""
        self._command("delete", id, done)

    def signal_child(self, id: str, signum: int, done: Done | None = None) -> None:
        """Sends a signal to the process of a child."""
        self._command("signal", id, done, signum=signum)

    def renew_zygote(self, done: Done | None = None) -> None:
        """Has children that start from now on, and all below them, run the program as it is on the disk now."""
        self._spawner.renew_zygote(done or _warn)

    def shutdown(self) -> None:
        """Stops all children, right to left; then `run` returns."""
        self._children.end(RunResult(ok=True, text="stopped as asked"))
        self._changed()

    def kill_all(self) -> None:
        """Stops the tree at once, by SIGKILL."""
        self.shutdown()
        self._children.kill_all()

    def watch(self, fd: int, callback: Callable[[], None]) -> None:
        """Calls `callback` inside `run` whenever `fd` is readable. Its exceptions are logged."""

        def guarded() -> None:
            try:
                callback()
            except Exception:
                _log.exception("callback of descriptor %d", fd)

        self._loop.watch(fd, guarded)

    def unwatch(self, fd: int) -> None:
        """Ends `watch`; before `fd` is closed."""
        self._loop.unwatch(fd)

    # What can be seen

    def tree(self) -> NodeStatus:
        """The whole tree, from memory, with memory and CPU use as of now."""
        return self._sampler.fill(self._tree())

    def which_children(self, under: str = "") -> list[ChildInfo]:
        """The children of a supervisor of the tree, in starting order. Raises LookupError if there is none."""
        nodes = self._supervisor_node(under).children
        return [ChildInfo(id=node.name, pid=node.pid, state=node.state, type=node.kind) for node in nodes]

    def count_children(self, under: str = "") -> ChildCounts:
        """How many children a supervisor of the tree has. Raises LookupError if there is none."""
        nodes = self._supervisor_node(under).children
        supervisors = sum(node.kind == "supervisor" for node in nodes)
        active = sum(node.pid is not None for node in nodes)
        return ChildCounts(specs=len(nodes), active=active, supervisors=supervisors, workers=len(nodes) - supervisors)

    def _tree(self) -> NodeStatus:
        ending = self._children.result is not None
        return NodeStatus(
            name=self.name,
            kind="supervisor",
            pid=os.getpid(),
            state="stopping" if ending else "running" if self._children.started else "starting",
            incarnation=self._generation,
            started_at=self._started_at,
            stats={"unwritten_reports": self._children.unwritten} if self._children.unwritten else {},
            children=[child.status() for child in self._children.by_id.values()],
        )

    def _supervisor_node(self, name: str) -> NodeStatus:
        for node in self._tree().walk():
            if node.name == (name or self.name) and node.kind == "supervisor":
                return node
        raise LookupError(f"there is no supervisor {name!r}")

    # Commands, here or further down

    def _command(
        self,
        op: Literal["terminate", "restart", "delete", "signal", "start"],
        target: str,
        done: Done | None,
        *,
        graceful: bool = True,
        signum: int = 0,
        spec: ChildSpec | None = None,
        instance: ChildInstance | None = None,
    ) -> None:
        done = done or _warn
        child = self._children.by_id.get(target)
        self._changed()
        if child is None or op == "start":
            via = self._way_to(target)
            if via is None:
                return done(f"there is no {'supervisor' if op == 'start' else 'actor'} {target!r}")
            if via.process is None or via.process.pid == 0 or via.process.asked:
                return done(f"{via.spec.id} is {via.state}; try again when it runs")
            number = next(self._call_numbers)
            self._calls[number] = (via, done)
            call = Call(
                number=number,
                op=op,
                target=target,
                graceful=graceful,
                signum=signum,
                spec=spec,
                instance=instance,
            )
            self._spawner.send(via.process, call)
        elif op == "terminate":
            self._children.terminate(child, done)
        elif op == "restart":
            self._children.restart(child, graceful, done)
        elif op == "delete":
            self._children.delete(child, done)
        else:
            self._children.send_signal(child, signum, done)

    def _way_to(self, target: str) -> Child | None:
        """The direct child that is, or has below it, the supervisor or actor `target`."""
        for child in self._children.by_id.values():
            if child.spec.id == target or child.contains(target):
                return child
        return None

    def _replied(self, reply: messages.Reply) -> None:
        if (call := self._calls.pop(reply.number, None)) is not None:
            call[1](reply.error)

    def _fail_calls(self, child: Child) -> None:
        """The process of a child is gone, and with it what it was asked to do."""
        for number, (via, done) in list(self._calls.items()):
            if via is child:
                del self._calls[number]
                done(f"{child.spec.id} ended before it could answer; try again")

    # Events

    def _on_message(self, process: Process, message: Up, fds: list[int]) -> None:
        if not isinstance(message, _NO_CHANGE):
            self._changed()
        self._children.on_message(process, message, fds)
        if isinstance(message, messages.Ready):
            self._children.step()

    def _on_exit(self, process: Process, status: os.waitid_result | None, error: str) -> None:
        self._changed()
        self._children.on_exit(process, status, error)

    def _zygote_lost(self, pid: int) -> None:
        self._report(
            Event(
                kind="zygote",
                id=self.name,
                text="its zygote was lost and is replaced",
                pid=pid,
                when=time.time(),
            )
        )

    def _interrupted(self) -> None:
        """Ctrl-C: an orderly stop the first time, the second time at once."""
        if self._children.result is None:
            self.shutdown()
        else:
            self.kill_all()

    def _report(self, event: Event) -> None:
        """Something happened to a child, or to the zygote. Only this supervisor logs it."""
        says_kind = event.kind in ("ready", "zygote")  # the text does
        text = event.text if says_kind else f"{event.kind} {event.text}".rstrip()
        level = logging.WARNING if event.crash else _LEVELS.get(event.kind, logging.INFO)
        _log.log(level, "%s: %s", event.id, text)
        self._pass_on(event)

    def _pass_on(self, event: Event) -> None:
        self._changed()
        if self._parent is not None:
            self._parent.event(event)
        elif self._on_event is not None:
            try:
                self._on_event(event)
            except Exception:
                _log.exception("callback for events")

    def _poll(self, spawner: Spawner) -> None:
        timeout_s = self._timeout(spawner)
        before = time.monotonic()
        self._loop.poll(timeout_s)
        if timeout_s is not None and (late_s := time.monotonic() - before - timeout_s) > LATE_S:
            self._children.forgive(late_s)

    def _timeout(self, spawner: Spawner) -> float | None:
        deadlines = [spawner.deadline(), self._children.deadline()]
        if self._parent is not None:
            deadlines.append(self._parent.next_beat)
        known = [deadline for deadline in deadlines if deadline is not None]
        return max(0.0, min(known) - time.monotonic()) if known else None

    # The supervisor above

    def _changed(self) -> None:
        if self._parent is not None:
            self._parent.changed = True

    def _pass_up(self, message: Up, fds: Sequence[int]) -> None:
        if self._parent is not None:
            self._parent.send(message, fds)

    def _called(self, call: Call) -> None:
        def done(error: str) -> None:
            assert self._parent is not None
            self._parent.reply(call.number, error)

        if call.op == "start" and call.target == self.name:
            new = call.spec or call.instance
            assert new is not None
            self.start_child(new, done=done)
        else:
            self._command(
                call.op,
                call.target,
                done,
                graceful=call.graceful,
                signum=call.signum,
                spec=call.spec,
                instance=call.instance,
            )


def _with_descendants(spec: ChildSpec) -> list[ChildSpec]:
    return [spec, *(spec.supervisor.descendants() if spec.supervisor is not None else ())]


def _warn(error: str) -> None:
    if error:
        _log.warning("%s", error)
