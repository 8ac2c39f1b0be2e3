"""A conversation in a file: a line of JSON, {"messages": [{"role": …, "content": …}]}, for `finetune`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mobilellm.atomic import atomic_write
from mobilellm.chat_template import checked

Message = dict[str, Any]
_SHAPE = '{"messages": [{"role": …, "content": …}, …]}'


def write_conversation(path: Path, messages: Sequence[Message]) -> None:
    """One line of JSON, in a file that appears whole or not at all."""
    with atomic_write(path) as temporary:
        text = json.dumps({"messages": list(messages)}, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def read_conversation(path: Path) -> list[Message]:
    """The messages of a file with one conversation: as written here, or the bare list of them.

    Raises FileNotFoundError, or ValueError with one line naming file and fault.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is not one conversation in JSON, {_SHAPE} ({error})") from None
    messages = values.get("messages") if isinstance(values, dict) else values
    if not isinstance(messages, list):
        raise ValueError(f"{path}: holds no conversation; {_SHAPE} is one")
    try:
        return [checked(message) for message in messages]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
