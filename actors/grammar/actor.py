"""The grammar actor: compiles what others will have to keep to, so that a bad constraint harms nobody else."""

from __future__ import annotations

import logging
import resource
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from llm_runtime.actors.actor import Actor, StartFailure, handles
from llm_runtime.actors.checkpoint import CheckpointError
from llm_runtime.actors.grammar.backends import BackendName, load_backend, missing
from llm_runtime.actors.grammar.compiler import GrammarCompiler
from llm_runtime.actors.messages import Compile, Compiled

logger = logging.getLogger(__name__)

CHECK_INTERVAL_S = 0.1


class GrammarConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Settings of the grammar actor.

    Attributes:
        model: GGUF file or Hugging Face directory.
        vocab_size: number of the model's logits.
        backend: the library that compiles.
        limit_s: how long a constraint may take to compile, of a processor's time.
        limit_bytes: memory that this process may take beyond what it has when it starts.
    """

    model: str
    vocab_size: Annotated[int, Meta(ge=1, lt=2**31)]
    backend: BackendName = "llguidance"
    limit_s: Annotated[float, Meta(gt=0, le=3600)] = 5.0
    limit_bytes: Annotated[int, Meta(ge=2**26)] = 2**30


class Grammar(Actor):
    """Answers `Compile`. A constraint that takes too long ends the process, for nothing else ends the compiler, but is
    answered first; one that crashes it is asked for again by its scheduler, and then no more."""

    def setup(self) -> None:
        self.config = config = msgspec.convert(self.args.config, GrammarConfig)
        try:
            if not missing(config.backend):
                load_backend(Path(config.model), config.vocab_size, config.backend)
        except CheckpointError as error:
            raise StartFailure(str(error)) from None
        self.compiler = GrammarCompiler(lambda: load_backend(Path(config.model), config.vocab_size, config.backend))
        self.watched.append(self.compiler.fd)
        self.refused = 0
        _limit_memory(config.limit_bytes)
        self.watching = False

    @handles(Compile)
    def compile(self, message: Compile, sender: str) -> None:
        """A constraint that a scheduler has not seen before."""
        self.compiler.submit(message.constraint, sender)
        self._watch()

    def turn(self) -> None:
        for asker, answer in self.compiler.finished():
            self._answer(asker, answer)

    def stats(self) -> dict[str, float]:
        """Constraints compiled, and refused, since the start."""
        return {"grammars_compiled": float(self.compiler.compiled), "grammars_refused": float(self.refused)}

    def _answer(self, asker: str, answer: Compiled) -> None:
        self.refused += bool(answer.error)
        self.send(asker, answer)

    def _watch(self) -> None:
        if self.compiler.busy and not self.watching:
            self.watching = True
            self.after(CHECK_INTERVAL_S, self._check)

    def _check(self) -> None:
        self.watching = False
        digest = self.compiler.overdue(self.config.limit_s)
        if not digest:
            self._watch()
            return
        text = f"The constraint takes longer than {self.config.limit_s:g} seconds to compile: make it simpler."
        for asker in self.compiler.askers(digest):
            self._answer(asker, Compiled(digest, text))
        logger.error("a constraint takes too long to compile: the process ends to be rid of it")
        raise SystemExit(1)


def _limit_memory(further: int) -> None:
    """More is refused to the compiler, so that it fails with one constraint instead of with the node."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = pages * resource.getpagesize() + further
    resource.setrlimit(resource.RLIMIT_AS, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))
