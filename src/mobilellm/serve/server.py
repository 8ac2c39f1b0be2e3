"""uvicorn, patient within limits: a head that trickles in is cut off, and streams end with the server."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
from asyncio import TimerHandle

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from mobilellm.serve.access_log import AccessLog
from mobilellm.serve.app import Service, application
from mobilellm.serve.errors import ApiError
from mobilellm.serve.settings import Access

_KEEP_ALIVE = 30
"""Seconds that a connection may be silent between two requests."""
_MOST_CONNECTIONS = 512


class Server(uvicorn.Server):
    """Told to end, it takes no more requests, gives texts `grace` seconds, then ends them with an error."""

    def __init__(self, service: Service, access: Access, log: AccessLog) -> None:
        self._service = service

        class Protocol(PatientProtocol):
            patience = service.limits.patience

        super().__init__(
            uvicorn.Config(
                application(service, access, log),
                http=Protocol,
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=_KEEP_ALIVE,
                timeout_graceful_shutdown=service.limits.grace + 5,
                limit_concurrency=_MOST_CONNECTIONS,
            )
        )

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        gc.collect()
        gc.freeze()  # what is here stays: to search it for garbage would hold all streams up, and so come late
        super().run(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        ending = asyncio.ensure_future(self._service.answering.end(self._service.limits.grace))
        await super().shutdown(sockets)
        await ending


class PatientProtocol(HttpToolsProtocol):
    """A request's head must be whole within `patience` seconds, or the connection is answered 408."""

    patience: float
    _head_timer: TimerHandle | None = None
    _in_request = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_request = True
        self._wait_for_head()

    def on_headers_complete(self) -> None:
        self._stop_waiting()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_request = False
        super().on_message_complete()

    def eof_received(self) -> None:
        """Half closed in the middle of a request: what is missing will not come. Else the client has gone."""
        if self._in_request and (self.cycle is None or not self.cycle.response_started):
            self._refuse(ApiError(400, "the connection was closed in the middle of the request"))
        super().eof_received()

    def send_400_response(self, msg: str) -> None:
        self._refuse(ApiError(400, msg))

    def _wait_for_head(self) -> None:
        self._stop_waiting()
        late = ApiError(408, f"the request's head was not here within {self.patience} s")
        self._head_timer = self.loop.call_later(self.patience, self._refuse, late)

    def _stop_waiting(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _refuse(self, error: ApiError) -> None:
        """Before there is an application to answer."""
        if self.transport.is_closing():
            return
        body = json.dumps(error.body()).encode()
        head = (
            f"HTTP/1.1 {error.status} {'Request Timeout' if error.status == 408 else 'Bad Request'}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises ValueError, one line, where that cannot be."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(_MOST_CONNECTIONS)
    except OSError as error:
        raise ValueError(
            f"cannot listen at host = {host}, port = {port}: {error.strerror}; choose another --port, "
            "or 0 for a free one"
        ) from None
    return bound


def url(bound: socket.socket, host: str) -> str:
    port = bound.getsockname()[1]
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{port}"
