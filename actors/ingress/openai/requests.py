"""Body of POST /v1/chat/completions, which requests of the other protocols are turned into."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from msgspec import Struct

from llm_runtime.actors.ingress.errors import invalid
from llm_runtime.actors.ingress.openai.messages import ChatMessage
from llm_runtime.actors.ingress.openai.protocol import UNSUPPORTED, CompletionsRequest, TopLogprobsCount
from llm_runtime.actors.ingress.openai.tools import Function, FunctionName, Tool, ToolChoice, named_tool
from llm_runtime.actors.ingress.sampling import TokenLimit, Tokens
from llm_runtime.actors.ingress.thinking import CustomParams

ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class ReasoningSwitch(Struct, forbid_unknown_fields=True):
    """Whether and how much to reason, as OpenRouter and SGLang have it. A summary is not made: there is the whole."""

    enabled: bool | None = None
    effort: ReasoningEffort | None = None
    max_tokens: Tokens | None = None
    exclude: bool | None = None
    summary: Any = None


class ThinkingSwitch(Struct, forbid_unknown_fields=True):
    """Whether to reason, as DeepSeek, GLM, Kimi and Doubao have it."""

    type: Literal["enabled", "disabled", "adaptive", "auto"]
    budget_tokens: Tokens | None = None


_SWITCHED = {"enabled": True, "disabled": False}


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
    reasoning: ReasoningSwitch | None = None
    thinking: ThinkingSwitch | bool | None = None
    enable_thinking: bool | None = None
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
        thinking = self.thinking if isinstance(self.thinking, ThinkingSwitch) else ThinkingSwitch("auto")
        return {
            "reasoning.max_tokens": None if self.reasoning is None else self.reasoning.max_tokens,
            "thinking.budget_tokens": thinking.budget_tokens,
            "thinking_budget": self.thinking_budget,
            "thinking_token_budget": self.thinking_token_budget,
            "custom_params": None if self.custom_params is None else self.custom_params.thinking_budget,
        }

    @property
    def template_arguments(self) -> dict[str, Any]:
        """Variables for the chat template. Templates have two names for the switch; others know neither."""
        own = {name: getattr(self, name) for name in ("reasoning_effort", "verbosity", "documents")}
        thinks = self._thinks
        switches = {} if thinks is None else {"enable_thinking": thinks, "thinking": thinks}
        return {
            **{name: value for name, value in own.items() if value},
            **switches,
            **(self.chat_template_kwargs or {}),
        }

    @property
    def _thinks(self) -> bool | None:
        """Whether to reason, by whichever of its names; None leaves that to the chat template."""
        if self.enable_thinking is not None:
            return self.enable_thinking
        if isinstance(self.thinking, bool):
            return self.thinking
        if self.thinking is not None and self.thinking.type in _SWITCHED:
            return _SWITCHED[self.thinking.type]
        if self.reasoning is not None and self.reasoning.enabled is not None:
            return self.reasoning.enabled
        return False if self.reasoning_effort == "none" else None

    def check(self) -> None:
        super().check()
        if self.reasoning is not None:
            self.reasoning_effort = self.reasoning_effort or self.reasoning.effort
            if self.reasoning.exclude:
                self.include_reasoning = False
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
