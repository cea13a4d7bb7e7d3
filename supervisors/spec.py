"""What to supervise: child and supervisor specifications, with the vocabulary and rules of Erlang/OTP.

Specifications are plain data (MessagePack-able), because the specification of a nested supervisor travels to
the process that runs it.
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

Restart = Literal["permanent", "transient", "temporary"]
Strategy = Literal["one_for_one", "one_for_all", "rest_for_one", "simple_one_for_one"]
AutoShutdown = Literal["never", "any_significant", "all_significant"]
ChildType = Literal["worker", "supervisor"]

NESTED_SUPERVISOR = "llm_runtime.supervisors.nested:NestedSupervisor"
"""What a child of type "supervisor" runs."""

DEFAULT_SHUTDOWN_MS = 5000
HEARTBEAT_S = 1.0
MAX_DESCRIPTORS = 200
"""Named descriptors one child may inherit; the kernel passes at most 253 in one message."""

MAX_MS = 2**32 - 1
"""The longest time in a child's specification, Erlang's longest timeout: 49 days."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
_START = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


class SpecError(ValueError):
    """A specification that cannot be started; the message is one sentence that says what to change."""


class Backoff(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Delay before a restart. OTP has none; a process is dearer than an Erlang process.

    The first restart is immediate. A crash before `stable_ms` of being ready counts as a quick one; the n-th
    quick crash in a row (n >= 2) waits `base_ms * factor ** (n - 2)`, at most `cap_ms`, times 1 ± `jitter`.
    `give_up_after` quick crashes in a row end the supervisor as too many restarts do: with a delay between
    them they would never exceed the restart intensity.
    """

    base_ms: Annotated[float, Meta(ge=0)] = 50.0
    factor: Annotated[float, Meta(ge=1)] = 2.0
    cap_ms: Annotated[float, Meta(ge=0)] = 5000.0
    jitter: Annotated[float, Meta(ge=0, lt=1)] = 0.2
    stable_ms: Annotated[float, Meta(ge=0)] = 1000.0
    give_up_after: Annotated[int, Meta(ge=1)] = 20


class ChildSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One child of a supervisor.

    id                    unique in the whole tree; names its log, crash reports and incarnation count.
    start                 "module:Class" with `@classmethod def run(cls, context: ChildContext) -> None`.
    args                  MessagePack-able arguments, handed over in the context.
    restart               permanent: always; transient: unless it ended normally; temporary: never.
    shutdown              milliseconds between the request to stop and SIGKILL, "brutal_kill" or "infinity";
                          None: 5000 for a worker, "infinity" for a supervisor.
    supervisor            what a child of type "supervisor" supervises; `start` stays empty then.
    significant           its end may end the supervisor (see SupervisorSpec.auto_shutdown).
    role                  free text for the status.
    descriptors           names of the file descriptors it inherits; a supervisor also gets those of its subtree.
    start_timeout_ms      from the start of a worker until `Link.ready()`; a supervisor may take what its children take.
    heartbeat_timeout_ms  silence after which a started child counts as hung and is killed.
    title                 process title; default "runtime: ID".
    """

    id: str
    start: str = ""
    args: dict[str, Any] = {}
    restart: Restart = "permanent"
    shutdown: int | Literal["brutal_kill", "infinity"] | None = None
    type: ChildType = "worker"
    supervisor: SupervisorSpec | None = None
    significant: bool = False
    role: str = ""
    descriptors: tuple[str, ...] = ()
    start_timeout_ms: int = 60_000
    heartbeat_timeout_ms: int = 5_000
    title: str | None = None

    @property
    def shutdown_ms(self) -> float | None:
        """Milliseconds a child may take to stop; 0 for brutal_kill, None for infinity."""
        if self.shutdown is None:
            return None if self.type == "supervisor" else DEFAULT_SHUTDOWN_MS
        if self.shutdown == "infinity":
            return None
        return 0 if self.shutdown == "brutal_kill" else self.shutdown

    @property
    def heartbeat_s(self) -> float:
        """Seconds from one heartbeat to the next."""
        return min(HEARTBEAT_S, self.heartbeat_timeout_ms / 4000)

    @property
    def process_title(self) -> str:
        return f"runtime: {self.id}" if self.title is None else self.title

    @property
    def entry(self) -> str:
        """The "module:Class" to run."""
        return NESTED_SUPERVISOR if self.type == "supervisor" else self.start

    def inherited(self) -> tuple[str, ...]:
        """Names of the descriptors to hand over: its own and, for a supervisor, those of its subtree."""
        names = dict.fromkeys(self.descriptors)
        if self.supervisor is not None:
            for child in self.supervisor.children:
                names.update(dict.fromkeys(child.inherited()))
        return tuple(names)


class SupervisorSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A supervisor: its children in starting order and what happens when one of them ends.

    More than `intensity` restarts within `period_s` seconds end the supervisor and all its children; its parent
    then decides. The default bears about one kill a second, spread over the children, for as long as it lasts.
    With simple_one_for_one, `children` holds one template; children are added at run time as ChildInstance.
    """

    strategy: Strategy = "one_for_one"
    children: tuple[ChildSpec, ...] = ()
    intensity: Annotated[int, Meta(ge=0)] = 30
    period_s: Annotated[float, Meta(gt=0)] = 10.0
    auto_shutdown: AutoShutdown = "never"
    backoff: Backoff = Backoff()

    def descendants(self) -> Iterator[ChildSpec]:
        """All specifications below this supervisor, parents first."""
        for child in self.children:
            yield child
            if child.supervisor is not None:
                yield from child.supervisor.descendants()


class ChildInstance(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One more child of a simple_one_for_one supervisor: `args` are laid over those of the template."""

    id: str
    args: dict[str, Any] = {}


def validate_child(child: ChildSpec, auto_shutdown: AutoShutdown = "never") -> None:
    """Raises SpecError unless `child` (and what is below it) can be started under such a supervisor."""
    name = f"child {child.id!r}"
    _check_types(child, name)
    if not _NAME.fullmatch(child.id):
        raise SpecError(
            f"{name}: an id has 1 to 100 letters, digits, '_', '-' or '.', and starts with a letter or digit"
        )
    if isinstance(child.shutdown, int) and not 0 <= child.shutdown <= MAX_MS:
        raise SpecError(
            f'{name}: shutdown is {child.shutdown} ms; give 0 to {MAX_MS}, "brutal_kill", or "infinity" for longer'
        )
    for field, value in (
        ("start_timeout_ms", child.start_timeout_ms),
        ("heartbeat_timeout_ms", child.heartbeat_timeout_ms),
    ):
        if not 0 < value <= MAX_MS:
            raise SpecError(f"{name}: {field} is {value}; give 1 to {MAX_MS} milliseconds")
    if len(child.inherited()) > MAX_DESCRIPTORS:
        raise SpecError(f"{name}: {len(child.inherited())} descriptors; at most {MAX_DESCRIPTORS} can be inherited")
    if child.significant and child.restart == "permanent":
        raise SpecError(f"{name}: a significant child must be transient or temporary, as a permanent one never ends")
    if child.significant and auto_shutdown == "never":
        raise SpecError(f"{name}: significant has no effect unless the supervisor sets auto_shutdown; set it")
    try:
        msgspec.msgpack.encode(child.args)
    except (TypeError, OverflowError, ValueError, RecursionError) as error:
        raise SpecError(f"{name}: args must be MessagePack-able: {error}") from None
    if child.type == "supervisor":
        if child.supervisor is None:
            raise SpecError(f'{name}: a child of type "supervisor" needs its SupervisorSpec in `supervisor`')
        if child.start:
            raise SpecError(f'{name}: leave `start` empty for a child of type "supervisor"')
        _validate_supervisor(child.supervisor, name)
    else:
        if child.supervisor is not None:
            raise SpecError(f'{name}: has a SupervisorSpec; set its type to "supervisor"')
        _validate_start(name, child.start)


def validate(spec: SupervisorSpec) -> None:
    """Raises SpecError, naming the child and what to change, unless the whole tree can be started."""
    _validate_supervisor(spec, "the supervisor")
    duplicates = [name for name, count in Counter(child.id for child in spec.descendants()).items() if count > 1]
    if duplicates:
        raise SpecError(f"child {duplicates[0]!r} occurs more than once; give each child of the tree its own id")


def _validate_supervisor(spec: SupervisorSpec, name: str) -> None:
    _check_types(spec, name)
    backoff = [(f"backoff.{field}", getattr(spec.backoff, field)) for field in Backoff.__struct_fields__]
    for field, value in (("period_s", spec.period_s), *backoff):
        if not math.isfinite(value):
            raise SpecError(f"{name}: {field} is {value}; give a finite number")
    if spec.strategy == "simple_one_for_one":
        if spec.auto_shutdown != "never":  # as OTP does since version 27
            raise SpecError(f"{name}: auto_shutdown does not go with simple_one_for_one; leave it out")
        if len(spec.children) != 1:
            raise SpecError(f"{name}: simple_one_for_one takes one child as template, not {len(spec.children)}")
        if spec.children[0].type == "supervisor":
            raise SpecError(f"{name}: the template of simple_one_for_one must be a worker, so that ids stay unique")
    for child in spec.children:
        validate_child(child, spec.auto_shutdown)


def _check_types(spec: ChildSpec | SupervisorSpec, name: str) -> None:
    """Types and limits of the fields, which msgspec checks on decoding only."""
    try:
        msgspec.convert(msgspec.to_builtins(spec, builtin_types=(bytes,)), type(spec))
    except (msgspec.ValidationError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise SpecError(f"{name}: {error}") from None


def _validate_start(name: str, start: str) -> None:
    if not _START.fullmatch(start):
        raise SpecError(f'{name}: start is {start!r}; give "module:Class"')
    module = start.partition(":")[0]
    try:
        found = importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        found = False
    if not found:
        raise SpecError(f"{name}: there is no module {module!r}; correct `start`, which is {start!r}")
