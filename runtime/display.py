"""Progress for people: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import json
import time
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from llm_runtime.runtime.progress import Begin, Happened, Note, Progress, Ready, Stopped
from llm_runtime.supervisors import Event

_AT_START = ("ready", "exit", "gave_up")
_NOT_WHILE_RUNNING = ("starting", "stopped", "command")
"""Events that get no line, because another one says it too."""
_MARKS = {
    "ready": Text("✓", style="green"),
    "ignored": Text("✓", style="dim"),
    "exit": Text("✗", style="red"),
    "gave_up": Text("✗", style="red"),
}


class _Terminal(Console):
    """A console on which nothing ends the program: who reads may leave, and the node goes on."""

    def on_broken_pipe(self) -> None:
        """Is silent from now on. The library would end the program."""
        with contextlib.suppress(SystemExit):
            super().on_broken_pipe()


class Display:
    """Shows the progress of one node.

    Uses no thread: the node that it shows forks.

    Args:
        live: draw a table that changes; by default if the output is a terminal.
    """

    def __init__(self, live: bool | None = None) -> None:
        self._console = _Terminal(highlight=False)
        self._live_wanted = self._console.is_terminal if live is None else live
        self._live: Live | None = None
        self._note = ""
        self._quarter = 0
        self._began = time.monotonic()
        self._depths: dict[str, int] = {}
        self._latest: dict[str, Event] = {}
        self._ready = False

    def show(self, progress: Progress) -> None:
        """Takes in what a node says and shows it."""
        match progress:
            case Note(total=total) if total:
                self._part(progress)
            case Note(text=text):
                self._end_live()
                self._note = text
                if not self._live_wanted:
                    self._console.print(f"{text} …")
            case Begin(processes=processes):
                self._end_live()
                self._depths = {name: depth for depth, name in processes}
                if self._live_wanted:
                    self._live = Live(console=self._console, auto_refresh=False, transient=True)
                    self._live.start()
            case Happened(event=event):
                self._happened(event)
            case Ready(node=node, url=url, model=model, task=task):
                self._end_live()
                self._ready = True
                self._console.print(self._tree(node))
                self._console.print(self._invitation(url, model, task), soft_wrap=True, markup=False)
            case Stopped(error=error, log=log):
                self._end_live()
                if error:
                    hint = f" (log: {log})" if log else ""
                    Console(stderr=True, highlight=False, soft_wrap=True).print(f"runtime: {error}{hint}", markup=False)
                else:
                    self._console.print("stopped")
        if self._live is not None and self._depths:
            self._live.update(self._table(), refresh=True)

    def close(self) -> None:
        """Leaves the terminal as it should be; for when an error ends the start."""
        self._end_live()

    def _part(self, note: Note) -> None:
        """Shows how much is done: a bar, or without a terminal a line for each quarter."""
        first, self._note = note.text != self._note, note.text
        if not self._live_wanted:
            quarter = 4 * note.done // note.total
            if first or quarter > self._quarter:
                self._console.print(f"{note.text} … {note.done} of {note.total} {note.unit}", soft_wrap=True)
            self._quarter = quarter
            return
        if self._live is None:
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        bar = ProgressBar(note.total, note.done, width=40)
        line = Table.grid(padding=(0, 1))
        line.add_row(note.text, bar, f"{note.done} of {note.total} {note.unit}")
        self._live.update(line, refresh=True)

    def _happened(self, event: Event) -> None:
        if event.id in self._depths:
            self._latest[event.id] = event
        worth_a_line = event.kind in _AT_START if not self._ready else event.kind not in _NOT_WHILE_RUNNING
        if self._live is None and worth_a_line:
            clock = time.strftime("%H:%M:%S", time.localtime(event.when))
            self._console.print(f"{clock}  {event.id:<16}  {event.text or event.kind}", markup=False, soft_wrap=True)

    def _table(self) -> Group:
        table = Table.grid(padding=(0, 2))
        for name, depth in self._depths.items():
            mark: Text | Spinner = Text("·", style="dim")
            text = ""
            if (event := self._latest.get(name)) is not None:
                text = event.text or event.kind
                mark = _MARKS.get(event.kind) or Spinner("dots")
            table.add_row(mark, "  " * depth + name, Text(text, style="dim"))
        elapsed = time.monotonic() - self._began
        return Group(table, Text(f"{self._note} … {elapsed:.1f} s", style="dim"))

    def _tree(self, node: str) -> Tree:
        """The processes as a picture, from what was said of them."""
        root = Tree(Text(node, style="bold"))
        branches = [root]
        for name, depth in self._depths.items():
            event = self._latest[name]
            line = Text.assemble((name, "bold"), f"  pid {event.pid}", (f"  {event.text}", "dim"))
            branches[depth + 1 :] = [branches[depth].add(line)]
        return root

    def _end_live(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _invitation(self, url: str, model: str, task: str) -> str:
        elapsed = time.monotonic() - self._began
        if not url:
            return f"\nready after {elapsed:.1f} s. The node with the ingress finds its engines by itself.\n"
        questions: dict[str, tuple[str, dict[str, Any]]] = {
            "generate": (
                "chat/completions",
                {
                    "messages": [{"role": "user", "content": "What is the capital of France?"}],
                    "temperature": 0,
                    "max_tokens": 64,
                    "stream": True,
                },
            ),
            "embed": ("embeddings", {"input": "Paris is the capital of France."}),
            "classify": ("classify", {"input": "Paris is the capital of France."}),
        }
        path, question = questions[task]
        body = json.dumps({"model": model, **question})
        return (
            f"\nready at {url}/v1 after {elapsed:.1f} s. Try:\n\n"
            f"  curl -N {url}/v1/{path} -H 'Content-Type: application/json' -d '{body}'\n"
        )
