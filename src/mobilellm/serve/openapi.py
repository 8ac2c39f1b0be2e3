"""The OpenAPI document: requests as protocol.py checks them, answers as choices.py writes them."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import models_json_schema

from mobilellm import __version__
from mobilellm.serve.protocol import ChatRequest, CompletionRequest

Object = dict[str, Any]

_NUMBER = {"type": ["number", "null"]}
_WHOLE = {"type": "integer", "minimum": 0}
_TEXT = {"type": "string"}
_FINISH = {"enum": ["stop", "length", "tool_calls", None]}


def document(name: str, with_key: bool) -> Object:
    """For the model of this name; `with_key`: requests to /v1 and /metrics need one."""
    _, found = models_json_schema(
        [(ChatRequest, "validation"), (CompletionRequest, "validation")],
        ref_template="#/components/schemas/{model}",
    )
    out: Object = {
        "openapi": "3.1.0",
        "info": {
            "title": "mobilellm",
            "version": __version__,
            "description": f"OpenAI's interface to the model {name}. Fields that are not here are refused.",
        },
        "paths": {
            "/health": {
                "get": _operation("Whether it takes requests", {"200": _json(_HEALTH), "503": _json(_HEALTH)})
            },
            "/v1/models": {
                "get": _operation("The model that is served", {"200": _json(_list_of("Model"))}, True)
            },
            "/v1/models/{name}": {
                "get": _operation("The model by its name", {"200": _json(_ref("Model"))}, True, (404,))
                | {"parameters": [{"name": "name", "in": "path", "required": True, "schema": _TEXT}]}
            },
            "/v1/chat/completions": {"post": _completion("Answer a conversation", "Chat")},
            "/v1/completions": {"post": _completion("Go on from a prompt", "Completion")},
            "/metrics": {"get": _operation("Counts for Prometheus", {"200": _plain()}, True)},
            "/openapi.json": {"get": _operation("This document", {"200": _json({"type": "object"})})},
        },
        "components": {"schemas": {**found["$defs"], **_answers()}},
    }
    if with_key:
        out["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path in out["paths"]:
            for operation in out["paths"][path].values():
                if "401" in operation["responses"]:
                    operation["security"] = [{"key": []}]
    return out


def _operation(
    summary: str, responses: Object, guarded: bool = False, errors: tuple[int, ...] = ()
) -> Object:
    """Any request may be refused for its host or origin (403); `guarded` ones for their key, too."""
    refused = (403, *errors, *((401,) if guarded else ()))
    return {
        "summary": summary,
        "responses": {**responses, **{str(status): _json(_ref("Error")) for status in sorted(refused)}},
    }


def _completion(summary: str, kind: str) -> Object:
    whole, chunk = _ref(f"{kind}Answer"), _ref(f"{kind}Chunk")
    content = {
        "application/json": {"schema": whole},
        "text/event-stream": {"x-event": chunk},  # OpenAPI 3.1 has no words for the schema of an event
    }
    answered = {
        "200": {"description": "The answer, whole or, with stream, as server-sent events", "content": content}
    }
    operation = _operation(summary, answered, True, (400, 404, 408, 413, 415, 429, 503))
    body = {"required": True, "content": {"application/json": {"schema": _ref(f"{kind}Request")}}}
    return {**operation, "requestBody": body}


def _answers() -> Object:
    """Schemas of what is sent."""
    chances: Object = {"type": ["object", "null"]}
    call = _object(id=_TEXT, type={"const": "function"}, function=_object(name=_TEXT, arguments=_TEXT))
    message = _object(
        role={"const": "assistant"}, content={"type": ["string", "null"]}, refusal={"type": "null"}
    )
    message["properties"]["tool_calls"] = {"type": "array", "items": call}
    chat = _object(index=_WHOLE, message=message, logprobs=chances, finish_reason=_FINISH)
    chat_delta = _object(index=_WHOLE, delta={"type": "object"}, logprobs=chances, finish_reason=_FINISH)
    text = _object(index=_WHOLE, text=_TEXT, logprobs=chances, finish_reason=_FINISH)
    return {
        "ChatAnswer": _answer("chat.completion", chat),
        "ChatChunk": _answer("chat.completion.chunk", chat_delta, is_chunk=True),
        "CompletionAnswer": _answer("text_completion", text),
        "CompletionChunk": _answer("text_completion", text, is_chunk=True),
        "Usage": _object(
            prompt_tokens=_WHOLE, completion_tokens=_WHOLE, total_tokens=_WHOLE,
            prompt_tokens_details=_object(cached_tokens=_WHOLE),
        ),
        "Timings": _object(
            prompt_tokens_per_second=_NUMBER, tokens_per_second=_NUMBER, seconds_to_first_token=_NUMBER,
            memory_bytes=_WHOLE,
        ),
        "Model": _object(
            id=_TEXT, object={"const": "model"}, created=_WHOLE, owned_by=_TEXT, mobilellm={"type": "object"}
        ),
        "Error": _object(
            error=_object(
                message=_TEXT, type=_TEXT, param={"type": ["string", "null"]},
                code={"type": ["string", "null"]},
            )
        ),
    }  # fmt: skip


def _answer(kind: str, choice: Object, is_chunk: bool = False) -> Object:
    out = _object(
        id=_TEXT, object={"const": kind}, created=_WHOLE, model=_TEXT,
        choices={"type": "array", "items": choice}, usage=_ref("Usage"), timings=_ref("Timings"),
    )  # fmt: skip
    if is_chunk:  # what it cost stands in the last one
        out["required"] = [name for name in out["required"] if name not in ("usage", "timings")]
    return out


def _object(**properties: Any) -> Object:
    return {"type": "object", "properties": properties, "required": [*properties]}


def _ref(name: str) -> Object:
    return {"$ref": f"#/components/schemas/{name}"}


def _list_of(name: str) -> Object:
    return _object(object={"const": "list"}, data={"type": "array", "items": _ref(name)})


def _json(schema: Object) -> Object:
    return {"description": "JSON", "content": {"application/json": {"schema": schema}}}


def _plain() -> Object:
    return {"description": "Prometheus' text format", "content": {"text/plain": {"schema": _TEXT}}}


_HEALTH = _object(status={"enum": ["ok", "ending"]}, running=_WHOLE, waiting=_WHOLE)
