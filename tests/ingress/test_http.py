"""HTTP itself: what is no right request, what is offered and not taken up, old versions, and clients that are slow."""

from __future__ import annotations

import gzip
import json
import socket
import time
import zlib
from collections.abc import Iterator
from typing import Any

import pytest

from .conftest import Served, one_ingress
from .fakes import answer

BODY = json.dumps({"prompt": "a", "max_tokens": 5, "seed": 1}).encode()
STREAM = json.dumps({"prompt": "a", "max_tokens": 5, "seed": 1, "stream": True}).encode()


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One that a page of another server may ask, and that is not asked under any name."""
    with one_ingress(
        tmp_path_factory.mktemp("i"), cors_origins=["https://App.example/"], allowed_hosts=["llm.example.com"]
    ) as served:
        yield served


def post(body: bytes = BODY, *headers: str, version: str = "1.1", path: str = "/v1/completions") -> bytes:
    lines = [f"POST {path} HTTP/{version}", "host: x", "content-type: application/json", *headers]
    if not any(each.lower().startswith(("content-length", "transfer-encoding")) for each in headers):
        lines.append(f"content-length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def talk(served: Served, *parts: bytes, end: bytes = b"") -> bytes:
    """All that comes back until the server closes the connection, or the end that is waited for has come."""
    with socket.create_connection(("127.0.0.1", served.port)) as connection:
        connection.settimeout(20)
        for part in parts:
            connection.sendall(part)
        received = b""
        while not (end and received.endswith(end)) and (chunk := connection.recv(65536)):
            received += chunk
        return received


def text_of(reply: bytes) -> str:
    return str(json.loads(reply.partition(b"\r\n\r\n")[2])["choices"][0]["text"])


OFFERS = {
    "h2c": ["Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA"],
    "websocket": ["Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Key: x", "Sec-WebSocket-Version: 13"],
    "unknown": ["Connection: keep-alive, upgrade", "Upgrade: foo/2, bar"],
    "TLS": ["Connection: Upgrade", "Upgrade: TLS/1.0"],
}


@pytest.mark.parametrize("offer", OFFERS)
@pytest.mark.parametrize("pieces", [1, 3, 10_000])
def test_offers_of_other_protocols_are_passed_over(shared: Served, offer: str, pieces: int) -> None:
    whole = post(BODY, *OFFERS[offer]) + post(BODY, "connection: close")
    step = -(-len(whole) // pieces)
    reply = talk(shared, *(whole[at : at + step] for at in range(0, len(whole), step)))
    assert reply.count(b"HTTP/1.1 200 OK") == 2
    assert reply.count(json.dumps(answer("a", 1, 5), ensure_ascii=False).encode()) == 2


def test_an_offer_with_a_chunked_body_and_one_without_a_body(shared: Served) -> None:
    chunked = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
    whole = post(chunked, "transfer-encoding: chunked", *OFFERS["h2c"])
    get = "\r\n".join(["GET /health HTTP/1.1", "host: x", *OFFERS["h2c"], "", ""]).encode()
    reply = talk(shared, whole + get + get.replace(b"host: x", b"host: x\r\nconnection: close"))
    assert reply.count(b"HTTP/1.1 200 OK") == 3


REFUSED = {
    "CONNECT": b"CONNECT example.com:443 HTTP/1.1\r\nhost: example.com:443\r\n\r\n",
    "both lengths": post(BODY, "transfer-encoding: chunked", "content-length: 5"),
    "both lengths, turned": post(BODY, "content-length: 5", "transfer-encoding: chunked"),
    "two lengths": post(BODY, "content-length: 43", "content-length: 42"),
    "two lengths alike": post(BODY, f"content-length: {len(BODY)}", f"content-length: {len(BODY)}"),
    "a list of lengths": post(BODY, f"content-length: {len(BODY)}, {len(BODY)}"),
    "a signed length": post(BODY, "content-length: +5"),
    "a huge length": post(BODY, "content-length: 99999999999999999999999"),
    "another coding": post(BODY, "transfer-encoding: gzip"),
    "two codings": post(b"0\r\n\r\n", "transfer-encoding: gzip, chunked"),
    "two coding headers": post(b"0\r\n\r\n", "transfer-encoding: chunked", "transfer-encoding: identity"),
    "not quite chunked": post(b"0\r\n\r\n", "transfer-encoding: xchunked"),
    "chunked in HTTP/1.0": post(b"0\r\n\r\n", "transfer-encoding: chunked", version="1.0"),
    "a folded line": b"GET /health HTTP/1.1\r\nhost: x\r\na: b\r\n c\r\n\r\n",
    "a bare line feed": b"GET /health HTTP/1.1\r\nhost: x\na: b\r\n\r\n",
    "only line feeds": b"GET /health HTTP/1.1\nhost: x\n\n",
    "a bare carriage return": b"GET /health HTTP/1.1\r\nhost: x\r\na: b\rc\r\n\r\n",
    "a zero byte": b"GET /health HTTP/1.1\r\nhost: x\r\na: b\0c\r\n\r\n",
    "a blank before the colon": b"GET /health HTTP/1.1\r\nhost : x\r\n\r\n",
    "no host": b"GET /health HTTP/1.1\r\n\r\n",
    "two hosts": b"GET /health HTTP/1.1\r\nhost: x\r\nhost: y\r\n\r\n",
    "a bad chunk": post(b"3\r\nabcX0\r\n\r\n", "transfer-encoding: chunked"),
    "a signed chunk": post(b"+3\r\nabc\r\n0\r\n\r\n", "transfer-encoding: chunked"),
    "the preface of HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "another version": b"GET /health HTTP/1.7\r\nhost: x\r\n\r\n",
    "TLS": bytes.fromhex("16030100ca010000c60303") + bytes(190),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_request_ends_the_connection(shared: Served, what: str) -> None:
    """And nothing behind it is taken for a request."""
    reply = talk(shared, REFUSED[what] + post())
    assert reply.startswith(b"HTTP/1.1 400 Bad Request\r\n"), reply
    assert reply.count(b"HTTP/1.1") == 1
    head, _, body = reply.partition(b"\r\n\r\n")
    assert b"\r\nx-request-id: " in head
    assert b"\r\nconnection: close" in head
    assert set(json.loads(body)) == {"error"}


def test_junk_behind_a_request_does_not_spoil_its_answer(shared: Served) -> None:
    for version in ("1.1", "1.0"):
        reply = talk(shared, post(STREAM, version=version) + b"\x00junk\r\n\r\n" * 10)
        assert reply.count(b"HTTP/1.1") == 1
        assert b"data: [DONE]\n\n" in reply
    reply = talk(shared, post() + post() + b"junk\r\n\r\n")
    assert text_of(reply.partition(b"HTTP/1.1 200 OK")[2].partition(b"HTTP/1.1")[0]) == answer("a", 1, 5)


def test_headers_that_are_too_large(shared: Served) -> None:
    line = b"GET /v1/messages HTTP/1.1\r\nhost: x\r\n"
    for rest in (b"a: " + b"b" * 100_000 + b"\r\n\r\n", b"a: b\r\n" * 100_000 + b"\r\n", b"b" * 100_000):
        reply = talk(shared, line + rest)
        assert reply.startswith(b"HTTP/1.1 431 "), reply[:100]
        assert json.loads(reply.partition(b"\r\n\r\n")[2])["type"] == "error"  # Anthropic's shape
    assert talk(shared, b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 431 ")
    many = b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n" + b"a: b\r\n" * 10_000 + b"\r\n"
    assert talk(shared, many).startswith(b"HTTP/1.1 200 OK")


@pytest.mark.parametrize("what", ["trailers", "one trailer", "an extension"])
def test_what_is_in_no_body_is_bounded(shared: Served, what: str) -> None:
    endless = {"trailers": b"0\r\n" + b"a: b\r\n" * 10**5, "one trailer": b"0\r\na: " + b"b" * 500_000}
    rest = endless.get(what, b"1;" + b"x" * 500_000)
    reply = talk(shared, post(b"1\r\n{\r\n" + rest, "transfer-encoding: chunked"))
    assert reply.startswith(b"HTTP/1.1 431 "), reply[:200]


def test_trailers_are_no_headers(shared: Served) -> None:
    body = b"%x\r\n%b\r\n0\r\nx-request-id: forged\r\n\r\n" % (len(BODY), BODY)
    reply = talk(shared, post(body, "transfer-encoding: chunked", "connection: close"))
    assert b"forged" not in reply
    assert text_of(reply) == answer("a", 1, 5)


def test_targets(shared: Served) -> None:
    for target in ("http://x/health", "http://y:1/health?a=b", "/health?a#b", "/health/", "/health//"):
        reply = talk(shared, f"GET {target} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
        assert reply.startswith(b"HTTP/1.1 200 OK"), target
    assert talk(shared, b"OPTIONS * HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").startswith(b"HTTP/1.1 405 ")


@pytest.mark.parametrize("path", ["/v1/chat/completions/", "/v1/models/", "/v1/models/fake/", "/api/tags/"])
def test_a_trailing_slash_is_served(shared: Served, path: str) -> None:
    """A redirect would lead from a proxy's TLS to plain HTTP."""
    headers = {"x-forwarded-proto": "https"}
    if "chat" in path:
        body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
        response = shared.client.post(path, json=body, headers=headers, follow_redirects=False)
    else:
        response = shared.client.get(path, headers=headers, follow_redirects=False)
    assert response.status_code == 200


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/metrics", "/", "/openapi.json"])
def test_head(shared: Served, path: str) -> None:
    whole = f"{{}} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    head, _, body = talk(shared, whole.format("HEAD").encode()).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK")
    assert body == b""
    length = next(line for line in head.split(b"\r\n") if line.startswith(b"content-length: "))
    got, _, whole_body = talk(shared, whole.format("GET").encode()).partition(b"\r\n\r\n")
    assert path == "/metrics" or length == b"content-length: %d" % len(whole_body)
    assert path == "/metrics" or length in got


