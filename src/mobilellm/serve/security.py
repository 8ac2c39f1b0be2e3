"""Who may ask: a browser's page of another site may not, a name that was made to point here may not, and
where there is a key, nobody without it.

DNS rebinding: a page at evil.example makes its name resolve to 127.0.0.1 and asks as its own origin. What
gives it away is the Host header, which names evil.example; an address or localhost cannot be rebound.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mobilellm.serve.errors import ApiError
from mobilellm.serve.settings import Access

_WITH_KEY = ("/v1/", "/metrics")
_ALWAYS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Frame-Options": "DENY",
}
_HOST = re.compile(r"(?:(?P<name>[A-Za-z0-9._-]+)|\[(?P<address>[0-9A-Fa-f:.]+)\])(?::[0-9]*)?")
_PREFLIGHT_SECONDS = "600"


class Guard:
    """Wraps the application; what it refuses is answered in the shape of every other error."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access = app, access
        self._names = {"localhost", access.host.lower(), *(name.lower() for name in access.hosts)}
        self._digest = None if access.key is None else _digest(access.key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        allowed = origin in self._access.origins

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                _add_headers(MutableHeaders(scope=message), origin if allowed else None)
            await send(message)

        try:
            self._check_host(headers)
            self._check_origin(headers, allowed)
            if allowed and scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
                await _preflight()(scope, receive, guarded)
                return
            if scope["path"].startswith(_WITH_KEY):
                self._check_key(headers)
        except ApiError as error:
            await error.response()(scope, receive, guarded)
            return
        await self._app(scope, receive, guarded)

    def _check_host(self, headers: Headers) -> None:
        hosts = headers.getlist("host")
        name = _name(hosts[0]) if len(hosts) == 1 else None
        if name is None or not (name in self._names or _is_address(name)):
            raise ApiError(
                403,
                f"host {', '.join(hosts)[:100]!r} is not a name of this server; it is told its names with "
                "--allow-host",
                "host_not_allowed",
            )

    def _check_origin(self, headers: Headers, allowed: bool) -> None:
        """Browsers name the origin of every request that writes, and of every one across origins."""
        origin = headers.get("origin")
        if origin is None:
            if headers.get("sec-fetch-site") in ("cross-site", "same-site") and not _is_link(headers):
                raise ApiError(403, "a page of another site asked for this", "origin_not_allowed")
        elif not allowed and origin.partition("://")[2].lower() != headers["host"].lower():
            raise ApiError(
                403,
                f"origin {origin[:100]!r} may not ask; it is allowed with --allow-origin",
                "origin_not_allowed",
            )

    def _check_key(self, headers: Headers) -> None:
        if self._digest is None:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        # Of equal length whatever was given, and compared in a time that tells nothing of it.
        if not hmac.compare_digest(_digest(given.strip()), self._digest) or scheme.lower() != "bearer":
            raise ApiError(
                401,
                "the API key is missing or wrong; send the header Authorization: Bearer KEY",
                "invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _name(host: str) -> str | None:
    """The name in a Host header, without its port; None for what is no name at all."""
    found = _HOST.fullmatch(host)
    return found and (found["name"] or found["address"]).lower()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_link(headers: Headers) -> bool:
    """Somebody followed a link to here, as one may; the page that comes does not run in theirs."""
    return headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"


def _add_headers(headers: MutableHeaders, origin: str | None) -> None:
    for name, value in _ALWAYS.items():
        headers[name] = value
    headers.add_vary_header("Origin")
    if origin is not None:
        headers["Access-Control-Allow-Origin"] = origin
        headers["Cross-Origin-Resource-Policy"] = "cross-origin"


def _preflight() -> Response:
    allowed = {
        "Access-Control-Allow-Methods": "GET, POST",
        "Access-Control-Allow-Headers": "authorization, content-type",
        "Access-Control-Max-Age": _PREFLIGHT_SECONDS,
    }
    return Response(status_code=204, headers=allowed)
