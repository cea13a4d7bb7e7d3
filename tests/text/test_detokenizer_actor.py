"""The detokenizer as a process: what schedulers and ingresses see of it, also when it is killed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from text_harness import Node
from vocabularies import write_gguf

from llm_runtime.actors.messages import (
    ActorStats,
    Hello,
    OpenText,
    Resend,
    Stopped,
    TextEvent,
    TextParams,
    Texts,
    TokenEvent,
    TokenLogprob,
    Tokens,
)
from llm_runtime.actors.vocabulary import pack_ids
from llm_runtime.actors.vocabulary.byte_alphabet import tokens_to_bytes

EOS, EOT, MARK = 256, 257, 258
"""Special tokens after the 256 bytes: end of sequence, end of turn (also an EOS), and one that is not."""
SCHEDULERS = ["main.scheduler", "other.scheduler"]
INGRESSES = ["ingress0", "ingress1"]

NewNode = Callable[..., Node]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocabulary of the 256 bytes in their order."""
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = ByteLevel.alphabet()
    ordered = [token for _, token in sorted(zip(tokens_to_bytes(alphabet), alphabet, strict=True))]
    tokens = [*ordered, "<eos>", "<eot>", "<mark>"]
    return write_gguf(
        tmp_path_factory.mktemp("model") / "bytes.gguf",
        {
            "general.architecture": "llama",
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "gpt-2",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [1] * 256 + [3] * 3,
            "tokenizer.ggml.merges": ["a b"],  # never used: a detokenizer builds no encoder
            "tokenizer.ggml.eos_token_id": EOS,
            "tokenizer.ggml.eot_token_id": EOT,
        },
    )


@pytest.fixture
def new_node(tmp_path: Path, model: Path) -> Iterator[NewNode]:
    nodes = []

    def start(**config: Any) -> Node:
        node = Node(
            tmp_path,
            "llm_runtime.actors.detokenizer:Detokenizer",
            "detokenizer",
            {"model": str(model), **config},
            SCHEDULERS + INGRESSES,
        )
        nodes.append(node)
        return node.start()

    yield start
    for node in nodes:
        node.close()


@pytest.fixture
def node(new_node: NewNode) -> Node:
    return new_node()


def opening(rid: str = "r", attempt: int = 0, ingress: str = "ingress0", **fields: Any) -> OpenText:
    text = TextParams(
        stop=fields.pop("stop", []),
        skip_special_tokens=fields.pop("skip_special_tokens", True),
        no_stop_trim=fields.pop("no_stop_trim", False),
    )
    return OpenText(rid, attempt, ingress, text, **fields)


def event(index: int, text: str | bytes | list[int], rid: str = "r", attempt: int = 0, **fields: Any) -> TokenEvent:
    tokens = text if isinstance(text, list) else list(text.encode() if isinstance(text, str) else text)
    return TokenEvent(rid, attempt, index, tokens, **fields)


def exchange(node: Node, message: Tokens, scheduler: str = SCHEDULERS[0], ingress: str = "ingress0") -> list[TextEvent]:
    """Sends a message that makes the detokenizer answer this ingress, and returns the answer."""
    node.send(scheduler, message)
    events: list[TextEvent] = node.receive(ingress, Texts).events
    return events


def one(node: Node, *events: TokenEvent, opens: list[OpenText] | None = None) -> TextEvent:
    answers = exchange(node, Tokens(list(events), opens or []))
    assert len(answers) == 1
    return answers[0]


def test_tokens_become_text(node: Node) -> None:
    first = one(node, event(0, "hé"[:1]), opens=[opening()])
    assert (first.rid, first.index, first.tokens, first.offset, first.text) == ("r", 0, [104], 0, "h")
    held = one(node, event(1, "é".encode()[:1], cached_tokens=5))
    assert (held.index, held.tokens, held.offset, held.text, held.cached_tokens) == (1, [0xC3], 1, "", 5)
    several = one(node, event(2, "é".encode()[1:] + b" ok"))
    assert (several.index, several.offset, several.text) == (2, 1, "é ok")
    last = one(node, event(6, "é".encode()[:1], finish="length"))
    assert (last.offset, last.text, last.finish, last.stop_reason) == (5, "\ufffd", "length", None)


