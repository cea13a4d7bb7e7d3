"""Peers of an ingress that speak the protocol and can be told to misbehave: one thread with four mailboxes.

The fake tokenizer makes one token of each byte. The fake model's answer is a pure function of prompt, seed and index,
as it is with a real one, so every test knows what its client must have received to the last character.
"""

from __future__ import annotations

import json
import threading
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from msgspec import msgpack, structs

from llm_runtime.actors.messages import (
    Abort,
    Acknowledge,
    ActorStats,
    CacheFlushed,
    ChatPrompt,
    DescribeTokenizer,
    Detokenize,
    Detokenized,
    EngineInfo,
    FillPrompt,
    FlushCache,
    Generate,
    Hello,
    Message,
    Refused,
    Register,
    Registry,
    Resend,
    TextEvent,
    TextLogprob,
    Texts,
    Tokenize,
    Tokenized,
    TokenizeFailed,
    TokenizerDescribed,
    Unknown,
)
from llm_runtime.transport import Codec, Mailbox

VOCAB_SIZE = 1000
EOS = 2
MAX_MODEL_LEN = 512
MODEL = "fake/model"


def piece(token: int) -> str:
    """The text of a token: its byte below 256, and a word above, some of them beyond ASCII."""
    if token < 256:
        return bytes([token]).decode("latin-1")
    return (f"w{token} ", f"é{token} ", f"😀{token} ", f"{token}\n")[token % 4]


def packed(text: str) -> bytes:
    """The fake tokenizer's tokens (i32) of a text."""
    return array("i", list(text.encode())).tobytes()


def unpacked(prompt: bytes) -> str:
    """The text of the fake tokenizer's tokens."""
    return bytes(array("i", prompt).tolist()).decode()


def token_at(prompt: bytes, seed: int, index: int) -> int:
    """What the fake model draws."""
    return 256 + (sum(prompt) * 31 + seed * 7 + index * index * 13 + index) % (VOCAB_SIZE - 256)


def answer(prompt: str, seed: int, count: int) -> str:
    """The text of the fake model's first `count` tokens after a prompt."""
    return "".join(piece(token_at(packed(prompt), seed, index)) for index in range(count))


@dataclass
class Plan:
    """The whole answer to a request."""

    tokens: list[int]
    ends: list[int]
    text: str
    finish: str
    stop_reason: str | int | None


_plans: dict[tuple[bytes, bytes, int | None], Plan] = {}


def plan(generate: Generate, eos_at: int | None = None) -> Plan:
    """What `whole_answer` gives, made once for each request."""
    key = generate.prompt, msgpack.encode((generate.sampling, generate.text)), eos_at
    if key not in _plans:
        _plans[key] = whole_answer(generate, eos_at)
    return _plans[key]


def whole_answer(generate: Generate, eos_at: int | None = None) -> Plan:
    """The answer to a request, which ends with an end-of-sequence token at index `eos_at` if that is given."""
    sampling = generate.sampling
    tokens: list[int] = []
    ends: list[int] = []
    text = ""
    for index in range(sampling.max_tokens):
        token = token_at(generate.prompt, sampling.seed, index)
        if eos_at is not None and index >= eos_at and EOS in sampling.stop_token_ids:
            tokens.append(EOS)
            ends.append(len(text))
            return Plan(tokens, ends, text, "stop", EOS)
        tokens.append(token)
        text += piece(token)
        ends.append(len(text))
        if token in sampling.stop_token_ids:
            text = text[: len(text) - len(piece(token))]
            ends[-1] = len(text)
            return Plan(tokens, ends, text, "stop", token)
        for stop in generate.text.stop:
            at = text.find(stop)
            if at >= 0:
                text = text[: at + len(stop) if generate.text.no_stop_trim else at]
                return Plan(tokens, [min(end, len(text)) for end in ends], text, "stop", stop)
    return Plan(tokens, ends, text, "length", None)


