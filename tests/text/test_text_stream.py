"""Properties of the incremental text: whatever the tokens are and however they are cut, nothing is lost or repeated."""

from __future__ import annotations

import random

import pytest
from corpus import TEXTS, random_text

from llm_runtime.actors.detokenizer.stop import StopMatcher
from llm_runtime.actors.detokenizer.stream import Pieces, TextStream
from llm_runtime.actors.messages import TextParams
from llm_runtime.actors.vocabulary import Vocabulary

BYTES = 256


def vocabulary(extra: list[bytes], special: list[int] | None = None, strip: bool = False) -> Vocabulary:
    """All single bytes as tokens 0 to 255, then `extra`."""

    def build() -> None:
        raise AssertionError("decoding must not build the encoder")

    return Vocabulary(
        token_bytes=[bytes([byte]) for byte in range(BYTES)] + extra,
        special_ids=special or [],
        bos_id=None,
        eos_ids=[],
        strips_leading_space=strip,
        special_tokens={},
        chat_templates={},
        build_tokenizer=build,  # type: ignore[arg-type]
    )


def cuts(source: random.Random, items: list[int]) -> list[list[int]]:
    """Random runs of the items, empty ones among them."""
    runs, at = [], 0
    while at < len(items):
        step = source.choice([0, 1, 1, 1, 2, 3, 7])
        runs.append(items[at : at + step])
        at += step
    return runs


def run(stream: TextStream, runs: list[list[int]]) -> str:
    """All the text of a stream that gets these tokens."""
    text = stream.backlog
    for tokens in runs:
        if stream.stop is None:
            text += stream.push(tokens)
    return text if stream.stop is not None else text + stream.finish()


def random_tokens(source: random.Random) -> bytes:
    if source.random() < 0.5:
        return source.randbytes(source.randint(0, 40))
    whole = random_text(source, 30).encode()
    start = source.randint(0, 3)
    return whole[start : len(whole) - source.randint(0, 3)]


@pytest.mark.parametrize("seed", range(300))
def test_equals_whole_decoding(seed: int) -> None:
    source = random.Random(seed)
    data = random_tokens(source)
    extra = [data[at : at + source.randint(1, 5)] for at in range(0, len(data), 3)]
    special = [BYTES + at for at in range(0, len(extra), 4)]
    words = vocabulary(extra, special, strip=bool(seed % 2))
    tokens = [source.randrange(BYTES + len(extra)) if source.random() < 0.3 else byte for byte in data]
    for skip in (False, True):
        stream = TextStream(Pieces.of(words, skip), TextParams(skip_special_tokens=skip))
        assert run(stream, cuts(source, tokens)) == words.decode(tokens, skip)
        assert stream.next == len(tokens)
        assert stream.sent == len(words.decode(tokens, skip))


@pytest.mark.parametrize("text", TEXTS)
def test_no_replacement_character_in_whole_text(text: str) -> None:
    words = vocabulary([])
    data = text.encode()
    for size in (1, 2, 3, 5):
        stream = TextStream(Pieces.of(words, True), TextParams())
        out = []
        for at in range(0, len(data), size):
            out.append(stream.push(list(data[at : at + size])))
            assert "\ufffd" not in out[-1]
            assert text.startswith("".join(out))
        assert "".join(out) + stream.finish() == text


def test_text_is_given_out_as_soon_as_it_is_certain() -> None:
    stream = TextStream(Pieces.of(vocabulary([]), True), TextParams())
    steps = [stream.push([byte]) for byte in "aé€🚀b".encode()]
    assert steps == ["a", "", "é", "", "", "€", "", "", "", "🚀", "b"]


def test_broken_character_is_replaced_at_the_end() -> None:
    stream = TextStream(Pieces.of(vocabulary([]), True), TextParams())
    assert stream.push(list("🚀".encode()[:3])) == ""
    assert stream.finish() == "\ufffd"


def test_unknown_token_ids_are_no_text() -> None:
    stream = TextStream(Pieces.of(vocabulary([]), True), TextParams())
    assert stream.push([97, 100_000, 98]) == "ab"
    assert stream.next == 3


def reference_stop(text: str, stop: list[str], keep: bool) -> tuple[str, str | None, int]:
    """The text up to the first stop string, that string, and how many characters of `text` it took to see it."""
    for end in range(1, len(text) + 1):
        for each in stop:
            if text[:end].endswith(each):
                return text[: end if keep else end - len(each)], each, end
    return text, None, len(text)


