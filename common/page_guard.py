"""What stands before every route of a local page: who may ask, for what, with how much.

::

    request --Host? Origin? path? token? X-Xfed-Token? body <= 64 KiB?--> route --> answer + HEADERS
                 \\--no--> 403 / 404 / 413 in plain words
    ?token=... --303--> cookie (HttpOnly, SameSite=Strict) + the same address without the token

The cookie is named after the port, since browsers share cookies between the ports of a machine.

Formal guarantees
    No route runs without the token; none runs for a method other than GET and HEAD without the token in the header
    `X-Xfed-Token` as well, which only a script of the page itself can send.
    A name that an attacker points to 127.0.0.1 (DNS rebinding), a page of another origin, and another port of this machine are
    answered 403, whatever token they bring. A path that climbs is answered 404; a body above 64 KiB 413, and no route sees it.
    Every answer forbids the browser to load or send anything elsewhere, to be framed, and to keep a copy.
Not covered
    Other accounts and programs of this machine that can read the user's terminal, browser or memory.
"""

from __future__ import annotations

import hmac
from urllib.parse import parse_qs, quote

from fastapi.responses import PlainTextResponse, Response
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["BODY_LIMIT", "HEADERS", "PageGuard"]

BODY_LIMIT = 64 * 1024
HEADERS = {
    "content-security-policy": "default-src 'none'; img-src 'self'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'self'",
    "cache-control": "no-store",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
"""What every answer carries."""

_OPEN_AGAIN = "Open the address that the command printed in this browser."


class PageGuard:
    """ASGI around an app: it sees each request first, and the head of each answer last. `token` and `port` are the page's."""

    def __init__(self, app: ASGIApp, token: str, port: int) -> None:
        self._app, self._token = app, token
        self._cookie = f"xfed-{port}"
        ends = (f":{port}", "") if port == 80 else (f":{port}",)
        self._hosts = {f"{name}{end}" for name in ("127.0.0.1", "localhost") for end in ends}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request: with a refusal, with the cookie, or as the app does."""
        if scope["type"] != "http":
            return

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        headers = Headers(scope=scope)
        asked = parse_qs(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        refusal = self._refusal(scope, headers, asked.get("token"))
        body = b""
        if refusal is None:
            body, refusal = await _body(headers, receive)
        if refusal is not None:
            await refusal(scope, receive, answer)
        elif "token" in asked:
            path = "/" + quote(scope["path"].lstrip("/"))
            cookie = f"{self._cookie}={self._token}; Path=/; HttpOnly; SameSite=Strict"
            await Response(status_code=303, headers={"location": path, "set-cookie": cookie})(scope, receive, answer)
        else:
            await self._app(scope, _again(body, receive), answer)

    def _refusal(self, scope: Scope, headers: Headers, asked: list[str] | None) -> PlainTextResponse | None:
        hosts, origins, sites = (headers.getlist(name) for name in ("host", "origin", "sec-fetch-site"))
        if len(hosts) != 1 or hosts[0] not in self._hosts:
            return _refuse(403, "This page is for 127.0.0.1 alone, and was asked for under another name.")
        if any(origin != f"http://{hosts[0]}" for origin in origins):
            return _refuse(403, f"Another website asked for this page. {_OPEN_AGAIN}")
        if any(site not in ("same-origin", "none") for site in sites):
            return _refuse(403, f"Another website asked for this page. {_OPEN_AGAIN}")
        path = scope["path"]
        climbs = any(part in (".", "..") for part in path.split("/")) or "\\" in path or "\0" in path
        if climbs or b"%2f" in scope.get("raw_path", b"").lower():
            return _refuse(404, "There is no such file.")
        safe = scope["method"] in ("GET", "HEAD")
        known = self._is_token(self._cookies(headers) if asked is None else asked) and (safe or asked is None)
        if not known:
            return _refuse(403, f"This page needs its token. {_OPEN_AGAIN}")
        if not safe and not self._is_token(headers.getlist("x-xfed-token")):
            return _refuse(403, "What changes something needs the header X-Xfed-Token. Reload the page.")
        return None

    def _cookies(self, headers: Headers) -> list[str]:
        pairs = [pair.strip().partition("=") for line in headers.getlist("cookie") for pair in line.split(";")]
        return [value for name, _, value in pairs if name == self._cookie]

    def _is_token(self, found: list[str]) -> bool:
        return len(found) == 1 and hmac.compare_digest(found[0].encode(), self._token.encode())


async def _body(headers: Headers, receive: Receive) -> tuple[bytes, PlainTextResponse | None]:
    """The whole body, or why it is not taken: more than `BODY_LIMIT`, said beforehand or found out while it comes."""
    too_long = _refuse(413, f"At most {BODY_LIMIT // 1024} KiB can be sent to this page at once.")
    said = headers.get("content-length", "0")
    if not said.isdecimal() or int(said) > BODY_LIMIT:
        return b"", too_long
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > BODY_LIMIT:
            return b"", too_long
        if message["type"] == "http.disconnect":
            return b"", _refuse(400, "The connection ended before the request did.")
        if not message.get("more_body", False):
            return body, None


def _again(body: bytes, receive: Receive) -> Receive:
    """The body once more, as one message; then whatever comes (that the client has gone)."""
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return first.pop() if first else await receive()

    return replay


def _refuse(status: int, words: str) -> PlainTextResponse:
    return PlainTextResponse(words + "\n", status, headers={"connection": "close"} if status == 413 else None)
