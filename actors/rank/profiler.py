"""Profiles of a rank's steps with torch's profiler, written as Chrome traces."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from llm_runtime.actors.messages import Profile, Profiled

logger = logging.getLogger(__name__)

MAX_STEPS = 10_000
"""A profile keeps every operation in memory: it ends by itself after so many steps."""


class Refusal(Exception):
    """What is asked for cannot be done; one sentence."""


class Profiler:
    """At most one profile at a time. Nothing of it outlives the process.

    Args:
        rank: the actor's name, a part of the names of its files.
        directory: where files go, or into directories below it that are asked for.
    """

    def __init__(self, rank: str, device: torch.device, directory: Path) -> None:
        self._rank = rank
        self._device = device
        self._directory = directory
        self._profile: profile | None = None
        self._path = Path()
        self._steps_left = 0
        self._answered = Profiled("-")

    def ask(self, message: Profile) -> Profiled:
        """Does what is asked. A question that comes again is answered as the first time."""
        if message.rid != self._answered.rid:
            try:
                path = self._start(message) if message.start else self.finish()
                self._answered = Profiled(message.rid, str(path))
            except Refusal as refusal:
                self._answered = Profiled(message.rid, error=f"{self._rank}: {refusal}.")
        return self._answered

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around a step; it is marked in the profile if one is being taken."""
        if self._profile is None:
            yield
            return
        with record_function(f"step {number}"):
            yield
        self._steps_left -= 1

    @property
    def due(self) -> bool:
        """Whether a profile has all of its steps: call `finish`."""
        return self._profile is not None and self._steps_left <= 0

    def finish(self) -> Path:
        """Ends the profile and writes it; where. Raises Refusal if there is none, or it cannot be written."""
        if self._profile is None:
            raise Refusal("no profile is being taken")
        taken, self._profile = self._profile, None
        taken.stop()
        began, umask = time.monotonic(), os.umask(0o077)
        try:
            taken.export_chrome_trace(str(self._path))
        except (OSError, RuntimeError) as error:
            raise Refusal(f"the profile cannot be written to {self._path} ({error})") from None
        finally:
            os.umask(umask)
        logger.info("wrote a profile to %s in %.1f s", self._path, time.monotonic() - began)
        return self._path

    def _start(self, message: Profile) -> Path:
        if self._profile is not None:
            raise Refusal("a profile is being taken already")
        wanted = set(message.activities)
        activities = [ProfilerActivity.CPU] if "CPU" in wanted else []
        if "GPU" in wanted and self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        if not activities:
            raise Refusal("its device is no GPU: ask for the activity CPU")
        directory = _below(self._directory, message.output_dir)
        self._path = directory / f"{message.name}-{self._rank}.trace.json.gz"
        self._steps_left = message.num_steps or MAX_STEPS
        self._profile = profile(
            activities=activities, record_shapes=message.record_shapes, with_stack=message.with_stack
        )
        self._profile.start()
        return self._path


def _below(base: Path, name: str) -> Path:
    """The directory that a client has named, which must lie in the one for profiles, or that one itself."""
    try:
        base.mkdir(mode=0o700, parents=True, exist_ok=True)
        root = base.resolve(strict=True)
        directory = (root / name).resolve()
        if not directory.is_relative_to(root):
            raise Refusal(f"output_dir must lie in {base}, the node's node.profile_dir: give a name in it, or none")
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:
        raise Refusal(f"output_dir {name or base} cannot be used ({error})") from None
    except ValueError as error:  # a zero byte
        raise Refusal(f"output_dir cannot be used ({error})") from None
    return directory
