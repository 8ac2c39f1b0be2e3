"""Answers that keep to a schema, from a model that would write anything, at temperature 1."""

from __future__ import annotations

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
from serving import SHAPE, Running

from mobilellm.runtime.random_model import made_tokenizer
from mobilellm.serve.errors import ApiError
from mobilellm.serve.grammar import Grammars
from mobilellm.serve.protocol import ChatRequest, parsed
from mobilellm.tokenizer import EOS_ID
from mobilellm.tool_calls import CLOSE, OPEN

jsonschema = pytest.importorskip("jsonschema", reason="needs jsonschema (extra test)")

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"type": "string"}},
        "mail": {"type": ["string", "null"]},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
REVIEW = {
    "type": "object",
    "properties": {
        "mood": {"enum": ["good", "bad", "neither"]},
        "score": {"type": "number"},
        "code": {"type": "string", "pattern": "^[A-F]{2}-[0-9]{3}$"},
        "parts": {"type": "array", "minItems": 2, "maxItems": 4, "items": {"$ref": "#/$defs/part"}},
    },
    "required": ["mood", "score", "code", "parts"],
    "additionalProperties": False,
    "$defs": {
        "part": {
            "type": "object",
            "properties": {
                "what": {"const": "part"},
                "in": {"anyOf": [{"$ref": "#/$defs/part"}, {"type": "null"}]},
            },
            "required": ["what", "in"],
            "additionalProperties": False,
        }
    },
}
FREE = {"type": "object"}
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "tells the weather",
            "parameters": PERSON,
            "strict": True,
        },
    },
    {"type": "function", "function": {"name": "time", "parameters": FREE}},
]


def called(name: str, arguments: dict[str, Any]) -> str:
    call = json.dumps({"name": name, "arguments": arguments})
    return f"{OPEN}\n{call}\n{CLOSE}"


def wanted(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


def answers_that_keep_to_their_schemas(server: Running, count: int) -> int:
    """Of strings and lists without any bound, too, which a random model hardly ever closes by itself."""

    def answer(number: int) -> None:
        schema = (PERSON, REVIEW)[number % 2]
        response = server.chat(
            f"number {number}", response_format=wanted(schema), max_tokens=160, temperature=1, seed=number
        )
        choice = response.json()["choices"][0]
        content = choice["message"]["content"]
        jsonschema.validate(json.loads(content), schema)
        # Spaces where json.dumps puts them and nowhere else: a model could go on with them for ever.
        bare = re.sub(r'"(?:[^"\\]|\\.)*"', '""', content)
        assert not re.search(r"\s", bare.replace(", ", ",").replace(": ", ":")), content
        assert choice["finish_reason"] == "stop"

    with ThreadPoolExecutor(8) as pool:
        return len(list(pool.map(answer, range(count))))


def test_answers_keep_to_their_schemas(server: Running) -> None:
    assert answers_that_keep_to_their_schemas(server, 16) == 16


@pytest.mark.slow
def test_200_of_200_answers_keep_to_their_schemas(server: Running) -> None:
    assert answers_that_keep_to_their_schemas(server, 200) == 200


def test_json_of_no_schema(server: Running) -> None:
    for seed in range(10):
        response = server.chat("x", response_format={"type": "json_object"}, max_tokens=60, seed=seed)
        assert isinstance(json.loads(response.json()["choices"][0]["message"]["content"]), dict)


def test_a_length_that_no_document_has_cuts_it_off(server: Running) -> None:
    choice = server.chat("x", response_format=wanted(PERSON), max_tokens=4).json()["choices"][0]
    assert choice["finish_reason"] == "length"


def test_a_call_that_is_required(server: Running) -> None:
    names = set()
    for seed in range(8):
        choice = server.chat(
            "x", tools=TOOLS, tool_choice="required", max_tokens=150, temperature=1, seed=seed
        ).json()["choices"][0]
        (call,) = choice["message"]["tool_calls"]
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] is None
        names.add(call["function"]["name"])
        arguments = json.loads(call["function"]["arguments"])
        jsonschema.validate(arguments, PERSON if call["function"]["name"] == "weather" else FREE)
    assert names == {"weather", "time"}


