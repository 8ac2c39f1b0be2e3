"""Directories in the official layouts, through the Auto classes; and a process without this package.

The directories are synthetic, with the files, config keys, tensor names and the 141 bytes of
tokenizer_config.json of the official ones. Their weights are random and their code is a trap.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import sentencepiece
import torch
import transformers
from hf_models import plain_model, shared_model, some_tokens, stock_twin
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

from mobilellm.hf import MobileLLMForCausalLM, MobileLLMModel, to_mobilellm
from mobilellm.model.checkpoint import save
from mobilellm.tokenizer import Tokenizer
from official_configs import OFFICIAL, as_llama

TOKENIZER_CONFIG = (
    '{"bos_token": "", "eos_token": "", "model_max_length": 1000000000000000019884624838656, '
    '"tokenizer_class": "LlamaTokenizer", "unk_token": ""}'
)
TRAP = (
    "from pathlib import Path\nPath(__file__).with_name('executed').touch()\nraise SystemExit('executed')\n"
)
TEXTS = ["Hello world", "  two  spaces", "def f(x):\n    return x\n", "naïve 🙂", ""]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small tokenizer.model with the settings of Llama's."""
    prefix = tmp_path_factory.mktemp("sentencepiece") / "tokenizer"
    source = [line for line in Path(__file__).read_text(encoding="utf-8").splitlines() if line.strip()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(source), model_prefix=str(prefix), vocab_size=500, model_type="bpe",
        byte_fallback=True, split_digits=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, minloglevel=2,
    )  # fmt: skip
    return prefix.with_suffix(".model")


def official_config(model: MobileLLMForCausalLM, sharing: bool) -> dict[str, Any]:
    shape = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "initializer_range",
    )  # fmt: skip
    values = {key: getattr(model.config, key) for key in shape}
    return OFFICIAL | values | {"layer_sharing": sharing, "use_cache": not sharing}


@pytest.fixture(params=["125M", "125M-layer-share", "converted", "1B", "1.5B"])
def official(
    request: pytest.FixtureRequest, tmp_path: Path, sentencepiece_model: Path
) -> tuple[Path, LlamaForCausalLM]:
    """A directory in an official layout, and stock Llama computing what it should compute."""
    name = request.param
    options = {"vocab_size": 500, "tie_word_embeddings": name != "1.5B"}
    sharing = name == "125M-layer-share"
    model = (shared_model if sharing else plain_model)(**options).half()
    config = official_config(model, sharing)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if name == "1.5B":
        config = as_llama(config) | {"head_dim": config["head_dim"], "torch_dtype": "float16"}
    elif name == "1B":
        tensors[HEAD] = torch.randn_like(tensors[EMBEDDING])
    elif name == "converted":
        del tensors[EMBEDDING]
    else:
        del tensors[HEAD]
    if name == "converted":
        safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    else:
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(TOKENIZER_CONFIG)
    for code in ("configuration_mobilellm.py", "modeling_mobilellm.py"):
        (tmp_path / code).write_text(TRAP)
    return tmp_path, stock_twin(model.float(), (0, 0, 1, 1) if sharing else (0, 1))


def test_the_tokenizer_config_is_the_official_one() -> None:
    assert len(TOKENIZER_CONFIG) == 141


def test_the_snippet_of_the_model_card(
    official: tuple[Path, LlamaForCausalLM], sentencepiece_model: Path
) -> None:
    directory, expected = official
    tokenizer = AutoTokenizer.from_pretrained(directory, use_fast=False)
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    tokenizer.add_special_tokens({"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"})
    assert not (directory / "executed").exists()

    reference = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    for text in TEXTS:
        assert tokenizer(text).input_ids == [1, *reference.encode(text)]
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id)
    assert ids == (1, 2, 0, 0)
    assert len(tokenizer) == 500

    assert model.dtype == torch.float16
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    model, kept = model.float(), batch["attention_mask"].bool()
    close = torch.testing.assert_close
    close(model(**batch).logits[kept], expected(**batch).logits[kept], atol=2e-5, rtol=1e-4)
    common = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    texts = model.generate(**batch, **common)
    assert texts.tolist() == expected.generate(**batch, use_cache=False, pad_token_id=0, **common).tolist()


def test_without_trust_remote_code_too(official: tuple[Path, LlamaForCausalLM]) -> None:
    directory, expected = official
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    torch.testing.assert_close(
        model(some_tokens()).logits, expected(some_tokens()).logits, atol=2e-5, rtol=1e-4
    )
    assert to_mobilellm(model).config.tie_word_embeddings is expected.config.tie_word_embeddings


def test_official_directories_generate_with_a_cache(official: tuple[Path, LlamaForCausalLM]) -> None:
    model = AutoModelForCausalLM.from_pretrained(official[0])
    output = model.generate(some_tokens(), max_new_tokens=2, return_dict_in_generate=True)
    assert len(output.past_key_values) == official[1].config.num_hidden_layers


def test_padding_is_not_the_end_of_a_text(official: tuple[Path, LlamaForCausalLM]) -> None:
    model = AutoModelForCausalLM.from_pretrained(official[0])
    if isinstance(model, MobileLLMForCausalLM):  # of the 1.5B transformers makes its own
        assert (model.generation_config.pad_token_id, model.generation_config.eos_token_id) == (0, 2)


