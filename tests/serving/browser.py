"""A headless Chromium, driven over its DevTools protocol."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

DEADLINE_S = 60.0
PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Browser:
    """One page.

    Attributes:
        complaints: what the browser has logged about it, such as violations of its content security policy.
    """

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._number = 0
        self.complaints: list[str] = []

    async def call(self, method: str, **params: Any) -> Any:
        """A command's result."""
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": params})
        while True:
            message = await self._socket.receive_json(timeout=DEADLINE_S)
            if message.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown"):
                self.complaints.append(json.dumps(message["params"]))
            if message.get("id") == self._number:
                assert "error" not in message, message
                return message["result"]

    async def open(self, url: str) -> None:
        """Goes to a page."""
        for domain in ("Log", "Runtime", "Page"):
            await self.call(f"{domain}.enable")
        await self.call("Page.navigate", url=url)

    async def value(self, expression: str) -> Any:
        """What a JavaScript expression gives."""
        result = await self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        return result["result"].get("value")

    async def wait_for(self, expression: str) -> Any:
        """Waits until a JavaScript expression is true; fails when that does not come in time."""
        async with asyncio.timeout(DEADLINE_S):
            while not (value := await self.value(expression)):
                await asyncio.sleep(0.05)
        return value


@contextlib.asynccontextmanager
async def browser(profile: Path) -> AsyncIterator[Browser]:
    """A browser with an empty page, that ends with the block."""
    assert PROGRAM is not None
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-port=0"]
    with (profile / "log").open("wb") as log:
        process = subprocess.Popen(
            [PROGRAM, *options, f"--user-data-dir={profile}", "about:blank"], stdout=log, stderr=log
        )
    try:
        async with aiohttp.ClientSession() as session:
            async with asyncio.timeout(DEADLINE_S):
                address = await _first_page(session, process, profile)
            async with session.ws_connect(address, max_msg_size=0) as socket:
                yield Browser(socket)
    finally:
        process.terminate()
        process.wait(10)


async def _first_page(session: aiohttp.ClientSession, process: subprocess.Popen[bytes], profile: Path) -> str:
    """The address at which the page of a browser that has just been started is driven."""
    port_file = profile / "DevToolsActivePort"
    while not (port_file.exists() and port_file.read_text().count("\n")):
        assert process.poll() is None, (profile / "log").read_text()
        await asyncio.sleep(0.02)
    port = port_file.read_text().split("\n")[0]
    while True:
        async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
            pages = [each["webSocketDebuggerUrl"] for each in await answer.json() if each["type"] == "page"]
        if pages:
            return str(pages[0])
        await asyncio.sleep(0.02)