@pytest.mark.parametrize("seed", range(400))
def test_stop_strings(seed: int) -> None:
    source = random.Random(seed)
    alphabet = "ab€" if seed % 2 else "abc\n "
    text = "".join(source.choice(alphabet) for _ in range(source.randint(0, 24)))
    stop = ["".join(source.choice(alphabet) for _ in range(source.randint(1, 5))) for _ in range(source.randint(1, 4))]
    keep = source.random() < 0.5
    expected, matched, end = reference_stop(text, stop, keep)
    tokens = list(text.encode())
    stream = TextStream(Pieces.of(vocabulary([]), True), TextParams(stop=stop, no_stop_trim=keep))
    assert run(stream, cuts(source, tokens)) == expected
    assert stream.stop == matched
    assert stream.next == len(text[:end].encode())


@pytest.mark.parametrize("seed", range(100))
def test_held_text_is_the_shortest_possible(seed: int) -> None:
    source = random.Random(seed)
    stop = ["".join(source.choice("ab") for _ in range(source.randint(1, 5))) for _ in range(2)]
    matcher = StopMatcher(stop, keep=False)
    seen, out = "", ""
    for _ in range(30):
        character = source.choice("abc")
        seen += character
        text, matched = matcher.push(character)
        out += text
        if matched is not None:
            return
        held = max(
            (n for n in range(len(seen) + 1) if any(s.startswith(seen[len(seen) - n :]) for s in stop)), default=0
        )
        assert out == seen[: len(seen) - held]
    assert out + matcher.flush() == seen


def test_tie_goes_to_the_first_in_the_list() -> None:
    assert StopMatcher(["bc", "abc"], keep=False).push("xabc") == ("xa", "bc")
    assert StopMatcher(["abc", "bc"], keep=False).push("xabc") == ("x", "abc")


def test_stop_string_that_is_complete_first_wins() -> None:
    assert StopMatcher(["abcd", "bc"], keep=False).push("abcd") == ("a", "bc")
    assert StopMatcher(["x", ""], keep=False).push("abx") == ("ab", "x")


@pytest.mark.parametrize("seed", range(60))
def test_replay_at_every_index(seed: int) -> None:
    """A stream that is rebuilt at any token, from what was given out until then, goes on exactly there."""
    source = random.Random(seed)
    data = random_tokens(source)
    words = vocabulary([b"  x", b"\xf0\x9f"], strip=bool(seed % 3))
    tokens = [source.choice([BYTES, BYTES + 1]) if source.random() < 0.1 else byte for byte in data]
    stop = [["zz", "\n"], [], ["e\u0301x", "ab"]][seed % 3]
    params = TextParams(stop=stop)
    pieces = Pieces.of(words, True)
    undisturbed = TextStream(pieces, params)
    whole = run(undisturbed, [[token] for token in tokens])
    for index in range(undisturbed.next):
        first = TextStream(pieces, params)
        had = first.push(tokens[:index])
        second = TextStream(pieces, params, tokens[:index], len(had))
        assert (second.next, second.sent, second.backlog) == (index, len(had), "")
        assert had + run(second, cuts(source, tokens[index:])) == whole
        assert second.stop == undisturbed.stop


@pytest.mark.parametrize("characters", range(12))
def test_replay_with_any_number_of_characters(characters: int) -> None:
    """Also when the receiver has less, or more, text than its tokens are worth."""
    text = "héllo wörld"
    tokens = list(text.encode())
    stream = TextStream(Pieces.of(vocabulary([]), True), TextParams(stop=["never"]), tokens[:6], characters)
    assert run(stream, [[token] for token in tokens[6:]]) == text[characters:]
    assert stream.sent == len(text)


def test_base_that_completes_a_stop_string() -> None:
    stream = TextStream(Pieces.of(vocabulary([]), True), TextParams(stop=["lo"]), list(b"hello"), 2)
    assert (stream.backlog, stream.stop, stream.next) == ("l", "lo", 5)


def test_stop_strings_wait_for_min_tokens() -> None:
    pieces = Pieces.of(vocabulary([b"one", b" two"]), skip_special=True)
    one, two = pieces.bytes.index(b"one"), pieces.bytes.index(b" two")
    stream = TextStream(pieces, TextParams(stop=[" two"], min_tokens=3))
    assert stream.push([one, two, one, two, one, two]) == "one twoone"
    assert stream.next == 4
