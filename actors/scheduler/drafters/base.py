"""What drafters have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from typing import TYPE_CHECKING

from llm_runtime.actors.registry import Registry

if TYPE_CHECKING:
    from llm_runtime.actors.scheduler.config import Config


class Drafter(ABC):
    """Guesses the next tokens of one request. The ranks verify the guesses, so wrong ones cost time and nothing else.

    Args:
        tokens: prompt and output (i32). The scheduler appends to it; see `follow`.
        config: the scheduler's settings.
    """

    __slots__ = ()

    @abstractmethod
    def __init__(self, tokens: array[int], config: Config) -> None: ...

    @abstractmethod
    def follow(self) -> None:
        """Takes in the tokens that are new since the last call. The scheduler calls it before it asks anything."""

    @abstractmethod
    def chances(self, count: int) -> list[float]:
        """The chance of each of the next `count` guesses to be right together with all guesses before it. Shorter
        where there are fewer guesses; empty without any."""

    @abstractmethod
    def guess(self, count: int) -> tuple[int, ...]:
        """The next `count` tokens, no more than there were chances: ids of the model's vocabulary."""

    @property
    def rate(self) -> float:
        """The chance of the next guess to be right; 0 without one."""
        return next(iter(self.chances(1)), 0.0)


DRAFTERS: Registry[type[Drafter]] = Registry(
    "drafter", "llm_runtime.drafters", ("tokens", "config"), Drafter, reserved=("off",)
)
