"""Drafters, each in a file of its own, by the names that `[engine.NAME] speculation` takes."""

from llm_runtime.actors.scheduler.drafters.base import DRAFTERS as DRAFTERS
from llm_runtime.actors.scheduler.drafters.base import Drafter as Drafter

DRAFTERS.load(__name__, __path__)