@pytest.mark.parametrize("pieces", [1, 5])
def test_http_1_0(shared: Served, pieces: int) -> None:
    """RFC 9112 §6.1: no chunks; a stream ends with the connection."""
    for body, headers in ((STREAM, ()), (BODY, ()), (STREAM, ("connection: keep-alive",))):
        whole = post(body, *headers, version="1.0").replace(b"host: x\r\n", b"")
        step = -(-len(whole) // pieces)
        reply = talk(shared, *(whole[at : at + step] for at in range(0, len(whole), step)))
        head, _, rest = reply.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 OK")
        assert b"transfer-encoding" not in head
        assert b"connection: close" in head
        if body is BODY:
            assert b"content-length: %d" % len(rest) in head
            continue
        events = rest.decode().split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        choices = [json.loads(each.removeprefix("data: "))["choices"] for each in events[:-2]]
        assert "".join(each[0]["text"] for each in choices if each) == answer("a", 1, 5)
    assert b"100 Continue" not in talk(shared, post(BODY, "expect: 100-continue", version="1.0"))


@pytest.mark.parametrize("offer", OFFERS)
def test_offers_in_http_1_0(shared: Served, offer: str) -> None:
    """RFC 9110 §7.8: they are passed over, and the client is still one of HTTP/1.0."""
    reply = talk(shared, post(STREAM, *OFFERS[offer], version="1.0").replace(b"host: x\r\n", b""))
    head, _, rest = reply.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK")
    assert b"transfer-encoding" not in head
    assert rest.startswith(b"data: ")
    assert rest.endswith(b"data: [DONE]\n\n")


def test_unknown_expectations_are_passed_over(shared: Served) -> None:
    assert text_of(talk(shared, post(BODY, "expect: the-unexpected", "connection: close"))) == answer("a", 1, 5)


@pytest.mark.parametrize(
    ("path", "keys"),
    [("/v1/nothing", {"error"}), ("/v1/messages/nothing", {"type", "error"}), ("/api/nothing", {"error"})],
)
def test_errors_of_routes_have_the_shape_of_the_protocol(shared: Served, path: str, keys: set[str]) -> None:
    known = {"/v1/nothing": "/v1/completions", "/v1/messages/nothing": "/v1/messages", "/api/nothing": "/api/chat"}
    for response, status in (
        (shared.client.post(path, json={}), 404),
        (shared.client.delete(known[path]), 405),
        (shared.client.post(known[path], content=b"x", headers={"content-encoding": "br"}), 415),
    ):
        assert response.status_code == status
        assert response.headers["x-request-id"]
        document: Any = response.json()
        assert set(document) == keys
        assert isinstance(document["error"], str) == path.startswith("/api/")
    named = shared.client.post(path, json={}, headers={"X-Request-Id": "mine"})
    assert named.headers["x-request-id"] == "mine"


JSON = {"content-type": "application/json"}


@pytest.mark.parametrize("coding", ["gzip", "x-gzip", "deflate", "raw deflate", "two members", "identity"])
def test_compressed_bodies(shared: Served, coding: str) -> None:
    raw = zlib.compressobj(wbits=-15)
    data = {
        "deflate": zlib.compress(BODY),
        "raw deflate": raw.compress(BODY) + raw.flush(),
        "identity": BODY,
        "two members": gzip.compress(BODY[:10]) + gzip.compress(BODY[10:]),
    }.get(coding, gzip.compress(BODY))
    name = {"raw deflate": "deflate", "two members": "gzip"}.get(coding, coding)
    response = shared.client.post("/v1/completions", content=data, headers={**JSON, "Content-Encoding": name})
    assert response.status_code == 200, response.text
    assert response.json()["choices"][0]["text"] == answer("a", 1, 5)


def test_bodies_that_cannot_be_read(shared: Served) -> None:
    def ask(data: bytes, coding: str) -> Any:
        return shared.client.post("/v1/completions", content=data, headers={**JSON, "Content-Encoding": coding})

    for coding in ("br", "zstd", "compress", "gzip, gzip", "foo"):
        response = ask(BODY, coding)
        assert (response.status_code, response.headers["accept-encoding"]) == (415, "gzip, deflate")
    whole = gzip.compress(BODY)
    for data in (BODY, b"", whole[:-9], whole[:-1], whole + b"junk", whole[:12] + b"\xff" * 8 + whole[20:]):
        assert ask(data, "gzip").status_code == 400
    for data in (gzip.compress(bytes(2**27), 9), zlib.compress(bytes(2**27), 9)):
        before = time.process_time()
        assert ask(data, "gzip" if data[:2] == b"\x1f\x8b" else "deflate").status_code == 413
        assert time.process_time() - before < 10
    assert ask(gzip.compress(b"") * 100_000 + whole, "gzip").status_code == 400


def test_pages_of_other_servers(shared: Served) -> None:
    """What a browser says of the page that asks."""
    for headers in (
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost:3000"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ):
        assert shared.client.post("/v1/completions", json={"prompt": "a"}, headers=headers).status_code == 403
        assert shared.client.get("/flush_cache", headers=headers).status_code == 403
        assert shared.client.get("/v1/models", headers=headers).status_code == 403
        assert shared.client.get("/health", headers=headers).status_code == 200
    own = {"Origin": shared.url, "Sec-Fetch-Site": "same-origin"}
    assert shared.client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}, headers=own).status_code == 200
    preflight = shared.client.options("/v1/completions", headers={"Origin": "https://app.example"})
    assert preflight.status_code == 405
    assert "cors_origins" in preflight.json()["error"]["message"]


