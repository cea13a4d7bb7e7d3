"""lm-eval's models for servers: loglikelihoods of token ids and texts, and generations in both protocols."""

import os
import urllib.request

from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

URL, MODEL = os.environ["NODE_URL"], os.environ["NODE_MODEL"]


def asked(kind: str, *arguments: object) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def completions() -> None:
    for tokenized in (True, False):
        lm = LocalCompletionsAPI(
            model=MODEL,
            base_url=f"{URL}/v1/completions",
            tokenizer_backend="remote" if remote() else None,
            tokenized_requests=tokenized and remote(),
            max_length=512,
        )
        if remote():
            paris, rome = lm.loglikelihood(
                [asked("loglikelihood", "The capital of France is", word) for word in (" Paris", " stone")]
            )
            assert paris[0] > rome[0]
        (text,) = lm.generate_until([asked("generate_until", "Two and two is", {"until": ["\n"], "max_gen_toks": 8})])
        assert text


def remote() -> bool:
    """Whether the server tells of its tokenizer."""
    try:
        urllib.request.urlopen(f"{URL}/tokenizer_info", timeout=30)
    except OSError:
        return False
    return True


def chat() -> None:
    lm = LocalChatCompletion(model=MODEL, base_url=f"{URL}/v1/chat/completions", max_length=512)
    from lm_eval.models.api_models import JsonChatStr

    question = JsonChatStr('[{"role": "user", "content": "What is the capital of France?"}]')
    (text,) = lm.generate_until([asked("generate_until", question, {"until": ["\n\n"], "max_gen_toks": 32})])
    assert "Paris" in text


if __name__ == "__main__":
    completions()
    chat()