def test_one_message_for_each_ingress_and_step(node: Node) -> None:
    opens = [opening(f"r{number}", ingress=f"ingress{number % 2}") for number in range(6)]
    events = [event(0, chr(97 + number), rid=f"r{number}") for number in range(6)]
    node.send(SCHEDULERS[0], Tokens(events, opens))
    for ingress in (0, 1):
        texts = node.receive(f"ingress{ingress}", Texts)
        assert [(each.rid, each.text) for each in texts.events] == [
            (f"r{number}", chr(97 + number)) for number in range(ingress, 6, 2)
        ]


@pytest.mark.parametrize(
    ("token", "asked", "keep", "text", "reason"),
    [
        (EOS, [EOS, 120], False, "ab", None),
        (EOT, [EOT], False, "ab", None),
        (120, [EOS, 120], False, "ab", 120),
        (120, [EOS, 120], True, "abx", 120),
        (EOS, [EOS], True, "ab", None),  # kept, but special tokens are skipped
        (MARK, [MARK], False, "ab", MARK),
    ],
)
def test_stop_token(node: Node, token: int, asked: list[int], keep: bool, text: str, reason: int | None) -> None:
    answer = one(
        node,
        event(0, [97, 98, token], finish="stop"),
        opens=[opening(stop_token_ids=asked, no_stop_trim=keep)],
    )
    assert (answer.text, answer.finish, answer.stop_reason, answer.tokens) == (text, "stop", reason, [97, 98, token])


def test_special_tokens(node: Node) -> None:
    shown = one(node, event(0, [97, MARK, 98]), opens=[opening(skip_special_tokens=False)])
    assert shown.text == "a<mark>b"
    skipped = one(node, event(0, [97, MARK, 98], attempt=1), opens=[opening(attempt=1)])
    assert skipped.text == "ab"


def test_stop_string_across_tokens(node: Node) -> None:
    assert one(node, event(0, "x EN"), opens=[opening(stop=["END", "STOP"])]).text == "x "
    held = one(node, event(4, "D and more"))
    assert (held.text, held.finish, held.stop_reason, held.tokens, held.offset) == ("", "stop", "END", [68], 2)
    stopped = node.receive(SCHEDULERS[0], Stopped)
    assert (stopped.rid, stopped.attempt, stopped.index) == ("r", 0, 4)
    # what the scheduler has drawn ahead is ignored, and does not disturb others
    answers = exchange(node, Tokens([event(14, "zz"), event(0, "b", rid="s")], [opening("s")]))
    assert [(each.rid, each.text) for each in answers] == [("s", "b")]
    assert node.receive(SCHEDULERS[0], Stopped).index == 4  # the scheduler seems not to know: it is told again


def test_stop_string_is_kept(node: Node) -> None:
    answer = one(node, event(0, "abENDcd"), opens=[opening(stop=["END"], no_stop_trim=True)])
    assert (answer.text, answer.stop_reason, len(answer.tokens)) == ("abEND", "END", 5)


def test_stop_string_wins_over_the_end_of_the_request(node: Node) -> None:
    answer = one(node, event(0, "abEND", finish="length"), opens=[opening(stop=["END"])])
    assert (answer.text, answer.finish, answer.stop_reason) == ("ab", "stop", "END")


def test_held_text_comes_with_the_end(node: Node) -> None:
    assert one(node, event(0, "abEN"), opens=[opening(stop=["END"])]).text == "ab"
    last = one(node, event(4, [], finish="abort"))
    assert (last.text, last.offset, last.finish, last.tokens) == ("EN", 2, "abort", [])


