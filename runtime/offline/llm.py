"""`LLM`: a model for one Python program."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_runtime.runtime.errors import UserError
from llm_runtime.runtime.offline.node import PrivateNode
from llm_runtime.runtime.offline.params import SamplingParams
from llm_runtime.runtime.offline.requests import post_all
from llm_runtime.runtime.offline.results import Result, result
from llm_runtime.runtime.offline.settings import as_arguments

Prompt = str | Sequence[int]
Messages = Sequence[Mapping[str, Any]]


class LLM:
    """A model that runs in supervised processes of this program's own: it survives the death of any of them.

        with LLM("smollm2-135m-instruct", kv_tokens=8192) as llm:
            results = llm.generate(["Once upon a time"], SamplingParams(max_tokens=32, temperature=0))

    The processes end on `close`, at the end of a `with` block, and with this program, even if that is killed. Methods
    may be called from several threads.

    Args:
        model: what `model.path` of a topology may be: an alias, a directory, a GGUF file, a Hugging Face id.
        topology: topology file, for more than one engine or for all settings in one place.
        settings: keys of the topology by their full names: `{"ingress.max_body_bytes": 2**24}`.
        keys: keys of `[model]` and of the engines by their bare names: `tp=2, deterministic=True`.

    Attributes:
        node: the processes; `RUNTIME_DIR=DIRECTORY runtime status`, with its `directory`, shows them.

    Raises UserError, one sentence that says what to do, here and in all methods.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        topology: str | os.PathLike[str] | None = None,
        settings: Mapping[str, Any] | None = None,
        **keys: Any,
    ) -> None:
        if model is None and topology is None:
            raise UserError('give a model, such as LLM("smollm2-135m-instruct"), or topology=FILE')
        file = None if topology is None else Path(topology)
        named = {"path": os.fspath(model)} if model is not None else {}
        self.node = PrivateNode(file, as_arguments({**named, **keys}, settings or {}, file))

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops the processes and waits for their end."""
        self.node.close()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Result]:
        """Continues prompts, each a text or a list of token ids; the results are in the prompts' order.

        Args:
            params: for all prompts, or one for each.
        """
        several: list[Prompt] = [prompts] if _is_one(prompts) else list(prompts)  # type: ignore[list-item, arg-type]
        return self._generate(several, several, params)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[Result]:
        """Answers conversations, each a list of OpenAI's messages, through the model's chat template.

        Args:
            params: for all conversations, or one for each.
            tools: functions that the template describes to the model; its calls are part of the text.
            chat_template_kwargs: variables for the template.
        """
        single = bool(messages) and isinstance(messages[0], Mapping)
        several: list[Any] = [messages] if single else list(messages)
        extra = {"tools": tools, "chat_template_kwargs": chat_template_kwargs}
        given = {key: value for key, value in extra.items() if value is not None}
        rendered = post_all(self.node, "/tokenize", [{"messages": each, **given} for each in several])
        return self._generate(several, [each["tokens"] for each in rendered], params)

    def _generate(
        self,
        shown: Sequence[Any],
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
    ) -> list[Result]:
        """Args: shown: what the results give as the prompts."""
        wanted = _one_each(params, len(prompts))
        bodies = [
            {"text" if isinstance(prompt, str) else "input_ids": prompt, **each.native()}
            for prompt, each in zip(prompts, wanted, strict=True)
        ]
        return [result(*each) for each in zip(shown, post_all(self.node, "/generate", bodies), strict=True)]


def _is_one(prompts: Any) -> bool:
    """Whether this is a single prompt: a text, or token ids."""
    return isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))


def _one_each(params: SamplingParams | Sequence[SamplingParams] | None, prompts: int) -> Sequence[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * prompts
    if len(params) != prompts:
        raise UserError(f"there are {prompts} prompts but {len(params)} sampling parameters: give one, or one for each")
    return params
