"""Conversations as tokens: a chat template in Jinja, rendered so that nobody can type a special token.

Templates are those of transformers (`apply_chat_template`) and are rendered as there, in jinja2's sandbox.
While one is rendered, <s>, </s> and <unk> are single private characters that no message holds; afterwards
these become the special ids, and the text between them is encoded piece by piece, as stock transformers and
llama.cpp do it. So "</s>" in a message stays text, whatever the template.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from mobilellm.sentencepiece_model import SPECIAL_PIECES
from mobilellm.tokenizer import EOS_ID, Tokenizer

TEMPLATE_FILE = "chat_template.jinja"
"""Where a model directory keeps its template, beside the files of the tokenizer."""

DEFAULT = Path(__file__).with_name(TEMPLATE_FILE).read_text(encoding="utf-8")
"""The template that fine-tuning gives a model, unless told otherwise."""

ROLES = ("system", "user", "assistant", "tool")

Message = Mapping[str, Any]
"""As in OpenAI's interface: role, content, and tool_calls of an assistant."""
Tool = Mapping[str, Any]
"""A function's description: name, description, parameters (a JSON schema); bare or under "function"."""

_PRIVATE = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE))
_Render = Callable[[Sequence[Message], bool], str]


class Conversation(NamedTuple):
    """Token ids, BOS included, and for each whether it is the assistant's: to be predicted, and learnt."""

    tokens: list[int]
    trained: list[bool]


class ChatTemplate:
    """A template and the tokenizer it is for. Raises ValueError for what is no Jinja template."""

    def __init__(self, source: str, tokenizer: Tokenizer) -> None:
        self.source, self.tokenizer = source, tokenizer
        _compiled(source, _unused_characters(source))

    def prompt(self, messages: Sequence[Message], tools: Sequence[Tool] | None = None) -> list[int]:
        """Ids up to where the assistant speaks, BOS included.

        Raises ValueError, one line, for messages that are none and for what the template refuses.
        """
        render, specials = self._renderer(messages, tools)
        return self._encoded(render(list(map(checked, messages)), True), specials)

    def conversation(self, messages: Sequence[Message], tools: Sequence[Tool] | None = None) -> Conversation:
        """A whole conversation, as a model is trained on it.

        Trained is what the assistant says, each time up to and with the </s> that ends its turn. Where it
        begins and ends is found by rendering beginnings of the conversation, so any template will do that
        renders them to beginnings of the whole. Raises ValueError for one that does not, or that leaves an
        assistant's turn without </s> (the model would never stop), and as `prompt`.
        """
        messages = list(map(checked, messages))
        render, specials = self._renderer(messages, tools)
        whole, eos = render(messages, False), specials[EOS_ID]
        parts: list[tuple[int, int]] = []
        for index in [index for index, message in enumerate(messages) if message["role"] == "assistant"]:
            before, after = render(messages[:index], True), render(messages[: index + 1], False)
            if not (whole.startswith(after) and after.startswith(before)):
                raise ValueError(
                    f"chat template: it renders messages 1 to {index + 1} differently where others follow, "
                    "so what the assistant says cannot be told apart; train with another template"
                )
            end = after.rfind(eos, len(before)) + 1
            if not end:
                raise ValueError(
                    "chat template: it does not close the assistant's turn with eos_token; a model trained "
                    "with it would never stop"
                )
            parts.append((len(before), end))
        return self._marked(whole, specials, parts)

    def _renderer(
        self, messages: Sequence[Message], tools: Sequence[Tool] | None
    ) -> tuple[_Render, tuple[str, ...]]:
        """A way to render these messages or some of them, and what stands for <unk>, <s> and </s> in it."""
        listed = None if not tools else [_checked_tool(tool) for tool in tools]
        specials = _unused_characters(self.source, *_texts([messages, listed]))
        template = _compiled(self.source, specials)
        unk, bos, eos = specials

        def render(messages: Sequence[Message], asking: bool) -> str:
            try:
                text: str = template.render(
                    messages=messages, tools=listed, add_generation_prompt=asking,
                    bos_token=bos, eos_token=eos, unk_token=unk, pad_token=unk,
                )  # fmt: skip
            except Exception as error:  # a template is a program of someone else's
                raise ValueError(f"chat template: {_first_line(error)}") from None
            return text

        return render, specials

    def _encoded(self, text: str, specials: tuple[str, ...]) -> list[int]:
        return self._marked(text, specials, []).tokens

    def _marked(self, text: str, specials: tuple[str, ...], parts: Sequence[tuple[int, int]]) -> Conversation:
        """`parts` are the trained (start, end) in characters, each end behind an EOS."""
        starts = {start for start, _ in parts}
        pieces = re.split(f"([{''.join(specials)}])", text)
        heads, place = list[str](), 0  # of a piece within which the assistant begins, what is before that
        cut = dict[int, int]()
        for number, piece in enumerate(pieces):
            for start in starts.intersection(range(place + 1, place + len(piece))):
                cut[number] = len(pieces) + len(heads)
                heads.append(piece[: start - place])
            place += len(piece)
        encoded = self.tokenizer.encode_batch([*pieces, *heads], bos=False)
        tokens, trained, place = list[int](), list[bool](), 0
        for number, piece in enumerate(pieces):
            ids = [specials.index(piece)] if piece in specials else encoded[number]
            inside = any(start <= place < end for start, end in parts)
            untrained = 0 if inside else len(ids)
            if number in cut:
                head = encoded[cut[number]]
                if ids[: len(head)] != head:
                    raise ValueError(
                        "chat template: a token runs across the beginning of what the assistant says; let "
                        "the template end what stands before it with a line break"
                    )
                untrained = len(head)
            tokens += ids
            trained += [False] * untrained + [True] * (len(ids) - untrained)
            place += len(piece)
        return Conversation(tokens, trained)


