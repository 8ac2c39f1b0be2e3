"""The page at `/`: its files are read once, so that no request comes near the file system."""

from __future__ import annotations

import hashlib
import mimetypes
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import NamedTuple

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "font-src 'self'",
        "connect-src 'self'",
        "manifest-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
_START = "index.html"


class PageFile(NamedTuple):
    content: bytes
    kind: str
    etag: str


def page_routes() -> list[Route]:
    """A route for every file of the page, and `/` for its start."""
    folder = files("mobilellm.serve") / "page"
    found = dict(_found(folder, "")) if folder.is_dir() else {}
    routes = [_route(f"/{name}", file) for name, file in sorted(found.items())]
    return [_route("/", found[_START]), *routes] if _START in found else routes


def _found(folder: Traversable, prefix: str) -> list[tuple[str, PageFile]]:
    out = []
    for entry in folder.iterdir():
        name = prefix + entry.name
        if entry.is_dir():
            out += _found(entry, f"{name}/")
        elif not entry.name.startswith("."):
            content = entry.read_bytes()
            kind = mimetypes.guess_type(entry.name)[0] or "application/octet-stream"
            kind = "text/javascript" if kind == "application/javascript" else kind
            kind = f"{kind}; charset=utf-8" if kind.startswith("text/") else kind
            out.append((name, PageFile(content, kind, f'"{hashlib.sha256(content).hexdigest()[:32]}"')))
    return out


def _route(path: str, file: PageFile) -> Route:
    headers = {"ETag": file.etag, "Cache-Control": "no-cache", "Content-Security-Policy": POLICY}

    async def answer(request: Request) -> Response:
        if file.etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(file.content, media_type=file.kind, headers=headers)

    return Route(path, answer, methods=["GET"])