def scripted_answer(generate: Generate, text: str) -> Plan:
    """An answer of this text and an end-of-sequence token, with a token for each character."""
    sampling = generate.sampling
    finish, reason = "stop", EOS
    for stop in generate.text.stop:
        if stop in text:
            text, reason = text[: text.index(stop)], stop
    tokens = [min(ord(character), 255) for character in text]
    if reason == EOS:
        tokens.append(EOS)
    if len(tokens) > sampling.max_tokens:
        tokens, text, finish, reason = tokens[: sampling.max_tokens], text[: sampling.max_tokens], "length", None
    return Plan(tokens, [min(end + 1, len(text)) for end in range(len(tokens))], text, finish, reason)


def logprob(token: int) -> TextLogprob:
    """The fake model's logprob of a token."""
    other = token + 1
    text = piece(token).encode()
    return TextLogprob(
        token, text, -0.25 - token % 8, [(token, text, -0.25 - token % 8), (other, piece(other).encode(), -20.0)]
    )


@dataclass
class Running:
    """A request in the fake engine."""

    generate: Generate
    sender: str
    plan: Plan
    sent: int
    """Output tokens sent so far."""
    base: int
    """Output tokens that the ingress had when it sent the request."""

    @property
    def done(self) -> bool:
        return self.sent >= len(self.plan.tokens)

    def event(self, start: int, end: int) -> TextEvent:
        """The event with tokens [start, end)."""
        generate, whole = self.generate, self.plan
        from_character = whole.ends[start - 1] if start else 0
        last = end == len(whole.tokens)
        to_character = len(whole.text) if last else (whole.ends[end - 1] if end else 0)
        sampling = generate.sampling
        prompt_logprobs = None
        if start == 0 and sampling.prompt_logprobs >= 0:
            prompt_logprobs = [logprob(token) for token in array("i", generate.prompt)]
            prompt_logprobs[0] = structs.replace(prompt_logprobs[0], logprob=None, top=[])
        return TextEvent(
            rid=generate.rid,
            attempt=generate.attempt,
            index=start,
            tokens=whole.tokens[start:end],
            offset=from_character,
            text=whole.text[from_character:to_character],
            finish=whole.finish if last else None,  # type: ignore[arg-type]
            stop_reason=whole.stop_reason if last else None,
            cached_tokens=1,
            logprobs=[logprob(token) for token in whole.tokens[start:end]] if sampling.logprobs >= 0 else None,
            prompt_logprobs=prompt_logprobs,
        )


