"""A conversation with an OpenAI-compatible server: messages, and answers that are streamed."""

from __future__ import annotations

import http.client
import urllib.parse
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec

from llm_runtime.runtime.errors import UserError

_EVENT = b"data: "
_TIMEOUT_S = 600.0
_REFUSED_KEY = 401


@dataclass
class Conversation:
    """What has been said.

    Attributes:
        url: of the server, without `/v1`.
        model: whom to ask; None for the server's choice.
        options: further fields of each request.
        api_key: sent as a bearer token.
        system: the message that is before all others.
        messages: in OpenAI's form.
    """

    url: str
    model: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    api_key: str | None = None
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forgets everything but the system's message."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]

    def ask(self, prompt: str) -> Generator[str, None, None]:
        """Pieces of the answer as they come. What has come is remembered, also if the rest is not waited for; without
        any answer, the question is not either.

        Raises UserError when the server cannot be reached or refuses.
        """
        question = {"role": "user", "content": prompt}
        pieces: list[str] = []
        try:
            for piece in self._stream([*self.messages, question]):
                pieces.append(piece)
                yield piece
        finally:
            if pieces:
                self.messages += [question, {"role": "assistant", "content": "".join(pieces)}]

    def _stream(self, messages: list[dict[str, str]]) -> Iterator[str]:
        body = {"messages": messages, "stream": True, **self.options}
        if self.model is not None:
            body["model"] = self.model
        connection, path = _connect(self.url)
        headers = {"Content-Type": "application/json"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        try:
            connection.request("POST", f"{path}/v1/chat/completions", msgspec.json.encode(body), headers)
            response = connection.getresponse()
            if response.status != 200:
                raise UserError(_problem(response.status, response.read()))
            for line in response:
                if line.startswith(_EVENT + b"{"):
                    yield from _pieces(line[len(_EVENT) :])
        except (OSError, http.client.HTTPException) as error:
            raise UserError(f"{self.url} does not answer ({error or type(error).__name__})") from None
        finally:
            connection.close()


def _connect(url: str) -> tuple[http.client.HTTPConnection, str]:
    """A connection to a server, and the path before `/v1`. Raises UserError for what is no URL."""
    address = urllib.parse.urlsplit(url)
    kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
    try:
        kind, port = kinds[address.scheme], address.port
    except (KeyError, ValueError):
        raise UserError(f"{url} is no URL of a server: give one such as http://127.0.0.1:8000") from None
    return kind(address.hostname or "", port, timeout=_TIMEOUT_S), address.path.rstrip("/").removesuffix("/v1")


def _pieces(data: bytes) -> Iterator[str]:
    try:
        event = msgspec.json.decode(data)
        if "error" in event:
            raise UserError(str(event["error"]["message"]))
        for choice in event["choices"]:
            if content := choice["delta"].get("content"):
                yield content
    except (msgspec.DecodeError, KeyError, TypeError, AttributeError):
        raise UserError("the server's answer is not that of an OpenAI-compatible one") from None


def _problem(status: int, body: bytes) -> str:
    """A refusal as a sentence."""
    if status == _REFUSED_KEY:
        return "the server asks for its API key: give it with --api-key or in $RUNTIME_API_KEY"
    try:
        return str(msgspec.json.decode(body)["error"]["message"])
    except (msgspec.DecodeError, KeyError, TypeError):
        return f"the server answers with status {status}"
