"""Compressed request bodies, bounded by what they hold."""

from __future__ import annotations

import zlib

from llm_runtime.actors.ingress.errors import ApiError, invalid

CODINGS = ("gzip", "x-gzip", "deflate")
UNKNOWN_CODING = "unknown_content_encoding"
MAX_MEMBERS = 64
"""Parts of one gzip body, RFC 1952 §2.2."""
_GZIP, _ZLIB, _RAW = 16 + zlib.MAX_WBITS, zlib.MAX_WBITS, -zlib.MAX_WBITS


def body_too_large(max_bytes: int) -> ApiError:
    """The error of a body that is larger than that, as it comes or decompressed."""
    return ApiError(413, f"The request body is larger than {max_bytes} bytes.", code="request_too_large")


def decompressed(data: bytes, coding: str, max_bytes: int) -> bytes:
    """What a body holds. Raises ApiError when it cannot be read, or is larger than `max_bytes`.

    Args:
        coding: one of `CODINGS`.
    """
    if coding == "deflate":
        # RFC 9110 §8.4.1.2 means zlib's format; some clients send the bare data.
        is_zlib = len(data) > 1 and data[0] & 15 == 8 and (data[0] << 8 | data[1]) % 31 == 0
        whole, rest = _member(data, _ZLIB if is_zlib else _RAW, max_bytes)
    else:
        whole, rest = _member(data, _GZIP, max_bytes)
        for _ in range(MAX_MEMBERS):
            if not rest:
                break
            more, rest = _member(rest, _GZIP, max_bytes - len(whole))
            whole += more
    if rest:
        raise invalid(f"The request body is not valid {coding}: something follows it.")
    return whole


def _member(data: bytes, kind: int, max_bytes: int) -> tuple[bytes, bytes]:
    """What one part holds, and what follows it."""
    decoder = zlib.decompressobj(kind)
    try:
        whole = decoder.decompress(data, max_bytes + 1)
    except zlib.error:
        raise invalid("The request body is not what its Content-Encoding says.") from None
    if len(whole) > max_bytes:
        raise body_too_large(max_bytes)
    if not decoder.eof:
        raise invalid("The request body ends early: it is not what its Content-Encoding says.")
    return whole, decoder.unused_data
