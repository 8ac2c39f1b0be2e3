"""Chat templates in Jinja, said in Ollama's language."""

from __future__ import annotations

import pytest

from mobilellm.config import ModelConfig
from mobilellm.export.ollama import Wrapping, in_go, modelfile, wrapping

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>'"
    " + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PLAIN_ROLES = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}[INST] {{ message['content'] }}"
    " [/INST]{% elif message['role'] == 'assistant' %} {{ message['content'] }}{{ eos_token }}"
    "{% else %}{{ raise_exception('no system messages') }}{% endif %}{% endfor %}"
)
SHOUTING = "{% for message in messages %}{{ message['content'] | upper }}{% endfor %}"
FIRST_ONLY = "{{ '<u>' + messages[0]['content'] + '</u>' }}"
SHAPE = ModelConfig(
    vocab_size=320, hidden_size=64, intermediate_size=160, num_layers=3, num_heads=4, num_kv_heads=2,
    head_dim=16, max_position_embeddings=96,
)  # fmt: skip


def test_fixed_words_are_found() -> None:
    assert wrapping(CHATML) == Wrapping(
        ("<|im_start|>system\n", "<|im_end|>\n"),
        ("<|im_start|>user\n", "<|im_end|>\n"),
        ("<|im_start|>assistant\n", "<|im_end|>\n"),
        "<|im_start|>assistant\n",
    )
    assert wrapping(PLAIN_ROLES) == Wrapping(None, ("[INST] ", " [/INST]"), (" ", "</s>"), "")


def test_the_template_in_go_is_balanced_and_holds_the_words() -> None:
    text = in_go(wrapping(CHATML))
    assert text.startswith(
        '{{ range .Messages }}{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}'
    )
    assert text.endswith("{{ end }}{{ end }}<|im_start|>assistant\n")
    assert text.count("{{") == text.count("}}")
    assert '{{ else if eq .Role "assistant" }}' in text


@pytest.mark.parametrize("template", [SHOUTING, FIRST_ONLY, "{% for"])
def test_freer_templates_are_refused(template: str) -> None:
    with pytest.raises(ValueError, match="cannot be said in Ollama's language"):
        wrapping(template)


def test_a_model_without_chat_completes_the_prompt() -> None:
    assert modelfile("m.gguf", SHAPE, None) == (
        'FROM ./m.gguf\nTEMPLATE """{{ .Prompt }}"""\nPARAMETER stop "</s>"\nPARAMETER num_ctx 96\n'
    )
