"""Formats of a kind by name, and by the chat templates that show them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from llm_runtime.actors.registry import Registry

C = TypeVar("C")


class Formats(Registry[type[C]]):
    """A registry of parsers. A format is one file: its class, its names, and how a chat template shows it."""

    def __init__(self, kind: str, group: str, argument: str, base: type) -> None:
        super().__init__(kind, group, (argument,), base, reserved=("auto", "none"))
        self._templates: dict[str, tuple[int, Callable[[str], bool]]] = {}

    def register(
        self, name: str, *aliases: str, template: Callable[[str], bool] | None = None, rank: int = 0
    ) -> Callable[[type[C]], type[C]]:
        """Registers the class below as a format.

        Args:
            name, aliases: names under which users ask for it. The first one is ours, which is SGLang's if it has one.
            template: whether a chat template shows this format; None if templates do not tell.
            rank: of several formats that a template may show, the one with the highest rank is taken.
        """
        if template is not None:
            self._templates[name] = rank, template
        return super().register(name, *aliases)

    @property
    def formats(self) -> tuple[str, ...]:
        """The first name of each format of this package, in alphabetical order."""
        first: dict[type[C], str] = {}
        for name, parser in self._own.items():
            first.setdefault(parser, name)
        return tuple(sorted(first.values()))

    def detect(self, template: str) -> str | None:
        """The format of this package that a chat template shows; None if it shows none that is known."""
        found = [(-rank, name) for name, (rank, shows) in self._templates.items() if shows(template)]
        return min(found)[1] if found else None
