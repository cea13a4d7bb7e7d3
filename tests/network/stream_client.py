"""Prints what a server answers, line by line as it comes. `python stream_client.py URL [BODY]`: with a body, a chat."""

from __future__ import annotations

import http.client
import sys
import urllib.parse

TIMEOUT_S = 60.0


def main() -> None:
    url = urllib.parse.urlsplit(sys.argv[1])
    assert url.hostname is not None
    connection = http.client.HTTPConnection(url.hostname, url.port, timeout=TIMEOUT_S)
    if len(sys.argv) > 2:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", f"{url.path}/v1/chat/completions", sys.argv[2], headers)
    else:
        connection.request("GET", url.path)
    answer = connection.getresponse()
    assert answer.status == 200, answer.read()
    for line in answer:
        print(line.decode(), end="", flush=True)


if __name__ == "__main__":
    main()
