"""One request's life: the body in, within limits; the answer out, whole or streamed; the client watched."""

from __future__ import annotations

import asyncio
import contextlib
import json

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mobilellm.serve.access_log import Record
from mobilellm.serve.answering import Answer
from mobilellm.serve.choices import Writer
from mobilellm.serve.errors import ApiError, JsonResponse
from mobilellm.serve.settings import Limits

_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # a proxy in front would hold tokens back
]
_TO_READ_THE_REST = 30
"""Seconds after its time that an answer's client may take to read what was written for it."""


async def read_body(request: Request, limits: Limits) -> bytes:
    """Raises ApiError: 413 for too much, 408 for too slow, 415 for what does not say that it is JSON."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "the body must be JSON: send the header Content-Type: application/json")
    too_large = ApiError(
        413,
        f"the body is larger than {limits.max_body} bytes",
        "body_too_large",
        headers={"Connection": "close"},
    )
    stated = request.headers.get("content-length", "")
    if stated.isdecimal() and int(stated) > limits.max_body:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(limits.patience):
            async for part in request.stream():
                body += part
                if len(body) > limits.max_body:
                    raise too_large
    except TimeoutError:
        raise ApiError(
            408, f"the body was not here within {limits.patience} s", None, headers={"Connection": "close"}
        ) from None
    return bytes(body)


class Exchange(Response):
    """Sends what an Answer becomes. A client that goes away frees its slots at the next token."""

    def __init__(self, answer: Answer, writer: Writer, seconds: float, record: Record) -> None:
        self.status_code, self.background = 200, None
        self._answer, self._writer, self._seconds, self._record = answer, writer, seconds, record

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = self._stream if self._writer.prepared.stream else self._whole
        gone = asyncio.ensure_future(_gone(receive))
        work = asyncio.ensure_future(sending(scope, receive, send))
        timer = asyncio.get_running_loop().call_later(self._seconds, self._answer.cancel)
        try:
            # What is written by then is sent, unless the client does not read it.
            patience = self._seconds + _TO_READ_THE_REST
            await asyncio.wait((gone, work), timeout=patience, return_when=asyncio.FIRST_COMPLETED)
            self._record.disconnected = not work.done()
        finally:
            timer.cancel()
            self._answer.cancel()
            gone.cancel()
            work.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await work
            self._record.answered(self._answer, self._writer)

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            while not self._writer.done:
                self._writer.take(await self._answer.take())
        except ApiError as error:
            await error.response()(scope, receive, send)
        else:
            await JsonResponse(self._writer.whole())(scope, receive, send)

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The status goes out with the first tokens: what fails before them has a status of its own."""
        try:
            arrivals = await self._answer.take()
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
        data = self._writer.beginning() + self._writer.chunks(arrivals)
        while not self._writer.done:
            if data:
                await send({"type": "http.response.body", "body": data, "more_body": True})
            try:
                data = self._writer.chunks(await self._answer.take())
            except ApiError as error:  # as OpenAI's clients expect it in a stream
                data = b"data: " + json.dumps(error.body()).encode() + b"\n\n"
                break
        await send({"type": "http.response.body", "body": data, "more_body": False})


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
