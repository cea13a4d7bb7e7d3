"""Chat templates: messages become one text, exactly as `apply_chat_template` of transformers renders them."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llm_runtime.actors.tokenizer.system_messages import folded, has_late_system, takes_late_system

MAX_CHARACTERS = 16 * 2**20
"""Characters that a rendered prompt may have."""
MAX_SECONDS = 10.0
"""Time that rendering may take, checked at each piece of output."""

_CONTINUE_MARK = "CONTINUE_FINAL_MESSAGE_TAG "
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
_RESERVED = ("messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template", "tokenize")

Messages = list[dict[str, Any]]


class TemplateFailure(Exception):
    """The messages cannot be rendered; the text is one sentence for the client."""


class ChatTemplate:
    """The chat templates of a model, compiled.

    Args:
        templates: Jinja sources by name. `tool_use`, where there is one, is taken for requests with tools, `default`
            for all others.
        special_tokens: `bos_token`, `eos_token` … for the templates.

    Raises:
        jinja2.TemplateError: a source is not a template.
    """

    def __init__(self, templates: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        environment = _environment()
        self.sources = dict(templates)
        self._templates = {name: environment.from_string(source) for name, source in templates.items()}
        self._special_tokens = dict(special_tokens)
        self._takes_late_system: dict[str, bool] = {}

    def render(
        self,
        messages: Messages,
        tools: list[dict[str, Any]] | None = None,
        arguments: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> str:
        """The text of a conversation. Raises TemplateFailure.

        Args:
            arguments: further variables for the template.
            add_generation_prompt: end with what makes the model answer.
            continue_final_message: end with the last message's content, for the model to go on with.
        """
        name = "tool_use" if tools and "tool_use" in self._templates else "default"
        if name not in self._templates:
            raise TemplateFailure(
                "This model has no chat template, so it cannot serve chat requests; send a plain prompt to "
                "/v1/completions, or set a chat template in the topology file."
            )
        reserved = [key for key in _RESERVED if arguments and key in arguments]
        if reserved:
            raise TemplateFailure(f"The chat template argument {reserved[0]!r} is set by the server; leave it out.")
        messages = [_plain(message) for message in messages]
        if has_late_system(messages) and not self._puts_system_where_it_stands(name):
            messages = folded(messages)
        if continue_final_message:
            if add_generation_prompt:
                raise TemplateFailure(
                    "continue_final_message and add_generation_prompt exclude each other; set only one of them."
                )
            final = _mark_end(messages, self.sources[name])
        variables = {
            "documents": None,
            **self._special_tokens,
            **(arguments or {}),
            "messages": messages,
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
        }
        text = _render(self._templates[name], variables)
        return _cut_at_mark(text, final) if continue_final_message else text

    def _puts_system_where_it_stands(self, name: str) -> bool:
        if name not in self._takes_late_system:
            variables = {"documents": None, **self._special_tokens, "tools": None, "add_generation_prompt": True}
            template = self._templates[name]
            self._takes_late_system[name] = takes_late_system(
                lambda messages: _render(template, {**variables, "messages": messages})
            )
        return self._takes_late_system[name]


def _render(template: jinja2.Template, variables: Mapping[str, Any]) -> str:
    deadline = time.monotonic() + MAX_SECONDS
    pieces: list[str] = []
    length = 0
    try:
        for piece in template.generate(**variables):
            pieces.append(piece)
            length += len(piece)
            if length > MAX_CHARACTERS:
                raise TemplateFailure(f"The rendered chat is longer than {MAX_CHARACTERS} characters.")
            if time.monotonic() > deadline:
                raise TemplateFailure(f"Rendering the chat took longer than {MAX_SECONDS:.0f} seconds.")
    except jinja2.TemplateError as error:
        raise TemplateFailure(error.message or type(error).__name__) from None
    except TemplateFailure:
        raise
    except Exception as error:  # templates are programs: an unexpected message makes them raise anything
        raise TemplateFailure(
            f"The chat template cannot render these messages ({type(error).__name__}: {error})."
        ) from None
    return "".join(pieces)


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    """A copy without the keys that are null, and with the reasoning under each name that templates know it by."""
    message = {key: value for key, value in message.items() if value is not None}
    reasoning = next((message[key] for key in _REASONING_FIELDS if key in message), None)
    if reasoning is not None:
        message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
    return message


def _mark_end(messages: Messages, source: str) -> str:
    """Puts a mark behind the final message's text, and returns that text without the mark."""
    content = messages[-1].get("content") if messages else None
    if content is None:
        raise TemplateFailure("continue_final_message needs a final message with content to continue.")
    if "content" not in source:
        raise TemplateFailure("continue_final_message does not work with this model's chat template.")
    if isinstance(content, str):
        messages[-1]["content"] = content + _CONTINUE_MARK
        return content
    parts = [dict(part) if isinstance(part, dict) else part for part in content] if isinstance(content, list) else []
    for part in reversed(parts):
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            text: str = part["text"]
            part["text"] = text + _CONTINUE_MARK
            messages[-1]["content"] = parts
            return text
    raise TemplateFailure("continue_final_message needs a final message with text to continue.")


def _cut_at_mark(text: str, final: str) -> str:
    mark = _CONTINUE_MARK.strip()
    if final.strip() not in text or mark not in text:
        raise TemplateFailure(
            "continue_final_message does not work here: the chat template leaves out or changes the final message."
        )
    place = text.rindex(mark)
    if text.startswith(_CONTINUE_MARK, place):
        return text[:place]
    return text[:place].rstrip()  # the template strips messages, and so the space that ends the mark is gone


def _environment() -> ImmutableSandboxedEnvironment:
    """Jinja as transformers sets it up (`utils/chat_template_utils.py`)."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["dict"] = _make_dict
    environment.globals["namespace"] = _Namespace
    return environment


class _Generation(jinja2.ext.Extension):
    """`{% generation %} … {% endgeneration %}`, which marks what the model wrote; rendered as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace without access to what begins with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_attribute(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: str) -> None:
    if name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"the chat template sets {name!r}, and names must not begin with _")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _make_dict(*args: Any, **kwargs: Any) -> dict[str, Any]:
    return dict(*args, **kwargs)  # a function, so that templates cannot reach the class


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
