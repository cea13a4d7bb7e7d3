"""The KV receiver of a decode engine: reads offered pages out of prefill engines into the pages of its own ranks."""

from llm_runtime.actors.kv_receiver.actor import KvReceiver, ReceiverConfig

__all__ = ["KvReceiver", "ReceiverConfig"]
