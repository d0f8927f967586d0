"""A server on 127.0.0.1 with the APIs of OpenAI and Anthropic that can be made to fail."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Script = Callable[[str, int], Any]
"""The answer to a prompt, given its text and the number of earlier requests with it: a text, or ("refused", text),
("filtered", text), ("cut", text), ("status", code), ("body", bytes), or ("wait", event, text), sent after the event."""


@dataclass
class Asked:
    time: float
    client: str
    key: str
    body: dict[str, Any] = field(repr=False)
    user: str = field(repr=False)


class serve:
    """`asked` records every request; `url(client)` is the base url for the client."""

    def __init__(self, script: Script) -> None:
        asked: list[Asked] = []
        counts: Counter[str] = Counter()
        lock = threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                client = {"/v1/chat/completions": "openai", "/v1/messages": "anthropic"}[self.path]
                key = self.headers.get("x-api-key") or (self.headers.get("Authorization") or "").removeprefix("Bearer ")
                user = body["messages"][-1]["content"]
                with lock:
                    asked.append(Asked(time.monotonic(), client, key, body, user))
                    n = counts[user]
                    counts[user] += 1
                found = script(user, n)
                kind, value = (found[0], found[1]) if isinstance(found, tuple) else ("text", found)
                if kind == "wait":
                    value.wait(300)
                    kind, value = "text", found[2]
                if kind == "status":
                    error = {"error": {"type": "error", "message": f"no, {key}"}}
                    self.send(value, json.dumps(error).encode())
                else:
                    self.send(200, value if kind == "body" else json.dumps(_FORMS[client](kind, value)).encode())

            def send(self, status: int, data: bytes) -> None:
                try:
                    self.send_response(status)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(data)))
                    self.send_header("retry-after-ms", "20")  # the clients wait this long before they retry
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:
                    self.close_connection = True  # the client has gone

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.asked = asked
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    def url(self, client: str) -> str:
        return f"http://127.0.0.1:{self.port}" + ("/v1" if client == "openai" else "")

    def __enter__(self) -> serve:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _openai(kind: str, text: str) -> dict[str, Any]:
    refused = kind == "refused"
    message = {"role": "assistant", "content": None if refused else text, "refusal": text if refused else None}
    reason = {"cut": "length", "filtered": "content_filter"}.get(kind, "stop")
    return {
        "id": "c1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "message": message, "finish_reason": reason, "logprobs": None}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107},
    }


def _anthropic(kind: str, text: str) -> dict[str, Any]:
    return {
        "id": "m1",
        "type": "message",
        "role": "assistant",
        "model": "m",
        "content": [] if kind == "filtered" else [{"type": "text", "text": text}],
        "stop_reason": {"refused": "refusal", "filtered": "refusal", "cut": "max_tokens"}.get(kind, "end_turn"),
        "stop_sequence": None,
        "usage": {"input_tokens": 100, "output_tokens": 7},
    }


_FORMS = {"openai": _openai, "anthropic": _anthropic}