def read_template(file: Path) -> str:
    """Raises FileNotFoundError, ValueError naming the file for what is no text."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such chat template")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: a chat template is UTF-8 text, this is none ({error})") from None


def stored_template(directory: Path) -> str | None:
    """The template of a model directory: chat_template.jinja, or, as older files have it, a key of
    tokenizer_config.json. None of a base model."""
    file = directory / TEMPLATE_FILE
    if file.is_file():
        return read_template(file)
    try:
        values = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    template = values.get("chat_template") if isinstance(values, dict) else None
    return template if isinstance(template, str) else None


def checked(message: Message) -> dict[str, Any]:
    """A message with a text for its content and an object for the arguments of every call.

    Raises ValueError naming what is wrong. A content of several parts, all text, becomes one text; arguments
    written as JSON, as OpenAI's interface has them, become the object they say.
    """
    if not isinstance(message, Mapping):
        raise ValueError(f"a message is an object with role and content, not {_short(message)}")
    role = message.get("role")
    if role not in ROLES:
        raise ValueError(f"role = {_short(role)} is not known; roles are {', '.join(ROLES)}")
    out: dict[str, Any] = {"role": role, "content": _content(message.get("content"))}
    for name in ("name", "tool_call_id"):
        if isinstance(message.get(name), str):
            out[name] = message[name]
    if calls := message.get("tool_calls"):
        if role != "assistant" or not isinstance(calls, list | tuple):
            raise ValueError("tool_calls must be a list, of a message of the assistant")
        out["tool_calls"] = [_checked_call(call) for call in calls]
    return out


def _content(content: object) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list | tuple) else [content]
    texts = [part.get("text") if isinstance(part, Mapping) else None for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"content = {_short(content)} must be text")
    return "".join(map(str, texts))


def _checked_call(call: object) -> dict[str, Any]:
    function: Any = call.get("function") if isinstance(call, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str):
        raise ValueError(f"tool call {_short(call)} has no function with a name")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            raise ValueError(f"arguments of {name} are not JSON: {_short(arguments)}") from None
    if not isinstance(arguments, Mapping):
        raise ValueError(f"arguments of {name} are {_short(arguments)}, not an object")
    out: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": dict(arguments)}}
    identifier = call.get("id") if isinstance(call, Mapping) else None
    return {"id": identifier, **out} if isinstance(identifier, str) else out


def _checked_tool(tool: object) -> dict[str, Any]:
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if not isinstance(tool, Mapping) or not isinstance(function, Mapping) or "name" not in function:
        raise ValueError(f"tool {_short(tool)} must be an object that describes a function with a name")
    return dict(tool)


def _texts(value: object) -> Iterator[str]:
    """Every text in nested lists and objects, names too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from chain.from_iterable(map(_texts, chain.from_iterable(value.items())))
    elif isinstance(value, list | tuple):
        yield from chain.from_iterable(map(_texts, value))


def _unused_characters(*texts: str) -> tuple[str, ...]:
    """One for each special token. Single characters, so that no texts put together could make one."""
    used = set[str]().union(*texts)
    free: Iterable[str] = (character for code in chain(*_PRIVATE) if (character := chr(code)) not in used)
    return tuple(islice(free, len(SPECIAL_PIECES)))


@lru_cache(maxsize=16)
def _compiled(source: str, specials: tuple[str, ...]) -> Any:
    """The template as transformers compiles it; special tokens spelt out in it are meant as such."""
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None,
               separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:  # fmt: skip
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _generation_block()]
    )
    environment.filters["tojson"] = tojson  # jinja2's own is for HTML
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.datetime.now().strftime(format)
    for piece, character in zip(SPECIAL_PIECES, specials, strict=True):
        source = source.replace(piece, character)
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise ValueError(f"chat template: not a Jinja template ({_first_line(error)})") from None


def _generation_block() -> Any:
    """transformers' tag {% generation %} around what the assistant says, which is found here without it."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(
                parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line
            )

    return Generation


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
