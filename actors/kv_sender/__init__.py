"""The KV sender of a prefill engine: has decode engines read finished pages, and says whether these were valid."""

from llm_runtime.actors.kv_sender.actor import KvSender, SenderConfig

__all__ = ["KvSender", "SenderConfig"]
