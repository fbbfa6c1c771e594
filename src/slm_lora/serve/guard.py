"""What stands between the network and the application: who may ask, how much, and how slowly.

Pages of other sites can make a browser ask a server on its own machine, and through DNS even
under that site's name (rebinding): so the Host must be ours, and an Origin, where there is one,
too. No answer allows other origins to read it.
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


class Refused(Exception):
    """A request that goes no further."""

    def __init__(self, status: int, message: str, code: str) -> None:
        """
        Args:
            status: of HTTP.
            message: for people.
            code: for programs.
        """
        super().__init__(message)
        self.status, self.code = status, code


def error_body(
    message: str, kind: str, code: str | None, param: str | None = None
) -> dict[str, Any]:
    """An error as clients of OpenAI's API read it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Guard:
    """ASGI middleware; see the module."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        hosts: Collection[str],
        token: str | None,
        most_bytes: int = 1 << 20,
        patience: float = 20.0,
    ) -> None:
        """
        Args:
            app: what is guarded.
            hosts: names under which this server may be asked, without port.
            token: needed for everything, if set.
            most_bytes: of a request's body.
            patience: seconds for a request's body to come, and for a client to take a piece of
                an answer.
        """
        self._app, self._hosts, self._token = app, frozenset(hosts), token
        self._most_bytes, self._patience = most_bytes, patience

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it with an error."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        began = False

        async def send_in_time(message: Message) -> None:
            nonlocal began
            began = True
            try:
                await asyncio.wait_for(send(message), self._patience)
            except TimeoutError:
                raise ConnectionError("the client does not take its answer") from None

        try:
            headers = _headers(scope)
            self._check_source(headers)
            cookie = self._check_token(scope, headers)
            body = await self._body(scope, headers, receive) if scope["type"] == "http" else None
        except Refused as refused:
            await _refuse(scope, send, refused)
            return
        if cookie is not None:
            # The token goes out of the address, and with it out of histories and logs.
            moved = [(b"location", scope["path"].encode()), (b"set-cookie", cookie)]
            await send({"type": "http.response.start", "status": 303, "headers": moved})
            await send({"type": "http.response.body", "body": b""})
            return
        given = receive if body is None else _again(body, receive)
        try:
            await self._app(scope, given, send_in_time)
        except ConnectionError:
            if not began:
                raise

    def _check_source(self, headers: MutableMapping[str, str]) -> None:
        host = _without_port(headers.get("host", ""))
        if host not in self._hosts:
            raise Refused(403, "this server does not answer under that name", "wrong_host")
        origin = headers.get("origin")
        if origin and _without_port(urlsplit(origin).netloc) not in self._hosts:
            raise Refused(403, "pages of other sites may not ask this server", "wrong_origin")

    def _check_token(self, scope: Scope, headers: MutableMapping[str, str]) -> bytes | None:
        """The cookie to set, where the token came in the address of a page."""
        if self._token is None:
            return None
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and _same(given.strip(), self._token):
            return None
        try:
            cookies = SimpleCookie(headers.get("cookie", ""))
        except CookieError:
            cookies = SimpleCookie()
        if COOKIE in cookies and _same(cookies[COOKIE].value, self._token):
            return None
        asked = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("token", [""])[0]
        if scope.get("method") == "GET" and _same(asked, self._token):
            return f"{COOKIE}={self._token}; HttpOnly; SameSite=Strict; Path=/".encode()
        raise Refused(401, "needs the token: Authorization: Bearer …", "invalid_api_key")

    async def _body(
        self, scope: Scope, headers: MutableMapping[str, str], receive: Receive
    ) -> bytes:
        too_large = Refused(413, f"more than {self._most_bytes} bytes", "body_too_large")
        try:
            if int(headers.get("content-length", 0)) > self._most_bytes:
                raise too_large
        except ValueError:
            raise Refused(400, "Content-Length is no number", "bad_request") from None
        parts: list[bytes] = []

        async def read() -> bytes:
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Refused(400, "the body ended early", "bad_request")
                parts.append(message.get("body", b""))
                if sum(map(len, parts)) > self._most_bytes:
                    raise too_large
                if not message.get("more_body"):
                    return b"".join(parts)

        try:
            return await asyncio.wait_for(read(), self._patience)
        except TimeoutError:
            raise Refused(408, "the body came too slowly", "timeout") from None


def _again(body: bytes, receive: Receive) -> Receive:
    """A body that was read already, then whatever else comes (the client going away)."""
    told = False

    async def given() -> Message:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return given


def _headers(scope: Scope) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in scope.get("headers", []):
        key = name.decode("latin-1").lower()
        if key == "host" and key in found:
            raise Refused(400, "two Host headers", "bad_request")
        found[key] = value.decode("latin-1")
    return found


def _without_port(host: str) -> str:
    """``[::1]:80`` → ``[::1]``, ``localhost:80`` → ``localhost``."""
    name, _, port = host.rpartition(":")
    return (name if name and port.isdigit() and not host.endswith("]") else host).lower()


def _same(given: str, wanted: str) -> bool:
    return hmac.compare_digest(given.encode(), wanted.encode())


async def _refuse(scope: Scope, send: Send, refused: Refused) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    kinds = {401: "authentication_error", 403: "permission_error"}
    body = json.dumps(
        error_body(str(refused), kinds.get(refused.status, "invalid_request_error"), refused.code)
    ).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),  # what is still to come of the body is not read
    ]
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