def test_cors(strict: Served) -> None:
    ask = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type,authorization"}
    page = {"Origin": "https://app.example"}
    preflight = strict.client.options("/v1/chat/completions", headers={**page, **ask})
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == "https://app.example"
    assert "authorization" in preflight.headers["access-control-allow-headers"]
    methods = preflight.headers["access-control-allow-methods"]
    assert all(each in methods for each in ("GET", "POST", "PUT", "DELETE"))
    for status, response in (
        (200, strict.client.post("/v1/completions", json=json.loads(STREAM), headers=page)),
        (400, strict.client.post("/v1/completions", json={}, headers=page)),
        (404, strict.client.get("/nothing", headers=page)),
    ):
        assert response.status_code == status
        assert response.headers["access-control-allow-origin"] == "https://app.example"
        assert "X-Request-Id" in response.headers["access-control-expose-headers"]
        assert "origin" in response.headers["vary"].lower()
    other = {"Origin": "https://evil.example"}
    assert strict.client.options("/v1/completions", headers={**other, **ask}).status_code == 400
    refused = strict.client.post("/v1/completions", json={"prompt": "a"}, headers=other)
    assert refused.status_code == 403
    assert "access-control-allow-origin" not in refused.headers


def test_names_of_the_server(strict: Served) -> None:
    """A page whose name leads to this machine (DNS rebinding) is for its browser one of this server."""
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost.evil.example"):
        for path in ("/v1/models", "/metrics", "/"):
            assert strict.client.get(path, headers={"host": host}).status_code == 403
        own = {"host": host, "origin": f"http://{host}"}
        assert strict.client.post("/v1/completions", json={"prompt": "a"}, headers=own).status_code == 403
    for host in (
        "localhost:1",
        "127.0.0.1",
        "[::1]:8000",
        "192.0.2.7",
        "llm.example.com",
        "LLM.example.com:1",
        "llm",
        "a.local",
    ):
        assert strict.client.get("/v1/models", headers={"host": host}).status_code == 200
