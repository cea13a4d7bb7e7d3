"""`runtime chat` with a running node, from a pipe and on a terminal."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time

from support import DEADLINE_S, ROOT, eventually

from llm_runtime import LLM

QUESTION = "What is the capital of France?"


def command(llm: LLM, *arguments: str) -> list[str]:
    server = ["--url", llm.node.url, "--api-key", llm.node.api_key]
    return [sys.executable, "-m", "llm_runtime", "chat", *server, "--temperature", "0", *arguments]


def test_piped_input_is_one_prompt(llm: LLM) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    ran = subprocess.run(
        command(llm, "--max-tokens", "16"), input=QUESTION, capture_output=True, text=True, env=environment, timeout=60
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "Paris" in ran.stdout
    latin1 = subprocess.run(
        command(llm, "--max-tokens", "2"), input=b"Gr\xfc\xdfe", capture_output=True, env=environment, timeout=60
    )
    assert (latin1.returncode, latin1.stderr) == (0, b"")
    refused = subprocess.run(
        [*command(llm), "--api-key", "wrong"], input="x", capture_output=True, text=True, env=environment, timeout=60
    )
    assert refused.returncode == 1
    assert refused.stderr.startswith("runtime: the server asks for its API key")


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, command: list[str]) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.execvpe(command[0], command, {**os.environ, "PYTHONPATH": str(ROOT / "src"), "TERM": "dumb"})
        self._readable = select.poll()  # takes descriptors beyond 1024
        self._readable.register(self.fd, select.POLLIN)
        self.shown = ""

    def expect(self, text: str) -> str:
        """Reads until a text is shown; what was shown before it."""
        deadline = time.monotonic() + DEADLINE_S
        while text not in self.shown:
            assert time.monotonic() < deadline, f"waited in vain for {text!r} after {self.shown!r}"
            if self._readable.poll(100):
                self.shown += os.read(self.fd, 4096).decode(errors="replace")
        before, _, self.shown = self.shown.partition(text)
        return before

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())


def test_a_conversation_on_a_terminal(llm: LLM) -> None:
    chat = Terminal(command(llm, "--max-tokens", "400"))
    try:
        chat.expect("> ")
        chat.type("Tell me a very long story about a castle.\n")
        chat.expect("castle.")
        chat.expect(" the ")  # the answer has begun
        chat.type("\x03")
        chat.expect("> ")
        chat.type("/clear\n")
        chat.expect("> ")
        chat.type(f"{QUESTION}\n")
        chat.expect("Paris")
        chat.expect("> ")
        chat.type("/unknown\n")
        chat.expect("/exit or Ctrl-D ends")
        chat.expect("> ")
        chat.type("\x04")
        ended: list[int] = []

        def has_ended() -> bool:
            pid, status = os.waitpid(chat.pid, os.WNOHANG)
            if pid:
                ended.append(os.waitstatus_to_exitcode(status))
            return bool(pid)

        eventually(has_ended, "the end of the command")
        assert ended == [0]
    finally:
        os.close(chat.fd)
