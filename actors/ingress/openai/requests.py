"""Body of POST /v1/chat/completions, which requests of the other protocols are turned into."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from actors.ingress.errors import invalid
from actors.ingress.openai.messages import ChatMessage
from actors.ingress.openai.protocol import UNSUPPORTED, CompletionsRequest, TopLogprobsCount
from actors.ingress.openai.tools import Function, FunctionName, Tool, ToolChoice, named_tool
from actors.ingress.sampling import TokenLimit, Tokens
from actors.ingress.thinking import CustomParams

ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class ChatRequest(CompletionsRequest, forbid_unknown_fields=True, kw_only=True):
    """Body of POST /v1/chat/completions."""

    unsupported: ClassVar[tuple[str, ...]] = (*UNSUPPORTED, "suffix", "best_of", "add_special_tokens")

    messages: list[ChatMessage]
    max_completion_tokens: TokenLimit | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobsCount | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    functions: list[Function] | None = None
    function_call: Literal["auto", "none"] | FunctionName | None = None
    reasoning_effort: ReasoningEffort | None = None
    verbosity: Literal["low", "medium", "high"] | None = None
    include_reasoning: bool | None = None
    separate_reasoning: bool = True
    stream_reasoning: bool = True
    thinking_budget: Tokens | None = None
    thinking_token_budget: Tokens | None = None
    custom_params: CustomParams | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None
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
        own = {name: getattr(self, name) for name in ("reasoning_effort", "verbosity", "documents")}
        return {**{name: value for name, value in own.items() if value}, **(self.chat_template_kwargs or {})}

    def check(self) -> None:
        super().check()
        if self.functions is None:
            if self.function_call not in (None, "auto", "none"):
                raise invalid("function_call is only allowed when functions are given.", "function_call")
            return
        if self.tools or self.tool_choice is not None:
            raise invalid(
                "functions and function_call are older names of tools and tool_choice: send these.", "functions"
            )
        choice = self.function_call
        self.tools = [Tool("function", function) for function in self.functions]
        self.tool_choice = named_tool(choice.name) if isinstance(choice, FunctionName) else choice
        self.parallel_tool_calls = False
