"""Conversations in files: {"messages": [{"role": …, "content": …}, …]}, a line each, as `finetune` reads them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mobilellm.atomic import atomic_write

Message = dict[str, Any]
ROLES = ("system", "user", "assistant", "tool")


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
        raise ValueError(f"{path}: is not one conversation in JSON ({error})") from None
    messages = values.get("messages") if isinstance(values, dict) else values
    if not isinstance(messages, list):
        raise ValueError(
            f'{path}: holds no conversation; {{"messages": [{{"role": …, "content": …}}]}} is one'
        )
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise ValueError(f"{path}: message {number} has none of the roles {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str):
            raise ValueError(f"{path}: message {number} has no text in its content")
    return messages
