"""The shapes conversations come in, each turned into messages as OpenAI's interface has them.

messages        {"messages": [{"role", "content", "tool_calls"}], "tools": […]}
prompt          {"prompt": text or messages, "completion" or "response": text or messages}
Alpaca          {"instruction", "input", "output"}, also with "system" and "history"; Dolly's names too
ShareGPT        {"conversations": [{"from", "value"}], "system", "tools"}, with function_call, observation
leaderboard     {"question": [[messages]], "function": […]}: questions without answers (BFCL)
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from mobilellm.chat_template import ROLES, checked

UNKNOWN_SHAPE, UNKNOWN_ROLE = "unknown shape", "unknown role"
NOT_A_MESSAGE, NOT_A_TOOL = "not a message", "not a tool"
NO_ANSWER = "no assistant turn"

Record = Mapping[str, Any]


class Talk(NamedTuple):
    """A conversation: messages that `chat_template.checked` has passed, and the functions offered in it."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]


class NoTalkError(ValueError):
    """A record that is no conversation: a reason to be counted by, and in words what is wrong."""

    def __init__(self, reason: str, words: str) -> None:
        super().__init__(words)
        self.reason = reason


_ROLE_OF = {
    **{role: role for role in ROLES},
    "developer": "system",
    "human": "user",
    "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "model": "assistant",
    "observation": "tool", "function": "tool", "function_response": "tool", "ipython": "tool",
}  # fmt: skip
_CALL_ROLES = ("function_call", "tool_call", "function-call")
_QUESTION_KEYS = ("prompt", "instruction", "question")
_ANSWER_KEYS = ("completion", "response", "output", "answer")
_ALPACA = re.compile(
    r"Below is an instruction that describes a task\b.*?### Instruction:\n(?P<instruction>.*?)"
    r"(?:\n\n### Input:\n(?P<input>.*?))?\n\n### Response:\s*",
    re.DOTALL,
)


def talk_of(record: Record) -> Talk:
    """The conversation of a record, in whatever shape it is.

    A prompt that comes in the words Alpaca puts around one is taken out of them: the chat template has its
    own. What an assistant says before it calls a function belongs to the same turn. Raises NoTalkError.
    """
    for key, make in _SHAPES:
        if key in record:
            messages = make(record)
            break
    else:
        raise NoTalkError(UNKNOWN_SHAPE, f"its keys are {', '.join(map(str, record)) or 'none'}")
    tools = _tools(record)
    if isinstance(system := record.get("system"), str) and system:
        messages = [{"role": "system", "content": system}, *messages]
    try:
        made = Talk(_joined([checked(message) for message in messages]), tools)
    except ValueError as error:
        raise NoTalkError(NOT_A_MESSAGE, str(error)) from None
    if not any(message["role"] == "assistant" for message in made.messages):
        raise NoTalkError(NO_ANSWER, _excerpt(made.messages))
    return made


def _from_messages(record: Record) -> list[Any]:
    return [_message(each) for each in _list(record, "messages")]


def _from_conversations(record: Record) -> list[Any]:
    return [_message(each) for each in _list(record, "conversations")]


def _from_questions(record: Record) -> list[Any]:
    """Of the function-calling leaderboard: a list of turns, each a list of messages."""
    question = record["question"]
    if isinstance(question, str):
        return _from_pair(record)
    turns = _list(record, "question")
    return [_message(each) for turn in turns for each in (turn if isinstance(turn, list) else [turn])]


def _from_pair(record: Record) -> list[Any]:
    question = next(record[key] for key in _QUESTION_KEYS if key in record)
    answer = next((record[key] for key in _ANSWER_KEYS if key in record), None)
    if answer is None:
        raise NoTalkError(NO_ANSWER, _excerpt(question))
    further = next((record[key] for key in ("input", "context") if record.get(key)), "")
    if further and isinstance(question, str):
        question = f"{question}\n\n{further}"
    history = record.get("history") or []
    if not isinstance(history, list) or not all(
        isinstance(each, list) and len(each) == 2 for each in history
    ):
        raise NoTalkError(NOT_A_MESSAGE, f"history = {_excerpt(history)} must be pairs of texts")
    messages = [part for pair in history for part in _pair(*pair)]
    return messages + _pair(_plain(question), answer)


