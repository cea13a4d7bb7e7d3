"""How bytes move between processes: message codec, mailboxes over ZeroMQ, memory that outlives a process."""

from llm_runtime.transport.arena import Arena
from llm_runtime.transport.codec import Codec, Envelope, MalformedMessage, OversizedMessage
from llm_runtime.transport.curve import Network
from llm_runtime.transport.faults import Faults, FaultyMailbox
from llm_runtime.transport.mailbox import Mailbox, MailboxCounters

__all__ = [
    "Arena",
    "Codec",
    "Envelope",
    "Faults",
    "FaultyMailbox",
    "Mailbox",
    "MailboxCounters",
    "MalformedMessage",
    "Network",
    "OversizedMessage",
]
