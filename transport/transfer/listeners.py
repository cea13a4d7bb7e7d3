"""Keeps libraries that listen on all addresses of a machine to the one address that they were given."""

from __future__ import annotations

import ctypes
import ipaddress
import os
import socket
import struct

_SO_ATTACH_FILTER = 26  # <asm-generic/socket.h>
_NETWORK_HEADER = 0xFFF00000  # SKF_NET_OFF of <linux/filter.h>: offsets from here on count from the IP header
_LOAD_BYTE, _LOAD_WORD, _JUMP_IF_EQUAL, _RETURN, _SHIFT_RIGHT = 0x30, 0x20, 0x15, 0x06, 0x74


def listening() -> set[int]:
    """The descriptors of this process that are listening TCP sockets."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as duplicate:
                if duplicate.family in (socket.AF_INET, socket.AF_INET6) and duplicate.getsockopt(
                    socket.SOL_SOCKET, socket.SO_ACCEPTCONN
                ):
                    found.add(int(name))
        except OSError:  # the descriptor of the listing itself, or one that another thread has closed
            continue
    return found


def restrict(descriptor: int, host: str) -> None:
    """Has the kernel drop whatever comes to a listening socket, or the connections it accepts, for another address.

    A socket that is bound already cannot be bound elsewhere. A filter can still be attached: it looks at the address
    that a packet was sent to. Raises OSError when the kernel refuses.
    """
    address = ipaddress.ip_address(host)
    version, offset = (4, 16) if address.version == 4 else (6, 24)
    words = struct.unpack(f"!{len(address.packed) // 4}I", address.packed)
    program: list[tuple[int, int, int, int]] = [
        (_LOAD_BYTE, 0, 0, _NETWORK_HEADER),
        (_SHIFT_RIGHT, 0, 0, 4),
        (_JUMP_IF_EQUAL, 0, 2 * len(words) + 1, version),
    ]
    for number, word in enumerate(words):
        program.append((_LOAD_WORD, 0, 0, _NETWORK_HEADER + offset + 4 * number))
        program.append((_JUMP_IF_EQUAL, 0, 2 * (len(words) - number) - 1, word))
    program += [(_RETURN, 0, 0, 0xFFFFFFFF), (_RETURN, 0, 0, 0)]
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
    memory = ctypes.create_string_buffer(code)
    pointer = struct.pack("@HP", len(program), ctypes.addressof(memory))  # struct sock_fprog
    with socket.socket(fileno=os.dup(descriptor)) as duplicate:
        duplicate.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, pointer)


def restrict_new(before: set[int], host: str) -> None:
    """Restricts the sockets that listen now and did not `before`, unless they are bound to the address alone."""
    for descriptor in listening() - before:
        with socket.socket(fileno=os.dup(descriptor)) as duplicate:
            bound = duplicate.getsockname()[0]
        if ipaddress.ip_address(bound) != ipaddress.ip_address(host):
            restrict(descriptor, host)
