"""How bytes move between processes: message codec, mailboxes over ZeroMQ, memory that outlives a process."""

from transport.arena import Arena
from transport.codec import Codec, Envelope, MalformedMessage, OversizedMessage
from transport.curve import Network
from transport.faults import Faults, FaultyMailbox
from transport.mailbox import Mailbox, MailboxCounters

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
