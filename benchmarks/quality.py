"""What types of weights and of cached keys and values cost in quality: perplexity, and what the model says.

    python benchmarks/quality.py [--dtypes int4] [--kv-dtypes auto] [--only agreement] [--llama-server BIN]

Perplexity is over runtime/bench/prose.txt and benchmarks/data/code.txt, in windows of 512 tokens, each read at once
from its beginning.

Agreement is over the questions of benchmarks/data/questions.json, rendered by the model's chat template and answered
greedily, up to 24 tokens or the end of the answer. The reference is float32 (weights, and cached keys and values).

    equal     answers that are float32's, token for token
    top-1     tokens of float32's answers that are the most likely ones where all tokens before are float32's
    KL        divergence of the distributions from float32's at these tokens, mean, in nats / 1000: the figure that
              chance moves least. Over float32's 64 likeliest tokens, and all others as one

Answers are computed as a server does for one request: the prompt is one chunk, then each token is a step.
`--streams N` answers N questions at a time: decode steps have up to N rows.

Without `--dtypes float32`, what float32 says is read from a temporary file, if a run before has left it there.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import sys
import tempfile
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from msgspec import Struct, msgpack
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from peers import llama_server
from reader import REPORTED, Answer, Reader

from llm_runtime.actors.actor import StartFailure
from llm_runtime.actors.dtypes import WeightDType, compute_dtype
from llm_runtime.actors.kv_format import KVDType
from llm_runtime.actors.tokenizer.chat_template import ChatTemplate
from llm_runtime.actors.vocabulary import Vocabulary, load_vocabulary
from llm_runtime.runtime.cgroups import cpu_count
from llm_runtime.runtime.models import resolve_model

ROOT = Path(__file__).resolve().parent.parent
TEXTS = {"prose": ROOT / "runtime/bench/prose.txt", "code": ROOT / "benchmarks/data/code.txt"}
FRANCE = "What is the capital of France?"
WINDOW, ANSWER = 512, 24
COMPARED = 64  # of float32's likeliest tokens; they are looked for among the REPORTED ones of the others

Part = Literal["perplexity", "agreement"]


class Row(Struct):
    """What is known of one combination of types: `perplexities` of TEXTS, `answers` to the questions (by a reader that
    follows float32's, if it is not the reference), and what is said of France's capital."""

    dtype: str
    kv_dtype: str
    weights_bytes: int
    perplexities: list[float] = []
    answers: list[Answer] = []
    france: str = ""


class Questions:
    """Chat questions by category, as prompts of a model."""

    def __init__(self, file: Path, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._template = ChatTemplate(vocabulary.chat_templates, vocabulary.special_tokens)
        questions: dict[str, list[str]] = json.loads(file.read_text("utf-8"))
        self.categories = {name: len(each) for name, each in questions.items()}
        self.prompts = [self._prompt(question) for each in questions.values() for question in each]
        self.france = self._prompt(FRANCE)

    def _prompt(self, question: str) -> list[int]:
        return self.vocabulary.encode(self._template.render([{"role": "user", "content": question}]), False)

    def text(self, answer: Answer) -> str:
        """The beginning of an answer, for a table."""
        return self.vocabulary.decode(answer.tokens, True)[:30].replace("\n", " ").replace("|", "\\|")


def perplexity(reader: Reader, tokens: list[int]) -> float:
    """Of a text, in windows of WINDOW tokens."""
    windows = [tokens[at : at + WINDOW] for at in range(0, len(tokens) - 1, WINDOW)]
    logprobs = np.concatenate([reader.logprobs(window) for window in windows if len(window) > 1])
    return float(np.exp(-logprobs.astype(np.float64).mean()))


def divergence(reference: Answer, other: Answer) -> NDArray[np.float64]:
    """From the reference's distribution to the other's, at each of n tokens: nats, [n]."""

    def arrays(answer: Answer) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
        logprobs = np.frombuffer(answer.logprobs, np.float32).astype(np.float64)
        return np.frombuffer(answer.ids, np.int32).reshape(-1, REPORTED), logprobs.reshape(-1, REPORTED)

    (ids, log_p), (others, logprobs) = arrays(reference), arrays(other)
    ids, log_p = ids[:, :COMPARED], log_p[:, :COMPARED]
    same = ids[:, :, None] == others[:, None, :]
    # A token that is not even reported is taken to be as likely as the last one that is.
    log_q = np.where(same.any(2), np.take_along_axis(logprobs, same.argmax(2), 1), logprobs[:, -1:])
    rest_p, rest_q = (np.maximum(1 - np.exp(each).sum(1), 1e-9) for each in (log_p, log_q))
    nats: NDArray[np.float64] = (np.exp(log_p) * (log_p - log_q)).sum(1) + rest_p * np.log(rest_p / rest_q)
    return nats


def measure(
    reader: Reader, parts: Sequence[Part], texts: Sequence[list[int]], questions: Questions, reference: Row | None
) -> Row:
    """A row; without a reference, that one."""
    config, eos = reader.executor.config, questions.vocabulary.eos_ids
    row = Row(config.dtype, str(config.kv_dtype), reader.executor.weights_bytes)
    if "perplexity" in parts:
        row.perplexities = [perplexity(reader, text) for text in texts]
    if "agreement" in parts:
        if reference is None:
            row.answers = reader.answers(questions.prompts, ANSWER, eos)
        else:
            row.answers = reader.follow(questions.prompts, reference.answers)
        row.france = questions.text(reader.answers([questions.france], ANSWER, eos)[0])
    return row


def llama_row(binary: str, gguf: Path, port: int, questions: Questions) -> Row:
    """What llama.cpp's server says with the same file."""
    server = llama_server(binary, gguf, port, Path("/dev/null"), ["--cache-type-k", "f16", "--cache-type-v", "f16"])

    def ask(prompt: list[int]) -> Answer:
        body = {"prompt": prompt, "n_predict": ANSWER, "temperature": 0, "cache_prompt": False, "return_tokens": True}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            return Answer(json.load(response)["tokens"])

    try:
        server.start(limit_s=120)
        answers = [ask(prompt) for prompt in questions.prompts]
        france = questions.text(ask(questions.france))
    finally:
        server.stop()
    return Row("llama.cpp", "float16", gguf.stat().st_size, answers=answers, france=france)


class Table:
    """Prints rows as they come, beside the reference."""

    def __init__(self, parts: Sequence[Part], texts: Sequence[list[int]], questions: Questions, reference: Row) -> None:
        self._parts, self._questions, self._reference = parts, questions, reference
        self._shares = [len(text) / sum(map(len, texts)) for text in texts]
        head = ["dtype", "kv_dtype", "weights MiB"]
        if "perplexity" in parts:
            sizes = (f"{len(text)} tokens of {name}" for name, text in zip(TEXTS, texts, strict=True))
            print(f"Perplexity of {' and '.join(sizes)}.")
            head += [*(f"ppl {name}" for name in TEXTS), "ppl", "over float32"]
        if "agreement" in parts:
            tokens = sum(len(answer.tokens) for answer in reference.answers)
            print(f"Agreement in {len(questions.prompts)} answers of {tokens} tokens.")
            head += [f"equal of {len(questions.prompts)}", *questions.categories, "top-1", "KL", "capital of France"]
        print(f"\n| {' | '.join(head)} |\n|{'---|' * len(head)}", flush=True)

    def add(self, row: Row) -> None:
        """Prints a row."""
        cells = [row.dtype, row.kv_dtype, f"{row.weights_bytes / 2**20:.0f}"]
        if "perplexity" in self._parts:
            cells += self._perplexities(row)
        if "agreement" in self._parts:
            cells += [*self._agreement(row), row.france]
        print(f"| {' | '.join(cells)} |", flush=True)

    def _perplexities(self, row: Row) -> list[str]:
        if not row.perplexities:
            return [""] * (len(TEXTS) + 2)
        both, base = (np.exp(np.dot(self._shares, np.log(each.perplexities))) for each in (row, self._reference))
        return [*(f"{each:.3f}" for each in row.perplexities), f"{both:.3f}", f"{100 * (both / base - 1):+.2f} %"]

    def _agreement(self, row: Row) -> list[str]:
        pairs = list(zip(self._reference.answers, row.answers, strict=True))
        equal = iter([theirs.tokens == ours.tokens for ours, theirs in pairs])
        counts = [sum(next(equal) for _ in range(size)) for size in self._questions.categories.values()]
        cells = [str(count) for count in (sum(counts), *counts)]
        if not row.answers[0].ids:
            return [*cells, "", ""]
        same = np.concatenate([np.equal(ours.tokens, theirs.tokens) for ours, theirs in pairs])
        nats = np.concatenate([divergence(ours, theirs) for ours, theirs in pairs])
        return [*cells, f"{100 * same.mean():.1f} %", f"{1000 * nats.mean():.2f}"]


def main() -> None:
    dtypes, kv_dtypes = get_args(WeightDType), get_args(KVDType)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtypes", nargs="+", choices=dtypes, default=dtypes)
    parser.add_argument("--kv-dtypes", nargs="+", choices=("auto", *kv_dtypes), default=("auto", *kv_dtypes))
    parser.add_argument("--only", choices=get_args(Part), help="leave the other part out")
    parser.add_argument("--questions", type=Path, default=ROOT / "benchmarks/data/questions.json", metavar="FILE")
    parser.add_argument("--streams", type=int, default=1, metavar="N", help="questions answered at a time")
    parser.add_argument("--deterministic", action="store_true", help="all but the reference in deterministic mode")
    parser.add_argument("--llama-server", metavar="BIN", help="one more row: the answers of llama.cpp's server")
    parser.add_argument("--port", type=int, default=8100, help="of llama.cpp's server")
    options = parser.parse_args()
    parts: Sequence[Part] = [options.only] if options.only else get_args(Part)
    model = resolve_model(options.model, ROOT).path
    if options.llama_server and not ("agreement" in parts and model.is_file()):
        parser.error("llama.cpp's server is for agreement, with a model that is a GGUF file")
    torch.set_num_threads(cpu_count())
    vocabulary = load_vocabulary(model)
    questions = Questions(options.questions, vocabulary)
    texts = [vocabulary.encode(path.read_text("utf-8"), False) for path in TEXTS.values()]
    length = max(WINDOW, max(map(len, questions.prompts)) + ANSWER)

    state = model.stat()
    key = repr((model, state.st_size, state.st_mtime_ns, parts, texts, questions.prompts, ANSWER, REPORTED))
    kept = Path(tempfile.gettempdir()) / f"quality-float32-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if "float32" not in options.dtypes and kept.exists():
        reference = msgpack.decode(kept.read_bytes(), type=Row)
    else:
        reference = measure(Reader(model, "float32", "float32", length, 1, False), parts, texts, questions, None)
        kept.write_bytes(msgpack.encode(reference))

    table = Table(parts, texts, questions, reference)
    for dtype in options.dtypes:
        default = compute_dtype(dtype)
        for kv_dtype in dict.fromkeys(default if each == "auto" else each for each in options.kv_dtypes):
            if (dtype, kv_dtype, options.streams, options.deterministic) == ("float32", "float32", 1, False):
                table.add(reference)
                continue
            gc.collect()  # the model before
            try:
                reader = Reader(model, dtype, kv_dtype, length, options.streams, options.deterministic)
            except StartFailure as failure:
                print(f"{dtype}, {kv_dtype}: {failure}", file=sys.stderr)
                continue
            table.add(measure(reader, parts, texts, questions, reference))
            del reader
    if options.llama_server:
        table.add(llama_row(options.llama_server, model, options.port, questions))


if __name__ == "__main__":
    main()
