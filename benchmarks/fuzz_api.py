"""Requests that a machine makes up from the server's own description, against a node of the embedded model.

    python -m venv /tmp/fuzz && /tmp/fuzz/bin/pip install schemathesis
    python benchmarks/fuzz_api.py --schemathesis /tmp/fuzz/bin/schemathesis

Every answer must have a status, a content type and an error as /openapi.json says, and none may be a 5xx. Afterwards no
process may have been restarted and nothing may be left running. Prints what was found; exit status 1 if anything was.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

from nodes import running

from llm_runtime.runtime.chaos.inject import node_report

NAME = "fuzz"
IDLE_WITHIN_S = 30.0
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
# What is made up is mostly refused for the same few reasons: three requests in four are spared them, to get further.
HOOKS = """
import zlib
import schemathesis

CONSTRAINTS = (
    *("response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar"),
    *("json_schema", "regex", "ebnf", "structural_tag"),
)

@schemathesis.hook
def map_body(context, body):
    if not isinstance(body, dict) or not zlib.crc32(repr(body).encode()) % 4:
        return body
    body = dict(body)
    if "model" in body:
        body["model"] = "smollm2-135m-instruct"
    if "prompt" in body and not body["prompt"]:
        body["prompt"] = "Once"
    if body.get("messages") is not None and zlib.crc32(repr(body).encode()) % 2:
        body["messages"] = [{"role": "user", "content": "Hi"}]
    constraints = [name for name in body if name in CONSTRAINTS and body[name] is not None]
    for name in ["modalities", *constraints[1:]]:
        body.pop(name, None)
    if body.get("prompt") and "messages" in body:
        del body["messages"]
    if body.get("text") is not None and "input_ids" in body:
        del body["input_ids"]
    for field in ("n", "best_of"):
        if isinstance(body.get(field), int) and body[field] > 3:
            body[field] = 2
    if not body.get("stream"):
        body.pop("stream_options", None)
    return body
"""


def fuzz(options: argparse.Namespace, url: str, report: Path) -> int:
    """Runs schemathesis; its exit status. What it sent and got is in `report`."""
    hooks = report.with_name("fuzz_hooks.py")
    hooks.write_text(HOOKS)
    command = [options.schemathesis, "run", f"{url}/openapi.json", "--url", url, "--checks", CHECKS]
    command += ["--max-examples", str(options.examples), "--seed", str(options.seed), "--workers", str(options.workers)]
    command += ["--request-timeout", "60", "--max-time", str(options.max_time), "--continue-on-failure"]
    command += [
        "--phases",
        options.phases,
        "--mode",
        options.mode,
        "--report",
        "ndjson",
        "--report-ndjson-path",
        str(report),
    ]
    command += ["--exclude-path", "/status/restart"]  # does what no request may do
    command += ["--suppress-health-check", "all", "--no-color", "--warnings", "off"]
    environment = {**os.environ, "PYTHONPATH": str(hooks.parent), "SCHEMATHESIS_HOOKS": hooks.stem}
    return subprocess.run(command, env=environment, cwd=hooks.parent, check=False).returncode


def statuses(report: Path) -> Counter[tuple[str, int]]:
    """How often each operation was answered with each status; 0 where there was no answer."""
    found: Counter[tuple[str, int]] = Counter()
    for line in report.read_text().splitlines():
        for case in _interactions(json.loads(line)):
            response = case.get("response") or {}
            found[str(case.get("label", "")), int(response.get("status_code", 0))] += 1
    return found


def _interactions(event: Any) -> list[dict[str, Any]]:
    scenario = event.get("ScenarioFinished", {})
    recorder = scenario.get("recorder", {})
    label = recorder.get("label", "")
    return [{**each, "label": label} for each in recorder.get("interactions", {}).values()]


def await_idle(url: str) -> int:
    """Requests that the engine still has though their clients are gone; it gets some seconds to notice."""
    deadline = time.monotonic() + IDLE_WITHIN_S
    while True:
        with urllib.request.urlopen(f"{url}/get_load", timeout=10) as answer:
            left = sum(load["num_reqs"] for load in json.load(answer))
        if not left or time.monotonic() > deadline:
            return int(left)
        time.sleep(0.1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemathesis", default=shutil.which("schemathesis"), help="its executable (%(default)s)")
    parser.add_argument("--examples", type=int, default=120, help="of each operation (%(default)s)")
    parser.add_argument("--max-time", type=int, default=600, help="seconds (%(default)s)")
    parser.add_argument("--phases", default="coverage,fuzzing")
    parser.add_argument("--mode", default="all", help="positive, negative or all")
    parser.add_argument("--keep", type=Path, help="where to keep what was sent and answered")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--port", type=int, default=8950)
    options = parser.parse_args()
    if not options.schemathesis:
        parser.error("schemathesis is not installed: pip install it in an environment of its own")
    settings = ("model.max_model_len=192", "engine.main.kv_tokens=4096", "engine.main.chunk_tokens=256")
    with tempfile.TemporaryDirectory() as directory, running(NAME, options.port, "smollm2.toml", *settings) as run_dir:
        url = f"http://127.0.0.1:{options.port}"
        before = {each.name: each.restarts for each in node_report(run_dir).tree.walk()}
        report = options.keep.absolute() if options.keep else Path(directory) / "cases.ndjson"
        began = time.monotonic()
        failed = fuzz(options, url, report)
        took = time.monotonic() - began
        found = statuses(report)
        tree = list(node_report(run_dir).tree.walk())
        restarted = {
            each.name: each.restarts - before[each.name] for each in tree if each.restarts != before[each.name]
        }
        left = await_idle(url)
    by_status = Counter[int]()
    for (_, status), count in found.items():
        by_status[status] += count
    print(f"{sum(by_status.values())} requests in {took:.0f} s, by status: {dict(sorted(by_status.items()))}")
    for label in sorted({label for label, _ in found}):
        print(f"  {label}: { ({status: n for (of, status), n in sorted(found.items()) if of == label}) }")
    print(f"restarted: {restarted or 'nothing'}; requests left: {left}")
    return 1 if failed or restarted or left else 0


if __name__ == "__main__":
    sys.exit(main())
