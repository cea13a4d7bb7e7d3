"""inspect-ai: an evaluation whose model calls a tool."""

import os
import tempfile
from typing import Any

from inspect_ai import Task, eval
from inspect_ai.dataset import Sample
from inspect_ai.scorer import includes
from inspect_ai.solver import generate, use_tools
from inspect_ai.tool import tool

MODEL = os.environ["MODEL"]


@tool
def weather() -> Any:
    async def execute(city: str) -> str:
        """The weather of a city.

        Args:
            city: its name.
        """
        return f"sunny in {city}"

    return execute


task = Task(
    dataset=[Sample(input="What is the weather in Paris?", target="sunny")],
    solver=[use_tools(weather()), generate()],
    scorer=includes(),
    name="weather",
)
os.environ |= {"LOCAL_API_KEY": "none", "LOCAL_BASE_URL": os.environ["OPENAI_BASE_URL"]}
with tempfile.TemporaryDirectory() as directory:
    for name in (f"openai/{MODEL}", f"openai-api/local/{MODEL}"):
        (log,) = eval(task, model=name, log_dir=directory, display="none")
        assert log.status == "success", log.error
        assert log.results is not None
        assert log.results.scores[0].metrics["accuracy"].value == 1
