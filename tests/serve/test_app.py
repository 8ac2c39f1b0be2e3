"""Every endpoint, by OpenAI's own client and by curl, streamed and whole."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from serving import Running, serving, write_model

import mobilellm.runtime
from mobilellm.chat_template import DEFAULT, ChatTemplate
from mobilellm.sampling import Sampling

openai = pytest.importorskip("openai", reason="needs openai (extra test)")
MESSAGES: Any = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def client(server: Running) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def model(chat_file: Path) -> mobilellm.runtime.RuntimeModel:
    """The same model in this process: what the server has to say."""
    return mobilellm.runtime.load(chat_file, threads=1)


def test_a_chat_is_answered_as_the_runtime_does(client: Any, model: Any) -> None:
    answer = client.chat.completions.create(model="small", messages=MESSAGES, max_tokens=12, temperature=0)
    prompt = ChatTemplate(DEFAULT, model.tokenizer).prompt(MESSAGES)
    (expected,) = list(model.generate_tokens([prompt], Sampling(), 12))[-1:]
    tokens = [new.token for new in model.generate_tokens([prompt], Sampling(), 12)]
    choice = answer.choices[0]
    written = b"".join(map(model.tokenizer.token_bytes, tokens))
    assert choice.message.content == written.decode(errors="replace")
    assert choice.finish_reason == ("stop" if expected.finish == "eos" else "length")
    assert choice.logprobs is None
    assert (answer.object, answer.model, choice.message.role) == ("chat.completion", "small", "assistant")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), 12)


def test_a_streamed_chat_says_the_same(client: Any) -> None:
    options = {"model": "small", "messages": MESSAGES, "max_tokens": 30, "temperature": 1, "seed": 5}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == whole.choices[0].finish_reason
    assert all(chunk.choices[0].finish_reason is None for chunk in chunks[:-1])
    assert chunks[-1].usage.completion_tokens == 30
    assert chunks[-1].model_extra["timings"]["tokens_per_second"] > 0
    assert len({chunk.id for chunk in chunks}) == 1


def test_tools_that_are_not_called(client: Any) -> None:
    tools = [{"type": "function", "function": {"name": "time", "parameters": {"type": "object"}}}]
    options: dict[str, Any] = {
        "model": "small",
        "messages": MESSAGES,
        "max_tokens": 12,
        "temperature": 0,
        "tools": tools,
    }
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True))
    assert whole.choices[0].message.tool_calls is None
    assert all(chunk.choices[0].delta.tool_calls is None for chunk in chunks)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content != ""
    assert whole.choices[0].finish_reason == chunks[-1].choices[0].finish_reason != "tool_calls"


def test_usage_is_a_chunk_of_its_own_where_it_is_asked_for(client: Any) -> None:
    chunks = list(
        client.chat.completions.create(
            model="small",
            messages=MESSAGES,
            max_tokens=5,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens == chunks[-1].usage.prompt_tokens + 5
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_completions(client: Any, model: Any) -> None:
    (expected,) = model.generate("some text", max_new_tokens=16)
    answer = client.completions.create(model="small", prompt="some text", temperature=0)
    assert answer.choices[0].text == expected.text  # 16 tokens where nothing is said
    assert answer.choices[0].logprobs is None
    chunks = list(client.completions.create(model="small", prompt="some text", temperature=0, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected.text
    echoed = client.completions.create(model="small", prompt="some text", temperature=0, echo=True)
    assert echoed.choices[0].text == f"some text{expected.text}"


def test_several_prompts_and_choices(client: Any) -> None:
    answer = client.completions.create(
        model="small", prompt=["ab", "cd"], n=2, temperature=1, seed=3, max_tokens=8
    )
    texts = [choice.text for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert texts[0] != texts[1]
    alone = client.completions.create(model="small", prompt="ab", temperature=1, seed=3, max_tokens=8)
    assert alone.choices[0].text == texts[0]
    assert answer.usage.completion_tokens == 32


def test_a_seed_decides_and_without_one_chance_does(client: Any) -> None:
    def text(**options: Any) -> str:
        answer = client.completions.create(model="small", prompt="x", max_tokens=20, **options)
        return str(answer.choices[0].text)

    assert text(seed=1) == text(seed=1)
    assert text(seed=-1) == text(seed=-1) != text(seed=1)
    assert text() != text()
    assert text(temperature=0) == text(temperature=0, seed=9)


def test_a_stop_string_ends_and_is_left_out(client: Any) -> None:
    whole = client.completions.create(model="small", prompt="x", temperature=0, max_tokens=40).choices[0].text
    stop = whole[20:24]
    cut = client.completions.create(
        model="small", prompt="x", temperature=0, max_tokens=40, stop=[stop, "\0"]
    )
    assert cut.choices[0].text == whole[: whole.index(stop)]
    assert cut.choices[0].finish_reason == "stop"


def test_logprobs_of_a_chat(client: Any) -> None:
    options = {"model": "small", "messages": MESSAGES, "max_tokens": 6, "temperature": 0}
    answer = client.chat.completions.create(**options, logprobs=True, top_logprobs=3)
    tokens = answer.choices[0].logprobs.content
    written = b"".join(bytes(each.bytes) for each in tokens)
    assert written.decode(errors="replace") == answer.choices[0].message.content
    for each in tokens:
        assert len(each.top_logprobs) == 3
        assert each.logprob == each.top_logprobs[0].logprob < 0  # the most likely is taken
    chunks = client.chat.completions.create(**options, logprobs=True, top_logprobs=3, stream=True)
    streamed = [
        each for chunk in chunks if chunk.choices[0].logprobs for each in chunk.choices[0].logprobs.content
    ]
    assert streamed == tokens


def test_logprobs_are_those_of_the_model(client: Any, model: Any) -> None:
    answer = client.completions.create(model="small", prompt="ab", max_tokens=3, temperature=0.7, logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs.text_offset[0] == 0
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 3
    total = sum(
        math.exp(each)
        for each in client.completions.create(model="small", prompt="ab", max_tokens=1, logprobs=20)
        .choices[0]
        .logprobs.top_logprobs[0]
        .values()
    )
    assert 0 < total <= 1


def test_bias_and_penalties_change_what_is_drawn(client: Any, model: Any) -> None:
    only = client.completions.create(
        model="small", prompt="x", max_tokens=5, temperature=0, logit_bias={"300": 100}
    )
    assert only.choices[0].text == model.tokenizer.token_bytes(300).decode() * 5
    varied = client.completions.create(
        model="small", prompt="x", max_tokens=40, temperature=0, extra_body={"logit_bias": {"300": 50}},
        presence_penalty=2, frequency_penalty=2,
    )  # fmt: skip
    assert varied.choices[0].text != model.tokenizer.token_bytes(300).decode() * 40


def test_fields_of_our_own(client: Any) -> None:
    greedy = client.completions.create(model="small", prompt="x", temperature=0, max_tokens=12)
    first = client.completions.create(
        model="small", prompt="x", temperature=1, max_tokens=12, extra_body={"top_k": 1, "min_p": 0.1}
    )
    assert first.choices[0].text == greedy.choices[0].text


def test_the_model_is_told_of(client: Any, server: Running) -> None:
    listed = client.models.list().data
    assert [each.id for each in listed] == ["small"]
    facts = client.models.retrieve("small").model_extra["mobilellm"]
    assert (facts["layers"], facts["context"], facts["is_chat"]) == (3, 1024, True)
    assert facts["quantisation"].startswith("Q8_0")
    assert min(facts["parameters"], facts["file_bytes"], facts["memory_bytes"]) > 0
    with pytest.raises(openai.NotFoundError, match="'small' is"):
        client.models.retrieve("other")
    with pytest.raises(openai.NotFoundError, match="'small' is"):
        client.completions.create(model="other", prompt="x")


def test_what_is_not_known_is_refused_and_named(server: Running) -> None:
    for fields, named in (
        ({"frequency": 1}, "frequency: this server does not know the field"),
        ({"temperature": "hot"}, "temperature: input should be a valid number"),
        ({"best_of": 3}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"n": 0}, "n: input should be greater than or equal to 1"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"stop": [""]}, "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias: 'x' is no token id of 0 … 599"),
        ({"echo": True, "logprobs": 1}, "echo: logprobs of the prompt are not computed"),
        ({"prompt": [1, 600]}, "prompt: token ids must be in 0 … 599"),
        ({"prompt": []}, "prompt: must be a text, a list of texts"),
        ({"prompt": ["x", 1]}, "prompt: must be a text, a list of texts"),
        ({"prompt": "word " * 3000}, "tokens; 1023 is the most here"),
        ({"stream_options": {"include_usage": True}}, "stream_options: goes with stream = true only"),
    ):
        response = server.post("/v1/completions", {"prompt": "x", **fields})
        error = response.json()["error"]
        assert response.status_code == 400, fields
        assert named in error["message"]
        assert error["type"] == "invalid_request_error"
    picture = {"type": "image_url", "image_url": {"url": "data:,"}}
    response = server.chat(messages=[{"role": "user", "content": [picture]}])
    assert response.json()["error"]["message"] == (
        "messages[0].user.content: must be a text, or a list of parts of type text"
    )
    for fields, named in (
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "judge", "content": "x"}]}, "messages[0]"),
        ({"messages": [{"role": "user"}]}, "messages[0].user.content: field required"),
        ({"top_logprobs": 2}, "top_logprobs: needs logprobs"),
        ({"tool_choice": "required"}, "there are no tools"),
        ({"functions": []}, "functions: this server does not know the field"),
        ({"prompt": "x"}, "prompt: this server does not know the field"),
    ):
        response = server.chat(**fields)
        assert response.status_code == 400, fields
        assert named in response.json()["error"]["message"]


def test_a_path_or_a_method_that_is_not_there_is_told_what_is(server: Running) -> None:
    for response, status, words in (
        (server.client.get("/models"), 404, "nothing at /models; OpenAI's interface begins at /v1"),
        (server.client.get("/v1/chat/completions"), 405, "GET does not go here, POST does"),
    ):
        assert response.status_code == status
        assert words in response.json()["error"]["message"]


def test_null_is_as_good_as_nothing(server: Running) -> None:
    nothing = dict.fromkeys(("temperature", "top_p", "stop", "seed", "n", "tools", "logit_bias", "user"))
    assert server.chat(max_tokens=2, **nothing).status_code == 200


def test_a_base_model_says_where_to_go(tmp_path: Path) -> None:
    with serving(write_model(tmp_path / "base.gguf", is_chat=False)) as base:
        response = base.chat("hello")
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "no_chat_template"
        assert "use /v1/completions" in response.json()["error"]["message"]
        assert base.post("/v1/completions", {"prompt": "x", "max_tokens": 3}).status_code == 200
        assert any("a base model: /v1/completions only" in line for line in base.said)


def test_curl(server: Running) -> None:
    if shutil.which("curl") is None:
        pytest.skip("needs curl")

    def curl(path: str, *flags: str) -> str:
        command = ["curl", "-sSN", "--max-time", "30", f"{server.url}{path}", *flags]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    body = {"messages": MESSAGES, "max_tokens": 4}
    post = ("-H", "Content-Type: application/json", "-d")
    assert json.loads(curl("/health"))["status"] == "ok"
    assert json.loads(curl("/v1/models"))["data"][0]["id"] == "small"
    assert (
        json.loads(curl("/v1/chat/completions", *post, json.dumps(body)))["usage"]["completion_tokens"] == 4
    )
    streamed = curl("/v1/chat/completions", *post, json.dumps({**body, "stream": True}))
    events = [line.removeprefix("data: ") for line in streamed.splitlines() if line]
    assert events[-1] == "[DONE]"
    assert [json.loads(event)["object"] for event in events[:-1]] == ["chat.completion.chunk"] * (
        len(events) - 1
    )
    completion = {"prompt": "x", "max_tokens": 4}
    assert json.loads(curl("/v1/completions", *post, json.dumps(completion)))["object"] == "text_completion"
    assert curl("/v1/completions", *post, json.dumps({**completion, "stream": True})).endswith(
        "data: [DONE]\n\n"
    )
    assert "mobilellm_requests_total" in curl("/metrics")
    assert json.loads(curl("/openapi.json"))["openapi"].startswith("3.1")
    assert "<html" in curl("/")
