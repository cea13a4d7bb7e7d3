"""The state machine of a supervisor: which child to stop, start or give up, and when.

Nothing here waits. Every event changes what is wanted of the children; `step` then begins whatever stop or start may
begin now. So commands are answered while a child hangs in its start, and a stop may come at any time.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from llm_runtime.supervisors import messages
from llm_runtime.supervisors.child import Child, Done
from llm_runtime.supervisors.exits import CrashReport, ExitReason, record_crash
from llm_runtime.supervisors.loop import pidfd_kill
from llm_runtime.supervisors.messages import Start, Up
from llm_runtime.supervisors.process import Process
from llm_runtime.supervisors.restarts import Delay, Intensity, affected, wants_restart
from llm_runtime.supervisors.spawner import Spawner
from llm_runtime.supervisors.spec import ChildInstance, ChildSpec, SpecError, SupervisorSpec, validate_child
from llm_runtime.supervisors.status import Culprit, Event, EventKind, RunResult

SAY_FULL_S = 60.0
TRIALS = 3
"""How often a child that is struck by a signal while it starts for the first time is started again. One that fails by
itself is not: it would fail again."""

_log = logging.getLogger(__name__)


class Children:
    """The children of one supervisor.

    report(event)       is told what happens to the children.
    pass_on(event)      is told what nested supervisors report of theirs.
    pass_up(msg, fds)   what descendants send that the supervisor's own parent has to know too.
    replied(msg)        answers of nested supervisors to commands.
    gone(child)         the process of a child has ended.
    """

    def __init__(
        self,
        spec: SupervisorSpec,
        run_dir: Path,
        generation: int,
        descriptors: Mapping[str, int],
        incarnations: Mapping[str, int],
        *,
        report: Callable[[Event], None],
        pass_on: Callable[[Event], None],
        pass_up: Callable[[Up, Sequence[int]], None],
        replied: Callable[[messages.Reply], None],
        gone: Callable[[Child], None],
    ) -> None:
        self.spec = spec
        self.started = False
        """All children have been ready (or ignored) once."""
        self.result: RunResult | None = None
        """Why it ends, once it does."""
        self.by_id: dict[str, Child] = {}
        self.unwritten = 0
        """Crash reports that could not be written."""
        self._run_dir = run_dir
        self._generation = generation
        self._descriptors = descriptors
        self._incarnations = dict(incarnations)
        self._report = report
        self._pass_on = pass_on
        self._pass_up = pass_up
        self._replied = replied
        self._gone = gone
        self._intensity = Intensity(spec.intensity, spec.period_s)
        self._dynamic = spec.strategy == "simple_one_for_one"
        self._wave_number: int | None = None
        self._said_full_at = -SAY_FULL_S
        for child in () if self._dynamic else spec.children:
            self.by_id[child.id] = Child(
                child, Delay(spec.backoff), in_wave=True, incarnation=self._incarnations.get(child.id, 0)
            )

    def attach(self, spawner: Spawner) -> None:
        """Gives it the means to start processes; before the first `step`."""
        self._spawner = spawner

    @property
    def over(self) -> bool:
        """It ends, and no child has a process any more."""
        return self.result is not None and all(child.process is None for child in self.by_id.values())

    def adopt_stored_fds(self, owner: str, name: str, fd: int, meta: bytes) -> None:
        """Takes over a descriptor stored with an earlier incarnation of this supervisor."""
        for child in self.by_id.values():
            if child.spec.id == owner or child.contains(owner):
                child.fd_store.store_fd(owner, name, fd, meta)
                return
        os.close(fd)
        self._pass_up(messages.RemoveFd(owner=owner, name=name), ())

    # Commands. Each answers through `done`, at once or later, with an error sentence or "".

    def add(self, new: ChildSpec | ChildInstance, done: Done) -> None:
        """OTP's start_child: starts one more child, to the right of the others. If it cannot start, it is forgotten."""
        if self.result is not None:
            return done("the supervisor is stopping")
        if isinstance(new, ChildInstance) != self._dynamic:
            wanted = "a ChildInstance" if self._dynamic else "a ChildSpec"
            return done(f"cannot start {new.id}: a {self.spec.strategy} supervisor takes {wanted}")
        if (present := self.by_id.get(new.id)) is not None:
            if present.wanted:
                return done(f"{new.id} is started already")
            return done(f"{new.id} is present already: restart it, or delete it first")
        if isinstance(new, ChildInstance):
            template = self.spec.children[0]
            spec = msgspec.structs.replace(template, id=new.id, args={**template.args, **new.args})
        else:
            spec = new
        try:
            validate_child(spec, self.spec.auto_shutdown)
        except SpecError as error:
            return done(str(error))
        if missing := [name for name in spec.inherited() if name not in self._descriptors]:
            return done(f"cannot start {spec.id}: its supervisor has no descriptor named {missing[0]!r}")
        child = Child(
            spec,
            Delay(self.spec.backoff),
            in_wave=not self.started,
            trial="forget",
            incarnation=self._incarnations.get(spec.id, 0),
        )
        child.up_waiters.append(done)
        self.by_id[spec.id] = child
        self.step()

    def terminate(self, child: Child, done: Done) -> None:
        """OTP's terminate_child: stops a child and leaves it stopped. A temporary or dynamic one is forgotten."""
        child.wanted = child.in_wave = child.bounce = False
        child.came_up(f"{child.spec.id} was stopped")
        child.down_waiters.append(done)
        if child.process is None:
            self._put_down(child)
        else:
            self._begin_stop(child)
        self.step()

    def restart(self, child: Child, graceful: bool, done: Done) -> None:
        """Starts a stopped child, or stops a running one and starts it again, together with the siblings that its
        strategy would restart with it. `graceful=False` kills it at once. Does not count as a restart."""
        if self.result is not None:
            return done("the supervisor is stopping")
        child.up_waiters.append(done)
        if child.process is None:
            if not child.wanted:
                child.delay, child.trial = Delay(self.spec.backoff), "stay"
            child.wanted = True
            for other in self.by_id.values():
                if other is child or (child.in_wave and other.in_wave):
                    other.not_before = 0.0
        else:
            self._restart_with_siblings(child, 0.0)
            if not child.in_wave or not graceful:
                self._begin_stop(child, brutal=not graceful)
        self.step()

    def delete(self, child: Child, done: Done) -> None:
        """OTP's delete_child: forgets a stopped child."""
        if self._dynamic:
            return done(f"cannot delete {child.spec.id}: terminate it, a dynamic child is then forgotten")
        if child.process is not None or child.wanted:
            return done(f"cannot delete {child.spec.id}, which is {child.state}: terminate it first")
        self._remove(child)
        done("")

    def send_signal(self, child: Child, number: int, done: Done) -> None:
        """Sends a signal to a child's process."""
        if child.process is None or child.process.pidfd < 0:
            return done(f"{child.spec.id} has no process")
        pidfd_kill(child.process.pidfd, number)
        done("")

    def end(self, result: RunResult) -> None:
        """Stops all children, right to left; the first result stays."""
        if self.result is None:
            self.result = result
        for child in self.by_id.values():
            child.wanted, child.bounce, child.in_wave = False, False, True
            child.came_up("the supervisor is stopping")
            if child.process is None:
                self._put_down(child)
        self.step()

    def kill_all(self) -> None:
        """Kills all children at once; what is below them dies with them."""
        for child in self.by_id.values():
            if child.process is not None:
                self._begin_stop(child, brutal=True)

    # The state machine

    def step(self) -> None:
        """Begins every stop and start that may begin now."""
        stopping = [child for child in self.by_id.values() if child.in_wave and child.must_stop]
        for child in reversed(stopping):
            self._begin_stop(child)
            if not self._dynamic:
                break
        blocked = bool(stopping)
        now = time.monotonic()
        for child in list(self.by_id.values()):
            if child.process is not None:
                blocked |= child.wanted and child.in_wave and not child.is_ready
            elif child.wanted:
                if child.in_wave and blocked:
                    if child.starts:
                        child.state = "restarting"
                    continue
                blocked |= child.in_wave
                if child.not_before <= now:
                    self._start(child)
                elif child.state != "backoff":
                    child.state = "backoff"
                    self._tell(child, "backoff", f"starts again in {child.not_before - now:.2f} s")
        if not self.started and self.result is None:
            self.started = all(child.is_ready or not child.wanted for child in self.by_id.values())

    def deadline(self) -> float | None:
        """When `check` or `step` has something to do next, in monotonic seconds."""
        times = []
        for child in self.by_id.values():
            if child.process is None:
                if child.wanted and child.state == "backoff":
                    times.append(child.not_before)
            elif (limit := child.process.limit()) is not None:
                times.append(limit[0])
        return min(times, default=None)

    def check(self) -> None:
        """Kills what has not started, stopped or given a sign of life in time."""
        for child in self.by_id.values():
            if child.process is not None and (verdict := child.process.overdue()) is not None:
                child.process.kill(verdict)
        self.step()

    def forgive(self, seconds: float) -> None:
        """This process did not run for so long, and perhaps no other did: silence in that time means nothing."""
        for child in self.by_id.values():
            if child.process is not None:
                child.process.last_beat += seconds

    def _start(self, child: Child) -> None:
        spec = child.spec
        child.incarnation = self._next_incarnation(child)
        self._count(spec.id, child.incarnation)  # before anybody can hear of it
        child.state = "starting"
        child.starts += 1
        names = spec.inherited()
        start = Start(
            id=spec.id,
            start=spec.entry,
            incarnation=child.incarnation,
            generation=self._generation,
            args=spec.args,
            supervisor=spec.supervisor,
            descriptors=names,
            run_dir=str(self._run_dir),
            heartbeat_s=spec.heartbeat_s,
            stored_fds=len(child.fd_store),
            incarnations=self._incarnations if spec.type == "supervisor" else {},
        )
        fds = [self._descriptors[name] for name in names]
        child.process = self._spawner.launch(
            spec, child.incarnation, self._log_path(spec.id), start, fds, child.fd_store.batches()
        )
        self._tell(child, "starting")

    def _next_incarnation(self, child: Child) -> int:
        if self.spec.strategy != "one_for_all":
            return self._incarnations.get(child.spec.id, 0) + 1
        if not child.in_wave or self._wave_number is None:
            number = max(self._incarnations.get(member, 0) for member in self.by_id) + 1
            if not child.in_wave:
                return number
            self._wave_number = number
        return self._wave_number

    def _count(self, name: str, incarnation: int) -> None:
        self._incarnations[name] = incarnation
        self._pass_up(messages.Counted(id=name, incarnation=incarnation), ())

    def _begin_stop(self, child: Child, brutal: bool = False) -> None:
        process = child.process
        assert process is not None
        if process.asked and not brutal:
            return
        process.asked = True
        child.state = "stopping"
        limit_ms = child.spec.shutdown_ms
        if brutal or limit_ms == 0:
            process.kill(("killed", "killed by its supervisor"))
        elif process.pid == 0 or (process.ready_at is None and child.spec.type == "worker"):
            process.kill(("shutdown", "stopped before it was ready"))
        else:
            process.stop_deadline = None if limit_ms is None else time.monotonic() + limit_ms / 1000
            self._spawner.send(process, messages.Shutdown())

    def on_message(self, process: Process, message: Up, fds: list[int]) -> None:
        """A child says something."""
        child = self.by_id[process.spec.id]
        match message:
            case messages.Ready():
                self._became_ready(child, process)
            case messages.Tree():
                child.subtree = message.children
            case messages.EventRaised():
                self._pass_on(message.event)
            case messages.Reply():
                self._replied(message)
            case messages.Counted(id=name, incarnation=incarnation):
                self._count(name, incarnation)
            case messages.StoreFd(owner=owner, name=name, meta=meta):
                if len(fds) == 1:
                    self._pass_up(message, fds)
                    if not child.fd_store.store_fd(owner, name, fds.pop(), meta):
                        self._say_full(owner)
            case messages.RemoveFd(owner=owner, name=name):
                self._pass_up(message, ())
                child.fd_store.remove_fd(owner, name)
            case _:
                process.heard(message)
        for fd in fds:
            os.close(fd)

    def _say_full(self, owner: str) -> None:
        if time.monotonic() - self._said_full_at > SAY_FULL_S:
            self._said_full_at = time.monotonic()
            what = "there are too many descriptors: raise `ulimit -n`"
            _log.error("connections of %s are not kept for its next incarnation, %s", owner, what)

    def _became_ready(self, child: Child, process: Process) -> None:
        if process.ready_at is not None:
            return
        process.ready_at = process.last_beat = time.monotonic()
        if not process.asked:
            child.state = "running"
            child.in_wave, child.trial = self.result is not None, ""
            child.came_up()
            self._tell(child, "ready", f"ready after {process.ready_at - process.started_at:.3f} s")

    def on_exit(self, process: Process, status: os.waitid_result | None, error: str) -> None:
        """The process of a child has ended (`status`), or could not be forked (`error`)."""
        child = self.by_id[process.spec.id]
        child.process, child.bounce = None, False
        reason = process.reason(status, error)
        child.last_exit = reason
        child.culprit = None if process.ending is None else process.ending.culprit
        child.subtree_stopped()
        self._gone(child)
        self._tell(child, "exit", reason.text, process.pid or None, crash=reason.abnormal and not process.asked)
        if self._needed_until_its_turn(child, process):
            self._start(child)
        elif process.asked or process.ignored or self.result is not None:
            if child.wanted and not process.ignored:
                child.state = "restarting"
            else:
                child.wanted = False
                if process.ignored:
                    child.came_up()
                    self._tell(child, "ignored", process.said)
                self._put_down(child)
        else:
            if reason.abnormal:
                self._record_crash(process, reason)
            self._ended_unasked(child, process, reason)
        self.step()

    def _record_crash(self, process: Process, reason: ExitReason) -> None:
        """Writes a report for people. A supervisor does its work without it too, on a full disk for example."""
        report = CrashReport(
            id=process.spec.id,
            pid=process.pid,
            incarnation=process.incarnation,
            uptime_s=round(time.monotonic() - process.started_at, 3),
            doing=process.doing,
            reason=reason,
        )
        try:
            record_crash(self._run_dir, report)
        except OSError as error:
            self.unwritten += 1
            _log.warning("the crash report of %s cannot be written: %s", report.id, error.strerror)

    def _needed_until_its_turn(self, child: Child, process: Process) -> bool:
        """Whether a child that died while all are stopped in order is started again, because others to its right, which
        may need it to finish what they are at, still stop."""
        if self.result is None or not self.result.ok or process.asked or process.ignored or self._dynamic:
            return False
        ids = list(self.by_id)
        to_the_right = ids[ids.index(child.spec.id) + 1 :]
        if child.spec.restart != "permanent" or all(self.by_id[id].process is None for id in to_the_right):
            return False
        return self._intensity.add(time.monotonic())

    def _ended_unasked(self, child: Child, process: Process, reason: ExitReason) -> None:
        """A child ended by itself: start it again, let it be, or give up."""
        name = child.spec.id
        struck = reason.kind in ("signal", "hung") and child.delay.quick_crashes < TRIALS
        if child.trial and not (child.trial == "give_up" and struck):
            text = f"{name} could not start: {reason.text}"
            child.came_up(text)
            if child.trial == "give_up":
                self._give_up(child, text)
            else:
                child.wanted = False
                self._put_down(child)
                child.state = "failed"
                if child.trial == "forget":
                    self._remove(child)
            return
        child.came_up(f"{name} did not start again: {reason.text}")
        if not wants_restart(child.spec.restart, reason):
            child.wanted = False
            self._put_down(child)
            if reason.abnormal:
                child.state = "failed"
            self._auto_shutdown(child)
            return
        now = time.monotonic()
        within = self._intensity.add(now)
        delay_s = child.delay.next(0.0 if process.ready_at is None else now - process.ready_at)
        if not within:
            times = f"more than {self.spec.intensity} restarts within {self.spec.period_s:g} s"
            self._give_up(child, f"{times}, the last because of {name}: {reason.text}")
        elif child.delay.exhausted:
            self._give_up(child, f"{name} crashed {child.delay.quick_crashes} times in a row: {reason.text}")
        else:
            self._restart_with_siblings(child, now + delay_s)

    def _restart_with_siblings(self, failed: Child, not_before: float) -> None:
        """Marks a child, and the siblings that go with it, for a stop (where they run) and a start."""
        group = self.spec.strategy in ("one_for_all", "rest_for_one")
        self._wave_number = None
        for name in list(affected(self.spec.strategy, list(self.by_id), failed.spec.id)):
            child = self.by_id[name]
            child.in_wave = group or child.trial == "give_up"
            if child is not failed and child.spec.restart == "temporary":
                child.wanted = False  # stopped with the others, never started again
                if child.process is None:
                    self._put_down(child)
                continue
            child.wanted, child.not_before = True, not_before
            child.bounce = child.process is not None

    def _put_down(self, child: Child) -> None:
        """A child that is not wanted has no process (any more)."""
        child.state = "stopped"
        child.in_wave = False
        if self.result is None:  # a supervisor that ends leaves it to its parent what becomes of stored descriptors
            for owner, name in child.fd_store.names():
                self._pass_up(messages.RemoveFd(owner=owner, name=name), ())
            child.fd_store.clear()
        if child.spec.restart == "temporary" or self._dynamic:
            self._remove(child)
        self._tell(child, "stopped")
        child.came_down()

    def _remove(self, child: Child) -> None:
        child.fd_store.clear()
        self.by_id.pop(child.spec.id, None)

    def _auto_shutdown(self, child: Child) -> None:
        rule = self.spec.auto_shutdown
        if not child.spec.significant or rule == "never" or self.result is not None:
            return
        others = (other for other in self.by_id.values() if other.spec.significant and other is not child)
        if rule == "any_significant" or not any(other.wanted for other in others):
            self.end(RunResult(ok=True, text=f"significant child {child.spec.id} has ended"))

    def _give_up(self, child: Child, text: str) -> None:
        assert child.last_exit is not None
        culprit = child.culprit or Culprit(
            id=child.spec.id, reason=child.last_exit, log=str(self._log_path(child.spec.id))
        )
        self._tell(child, "gave_up", text)
        child.wanted = False
        self.end(RunResult(ok=False, text=text, culprit=culprit))
        child.state = "failed"

    def _log_path(self, name: str) -> Path:
        return self._run_dir / "logs" / f"{name}.log"

    def _tell(
        self, child: Child, kind: EventKind, text: str = "", pid: int | None = None, *, crash: bool = False
    ) -> None:
        if pid is None and child.process is not None:
            pid = child.process.pid or None
        self._report(
            Event(
                kind=kind,
                id=child.spec.id,
                text=text,
                pid=pid,
                incarnation=child.incarnation,
                when=time.time(),
                crash=crash,
            )
        )
