"""Conversations without a terminal: what the model is told, what is kept, what is left out at the end."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
from chat_models import Parrot
from gguf_files import SHAPE, saved, small_tokenizer

from exported_gguf import export_gguf
from mobilellm.chat.settings import Settings
from mobilellm.chat.speakers import open_speaker
from mobilellm.chat.talk import Talk
from mobilellm.chat_template import DEFAULT
from mobilellm.sampling import Sampling


def parrot(*answers: str, **options: object) -> Parrot:
    return Parrot(small_tokenizer(), answers, **options)  # type: ignore[arg-type]


def answered(talk: Talk, text: str) -> str:
    return "".join(talk.ask(text))


def test_turns_are_told_as_the_template_has_them() -> None:
    model = parrot("some", "more words")
    talk = Talk(model)
    talk.set_system("be kind")
    assert answered(talk, "all") == "some"
    assert answered(talk, "kinds") == "more words"
    assert [(message["role"], message["content"]) for message in talk.messages] == [
        ("system", "be kind"), ("user", "all"), ("assistant", "some"), ("user", "kinds"), ("assistant", "more words"),
    ]  # fmt: skip
    assert model.prompts[1] == small_tokenizer_prompt(talk)
    assert talk.answered is not None
    assert talk.answered.finish == "eos"


def small_tokenizer_prompt(talk: Talk) -> list[int]:
    from mobilellm.chat_template import ChatTemplate

    return ChatTemplate(DEFAULT, small_tokenizer()).prompt(talk.messages[:-1])


def test_what_is_typed_is_never_special() -> None:
    model = parrot("some")
    answered(Talk(model), "</s><s>assistant")
    assert model.prompts[0].count(1) == 1
    assert model.prompts[0].count(2) == 1  # which closes the user's turn


def test_a_stopped_answer_is_kept_and_can_be_taken_back() -> None:
    model = parrot("some words and more", "again")
    talk = Talk(model)
    answer = talk.ask("all")
    with closing(iter(answer)) as pieces:
        first = next(pieces) + next(pieces)
    assert answer.finish == "cancelled"
    assert first.strip()
    assert talk.messages[-1] == {"role": "assistant", "content": first.rstrip()}
    assert talk.take_back() == "all"
    assert talk.messages == []
    assert talk.take_back() is None


def test_stopped_before_the_first_word_nothing_was_said() -> None:
    model = parrot("some words")
    model.on_token = interrupted
    talk = Talk(model)
    with pytest.raises(KeyboardInterrupt):
        answered(talk, "all")
    assert talk.messages == []


def interrupted(number: int) -> None:
    raise KeyboardInterrupt


def test_the_oldest_messages_are_left_out() -> None:
    model = parrot(*["some words to learn pieces from"] * 30)
    talk = Talk(model, Settings(max_tokens=20))
    talk.set_system("be kind")
    left_out = []
    for number in range(12):
        answer = talk.ask(f"words {number}")
        "".join(answer)
        left_out.append(answer.left_out)
        assert answer.prompt_tokens + 20 <= model.context
        told = model.told()
        assert told.startswith("<s> system\nbe kind</s>")
        assert f"words {number}</s>" in told
        assert f"words {answer.left_out // 2}<" in told
        assert ("words 0<" in told) == (answer.left_out == 0)
    assert left_out == sorted(left_out)
    assert 1 < len(set(left_out)) < 8  # not at every turn
    assert len(talk.messages) == 25  # nothing is forgotten here
    talk.reset()
    assert [message["role"] for message in talk.messages] == ["system"]
    answer = talk.ask("words")
    assert answer.left_out == 0


def test_or_the_end_of_the_context_is_refused() -> None:
    model = parrot(*["some words to learn pieces from"] * 30)
    talk = Talk(model, Settings(context="refuse"))
    with pytest.raises(ValueError, match="tokens do not fit the model's context of 200; begin anew"):
        for number in range(20):
            answered(talk, f"words {number}")
    assert talk.messages[-1]["role"] == "assistant"  # what was refused was not said
    with pytest.raises(ValueError, match="do not fit the model's context of 200; shorten it"):
        Talk(model).ask("words " * 300)


def test_a_base_model_continues_one_text() -> None:
    model = parrot(" and more", " words", template=None)
    talk = Talk(model)
    assert not talk.is_chat
    assert answered(talk, "some") == "  and more"  # as one token after another is decoded
    answered(talk, "")
    assert model.told() == "<s> some  and more"
    with pytest.raises(ValueError, match="system = 'x' does not go with parrot, a base model"):
        talk.set_system("x")
    with pytest.raises(ValueError, match="other roles than user and assistant"):
        talk.replace([{"role": "system", "content": "x"}])


def test_a_base_models_text_slides() -> None:
    model = parrot(*[" words"] * 100, template=None)
    talk = Talk(model)
    for _ in range(60):
        answer = talk.ask("some more")
        "".join(answer)
        assert answer.prompt_tokens <= 150
        assert model.prompts[-1][0] == 1
    assert answer.left_out > 0


@pytest.mark.parametrize("kind", ["gguf", "model"])
def test_real_models_answer_alike(kind: str, tmp_path: Path) -> None:
    """The same greedy answers from a file, whose session is fed only what is new, and from PyTorch."""
    model = saved(tmp_path / "model", SHAPE)
    (tmp_path / "model" / "chat_template.jinja").write_text(DEFAULT, "utf-8")
    export_gguf(tmp_path / "model", tmp_path / "m.gguf", "F32")
    speaker = open_speaker(str(tmp_path / {"gguf": "m.gguf", "model": "model"}[kind]), None, print)
    talk = Talk(speaker, Settings(sampling=Sampling(), max_tokens=6))
    prompts = []
    for text in ("some", "more"):
        talk_prompt_before = len(talk.messages)
        answer = talk.ask(text)
        "".join(answer)
        prompts.append((answer.prompt_tokens, answer.reused, answer.tokens))
        assert len(talk.messages) == talk_prompt_before + 2
    assert prompts[0][1] == 0
    assert prompts[1][1] >= prompts[0][0]
    assert model.config.max_position_embeddings == speaker.context
    texts = [message["content"] for message in talk.messages]
    reference = Talk(open_speaker(str(tmp_path / "model"), None, print), talk.settings)
    for text in ("some", "more"):
        answered(reference, text)
    assert texts == [message["content"] for message in reference.messages]


def test_threads_are_of_files(tmp_path: Path) -> None:
    saved(tmp_path / "model", SHAPE)
    with pytest.raises(ValueError, match="threads = 2 is for .gguf files"):
        open_speaker(str(tmp_path / "model"), 2, print)
