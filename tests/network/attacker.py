"""Sends what it can to ports without having the keys. `python attacker.py HOST SECONDS PORT…`."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time

import zmq

from llm_runtime.actors.messages import Abort, Hello, Message
from llm_runtime.transport import Codec

OPEN_AT_ONCE = 64
PAUSE_S = 0.02


def main() -> None:
    host, seconds, *ports = sys.argv[1:]
    deadline = time.monotonic() + float(seconds)
    context = zmq.Context()
    codec = Codec(Message)
    frames = [codec.encode("ingress0", 2**62, number, body) for number, body in enumerate((Hello(), Abort("x")))]
    # Random bytes, a greeting with a command that claims to be long, nothing at all, and what a transfer engine may
    # take for the beginning of a very long read.
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x01CURVE" + bytes(47)
    junk = (
        os.urandom(60_000),
        greeting + b"\x06" + (2**25).to_bytes(8, "big") + bytes(60_000),
        b"",
        (2**62).to_bytes(8, "little") + bytes(9),
    )
    kinds = (zmq.PUSH, zmq.DEALER, zmq.REQ)
    raws: list[socket.socket] = []
    plain: list[zmq.Socket[bytes]] = []
    rounds = 0
    while time.monotonic() < deadline:
        for port in ports:
            raws.append(socket.create_connection((host, int(port)), 10))
            with contextlib.suppress(OSError):
                raws[-1].sendall(junk[rounds % len(junk)])
            plain.append(context.socket(kinds[rounds % len(kinds)]))
            plain[-1].setsockopt(zmq.LINGER, 0)
            plain[-1].connect(f"tcp://{host}:{port}")
            with contextlib.suppress(zmq.Again):  # a socket whose only peer has refused it takes nothing more
                plain[-1].send(frames[rounds % len(frames)], zmq.NOBLOCK)
        rounds += 1
        for crowd in (raws, plain):
            while len(crowd) > OPEN_AT_ONCE:
                crowd.pop(0).close()
        time.sleep(PAUSE_S)
    print(rounds)
    context.destroy(linger=0)


if __name__ == "__main__":
    main()
