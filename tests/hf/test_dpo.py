"""docs/examples/dpo.py: the margin rises, what is padded is never the end, the result is a model of ours."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

for extra in ("trl", "peft", "datasets"):
    pytest.importorskip(extra, reason="needs the extra finetune")

import mobilellm  # noqa: E402
from mobilellm import chat_template  # noqa: E402
from mobilellm.model import checkpoint  # noqa: E402
from mobilellm.model.transformer import MobileLLM  # noqa: E402
from mobilellm.presets import preset  # noqa: E402
from mobilellm.tokenizer import EOS_ID, PAD_ID, Tokenizer  # noqa: E402

EXAMPLE = Path(__file__).resolve().parents[2] / "docs" / "examples" / "dpo.py"
PAIRS = [
    {
        "prompt": [{"role": "user", "content": f"what is {word}?"}],
        "chosen": [{"role": "assistant", "content": f"a kind word, {word}"}],
        "rejected": [
            {"role": "assistant", "content": "no" if len(word) < 4 else "go away from here at once"}
        ],
    }
    for word in ("one", "two", "three", "four", "five", "six", "seven", "eight")
]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dpo_example", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def chat_model(tmp_path: Path) -> Path:
    """A model that shares layers, random but for our chat template."""
    texts = [message["content"] for pair in PAIRS for part in pair.values() for message in part]
    tokenizer = Tokenizer.train([*texts, "user assistant system"] * 4, vocab_size=300)
    model = MobileLLM(preset("test-ls"), torch.Generator().manual_seed(0))
    checkpoint.save(tmp_path / "chat", model, tokenizer, chat_template=chat_template.DEFAULT)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    return tmp_path / "chat"


def test_a_pair_is_padded_with_what_is_not_the_end(example: ModuleType, chat_model: Path) -> None:
    """And the template that transformers renders gives the tokens that ours gives."""
    loaded = mobilellm.load(chat_model)
    theirs = example.tokenizer_of(loaded)
    assert (theirs.pad_token_id, theirs.eos_token_id) == (PAD_ID, EOS_ID)
    assert loaded.tokenizer is not None
    assert loaded.chat_template is not None
    ours = chat_template.ChatTemplate(loaded.chat_template, loaded.tokenizer)
    for pair in PAIRS:
        messages = [*pair["prompt"], *pair["chosen"]]
        ids = theirs.apply_chat_template(messages, tokenize=True, return_dict=False)
        assert ids == ours.conversation(messages).tokens
        assert EOS_ID in ids[-2:]


@pytest.mark.parametrize("rank", [8, 0], ids=["lora", "full"])
def test_the_margin_rises_and_the_result_is_loaded(
    example: ModuleType, chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], rank: int,
) -> None:  # fmt: skip
    rate = "2e-2" if rank else "2e-3"
    out = tmp_path / "preferred"
    words = [
        str(EXAMPLE), str(chat_model), str(tmp_path / "pairs.jsonl"), "--out", str(out), "--rank", str(rank),
        "--learning-rate", rate, "--epochs", "6", "--batch", "4",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", words)
    example.main()
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["margin_first"] == pytest.approx(0, abs=1e-4)
    assert said["margin_last"] > 0.2
    before, after = mobilellm.load(chat_model), mobilellm.load(out)
    assert after.chat_template == before.chat_template == chat_template.DEFAULT
    assert after.model.config == before.model.config
    assert preference(after) > preference(before) + 1
    with pytest.raises(FileExistsError):
        example.main()


@torch.no_grad()
def preference(loaded: mobilellm.LoadedModel) -> float:
    """Mean over the pairs of how many nats the chosen answer is likelier than the rejected one."""
    assert loaded.tokenizer is not None
    assert loaded.chat_template is not None
    template, total = chat_template.ChatTemplate(loaded.chat_template, loaded.tokenizer), 0.0
    for pair in PAIRS:
        for part, sign in (("chosen", 1), ("rejected", -1)):
            tokens, trained = template.conversation([*pair["prompt"], *pair[part]])
            ids = torch.tensor([tokens])
            scores = loaded.model(ids[:, :-1]).log_softmax(-1)[0].gather(-1, ids[0, 1:, None])[:, 0]
            total += sign * scores[torch.tensor(trained[1:])].sum().item()
    return total / len(PAIRS)


def test_a_base_model_is_refused(
    example: ModuleType, chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (chat_model / "chat_template.jinja").unlink()
    words = [str(EXAMPLE), str(chat_model), str(tmp_path / "pairs.jsonl"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit, match="has no chat template; make a chat model of it first"):
        example.main()