@dataclass
class Seen:
    """What the fakes have received."""

    generates: list[Generate] = field(default_factory=list)
    aborts: list[str] = field(default_factory=list)
    acknowledged: list[str] = field(default_factory=list)
    resends: list[Resend] = field(default_factory=list)
    flushes: list[str] = field(default_factory=list)
    tokenizes: list[Tokenize] = field(default_factory=list)
    stats: list[tuple[str, ActorStats]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    """What breaks the protocol."""


class Fakes:
    """Bootstrap, tokenizer, scheduler and detokenizer in one thread. Attributes may be set while it runs.

    Attributes:
        step_s: pause between two steps.
        per_step: tokens of each running request in one step.
        filter: given each outgoing batch of events; gives the batches to send.
        refuse: given each `Generate`; gives the refusal, or None to serve.
        frozen: no steps are made.
        silent_tokenizer: the tokenizer answers nothing.
        silent_flush: the scheduler does not say that it has flushed its cache.
        registered: the bootstrap lists the engine.
        eos_at: answers end there.
        script: given a `Generate`; gives the whole text of its answer.
        opening: with what prompts of chats end, unless the template is told `enable_thinking: false`.
    """

    def __init__(self, directory: Path, ingresses: list[str], scheduler: str = "main.scheduler") -> None:
        self.directory = directory
        self.ingresses = ingresses
        self.scheduler = scheduler
        self.step_s = 0.002
        self.per_step = 1
        self.filter: Callable[[list[TextEvent]], list[list[TextEvent]]] = lambda events: [events]
        self.refuse: Callable[[Generate], Refused | None] = lambda generate: None
        self.frozen = False
        self.silent_tokenizer = False
        self.silent_flush = False
        self.registered = True
        self.forgetful = False
        self.eos_at: int | None = None
        self.script: Callable[[Generate], str] | None = None
        self.opening = ""
        self.seen = Seen()
        self._names = {"bootstrap": "bootstrap", "tokenizer": "tokenizer", "scheduler": scheduler}
        self._names["detokenizer"] = "detokenizer"
        self._incarnations = dict.fromkeys(self._names, 1)
        self._mailboxes: dict[str, Mailbox[Message]] = {}
        self._running: dict[str, Running] = {}
        self._attempts: dict[str, int] = {}
        self._jobs: list[tuple[Callable[[], None], threading.Event]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def address(self, name: str) -> str:
        """Where an actor's mailbox is bound."""
        return f"ipc://{self.directory}/{name}"

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(10)
        assert not self._thread.is_alive()

    def do(self, job: Callable[[], None]) -> None:
        """Runs a job in the fakes' thread and waits for it."""
        done = threading.Event()
        self._jobs.append((job, done))
        assert done.wait(10)

    def restart(self, role: str, away_s: float = 0.0) -> None:
        """An actor is killed and started anew: it knows nothing, and its incarnation is higher."""

        def job() -> None:
            self._mailboxes.pop(role).close()
            time.sleep(away_s)
            self._incarnations[role] += 1
            if role == "scheduler":
                self._running.clear()
                self._attempts.clear()
            self._open(role)

        self.do(job)

    def announce_stats(self, role: str, figures: dict[str, float]) -> None:
        """An actor's figures go to all ingresses."""
        self.do(lambda: self._to_ingresses(role, ActorStats(1, figures)))

    def raw(self, frame: bytes) -> None:
        """Sends bytes that are no message into every ingress's mailbox."""

        def job() -> None:
            mailbox = self._mailboxes["scheduler"]
            for ingress in self.ingresses:
                mailbox.send(ingress, Hello())
                mailbox._outboxes[ingress].send(frame)

        self.do(job)

    def lose(self, rid_prefix: str = "") -> None:
        """The scheduler forgets requests without a restart."""

        def job() -> None:
            for rid in [each for each in self._running if each.startswith(rid_prefix)]:
                del self._running[rid]

        self.do(job)

    # -- in the thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        for role in self._names:
            self._open(role)
        next_registry = next_step = 0.0
        while not self._stop.is_set():
            while self._jobs:
                job, done = self._jobs.pop(0)
                job()
                done.set()
            now = time.monotonic()
            if now >= next_registry:
                next_registry = now + 0.1
                self._register()
            if now >= next_step:
                next_step = now + self.step_s
                self._step()
            worked = False
            for role in self._names:
                for envelope in self._mailboxes[role].receive():
                    worked = True
                    self._handle(role, envelope.sender, envelope.body)
            if not worked:
                time.sleep(min(0.001, self.step_s))
        for mailbox in self._mailboxes.values():
            mailbox.close()

    def _open(self, role: str) -> None:
        name = self._names[role]
        peers = {ingress: self.address(ingress) for ingress in self.ingresses}
        mailbox = Mailbox(name, self._incarnations[role], self.address(name), peers, Codec(Message))
        self._mailboxes[role] = mailbox
        for ingress in self.ingresses:
            mailbox.send(ingress, Hello())

    def _to_ingresses(self, role: str, message: Message) -> None:
        for ingress in self.ingresses:
            self._mailboxes[role].send(ingress, message)

    def _register(self) -> None:
        info = EngineInfo(
            "main", "unified", self.scheduler, self.address(self.scheduler), MODEL, "f", 1, 16, 64, MAX_MODEL_LEN
        )
        self._to_ingresses("bootstrap", Registry([info] if self.registered else []))

    def _handle(self, role: str, sender: str, message: Message) -> None:
        reply = self._mailboxes[role].send
        match message:
            case Tokenize():
                self.seen.tokenizes.append(message)
                if not self.silent_tokenizer:
                    reply(sender, self._tokenize(message))
            case Detokenize():
                tokens = array("i", message.tokens)
                pieces = [piece(token) for token in tokens]
                reply(sender, Detokenized(message.rid, "".join(pieces), pieces))
            case DescribeTokenizer():
                special = {"bos_token": "<s>", "eos_token": "</s>"}
                reply(sender, TokenizerDescribed(message.rid, special, {"default": "{{ messages }}"}, VOCAB_SIZE))
            case Generate():
                self._generate(sender, message)
            case Abort():
                self.seen.aborts.append(message.rid)
                self._running.pop(message.rid, None)
            case Acknowledge():
                self.seen.acknowledged += message.rids
                for rid in message.rids:
                    request = self._running.pop(rid, None)
                    if request is not None and not request.done:
                        self.seen.wrong.append(f"{rid} acknowledged before it was done")
            case Resend():
                self.seen.resends.append(message)
                request = self._running.get(message.rid)
                if request is None or request.generate.attempt != message.attempt:
                    reply(sender, Unknown(message.rid, message.attempt))
                elif request.sent > request.base or request.done:
                    self._mailboxes["detokenizer"].send(
                        request.sender, Texts([request.event(request.base, request.sent)])
                    )
            case FlushCache():
                self.seen.flushes.append(message.rid)
                if not self.silent_flush:
                    reply(sender, CacheFlushed(message.rid, "Requests run." if self._running else ""))
            case ActorStats():
                self.seen.stats.append((sender, message))
            case Hello() | Register():
                pass
            case _:
                self.seen.wrong.append(f"{role} got {type(message).__name__}")

    def _tokenize(self, message: Tokenize) -> Tokenized | TokenizeFailed:
        prompt = message.prompt
        if isinstance(prompt, ChatPrompt):
            arguments: dict[str, Any] = json.loads(prompt.template_arguments)
            if "fail" in arguments:
                return TokenizeFailed(message.rid, "The chat template cannot render this.")
            text = "".join(f"{each['role']}:{each['content']}\n" for each in json.loads(prompt.messages))
            text += "assistant:" if prompt.add_generation_prompt else ""
            if prompt.add_generation_prompt and arguments.get("enable_thinking") is not False:
                text += self.opening
        elif isinstance(prompt, FillPrompt):
            return Tokenized(message.rid, packed(f"<P>{prompt.text}<S>{prompt.suffix}<M>"), array("i", [77]).tobytes())
        else:
            text = prompt.text
        return Tokenized(message.rid, packed(text))

    def _generate(self, sender: str, message: Generate) -> None:
        self.seen.generates.append(message)
        refusal = self.refuse(message)
        if refusal is not None:
            self._mailboxes["scheduler"].send(sender, refusal)
            return
        if message.attempt < self._attempts.get(message.rid, 0):
            return
        self._attempts[message.rid] = message.attempt
        whole = plan(message, self.eos_at) if self.script is None else scripted_answer(message, self.script(message))
        output = array("i", message.output).tolist()
        if output != whole.tokens[: len(output)]:
            self.seen.wrong.append(f"{message.rid}: the ingress has other tokens than were sent")
        have = whole.ends[len(output) - 1] if output else 0
        if message.characters != have:
            self.seen.wrong.append(f"{message.rid}: {message.characters} characters for {len(output)} tokens")
        self._running[message.rid] = Running(message, sender, whole, len(output), len(output))

    def _step(self) -> None:
        if self.frozen:
            return
        batches: dict[str, list[TextEvent]] = {}
        for request in self._running.values():
            first = request.sent == request.base and request.done and not request.plan.tokens
            if request.done and not first:
                continue
            end = min(request.sent + self.per_step, len(request.plan.tokens))
            batches.setdefault(request.sender, []).append(request.event(request.sent, end))
            request.sent = max(end, 1) if first else end
        for ingress, events in batches.items():
            for batch in self.filter(events):
                self._mailboxes["detokenizer"].send(ingress, Texts(batch))
