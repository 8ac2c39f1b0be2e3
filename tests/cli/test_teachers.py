"""Teachers by what a person types, each against the whole logits of the same model."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import safetensors.torch
import torch
from torch.utils.flop_counter import FlopCounterMode

from mobilellm.cli.teachers import look_at_teacher, open_teacher
from mobilellm.config import ModelConfig
from mobilellm.model import checkpoint
from mobilellm.model.transformer import MobileLLM
from mobilellm.tokenizer import Tokenizer
from mobilellm.train.teacher import Teacher, top_k
from mobilellm.train.teacher_cache import Passage
from mobilellm.train.teacher_cost import Lack

CPU = torch.device("cpu")
TEXT = "\n\n".join(topics[name] for name in sorted(topics))[:60_000]
SAID: list[str] = []


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([TEXT], 350)


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    """The embedding has rows to spare."""
    return ModelConfig(
        vocab_size=360, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=4, num_kv_heads=2,
        head_dim=16, max_position_embeddings=64, rope_theta=10_000.0, rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def model(config: ModelConfig) -> MobileLLM:
    model = MobileLLM(config, torch.Generator().manual_seed(1))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    return model.eval()


@pytest.fixture(scope="module")
def directory(model: MobileLLM, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkpoint.save(path := tmp_path_factory.mktemp("teacher") / "model", model, tokenizer)
    return path


def opened(source: Path, tokenizer: Tokenizer, dtype: str | None = None) -> Teacher:
    teacher = open_teacher(str(source), dtype, CPU, tokenizer, SAID.append)
    seen = look_at_teacher(str(source), dtype, tokenizer, SAID.append)  # what a plan sees of it
    assert (seen.name, seen.vocab_size, seen.context) == (teacher.name, teacher.vocab_size, teacher.context)
    return teacher


def refused(source: Path, tokenizer: Tokenizer, dtype: str | None = None) -> str:
    """What opening it says, and looking at it."""
    said = []
    for action in (
        lambda: open_teacher(str(source), dtype, CPU, tokenizer, SAID.append),
        lambda: look_at_teacher(str(source), dtype, tokenizer, SAID.append),
    ):
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            action()
        said.append(str(caught.value))
    assert said[0] == said[1]
    return said[0]


def some_passages() -> list[Passage]:
    draw = np.random.default_rng(0)
    return [Passage(draw.integers(0, 350, length), draw.random(length) < 0.7) for length in (40, 17, 40, 3)]


def check(teacher: Teacher, logits_of: Callable[[torch.Tensor], np.ndarray], atol: float) -> None:
    passages = some_passages()
    for passage, top in zip(passages, top_k(teacher, passages, 12, 2.0), strict=True):
        whole = logits_of(torch.from_numpy(passage.tokens))
        logs = torch.from_numpy(whole[passage.counted, :350] / 2).log_softmax(-1)
        best = logs.topk(12).values
        assert np.allclose(top.logs[:, :-1], best, atol=atol)
        assert np.allclose(logs.gather(-1, torch.from_numpy(top.ids.astype(np.int64))), best, atol=atol)


def test_a_model_of_ours(directory: Path, model: MobileLLM, tokenizer: Tokenizer) -> None:
    teacher = opened(directory, tokenizer)
    assert (teacher.vocab_size, teacher.context, teacher.dtype) == (350, 64, "float32")

    @torch.no_grad()
    def logits(tokens: torch.Tensor) -> np.ndarray:
        return model(tokens[None])[0].numpy()

    check(teacher, logits, 5e-3)
    check(opened(directory, tokenizer, "bfloat16"), logits, 0.2)
    assert opened(directory, tokenizer, "bfloat16").fingerprint != teacher.fingerprint
    assert opened(directory, tokenizer).fingerprint == teacher.fingerprint


def test_a_gguf_file(directory: Path, model: MobileLLM, tokenizer: Tokenizer, tmp_path: Path) -> None:
    from exported_gguf import export_gguf

    export_gguf(directory, tmp_path / "t.gguf")

    @torch.no_grad()
    def logits(tokens: torch.Tensor) -> np.ndarray:
        return model(tokens[None])[0].numpy()

    check(opened(tmp_path / "t.gguf", tokenizer), logits, 0.3)
    said = refused(tmp_path / "t.gguf", tokenizer, "bfloat16")
    assert said.startswith("distill.dtype = bfloat16 does not go with")
    assert "runs as it is stored" in said
    shape = look_at_teacher(str(tmp_path / "t.gguf"), None, tokenizer, SAID.append)
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert shape.runs_beside
    assert shape.weights_bytes < (tmp_path / "t.gguf").stat().st_size


def test_a_model_that_only_transformers_runs(tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    shape = transformers.GPTNeoXConfig(
        vocab_size=360, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    other = transformers.AutoModelForCausalLM.from_config(shape).eval()
    with torch.no_grad():
        other.get_output_embeddings().weight.mul_(30)
    other.save_pretrained(tmp_path / "neox")
    tokenizer.save(tmp_path / "neox")

    @torch.no_grad()
    def logits(tokens: torch.Tensor) -> np.ndarray:
        found: np.ndarray = other(tokens[None]).logits[0].numpy()
        return found

    check(opened(tmp_path / "neox", tokenizer), logits, 5e-3)
    seen = look_at_teacher(str(tmp_path / "neox"), "bfloat16", tokenizer, SAID.append)
    assert seen.parameters == sum(parameter.numel() for parameter in other.parameters())
    assert seen.weights_bytes == 2 * seen.parameters
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        other.to("meta")(torch.zeros(1, 40, dtype=torch.long, device="meta"))
    counted = seen.flops(Lack(1, 40, 40, 40 * 40, 40))  # as torch counts it: every token with every other
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.05)  # biases are taken for products


def test_another_tokenizer_is_refused(directory: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    other = Tokenizer.train([TEXT], 345)
    assert "has another tokenizer than the data (350 tokens there, 345 here)" in refused(directory, other)
    shutil.copytree(directory, bare := tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    assert "has no tokenizer.json or tokenizer.model" in refused(bare, tokenizer)
    (bare / "tokenizer.json").write_text('{"model": {"type": "WordPiece"}}')
    assert "has another kind of tokenizer than the data" in refused(bare, tokenizer)
    assert "no such directory" in refused(tmp_path / "nowhere" / "at-all", tokenizer)
    shutil.copytree(directory, hollow := tmp_path / "hollow")
    (hollow / "model.safetensors").unlink()
    assert "no weights there" in refused(hollow, tokenizer)


def test_numbers_that_overflow_are_refused(directory: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    shutil.copytree(directory, broken := tmp_path / "broken")
    tensors = safetensors.torch.load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][:] = 3e38
    safetensors.torch.save_file(tensors, broken / "model.safetensors")
    with pytest.raises(ValueError, match=r"gives logits that are no numbers .*another teacher"):
        top_k(opened(broken, tokenizer), some_passages(), 4, 1.0)
