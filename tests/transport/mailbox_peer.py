"""A process with a mailbox, for tests that kill it: answers each `Number` with the same `Number`.

`python mailbox_peer.py NAME INCARNATION ADDRESS PEER PEER_ADDRESS`. It prints one line when its mailbox is bound.
"""

from __future__ import annotations

import sys

from msgspec import Struct

from llm_runtime.transport import Codec, Mailbox


class Number(Struct, tag=True, array_like=True):
    value: int


class Blob(Struct, tag=True, array_like=True):
    data: bytes
    names: list[str] = []


Body = Number | Blob


def main() -> None:
    name, incarnation, address, peer, peer_address = sys.argv[1:]
    mailbox: Mailbox[Body] = Mailbox(name, int(incarnation), address, {peer: peer_address}, Codec(Body))
    print("ready", flush=True)
    while True:
        mailbox.poll(3600)
        for envelope in mailbox.receive():
            mailbox.send(envelope.sender, envelope.body)


if __name__ == "__main__":
    main()
