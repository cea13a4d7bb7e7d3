"""The page at / in a browser, with a node whose ingress asks for a key."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest
from browser import PROGRAM, browser
from llm_tools import private_tree

from llm_runtime import LLM

BUTTON = "document.querySelector('[data-action=\"{}\"]')"
HEALTH = "document.querySelector('tr[data-name=\"main.scheduler\"]')?.dataset.health"

ENDLESS = """
const send = fetch;
window.fetch = (url, options) => {
  if (!String(url).includes("chat/completions")) return send(url, options);
  const body = {...JSON.parse(options.body), ignore_eos: true, max_tokens: 7000};
  return send(url, {...options, body: JSON.stringify(body)});
};
0
"""
"""Answers that are drawn at random may end before the page shows their requests: these do not."""


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
        row = await page.value("document.querySelector('tr[data-name=\"main.scheduler\"]').textContent")
        assert "killed by SIGKILL" in row
        await page.wait_for(f"{HEALTH} === 'good'")

        await page.value("post('v1/completions', {prompt: 'Once upon a time', max_tokens: 4, ignore_eos: true}) && 0")
        await page.wait_for(
            "[...document.querySelectorAll('.figure')].every((each) => each.querySelector('b')"
            ".textContent !== '–' && each.querySelector('path').getAttribute('d'))"
        )
        event = "[...document.querySelectorAll('#events tbody tr')].find((row) => row.textContent.includes('SIGKILL'))"
        assert "main.scheduler" in await page.value(f"{event}.textContent")
        assert await page.wait_for(f"{event}.cells[3].textContent.trim()")  # how long it was away

        await page.wait_for(f"!!{BUTTON.format('log main')}")
        await page.value(f"{BUTTON.format('log main')}.click()")
        await page.wait_for("document.getElementById('log-text').textContent.includes('main.scheduler')")

        await page.value(ENDLESS)
        await page.value(
            "document.getElementById('prompt').value = 'Tell a long story of a king and his three sons.';"
            "document.getElementById('ask').requestSubmit()"
        )
        await page.wait_for("document.getElementById('answer').textContent.trim().length > 0")  # drawn at random
        for _ in range(2):  # an end is asked for twice
            await page.wait_for("!!document.querySelector('#requests td button')")
            await page.value("document.querySelector('#requests td button').click()")
        await page.wait_for("document.getElementById('send').textContent === 'Ask'")

        before = private_tree(llm)["detokenizer"]["pid"]
        for _ in range(2):
            await page.value(f"{BUTTON.format('restart detokenizer')}.click()")
        await page.wait_for("document.getElementById('ordered').textContent === 'restart of detokenizer: done'")
        assert private_tree(llm)["detokenizer"]["pid"] != before

        points = "document.querySelector('.figure path').getAttribute('d').length"
        drawn = await page.value(points)
        await page.call("Page.reload")
        await page.wait_for(f"document.querySelector('.figure path') && {points} >= {drawn - 60}")
        for width in (390, 820, 1440):
            await page.call(
                "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500
            )
            await page.wait_for(f"innerWidth === {width}")
            assert await page.value("document.documentElement.scrollWidth") <= width
            cut = "[...document.querySelectorAll('.scroll')].some((each) => each.scrollWidth > each.clientWidth)"
            await page.wait_for(f"document.querySelector('tr[data-name] button') && !({cut})")  # buttons are in sight
        assert not [each for each in page.complaints if "Security Policy" in each or "exception" in each]
