"""What a request may say: OpenAI's fields that this server means, and no others.

A field that is not here is refused, and so is a value that would change the answer and cannot be honoured;
null is as good as leaving a field out. The schemas of these classes stand in the OpenAPI document.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mobilellm.serve.errors import ApiError

_Text = Annotated[str, Field(min_length=1)]
_MOST_SHOWN_ERRORS = 3
_LARGEST_SEED, _MOST = 2**63 - 1, 2**31 - 1


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(_Strict):
    include_usage: bool | None = None


class Request(_Strict):
    """What both kinds of completion take. The last three fields are this server's own."""

    model: str | None = Field(None, description="By default the model that is served.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=128)
    max_tokens: int | None = Field(None, ge=1, le=_MOST)
    stop: _Text | Annotated[list[_Text], Field(max_length=16)] | None = None
    seed: int | None = Field(None, ge=-_LARGEST_SEED - 1, le=_LARGEST_SEED)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    user: Annotated[str, Field(max_length=512)] | None = Field(None, description="Goes into the access log.")
    top_k: int | None = Field(None, ge=0, le=_MOST)
    min_p: float | None = Field(None, ge=0, lt=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)


class CompletionRequest(Request):
    """Goes on from a prompt."""

    prompt: str | Annotated[list[str] | list[int] | list[list[int]], Field(min_length=1)]
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=20)
    suffix: None = None
    best_of: None = None


class JsonSchema(_Strict):
    """`name` is the client's own label; `strict` changes nothing, since the schema is always kept to."""

    name: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextFormat(_Strict):
    type: Literal["text"]


class JsonObjectFormat(_Strict):
    type: Literal["json_object"]


class JsonSchemaFormat(_Strict):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class Function(_Strict):
    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Strict):
    type: Literal["function"]
    function: Function


class NamedFunction(_Strict):
    name: str


class NamedTool(_Strict):
    type: Literal["function"]
    function: NamedFunction


class TextPart(_Strict):
    type: Literal["text"]
    text: str


_Content = str | list[TextPart]


class CalledFunction(_Strict):
    name: str
    arguments: str


class ToolCall(_Strict):
    id: str | None = None
    type: Literal["function"]
    function: CalledFunction


class SystemMessage(_Strict):
    role: Literal["system", "developer"]
    content: _Content
    name: str | None = None


class UserMessage(_Strict):
    role: Literal["user"]
    content: _Content
    name: str | None = None


class AssistantMessage(_Strict):
    role: Literal["assistant"]
    content: _Content | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    refusal: None = None


class ToolMessage(_Strict):
    role: Literal["tool"]
    content: _Content
    tool_call_id: str | None = None
    name: str | None = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


class ChatRequest(Request):
    """Answers a conversation."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = Field(None, ge=1, le=_MOST)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: Literal[True] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None


_OF_SEVERAL_KINDS = {
    "prompt": "a text, a list of texts, token ids, or a list of lists of token ids; not empty",
    "stop": "a text or a list of up to 16, none of them empty",
    "content": "a text, or a list of parts of type text",
    "tool_choice": "none, auto, required, or a function by its name",
}
_Parsed = TypeVar("_Parsed", bound=BaseModel)


def parsed(kind: type[_Parsed], body: bytes) -> _Parsed:
    """The request in a body. Raises ApiError 400, one line that names what is at fault."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_context=False, include_input=False)
        if faults[0]["type"] == "json_invalid":
            raise ApiError(400, f"the body is not JSON: {faults[0]['msg'].partition(': ')[2]}") from None
        lines = dict.fromkeys(_line(fault["type"], fault["loc"], fault["msg"]) for fault in faults)
        more = f" (and {len(lines) - _MOST_SHOWN_ERRORS} more)" if len(lines) > _MOST_SHOWN_ERRORS else ""
        parameter = next((str(part) for part in faults[0]["loc"]), None)
        raise ApiError(400, "; ".join([*lines][:_MOST_SHOWN_ERRORS]) + more, None, parameter) from None


def _line(kind: str, place: tuple[int | str, ...], message: str) -> str:
    for depth, part in enumerate(place):
        wanted = _OF_SEVERAL_KINDS.get(str(part))
        is_of_the_name = kind in ("missing", "extra_forbidden") and depth == len(place) - 1
        if wanted is not None and not is_of_the_name:  # a complaint for each kind would be told
            kind, place, message = "", place[: depth + 1], f"must be {wanted}"
            break
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)[1:]
    if kind == "extra_forbidden":
        return f"{where[:100]}: this server does not know the field; leave it out"
    return f"{where[:100] or 'the body'}: {message[:1].lower()}{message[1:]}"
