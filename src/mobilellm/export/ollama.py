"""A Modelfile for Ollama, its chat template in Go's language made from the model's own in Jinja.

Ollama reads no Jinja. A template that puts every message between fixed words, as nearly all do, is found out
by what it makes of sample messages, and said in Go; the translation is tried on a longer talk, and one that
does not give the same text is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from mobilellm.config import ModelConfig

Message = Mapping[str, str]
_BOS, _EOS = "<s>", "</s>"
_MARK = "\u2063{}\u2063"
"""Stands for a message's text: no template has it among its fixed words."""


class Wrapping(NamedTuple):
    """The fixed words around a system, a user and an assistant message, and those that ask for an answer."""

    system: tuple[str, str] | None
    user: tuple[str, str]
    assistant: tuple[str, str]
    asking: str


def modelfile(file: str, config: ModelConfig, chat_template: str | None) -> str:
    """The text of a Modelfile that runs `file` beside it. Raises ValueError for a template too free."""
    template = "{{ .Prompt }}" if chat_template is None else in_go(wrapping(chat_template))
    return (
        f"FROM ./{file}\n"
        f'TEMPLATE """{template}"""\n'
        f'PARAMETER stop "{_EOS}"\n'
        f"PARAMETER num_ctx {config.max_position_embeddings}\n"
    )


def wrapping(chat_template: str) -> Wrapping:
    """Raises ValueError for a template that does more than put messages between fixed words."""
    render = _renderer(chat_template)
    user, answer = (
        {"role": "user", "content": _MARK.format(1)},
        {"role": "assistant", "content": _MARK.format(2)},
    )
    system = {"role": "system", "content": _MARK.format(0)}
    try:
        before, asking = _parts(render([user], True), 1)
        alone = render([user], False)
        words = _parts(alone, 1)
        after = words[1]
        both = render([user, answer], False)
        between, closing = both[len(before) + len(_MARK.format(1)) :].split(_MARK.format(2))
        found = Wrapping(
            _system(render, system, user, before),
            (before, after),
            (between.removeprefix(after), closing),
            asking.removeprefix(after),
        )
    except ValueError:
        raise ValueError(_refusal()) from None
    talk = [*([system] if found.system else []), user, answer, {"role": "user", "content": "x y"}]
    if _spoken(found, talk) != render(talk, True):
        raise ValueError(_refusal())
    return found


def in_go(found: Wrapping) -> str:
    """The same as a template of Ollama."""
    roles = [("user", found.user), ("assistant", found.assistant)]
    if found.system is not None:
        roles.insert(0, ("system", found.system))
    branches = "".join(
        f'{{{{ {"else if" if index else "if"} eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}'
        for index, (role, (before, after)) in enumerate(roles)
    )
    return f"{{{{ range .Messages }}}}{branches}{{{{ end }}}}{{{{ end }}}}{found.asking}"


def _spoken(found: Wrapping, talk: Sequence[Message]) -> str:
    around = {"system": found.system, "user": found.user, "assistant": found.assistant}
    text = ""
    for message in talk:
        words = around[message["role"]]
        assert words is not None
        text += words[0] + message["content"] + words[1]
    return text + found.asking


def _system(
    render: Callable[[Sequence[Message], bool], str], system: Message, user: Message, before_user: str
) -> tuple[str, str] | None:
    """None for a template that knows no system message."""
    try:
        text = render([system, user], False)
        before, rest = text.split(system["content"])
        between, _ = rest.split(user["content"])
    except ValueError:
        return None
    if not between.endswith(before_user):
        raise ValueError
    return before, between.removesuffix(before_user)


def _parts(text: str, number: int) -> tuple[str, str]:
    before, after = text.split(_MARK.format(number))
    return before, after


def _renderer(chat_template: str) -> Callable[[Sequence[Message], bool], str]:
    """As transformers renders. BOS in front is left out: the runtime puts it there itself."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)

    def refuse(message: str) -> str:
        raise ValueError(message)

    environment.globals["raise_exception"] = refuse

    def render(messages: Sequence[Message], asking: bool) -> str:
        try:
            text = environment.from_string(chat_template).render(
                messages=messages, add_generation_prompt=asking, bos_token=_BOS, eos_token=_EOS
            )
        except TemplateError as error:
            raise ValueError(str(error)) from None
        return text.removeprefix(_BOS)

    return render


def _refusal() -> str:
    return (
        "the chat template does more than put messages between fixed words, and cannot be said in Ollama's "
        "language; leave ollama out and write a Modelfile with a TEMPLATE of your own"
    )
