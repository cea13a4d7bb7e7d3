"""The page at / in a browser, with a node whose ingress asks for a key."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest
from browser import PROGRAM, browser
from llm_tools import private_tree

from runtime import LLM

HEALTH = "document.querySelector('tr[data-name=\"main.scheduler\"]')?.dataset.health"


@pytest.mark.skipif(PROGRAM is None, reason="there is no Chromium: apt-get install chromium")
def test_the_page_shows_the_node_live(llm: LLM, tmp_path: Path) -> None:
    asyncio.run(_look(llm, tmp_path))


async def _look(llm: LLM, profile: Path) -> None:
    async with browser(profile) as page:
        await page.open(llm.node.url)
        await page.wait_for("document.getElementById('login')?.hidden === false")
        assert not await page.value("document.querySelector('tr[data-name]')")
        await page.value(
            f"document.getElementById('key').value = '{llm.node.api_key}';"
            "document.getElementById('login').requestSubmit()"
        )
        await page.wait_for(f"{HEALTH} === 'good'")
        shown = await page.value("[...document.querySelectorAll('tr[data-name]')].map((row) => row.dataset.name)")
        assert sorted(shown) == sorted(private_tree(llm))
        assert await page.value("document.getElementById('login').hidden")

        os.kill(private_tree(llm)["main.scheduler"]["pid"], signal.SIGKILL)
        await page.wait_for(f"{HEALTH} === 'bad'")
        row = await page.value("document.querySelector('tr[data-name=\"main.scheduler\"]').innerText")
        assert "killed by SIGKILL" in row
        await page.wait_for(f"{HEALTH} === 'good'")

        await page.value(
            "document.getElementById('prompt').value = 'Name the capital of France.';"
            "document.getElementById('ask').requestSubmit()"
        )
        await page.wait_for("document.getElementById('answer').textContent.trim().length > 0")  # drawn at random
        await page.wait_for(
            "[...document.querySelectorAll('.figure')].every((each) => each.querySelector('b')"
            ".textContent !== '–' && each.querySelector('polyline').getAttribute('points'))"
        )
        assert not [each for each in page.complaints if "Security Policy" in each or "exception" in each]