def _pair(question: object, answer: object) -> list[Any]:
    """Either may be a text or messages."""
    return [
        each
        for role, said in (("user", question), ("assistant", answer))
        for each in ([_message(one) for one in said] if isinstance(said, list) else [_text(role, said)])
    ]


def _text(role: str, said: object) -> dict[str, Any]:
    if not isinstance(said, str):
        raise NoTalkError(NOT_A_MESSAGE, f"{role} says {_excerpt(said)}, which is no text")
    return {"role": role, "content": said}


def _plain(prompt: object) -> object:
    found = _ALPACA.fullmatch(prompt) if isinstance(prompt, str) else None
    if found is None:
        return prompt
    return "\n\n".join(part for part in (found["instruction"], found["input"]) if part)


_SHAPES: tuple[tuple[str, Callable[[Record], list[Any]]], ...] = (
    ("messages", _from_messages),
    ("conversations", _from_conversations),
    ("question", _from_questions),
    ("prompt", _from_pair),
    ("instruction", _from_pair),
)


def _message(each: object) -> dict[str, Any]:
    """One message, with role or from, content or value, and an older function_call as a tool call."""
    if not isinstance(each, Mapping):
        raise NoTalkError(NOT_A_MESSAGE, f"{_excerpt(each)} is no object with role and content")
    spoken = each.get("role", each.get("from"))
    content = each["content"] if "content" in each else each.get("value")
    if spoken in _CALL_ROLES:
        return {"role": "assistant", "content": "", "tool_calls": _calls(content)}
    role = _ROLE_OF.get(spoken) if isinstance(spoken, str) else None
    if role is None:
        raise NoTalkError(UNKNOWN_ROLE, f"role {_excerpt(spoken)}")
    message = {**each, "role": role, "content": content}
    if isinstance(each.get("function_call"), Mapping):
        message["tool_calls"] = [{"type": "function", "function": each["function_call"]}]
    if role == "tool" and content is not None and not isinstance(content, str):
        message["content"] = json.dumps(content, ensure_ascii=False)
    return message


def _calls(content: object) -> list[dict[str, Any]]:
    """Of a function_call turn: an object, or several, with name and arguments, as JSON or as they are."""
    calls = _json(content, NOT_A_MESSAGE) if isinstance(content, str) else content
    return [
        {"type": "function", "function": call} for call in (calls if isinstance(calls, list) else [calls])
    ]


def _joined(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """With words and the call that follows them in one turn of the assistant."""
    out: list[dict[str, Any]] = []
    for message in messages:
        last = out[-1] if out else {}
        speaking = last.get("role") == "assistant" and not last.get("tool_calls")
        if speaking and message.get("tool_calls") and not message["content"]:
            out[-1] = {**message, "content": last["content"]}
        else:
            out.append(message)
    return out


def _tools(record: Record) -> list[dict[str, Any]]:
    found: Any = next((record[key] for key in ("tools", "functions", "function") if record.get(key)), [])
    tools = _json(found, NOT_A_TOOL) if isinstance(found, str) else found
    tools = tools if isinstance(tools, list) else [tools]
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise NoTalkError(NOT_A_TOOL, f"{_excerpt(tool)} describes no function with a name")
    return [dict(tool) for tool in tools]


def _json(text: str, reason: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise NoTalkError(reason, f"not JSON: {_excerpt(text)}") from None


def _list(record: Record, key: str) -> list[Any]:
    if not isinstance(record[key], list):
        raise NoTalkError(NOT_A_MESSAGE, f"{key} = {_excerpt(record[key])} is no list")
    return list(record[key])


def _excerpt(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 80 else f"{text[:79]}…"
