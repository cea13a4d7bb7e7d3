"""guidellm: a short benchmark without failures."""

import json
import os
import subprocess

PROCESSOR = os.getcwd()
"""Where the tokenizer is; `run.py` puts it there."""

subprocess.run(
    [
        *("guidellm", "run", "--disable-console-interactive"),
        *("--backend", f"kind=openai_http,target={os.environ['NODE_URL']},model={os.environ['NODE_MODEL']}"),
        *("--profile", "kind=concurrent,streams=2", "--constraint", "kind=max_requests,count=6"),
        *("--tokenizer", f"kind=huggingface_auto,model={PROCESSOR}"),
        *("--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=16", "--output", "kind=json,path=found.json"),
    ],
    check=True,
    timeout=240,
)
with open("found.json") as file:
    (benchmark,) = json.load(file)["benchmarks"]
assert len(benchmark["requests"]["successful"]) >= 6
assert not benchmark["requests"]["errored"]
