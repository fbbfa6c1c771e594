"""Middleware that checks every request: host, origin, token, body size and timeouts.

A page of another site can make a browser send requests to a server on the same machine, with DNS
rebinding even under that site's name. Host, and Origin if there is one, must therefore be names of
this server. No response carries CORS headers, so other origins cannot read it.
"""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Collection, MutableMapping
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs, urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})
COOKIE = "slm_lora_token"


class Rejection(Exception):
    """The request is answered with an error and does not reach the application."""

    def __init__(self, status: int, message: str, code: str) -> None:
        """
        Args:
            status: HTTP status.
            message: human-readable reason.
            code: machine-readable reason.
        """
        super().__init__(message)
        self.status, self.code = status, code


def error_body(
    message: str, type_: str, code: str | None, param: str | None = None
) -> dict[str, Any]:
    """Error body in the format of OpenAI's API."""
    return {"error": {"message": message, "type": type_, "param": param, "code": code}}


class Guard:
    """ASGI middleware; see the module docstring."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        hosts: Collection[str],
        token: str | None,
        max_body_bytes: int = 1 << 20,
        timeout_s: float = 20.0,
    ) -> None:
        """
        Args:
            app: the application.
            hosts: accepted host names, without port.
            token: required on every request, if set.
            max_body_bytes: largest request body.
            timeout_s: seconds in which a request body must arrive, and in which a client must
                accept each part of a response.
        """
        self._app, self._hosts, self._token = app, frozenset(hosts), token
        self._max_body_bytes, self._timeout_s = max_body_bytes, timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with an error."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        response_started = False

        async def send_in_time(message: Message) -> None:
            nonlocal response_started
            response_started = True
            try:
                await asyncio.wait_for(send(message), self._timeout_s)
            except TimeoutError:
                raise ConnectionError("the client does not read the response") from None

        try:
            headers = _headers(scope)
            self._check_source(headers)
            cookie = self._check_token(scope, headers)
            body = await self._body(scope, headers, receive) if scope["type"] == "http" else None
        except Rejection as rejection:
            await _reject(scope, send, rejection)
            return
        if cookie is not None:
            # Redirect without the token, which would otherwise remain in histories and logs.
            headers_out = [(b"location", scope["path"].encode()), (b"set-cookie", cookie)]
            await send({"type": "http.response.start", "status": 303, "headers": headers_out})
            await send({"type": "http.response.body", "body": b""})
            return
        guarded_receive = receive if body is None else _replay(body, receive)
        try:
            await self._app(scope, guarded_receive, send_in_time)
        except ConnectionError:
            if not response_started:
                raise

    def _check_source(self, headers: MutableMapping[str, str]) -> None:
        host = _without_port(headers.get("host", ""))
        if host not in self._hosts:
            reason = f"Host {host!r:.80}: not a name of this server (see --allow-host)"
            raise Rejection(403, reason, "wrong_host")
        origin = headers.get("origin")
        if origin and _without_port(urlsplit(origin).netloc) not in self._hosts:
            reason = f"Origin {origin!r:.80}: requests from other sites are rejected"
            raise Rejection(403, reason, "wrong_origin")

    def _check_token(self, scope: Scope, headers: MutableMapping[str, str]) -> bytes | None:
        """The cookie to set if the token is in the query string, else None.

        Raises:
            Rejection: the request has no valid token.
        """
        if self._token is None:
            return None
        scheme, _, credentials = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and _equal(credentials.strip(), self._token):
            return None
        try:
            cookies = SimpleCookie(headers.get("cookie", ""))
        except CookieError:
            cookies = SimpleCookie()
        if COOKIE in cookies and _equal(cookies[COOKIE].value, self._token):
            return None
        query_token = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("token", [""])[
            0
        ]
        if scope.get("method") == "GET" and _equal(query_token, self._token):
            return f"{COOKIE}={self._token}; HttpOnly; SameSite=Strict; Path=/".encode()
        reason = "missing or wrong token; send the header Authorization: Bearer TOKEN"
        raise Rejection(401, reason, "invalid_api_key")

    async def _body(
        self, scope: Scope, headers: MutableMapping[str, str], receive: Receive
    ) -> bytes:
        too_large = Rejection(
            413, f"body: more than {self._max_body_bytes} bytes", "body_too_large"
        )
        try:
            if int(headers.get("content-length", 0)) > self._max_body_bytes:
                raise too_large
        except ValueError:
            raise Rejection(400, "Content-Length: not a number", "bad_request") from None
        parts: list[bytes] = []

        async def read() -> bytes:
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Rejection(400, "body: incomplete", "bad_request")
                parts.append(message.get("body", b""))
                if sum(map(len, parts)) > self._max_body_bytes:
                    raise too_large
                if not message.get("more_body"):
                    return b"".join(parts)

        try:
            return await asyncio.wait_for(read(), self._timeout_s)
        except TimeoutError:
            reason = f"body: incomplete after {self._timeout_s:g} s"
            raise Rejection(408, reason, "timeout") from None


def _replay(body: bytes, receive: Receive) -> Receive:
    """A receive channel that yields a body already read, then later messages (a disconnect)."""
    replayed = False

    async def replay() -> Message:
        nonlocal replayed
        if replayed:
            return await receive()
        replayed = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _headers(scope: Scope) -> dict[str, str]:
    headers: dict[str, str] = {}
    for name, value in scope.get("headers", []):
        key = name.decode("latin-1").lower()
        if key == "host" and key in headers:
            raise Rejection(400, "more than one Host header", "bad_request")
        headers[key] = value.decode("latin-1")
    return headers


def _without_port(host: str) -> str:
    """``[::1]:80`` → ``[::1]``, ``localhost:80`` → ``localhost``."""
    name, _, port = host.rpartition(":")
    return (name if name and port.isdigit() and not host.endswith("]") else host).lower()


def _equal(given: str, expected: str) -> bool:
    return hmac.compare_digest(given.encode(), expected.encode())


async def _reject(scope: Scope, send: Send, rejection: Rejection) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    types = {401: "authentication_error", 403: "permission_error"}
    type_ = types.get(rejection.status, "invalid_request_error")
    body = json.dumps(error_body(str(rejection), type_, rejection.code)).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),  # the rest of the body is not read
    ]
    await send({"type": "http.response.start", "status": rejection.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
