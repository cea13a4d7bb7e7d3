"""`truncation` = auto: the oldest turns of a conversation that is too long are left out."""

from __future__ import annotations

from llm_runtime.actors.ingress.exchange import Exchange
from llm_runtime.actors.ingress.openai.messages import ChatMessage
from llm_runtime.actors.ingress.openai.requests import ChatRequest
from llm_runtime.actors.ingress.openai.tools import callable_tools
from llm_runtime.actors.ingress.openai.turn import conversation
from llm_runtime.actors.ingress.service import Service


async def truncate(service: Service, exchange: Exchange, request: ChatRequest) -> None:
    """Leaves out as few of the oldest turns as it takes for prompt and answer to fit the model's context.

    A turn begins with a message of the user, so that no result of a tool is left without its call. What the system says
    first stays, and so does the last turn, even if it does not fit.
    """
    if exchange.work.prompts is not None:
        return  # an earlier incarnation of this worker has done it, and its prompt counts
    tools = callable_tools(request.tools, request.tool_choice)
    messages = request.messages
    first = next((i for i, each in enumerate(messages) if each.role not in ("system", "developer")), len(messages))
    turns = [i for i, each in enumerate(messages) if i > first and each.role == "user"]
    room = service.model.max_model_len - max(request.max_tokens or 1, 1)

    def without(turn: int) -> list[ChatMessage]:
        return [*messages[:first], *messages[turns[turn - 1] if turn else first :]]

    low, high = 0, len(turns)  # so many turns are left out, at least and at most
    while low < high:
        middle = 0 if low == 0 and high == len(turns) else (low + high) // 2
        request.messages = without(middle)
        if await service.length_of(conversation(service.model, request, tools)) <= room:
            high = middle
        else:
            low = middle + 1
    request.messages = without(low)
