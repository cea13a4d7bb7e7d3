"""The scheduler: continuous batching over paged KV with a prefix tree, for engines of each role."""

from actors.scheduler.actor import Scheduler
from actors.scheduler.config import Config
from actors.scheduler.decode import DecodeScheduler
from actors.scheduler.prefill import PrefillScheduler

__all__ = ["Config", "DecodeScheduler", "PrefillScheduler", "Scheduler"]