def test_the_user_s_generation_settings_survive(tmp_path: Path) -> None:
    model = shared_model()
    model.generation_config.max_new_tokens = 7
    model.generation_config.use_cache = False
    model.generation_config._from_model_config = False
    model.save_pretrained(tmp_path)
    settings = AutoModelForCausalLM.from_pretrained(tmp_path).generation_config
    assert (settings.max_new_tokens, settings.use_cache) == (7, False)


@pytest.mark.parametrize("tied", [True, False])
def test_auto_model_and_config(tmp_path: Path, tied: bool) -> None:
    model = shared_model("reverse", 3, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is MobileLLMModel
    assert torch.equal(base(some_tokens()).last_hidden_state, model.model(some_tokens()).last_hidden_state)
    config = AutoConfig.from_pretrained(tmp_path, use_cache=False)
    assert config.schedule == (0, 1, 1, 0, 0, 1)
    assert not config.use_cache
    assert type(AutoModelForCausalLM.from_config(config)) is MobileLLMForCausalLM


# --- tokenizers ---


def test_a_saved_tokenizer_needs_nothing_of_ours(official: tuple[Path, Any], tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(official[0], padding_side="right")
    assert tokenizer.padding_side == "right"
    tokenizer.save_pretrained(tmp_path / "saved")
    again = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "saved")
    assert again(TEXTS).input_ids == tokenizer(TEXTS).input_ids
    assert Tokenizer.load(tmp_path / "saved").encode_batch(TEXTS) == tokenizer(TEXTS).input_ids


def test_other_llama_tokenizers_stay_stock(tmp_path: Path) -> None:
    transformers.LlamaTokenizer(vocab={"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, "a": 4}).save_pretrained(
        tmp_path
    )
    LlamaForCausalLM(stock_twin(plain_model()).config).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "LlamaTokenizer"
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is transformers.LlamaTokenizer
    assert loaded("a").input_ids == transformers.LlamaTokenizer.from_pretrained(tmp_path)("a").input_ids
    (tmp_path / "config.json").unlink()
    assert type(tokenizer_class_from_name("LlamaTokenizer").from_pretrained(tmp_path)) is type(loaded)
    # AutoTokenizer prefers a class from outside transformers to tokenizer code in a directory: ours is none.
    assert tokenizer_class_from_name("LlamaTokenizer").__module__.startswith("transformers.")


def test_a_mobilellm_directory_without_tokenizer_config(official: tuple[Path, Any]) -> None:
    directory, _ = official
    if json.loads((directory / "config.json").read_text())["model_type"] == "llama":
        pytest.skip("nothing tells such a directory from any other Llama")
    expected = AutoTokenizer.from_pretrained(directory)(TEXTS).input_ids
    (directory / "tokenizer_config.json").unlink()
    assert AutoTokenizer.from_pretrained(directory)(TEXTS).input_ids == expected


def test_a_damaged_tokenizer_is_refused_in_one_line(official: tuple[Path, Any]) -> None:
    file = official[0] / "tokenizer.model"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"tokenizer\.model") as caught:
        AutoTokenizer.from_pretrained(official[0])
    assert "\n" not in str(caught.value)


# --- where this package is not installed ---

ELSEWHERE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "mobilellm":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

for directory in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True).eval()
    ids = torch.load(sys.argv[1])
    found = {"logits": model(ids).logits, "type": type(model).__module__}
    common = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    found["cached"] = model.generate(ids, **common)
    found["uncached"] = model.generate(ids, use_cache=False, **common)
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
    found["ids"] = tokenizer("Hello world").input_ids
    model.save_pretrained(directory + "-again")
    torch.save(found, directory + ".pt")
assert not any(name.split(".")[0] == "mobilellm" for name in sys.modules)
"""


@pytest.mark.slow
def test_saved_directories_load_where_this_package_is_absent(
    tmp_path: Path, sentencepiece_model: Path
) -> None:
    tokenizer = Tokenizer.from_sentencepiece(sentencepiece_model)
    model = shared_model("reverse", 3, vocab_size=500)
    ids = some_tokens()
    torch.save(ids, tmp_path / "ids.pt")
    by_transformers, by_us = tmp_path / "by_transformers", tmp_path / "by_us"
    model.save_pretrained(by_transformers)
    tokenizer.save(by_transformers)
    save(by_us, to_mobilellm(model), tokenizer)
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        # Threads that spin at every barrier of such small products take minutes on a busy machine.
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-I", "-c", ELSEWHERE, tmp_path / "ids.pt", by_transformers, by_us]
    done = subprocess.run(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=1200,  # only against hanging for ever: the imports alone take 20 s beside ten busy processes
        check=False,
    )
    assert done.returncode == 0, f"{done.returncode}\n{done.stdout}\n{done.stderr}"  # negative: killed
    expected = model(ids).logits
    for directory in (by_transformers, by_us):
        found = torch.load(f"{directory}.pt")
        assert found["type"].startswith("transformers_modules.")
        torch.testing.assert_close(found["logits"], expected, atol=2e-5, rtol=1e-4)
        assert found["cached"].tolist() == found["uncached"].tolist()
        assert found["ids"] == tokenizer.encode("Hello world")
        again = AutoModelForCausalLM.from_pretrained(f"{directory}-again")  # saved there, read here
        torch.testing.assert_close(again(ids).logits, expected, atol=2e-5, rtol=1e-4)
        for code in ("configuration_mobilellm.py", "modeling_mobilellm.py"):
            assert Path(f"{directory}-again", code).read_text() == (directory / code).read_text()
