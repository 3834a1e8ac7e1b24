"""Small servers on the loopback interface that answer as a test says: well, badly, slowly, or not at all."""

from __future__ import annotations

import json
import socket
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def completion(text: str, **choice: Any) -> bytes:
    """The body of a good answer."""
    message = {"role": "assistant", "content": text}
    return json.dumps({"choices": [{"index": 0, "message": message, "finish_reason": "stop", **choice}]}).encode()


def http(body: bytes, status: str = "200 OK", *headers: str) -> bytes:
    """A whole HTTP answer."""
    head = [
        f"HTTP/1.1 {status}",
        "content-type: application/json",
        f"content-length: {len(body)}",
        "connection: close",
        *headers,
    ]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


class Served(list[dict[str, Any]]):
    """The requests that a server got, in order: headers (lower case) and parsed body; and where it is."""

    url: str


@contextmanager
def serve(answer: Callable[[dict[str, Any], int, socket.socket], bytes | None]) -> Iterator[Served]:
    """A server; `answer(request, number, connection)` returns the bytes to send, or None where it sent what it wanted."""
    served = Served()
    lock = threading.Lock()

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            first = self.rfile.readline().decode()
            headers = {}
            while (line := self.rfile.readline().decode().strip()) != "":
                name, _, value = line.partition(":")
                headers[name.lower()] = value.strip()
            body = self.rfile.read(int(headers.get("content-length", 0)))
            request = {"path": first.split()[1], "headers": headers, **json.loads(body or b"{}")}
            with lock:
                number = len(served)
                served.append(request)
            sent = answer(request, number, self.connection)
            if sent is not None:
                self.wfile.write(sent)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        request_queue_size = 256

        def handle_error(self, request: Any, client_address: Any) -> None:
            """A client that leaves early is nothing to print."""

    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        served.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        try:
            yield served
        finally:
            server.shutdown()


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])
