"""Conversations by a tokenizer of transformers: the tokens are its own, what the assistant says is marked."""

from __future__ import annotations

import pytest
from tiny_baselines import tokenizer

from mobilellm.eval.transformers_chat import TokenizerChat

TEMPLATE = (
    "{{ bos_token }}{% for tool in tools or [] %}{{ tool.name }}\n{% endfor %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
MESSAGES = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "Three?"},
    {"role": "assistant", "content": "Four."},
]


def test_prompts_and_conversations() -> None:
    words = tokenizer("llama")
    chat = TokenizerChat(words, TEMPLATE, "a model")
    asked = words.decode(chat.prompt(MESSAGES[:1], [{"name": "f"}]))
    assert asked == "<s>f\n[user]One?</s>[assistant]"
    tokens, trained = chat.conversation(MESSAGES)
    assert words.decode(tokens) == "<s>[user]One?</s>[assistant]Two.</s>[user]Three?</s>[assistant]Four.</s>"
    said = [token for token, counts in zip(tokens, trained, strict=True) if counts]
    assert words.decode(said) == "Two.</s>Four.</s>"


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        ("{{ raise_exception('no system role') }}", "a model: chat template: no system role"),
        ("{% for", "a model: chat template: "),
        (TEMPLATE + "{{ messages | length }}", "treats messages 1 to 2 otherwise where others follow"),
    ],
)
def test_templates_that_refuse(template: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        TokenizerChat(tokenizer("llama"), template, "a model").conversation(MESSAGES)


def test_a_message_that_is_none() -> None:
    with pytest.raises(ValueError, match="role = 'robot' is not known"):
        TokenizerChat(tokenizer("llama"), TEMPLATE, "a model").prompt([{"role": "robot", "content": ""}])
