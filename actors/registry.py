"""Implementations of one kind by name: those of this package, and those that other packages bring as entry points."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pkgutil import iter_modules
from typing import Any, Generic, TypeVar

from llm_runtime.actors.errors import StartFailure

T = TypeVar("T")


class Registry(Generic[T]):
    """One registration makes an implementation known everywhere: to topologies, their errors, and the actors.

    An implementation of this package registers with the decorator `register`. One of another package is an entry point:
    its name is the implementation's name. It is imported when somebody asks for that name, and never before.

    Args:
        kind: what is registered, in the words of error messages.
        group: the group of entry points.
        arguments: what an implementation is called with.
        base: the class that implementations are subclasses of; None if they are functions.
        reserved: values of the topology's key that name no implementation.
    """

    def __init__(
        self, kind: str, group: str, arguments: Sequence[str], base: type | None = None, reserved: Sequence[str] = ()
    ) -> None:
        self.kind = kind
        self.group = group
        self.reserved = tuple(reserved)
        self._arguments = tuple(arguments)
        self._base = base
        self._own: dict[str, T] = {}
        self._others: dict[str, T] = {}

    def register(self, name: str, *aliases: str) -> Callable[[T], T]:
        """Registers the class or function below under these names."""

        def declare(implementation: T) -> T:
            for each in (name, *aliases):
                assert each not in (*self._own, *self.reserved), f"there already is a {self.kind} named {each}"
                self._own[each] = implementation
            return implementation

        return declare

    def load(self, package: str, path: list[str]) -> None:
        """Imports all modules of a package, so that they register what they hold."""
        for module in iter_modules(path):
            import_module(f"{package}.{module.name}")

    @property
    def names(self) -> tuple[str, ...]:
        """The names in this package, in alphabetical order."""
        return tuple(sorted(self._own))

    @property
    def installed(self) -> tuple[str, ...]:
        """The names that other installed packages add, in alphabetical order. Imports none of them."""
        return tuple(sorted({point.name for point in entry_points(group=self.group)} - {*self._own, *self.reserved}))

    def get(self, name: str) -> T:
        """The implementation of a name. One of another package is imported at the first call.

        Raises StartFailure if there is none, or if the one of another package cannot be used.
        """
        if name in self._own:
            return self._own[name]
        if name not in self._others:
            points = tuple(entry_points(group=self.group, name=name))
            if not points:
                known = ", ".join(f'"{each}"' for each in (*self.reserved, *self.names, *self.installed))
                raise StartFailure(f'there is no {self.kind} "{name}"; give one of {known}')
            self._others[name] = self._load(points[0])
        return self._others[name]

    def _load(self, point: EntryPoint) -> T:
        """Imports what an entry point names. Raises StartFailure if that cannot be used."""
        try:
            found = point.load()
            problem = self._problem(found)
        except Exception as error:  # whatever a package from outside does
            problem = f"{type(error).__name__}: {error}"
        if problem:
            package = f"{point.dist.name} {point.dist.version}" if point.dist else "unknown package"
            raise StartFailure(
                f'the {self.kind} "{point.name}" cannot be used: the entry point "{point.name} = {point.value}" in '
                f"[{self.group}] of {package}: {problem}"
            )
        implementation: T = found
        return implementation

    def _problem(self, found: Any) -> str:
        """What an object lacks to be an implementation; empty if nothing."""
        base = self._base
        if base is not None:
            name = f"{base.__module__}.{base.__qualname__}"
            if not (isinstance(found, type) and issubclass(found, base)):
                return f"it is not a subclass of {name}"
            missing = {*getattr(found, "__abstractmethods__", ())}
            missing |= {each for each in inspect.get_annotations(base) if not hasattr(found, each)}
            if missing:
                return f"it lacks {', '.join(sorted(missing))} of {name}"
        try:
            inspect.signature(found).bind(*self._arguments)
        except TypeError:
            return f"it cannot be called with ({', '.join(self._arguments)})"
        return ""