def test_logprobs(node: Node) -> None:
    logprobs = [
        TokenLogprob(0xC3, -0.5, [(0xC3, -0.5), (97, -1.5)]),
        TokenLogprob(0xA9, -0.25, [(EOS, -2.0), (999, -3.0)]),
        TokenLogprob(98, -0.125),
    ]
    prompt = [TokenLogprob(97, None), TokenLogprob(98, -1.0)]
    answer = one(
        node,
        event(0, [0xC3, 0xA9, 98], logprobs=logprobs, prompt_logprobs=prompt),
        opens=[opening(stop=["é"])],
    )
    assert answer.logprobs is not None
    assert [(each.token, each.token_bytes, each.logprob, each.top) for each in answer.logprobs] == [
        (0xC3, b"\xc3", -0.5, [(0xC3, b"\xc3", -0.5), (97, b"a", -1.5)]),
        (0xA9, b"\xa9", -0.25, [(EOS, b"<eos>", -2.0), (999, b"", -3.0)]),
    ]
    assert answer.prompt_logprobs is not None
    assert [(each.token_bytes, each.logprob) for each in answer.prompt_logprobs] == [(b"a", None), (b"b", -1.0)]


def test_repeats_are_cut_and_dropped(node: Node) -> None:
    assert one(node, event(0, "abc"), opens=[opening()]).text == "abc"
    answers = exchange(
        node,
        Tokens(
            [event(0, "abc"), event(1, "b"), event(1, "bcd", logprobs=[TokenLogprob(0, float(n)) for n in range(3)])]
        ),
    )
    assert [(each.index, each.offset, each.text) for each in answers] == [(3, 3, "d")]
    assert answers[0].logprobs is not None
    assert [each.logprob for each in answers[0].logprobs] == [2.0]
    ended = one(node, event(3, "d", finish="length"))  # the last token again, now with the end
    assert (ended.index, ended.tokens, ended.text, ended.finish) == (4, [], "", "length")
    assert one(node, event(3, "d", finish="length"), event(0, "s", rid="s"), opens=[opening("s")]).rid == "s"


def test_gap_and_unknown_request_are_asked_for_once(node: Node) -> None:
    assert one(node, event(0, "ab"), opens=[opening()]).text == "ab"
    node.send(SCHEDULERS[1], Tokens([event(5, "x"), event(6, "y"), event(0, "u", rid="unknown")]))
    gap = node.receive(SCHEDULERS[0], Resend)  # to the scheduler that has opened the request
    assert (gap.rid, gap.attempt) == ("r", 0)
    assert node.receive(SCHEDULERS[1], Resend).rid == "unknown"
    assert one(node, event(2, "c")).text == "c"  # the gap has changed nothing
    figures = node.receive("ingress0", ActorStats).figures
    assert (figures["detokenizer_resends"], figures["detokenizer_requests"]) == (2.0, 1.0)


def test_attempts(node: Node) -> None:
    assert one(node, event(0, "ab", attempt=2), opens=[opening(attempt=2)]).text == "ab"
    old = Tokens([event(2, "x", attempt=1), event(2, "c", attempt=2)], [opening(attempt=1)])
    assert [each.text for each in exchange(node, old, SCHEDULERS[1])] == ["c"]
    newer = one(
        node,
        event(2, "cd", attempt=3),
        opens=[opening(attempt=3, base=pack_ids(b"ab"), characters=2)],
    )
    assert (newer.attempt, newer.index, newer.offset, newer.text) == (3, 2, 2, "cd")
    node.send(SCHEDULERS[0], Tokens([event(4, "e", attempt=4)]))
    assert node.receive(SCHEDULERS[0], Resend).attempt == 4


def test_text_of_the_base_that_the_ingress_lacks(node: Node) -> None:
    answers = exchange(
        node, Tokens([event(5, " you")], [opening(base=pack_ids(b"hello"), characters=2, stop=["lo you"])])
    )
    assert [(each.index, each.tokens, each.offset, each.text) for each in answers] == [
        (5, [], 2, "l"),
        (5, list(b" you"), 3, ""),
    ]
    assert answers[1].finish == "stop"


