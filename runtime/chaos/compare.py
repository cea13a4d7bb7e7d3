"""What is wrong with an answer, by itself and beside the answer of an undisturbed run."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from llm_runtime.runtime.chaos.client import Answer, Choice
from llm_runtime.runtime.chaos.corpus import Request

_WORD = re.compile(r"\s*\S+|\s+")


@dataclass
class Difference:
    """Tokens (words where an answer shows no tokens) that were lost, came twice, or are others."""

    lost: int = 0
    repeated: int = 0
    changed: int = 0
    text: str = ""

    @property
    def any(self) -> bool:
        return bool(self.lost or self.repeated or self.changed)

    def add(self, other: Difference) -> None:
        self.lost += other.lost
        self.repeated += other.repeated
        self.changed += other.changed
        self.text = self.text or other.text


def check(request: Request, answer: Answer) -> Difference:
    """Contradictions within one answer that did not fail."""
    found = Difference()
    if answer.protocol:
        found.add(Difference(changed=1, text=answer.protocol))
    for choice in answer.choices:
        if request.shows_tokens and choice.finish == "length":
            found.add(_count(len(choice.tokens), request.tokens, "tokens shown"))
        if choice.logprobs and len(choice.logprobs) != len(choice.tokens):
            found.add(_count(len(choice.logprobs), len(choice.tokens), "logprobs"))
    if all(choice.finish == "length" for choice in answer.choices):
        found.add(_count(answer.counted, request.tokens * request.choices, "tokens counted"))
    return found


def compare(request: Request, answer: Answer, wanted: Answer) -> Difference:
    """How an answer differs from the one of the undisturbed run."""
    found = Difference()
    for index, (choice, reference) in enumerate(zip(answer.choices, wanted.choices, strict=True)):
        if choice != reference:
            found.add(_compare(choice, reference, f"{request.label}, choice {index}"))
    if not found.any and answer.counted != wanted.counted:
        found.add(_count(answer.counted, wanted.counted, "tokens counted"))
    return found


def _compare(choice: Choice, wanted: Choice, label: str) -> Difference:
    """Tokens are compared first, then texts, then logprobs and finish reasons."""
    got_units: Sequence[object] = choice.tokens
    wanted_units: Sequence[object] = wanted.tokens
    if got_units == wanted_units:
        got_units, wanted_units = _WORD.findall(choice.text), _WORD.findall(wanted.text)
    found = Difference()
    if got_units != wanted_units:
        matcher = difflib.SequenceMatcher(None, [repr(u) for u in wanted_units], [repr(u) for u in got_units], False)
        for tag, a, b, c, d in matcher.get_opcodes():
            if tag == "equal":
                continue
            if not found.text:
                found.text = f"{label}: at {a}, {wanted_units[a : a + 5]!r} became {got_units[c : c + 5]!r}"
            found.changed += min(b - a, d - c)
            found.lost += max(0, (b - a) - (d - c))
            found.repeated += max(0, (d - c) - (b - a))
    elif choice.text != wanted.text:
        found = Difference(changed=1, text=f"{label}: white space differs")
    elif choice.finish != wanted.finish:
        found = Difference(changed=1, text=f"{label}: finished by {choice.finish}, not {wanted.finish}")
    else:
        got, right = choice.prompt_logprobs + choice.logprobs, wanted.prompt_logprobs + wanted.logprobs
        pairs = list(zip(got, right, strict=False))
        differ = sum(a != b for a, b in pairs) + abs(len(got) - len(right))
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
        found = Difference(changed=differ, text=f"{label}: {differ} logprobs differ, the first at {at}")
    return found


def _count(got: int, wanted: int, what: str) -> Difference:
    if got == wanted:
        return Difference()
    return Difference(max(0, wanted - got), max(0, got - wanted), 0, f"{got} {what} in place of {wanted}")
