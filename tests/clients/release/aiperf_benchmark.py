"""aiperf: a short benchmark of chats without failures."""

import json
import os
import subprocess
from pathlib import Path

PROCESSOR = os.getcwd()
"""Where the tokenizer is; `run.py` puts it there."""

subprocess.run(
    [
        *("aiperf", "profile", "--model", os.environ["NODE_MODEL"], "--url", os.environ["NODE_URL"]),
        *("--endpoint-type", "chat", "--streaming", "--concurrency", "2", "--request-count", "6"),
        *("--synthetic-input-tokens-mean", "32", "--output-tokens-mean", "16", "--tokenizer", PROCESSOR),
        *("--artifact-dir", "found", "--ui", "none"),
    ],
    check=True,
    timeout=240,
)
(file,) = Path("found").rglob("profile_export_aiperf.json")
found = json.loads(file.read_text())
assert found["request_count"]["avg"] == 6, found.get("request_count")
assert not (found.get("error_request_count") or {}).get("avg"), found["error_request_count"]
