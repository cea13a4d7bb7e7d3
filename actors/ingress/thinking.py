"""What clients say of the length of the reasoning, under the names of Qwen, vLLM and SGLang, and what engines are told
of it."""

from __future__ import annotations

from array import array
from collections.abc import Mapping

from msgspec import Struct

from llm_runtime.actors.ingress.config import ServedModel
from llm_runtime.actors.ingress.errors import invalid
from llm_runtime.actors.ingress.sampling import Tokens
from llm_runtime.actors.messages import Thinking
from llm_runtime.actors.parsers.reasoning import Markers


class CustomParams(Struct, forbid_unknown_fields=True):
    """What SGLang hands to a processor of logits; the one of thinking budgets is built in here."""

    thinking_budget: Tokens | None = None


def thinking_budget(model: ServedModel, given: Mapping[str, int | None]) -> int | None:
    """How many tokens the reasoning may have; None for any number. Raises ApiError where a model's reasoning cannot be
    told from its answer, and for several budgets.

    Args:
        given: what the client says, by its names for it.
    """
    budgets = {name: budget for name, budget in given.items() if budget is not None}
    if not budgets:
        return None
    names = list(budgets)
    if len(set(budgets.values())) > 1:
        raise invalid(f"{' and '.join(names)} are names for one thing: send one of them.", names[1])
    if model.reasoning_parser is None:
        raise invalid(
            f"The model '{model.name}' is served without a format of reasoning, so there is nothing that a thinking "
            "budget could limit: set reasoning_parser under [ingress] in the topology, or send no budget.",
            names[0],
            "unsupported_parameter",
        )
    return budgets[names[0]]


def thinking_of(markers: Markers, budget: int | None, closing: bytes) -> Thinking:
    """What the engine is told. `closing` are the token ids (i32) of the markers' `closing`."""
    return Thinking(markers.ends, markers.start, budget, list(array("i", closing)))