def test_closed_requests_are_forgotten(node: Node) -> None:
    assert one(node, event(0, "a"), opens=[opening()]).text == "a"
    node.send(SCHEDULERS[0], Tokens([event(1, "b")], closes=["r", "never opened"]))
    assert node.receive("ingress0", Texts).events[0].text == "b"
    node.send(SCHEDULERS[0], Tokens([event(2, "c")]))
    assert node.receive(SCHEDULERS[0], Resend).rid == "r"


def test_memory_is_bounded(new_node: NewNode) -> None:
    node = new_node(max_requests=3)
    exchange(node, Tokens([event(0, "a", rid="r4")], [opening(f"r{number}") for number in range(5)]))
    node.send(SCHEDULERS[0], Tokens([event(0, "a", rid=f"r{number}") for number in range(4)]))
    assert {node.receive(SCHEDULERS[0], Resend).rid for _ in range(2)} == {"r0", "r1"}
    assert [each.rid for each in node.receive("ingress0", Texts).events] == ["r2", "r3"]


def test_nonsense_is_survived(node: Node) -> None:
    node.send(SCHEDULERS[0], Tokens([event(0, "a"), event(0, "a", rid="s")], [opening(base=b"abc"), opening("s")]))
    assert [each.rid for each in node.receive("ingress0", Texts).events] == ["s"]
    node.send(SCHEDULERS[0], Hello())
    node.send(SCHEDULERS[0], Stopped("r", 0, 0))  # not for a detokenizer
    assert one(node, event(1, [97, 2**31 - 1, 98], rid="s")).text == "ab"
    assert one(node, event(0, "x", rid="t"), opens=[opening("t", stop=[""])]).text == "x"
    assert node.stop() == 0


class Ingress:
    """The ingress' side of a request: takes exactly the next token and the next character."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.text = ""
        self.finish: str | None = None

    def take(self, event: TextEvent) -> None:
        if event.index > len(self.tokens):
            raise AssertionError("a gap reached the ingress")
        self.tokens += event.tokens[len(self.tokens) - event.index :]
        assert event.offset <= len(self.text)
        self.text += event.text[len(self.text) - event.offset :]
        self.finish = event.finish or self.finish


@pytest.mark.parametrize("stop", [[], ["🚀🚀", "THE END"]])
def test_killed_while_it_writes(node: Node, stop: list[str]) -> None:
    """SIGKILL after every few tokens; a scheduler that opens again what is asked for. The text is whole, once."""
    expected = "Ünï 🚀, नमस्ते 👨‍👩‍👧‍👦 THE EN…" * 2
    output = [*expected.encode(), EOS]
    ingress, attempt = Ingress(), 0
    opens = [opening(stop=stop)]
    kills = 0
    while ingress.finish is None:
        index = len(ingress.tokens)
        chunk = output[index : index + 5]
        if kills < 4 and index >= 30 * (kills + 1):
            node.kill()
            # the step that is lost with the process, or left for its successor
            node.send(SCHEDULERS[0], Tokens([event(index, chunk, attempt=attempt)]))
            node.start()
            kills += 1
            resend = node.receive(SCHEDULERS[0], Resend, deadline_s=5)
            assert (resend.rid, resend.attempt) == ("r", attempt)
            opens = [opening(attempt=attempt, stop=stop, base=pack_ids(ingress.tokens), characters=len(ingress.text))]
        finish = "stop" if index + 5 >= len(output) else None
        for each in exchange(node, Tokens([event(index, chunk, attempt=attempt, finish=finish)], opens)):
            ingress.take(each)
        opens = []
    assert kills == 4
    assert ingress.text == expected
    assert ingress.tokens == output


def test_cannot_start_without_a_model(new_node: NewNode, tmp_path: Path) -> None:
    node = new_node(model=str(tmp_path / "absent.gguf"))
    assert node.report.startswith("failed")
    assert "absent.gguf: no such file" in node.report
