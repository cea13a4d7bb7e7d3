"""guidellm: a short benchmark without failures."""

import json
import os
import subprocess

PROCESSOR = os.getcwd()
"""Where the tokenizer is; `run.py` puts it there."""

subprocess.run(
    [
        *("guidellm", "benchmark", "run", "--target", os.environ["NODE_URL"], "--model", os.environ["NODE_MODEL"]),
        *("--profile", "concurrent", "--rate", "2", "--max-requests", "6", "--max-seconds", "60"),
        *("--data", "prompt_tokens=32,output_tokens=16", "--processor", PROCESSOR),
        *("--outputs", "json", "--output-dir", "."),
    ],
    check=True,
    timeout=240,
)
with open("benchmarks.json") as file:
    (benchmark,) = json.load(file)["benchmarks"]
assert len(benchmark["requests"]["successful"]) >= 6
assert not benchmark["requests"]["errored"]
