"""A judge with a known rule: an OpenAI-style server on this machine."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Rule = Callable[[str, str], str]
"""The texts of reply A and reply B in, the answer's text out."""


class JudgeServer:
    """Counts requests and answers them by a rule.

    Attributes:
        rule: of the answers.
        statuses: of the next requests, first to last, where they are not 200.
        down_after: requests after which every status is 503; None: never.
        location: where every request is redirected to; empty: nowhere.
        bodies: of all requests that the rule answered.
        requests: paths of all requests.
        authorizations: their headers.
    """

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.statuses: list[int] = []
        self.down_after: int | None = None
        self.location = ""
        self.bodies: list[dict[str, Any]] = []
        self.requests: list[str] = []
        self.authorizations: list[str | None] = []
        self.lock = threading.Lock()
        self.url = ""

    def answer(self, body: dict[str, Any]) -> tuple[int, str]:
        """Status and text for a request."""
        with self.lock:
            if self.statuses:
                return self.statuses.pop(0), "planned"
            if self.down_after is not None and len(self.bodies) >= self.down_after:
                return 503, "down"
            self.bodies.append(body)
        return 200, self.rule(*replies_in(body))


def replies_in(body: dict[str, Any]) -> tuple[str, str]:
    """Replies A and B of a request, read without the code that wrote it."""
    content = body["messages"][0]["content"]
    texts = [
        re.search(rf"<reply_{name}-(\w+)>\n(.*?)\n</reply_{name}-\1>", content, re.DOTALL)
        for name in "ab"
    ]
    assert texts[0] and texts[1]
    return texts[0][2], texts[1][2]


@contextmanager
def judge_server(rule: Rule) -> Iterator[JudgeServer]:
    """A server within the block."""
    judge = JudgeServer(rule)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with judge.lock:
                judge.requests.append(self.path)
                judge.authorizations.append(self.headers.get("Authorization"))
            status, text = judge.answer(body)
            content = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
            self.send_response(307 if judge.location else status)
            if judge.location:
                self.send_header("Location", judge.location)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    judge.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield judge
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
