"""The application: which path answers what, and what lives as long as the server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mobilellm.runtime.session import RuntimeModel
from mobilellm.serve.access_log import AccessLog, Record
from mobilellm.serve.answering import Answering
from mobilellm.serve.choices import ChatWriter, CompletionWriter
from mobilellm.serve.errors import ApiError, JsonResponse
from mobilellm.serve.exchange import Exchange, read_body
from mobilellm.serve.facts import facts, facts_of_now
from mobilellm.serve.metrics import CONTENT_TYPE, Metrics
from mobilellm.serve.openapi import document
from mobilellm.serve.page_files import page_routes
from mobilellm.serve.prepared import Preparer
from mobilellm.serve.protocol import ChatRequest, CompletionRequest, parsed
from mobilellm.serve.security import Guard
from mobilellm.serve.settings import Access, Limits

_PREPARING = 4
"""Requests that are made ready at once, each by a thread; more would only take memory from one another."""


class Service:
    """The endpoints, and what they share."""

    def __init__(self, model: RuntimeModel, limits: Limits) -> None:
        self.model, self.limits = model, limits
        self.preparer = Preparer(model, limits)
        self.preparer.get_ready()
        self.answering = Answering(model, limits)
        self.metrics = Metrics(lambda: self.answering.running, lambda: self.answering.waiting)
        self._created = int(time.time())
        self._facts = facts(model)

    async def health(self, request: Request) -> Response:
        answering = self.answering
        state = "ending" if answering.closing else "ok"
        body = {"status": state, "running": answering.running, "waiting": answering.waiting}
        return JsonResponse(body, 503 if answering.closing else 200)

    async def models(self, request: Request) -> Response:
        return JsonResponse({"object": "list", "data": [self._described()]})

    async def model_by_name(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name != self.preparer.name:
            raise ApiError(
                404, f"model {name[:100]!r} is not here; {self.preparer.name!r} is", "model_not_found"
            )
        return JsonResponse(self._described())

    async def metrics_text(self, request: Request) -> Response:
        return Response(self.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    async def chat(self, request: Request) -> Response:
        asked = parsed(ChatRequest, await read_body(request, self.limits))
        record: Record = request.scope["record"]
        record.user, record.said["messages"] = asked.user, asked.model_dump(exclude_none=True)["messages"]
        prepared = await asyncio.to_thread(self.preparer.chat, asked)
        answer = self.answering.begin(prepared.choices)
        writer = ChatWriter(prepared, answer, self.preparer.name, self.model.tokenizer)
        return Exchange(answer, writer, self.limits.max_seconds, record)

    async def completion(self, request: Request) -> Response:
        asked = parsed(CompletionRequest, await read_body(request, self.limits))
        record: Record = request.scope["record"]
        record.user, record.said["prompt"] = asked.user, asked.prompt
        prepared = await asyncio.to_thread(self.preparer.completion, asked)
        answer = self.answering.begin(prepared.choices)
        writer = CompletionWriter(prepared, answer, self.preparer.name, self.model.tokenizer)
        return Exchange(answer, writer, self.limits.max_seconds, record)

    def _described(self) -> dict[str, Any]:
        return {
            "id": self.preparer.name,
            "object": "model",
            "created": self._created,
            "owned_by": "mobilellm",
            "mobilellm": {**self._facts, **facts_of_now(self.model)},
        }


def application(service: Service, access: Access, log: AccessLog) -> ASGIApp:
    """The whole server as an ASGI application; its shutdown closes the service's batch."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        threads = ThreadPoolExecutor(_PREPARING, thread_name_prefix="mobilellm prepare")
        asyncio.get_running_loop().set_default_executor(threads)
        yield
        await asyncio.to_thread(service.answering.close)

    async def described(request: Request) -> Response:
        return JsonResponse(openapi)

    openapi = document(service.preparer.name, access.key is not None)
    routes: list[Route] = [
        Route("/health", service.health, methods=["GET"]),
        Route("/v1/models", service.models, methods=["GET"]),
        Route("/v1/models/{name}", service.model_by_name, methods=["GET"]),
        Route("/v1/chat/completions", service.chat, methods=["POST"]),
        Route("/v1/completions", service.completion, methods=["POST"]),
        Route("/metrics", service.metrics_text, methods=["GET"]),
        Route("/openapi.json", described, methods=["GET"]),
        *page_routes(),
    ]
    handlers: Any = {ApiError: _api_error, HTTPException: _http_error, Exception: _unexpected}
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)
    return Recorded(Guard(app, access), log, service.metrics, [route.path for route in routes])


class Recorded:
    """Outermost: every request has a Record, which is written when it has been answered."""

    def __init__(self, app: ASGIApp, log: AccessLog, metrics: Metrics, paths: Sequence[str]) -> None:
        self._app, self._log, self._metrics, self._paths = app, log, metrics, frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        client = scope.get("client")
        record = scope["record"] = Record(scope["method"], scope["path"], client and client[0])
        record.route = self._route(record.path)

        async def counted(message: Message) -> None:
            record.status = message.get("status", record.status)
            record.bytes += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, receive, counted)
        finally:
            record.seconds = time.perf_counter() - record.began
            self._log.write(record)
            self._metrics.add(record)

    def _route(self, path: str) -> str:
        """Few, whatever is asked: Prometheus keeps a count for each."""
        if path in self._paths:
            return path
        return "/v1/models/{name}" if path.startswith("/v1/models/") else "none"


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _http_error(request: Request, error: Exception) -> Response:
    """The router's own: no such path, no such method."""
    assert isinstance(error, HTTPException)
    allowed = (error.headers or {}).get("Allow", "another method")
    message = {
        404: f"there is nothing at {request.url.path[:100]}; OpenAI's interface begins at /v1, "
        "and /openapi.json lists all there is",
        405: f"{request.method} does not go here, {allowed} does",
    }
    return ApiError(
        error.status_code, message.get(error.status_code, error.detail), headers=error.headers
    ).response()


async def _unexpected(request: Request, error: Exception) -> Response:
    return ApiError(500, "a fault of the server; its own log says more", "internal_error").response()
