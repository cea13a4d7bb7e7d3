"""The scheduler: continuous batching over paged KV with a prefix tree."""

from actors.scheduler.actor import Scheduler
from actors.scheduler.config import Config

__all__ = ["Config", "Scheduler"]