def test_a_call_by_name_streamed_by_openais_client(server: Running) -> None:
    openai = pytest.importorskip("openai", reason="needs openai (extra test)")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    chunks = list(
        client.chat.completions.create(
            model="small", messages=[{"role": "user", "content": "x"}], tools=TOOLS, stream=True, max_tokens=150,
            tool_choice={"type": "function", "function": {"name": "weather"}},
        )
    )  # fmt: skip
    (call,) = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert (call.index, call.function.name) == (0, "weather")
    jsonschema.validate(json.loads(call.function.arguments), PERSON)
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


@pytest.mark.parametrize(
    ("text", "may_be"),
    [
        ("it rains", True),
        (called("weather", {"name": "a", "age": 3, "tags": []}), True),
        (called("weather", {"name": "a", "age": "three", "tags": []}), False),
        (called("weather", {}), False),
        (called("time", {"anything": [1]}), True),  # not strict
        (called("weather", {"name": "a", "age": 3, "tags": []}) + " and more", False),
        (called("another", {}), False),
    ],
)
def test_strict_tools_are_called_as_they_want_or_not_at_all(text: str, may_be: bool) -> None:
    tokenizer = made_tokenizer(SHAPE.vocab_size)
    body = {"messages": [{"role": "user", "content": "x"}], "tools": TOOLS}
    matchers = Grammars(tokenizer).of_chat(parsed(ChatRequest, json.dumps(body).encode()), TOOLS)
    assert matchers is not None
    matcher = matchers.begin(1000)
    tokens = [*tokenizer.encode(f"\0{text}", bos=False)[2:], EOS_ID]
    for place, token in enumerate(tokens):
        if not matcher.allowed(SHAPE.vocab_size)[token]:
            assert not may_be, tokenizer.decode(tokens[:place])
            return
        assert matcher.settled(token) == token
    assert may_be


def test_a_conversation_with_calls_is_understood(server: Running) -> None:
    called = {"id": "1", "type": "function", "function": {"name": "time", "arguments": "{}"}}
    messages = [
        {
            "role": "developer",
            "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "brief"}],
        },
        {"role": "user", "content": "what time is it?"},
        {"role": "assistant", "content": None, "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "1", "content": "noon"},
    ]
    body = {"messages": messages, "tools": TOOLS[1:], "max_tokens": 5}
    assert server.post("/v1/chat/completions", body).status_code == 200


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"response_format": wanted({"type": "text"})}, "response_format: the schema cannot be kept to"),
        ({"response_format": wanted({"type": "object", "uniqueItems": 3, "not": {}})}, "response_format"),
        ({"response_format": {"type": "grammar"}}, "response_format"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "no tool 'x'"),
        ({"tools": TOOLS, "tool_choice": "required", "response_format": wanted(PERSON)}, "does not go with"),
    ],
)
def test_what_cannot_be_kept_to_is_refused(server: Running, fields: Any, named: str) -> None:
    response = server.chat("x", **fields)
    assert response.status_code == 400
    assert named in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        {"type": "object", "properties": {"in": {"$ref": "#"}}, "required": ["in"]},
        {"type": "object", "properties": {f"p{number}": {"type": "string"} for number in range(2000)}},
    ],
    ids=["itself", "endless", "of too many parts"],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_that_shows_only_in_use_what_it_is_is_the_clients_mistake(
    server: Running, schema: Any, stream: bool
) -> None:
    """In a stream that has begun, by then, it is an event."""
    response = server.chat("x", response_format=wanted(schema), stream=stream)
    assert stream or response.status_code == 400
    assert '"error":' in response.text
    assert "response_format: the schema cannot be kept to" in response.text


def test_a_monstrous_schema_is_refused_in_time() -> None:
    """Each of these grows beyond all bounds if nothing stops it."""
    grammars = Grammars(made_tokenizer(SHAPE.vocab_size))
    deep: Any = {"type": "string"}
    for _ in range(100):
        deep = {"type": "object", "properties": {"a": deep, "b": deep}, "required": ["a"]}
        if len(json.dumps(deep)) > 100_000:
            break
    pattern = {"type": "string", "pattern": "^(a?){500}(b?){500}(c|d){1,900}$"}
    start = time.process_time()
    for schema in (deep, pattern, {"anyOf": [{"const": "x" * number} for number in range(1, 300)]}):
        body = {"messages": [{"role": "user", "content": "x"}], "response_format": wanted(schema)}
        with suppress(ApiError):
            matchers = grammars.of_chat(parsed(ChatRequest, json.dumps(body).encode()), [])
            assert matchers is not None
            matchers.begin(50).allowed(SHAPE.vocab_size)
    assert time.process_time() - start < 10
