"""Body of POST /v1/chat/completions, which requests of the other protocols are turned into."""

from __future__ import annotations

from typing import Any, Literal

from actors.ingress.openai.messages import ChatMessage
from actors.ingress.openai.protocol import CompletionsRequest, TopLogprobsCount
from actors.ingress.openai.tools import Tool, ToolChoice
from actors.ingress.sampling import Tokens
from actors.ingress.thinking import CustomParams

ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class ChatRequest(CompletionsRequest, forbid_unknown_fields=True, kw_only=True):
    """Body of POST /v1/chat/completions."""

    messages: list[ChatMessage]
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobsCount | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    reasoning_effort: ReasoningEffort | None = None
    separate_reasoning: bool = True
    stream_reasoning: bool = True
    thinking_budget: Tokens | None = None
    thinking_token_budget: Tokens | None = None
    custom_params: CustomParams | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False

    @property
    def thinking_budgets(self) -> dict[str, int | None]:
        """What the request says of the length of the reasoning, by the names of Qwen, vLLM and SGLang for it."""
        return {
            "thinking_budget": self.thinking_budget,
            "thinking_token_budget": self.thinking_token_budget,
            "custom_params": None if self.custom_params is None else self.custom_params.thinking_budget,
        }

    @property
    def template_arguments(self) -> dict[str, Any]:
        """Variables for the chat template."""
        effort = {} if self.reasoning_effort is None else {"reasoning_effort": self.reasoning_effort}
        return {**effort, **(self.chat_template_kwargs or {})}
