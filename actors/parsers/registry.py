"""Formats of a kind by name. A format is one file: its class, its names, and how a chat template shows it."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pkgutil import iter_modules
from typing import Generic, NamedTuple, TypeVar

C = TypeVar("C")


class _Format(NamedTuple, Generic[C]):
    parser: type[C]
    template: Callable[[str], bool] | None
    rank: int


class Formats(Generic[C]):
    """What the modules of a package declare with `register`."""

    def __init__(self) -> None:
        self._formats: dict[str, _Format[C]] = {}
        self._canonical: dict[str, str] = {}

    def register(
        self, name: str, *aliases: str, template: Callable[[str], bool] | None = None, rank: int = 0
    ) -> Callable[[type[C]], type[C]]:
        """Declares the class below as a format.

        Args:
            name, aliases: names under which users ask for it. The first one is ours, which is SGLang's if it has one.
            template: whether a chat template shows this format; None if templates do not tell.
            rank: of several formats that a template may show, the one with the highest rank is taken.
        """

        def declare(parser: type[C]) -> type[C]:
            self._formats[name] = _Format(parser, template, rank)
            for each in (name, *aliases):
                assert each not in self._canonical, f"two formats are named {each}"
                self._canonical[each] = name
            return parser

        return declare

    def load(self, package: str, path: list[str]) -> None:
        """Imports all modules of a package."""
        for module in iter_modules(path):
            import_module(f"{package}.{module.name}")

    @property
    def names(self) -> tuple[str, ...]:
        """All names, aliases among them, in alphabetical order."""
        return tuple(sorted(self._canonical))

    @property
    def formats(self) -> tuple[str, ...]:
        """The first name of each format, in alphabetical order."""
        return tuple(sorted(self._formats))

    def canonical(self, name: str) -> str:
        """The first name of a format."""
        return self._canonical[name]

    def parser(self, name: str) -> type[C]:
        """The class of a format."""
        return self._formats[self._canonical[name]].parser

    def detect(self, template: str) -> str | None:
        """The format that a chat template shows; None if it shows none that is known."""
        found = [
            (-each.rank, name)
            for name, each in self._formats.items()
            if each.template is not None and each.template(template)
        ]
        return min(found)[1] if found else None
