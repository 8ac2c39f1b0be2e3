"""Directories and files: ours, damaged ones, foreign ones, and stock transformers reading ours."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import tokenizers

from mobilellm.sentencepiece_model import LAYOUT_HEAD, SPACE
from mobilellm.tokenizer import BOS_ID, EOS_ID, PAD_ID, UNK_ID, Tokenizer
from tokenizer_oracles import HARD_TEXTS, small, small_model, trained

OFFICIAL_CONFIG = (
    '{"bos_token": "", "eos_token": "", "model_max_length": 1000000000000000019884624838656, '
    '"tokenizer_class": "LlamaTokenizer", "unk_token": ""}'
)


def test_saving_and_loading_changes_nothing(tmp_path: Path) -> None:
    trained().save(tmp_path / "new" / "place", model_max_length=2048)
    loaded = Tokenizer.load(tmp_path / "new" / "place")
    assert (loaded.pieces, loaded.merges, loaded.repairs) == (trained().pieces, trained().merges, ())
    assert loaded.fingerprint == trained().fingerprint
    assert Tokenizer.load(tmp_path / "new" / "place" / "tokenizer.json").fingerprint == trained().fingerprint
    assert sorted(path.name for path in (tmp_path / "new" / "place").iterdir()) == [
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_saved_settings_say_what_encode_does(tmp_path: Path) -> None:
    trained().save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (config["add_bos_token"], config["add_eos_token"]) == (True, False)
    assert config["clean_up_tokenization_spaces"] is False
    special = json.loads((tmp_path / "special_tokens_map.json").read_text())
    assert special == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    assert config.items() >= special.items()


def test_fingerprint_tells_tokenizers_apart() -> None:
    swapped = [*trained().pieces[:-2], trained().pieces[-1], trained().pieces[-2]]
    assert Tokenizer(swapped, trained().merges).fingerprint != trained().fingerprint
    assert Tokenizer(trained().pieces, trained().merges[::-1]).fingerprint != trained().fingerprint


def test_saving_beside_the_model_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    shutil.copy(small_model(), tmp_path / "tokenizer.model")
    with pytest.raises(ValueError, match=r"tokenizer\.model: belongs to another tokenizer"):
        trained().save(tmp_path)
    small().save(tmp_path)
    assert Tokenizer.load(tmp_path).fingerprint == small().fingerprint
    with pytest.raises(ValueError, match="is a file"):
        small().save(tmp_path / "tokenizer.model")
    with pytest.raises(ValueError, match="model_max_length is 0"):
        small().save(tmp_path, model_max_length=0)


def test_the_official_config_is_repaired(tmp_path: Path) -> None:
    assert len(OFFICIAL_CONFIG) == 141
    shutil.copy(small_model(), tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text(OFFICIAL_CONFIG)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.repairs == ("tokenizer_config.json has empty special tokens; using <s>=1 </s>=2 <unk>=0",)
    assert loaded.fingerprint == small().fingerprint


def test_an_eos_that_pads_is_repaired_and_other_special_tokens_are_refused(tmp_path: Path) -> None:
    small().save(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"eos_token": {"content": "</s>", "special": True}, "pad_token": "</s>"}))
    assert Tokenizer.load(tmp_path).repairs == (
        "tokenizer_config.json has the pad token </s>; using <unk>=0",
    )
    config.write_text(json.dumps({"eos_token": "<|im_end|>"}))
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: eos_token is '<\|im_end\|>'"):
        Tokenizer.load(tmp_path)
    config.write_text('{"eos_token": ')
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: not JSON"):
        Tokenizer.load(tmp_path)


def test_agreeing_files_need_no_repair(tmp_path: Path) -> None:
    small().save(tmp_path)
    shutil.copy(small_model(), tmp_path / "tokenizer.model")
    assert Tokenizer.load(tmp_path).repairs == ()


def test_a_wrong_conversion_loses_against_the_model(tmp_path: Path) -> None:
    """What LlamaTokenizer of transformers 5 makes of a tokenizer.model: no space before a leading space."""
    small().save(tmp_path)
    wrong = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    wrong.normalizer = None
    wrong.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    wrong.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="prepares text differently from SentencePiece"):
        Tokenizer.load(tmp_path)
    shutil.copy(small_model(), tmp_path / "tokenizer.model")
    loaded = Tokenizer.load(tmp_path)
    assert loaded.fingerprint == small().fingerprint
    (repair,) = loaded.repairs
    assert repair.startswith("tokenizer.json encodes ")
    assert repair.endswith("probe texts differently from tokenizer.model; using tokenizer.model")


def test_a_broken_json_loses_against_the_model(tmp_path: Path) -> None:
    shutil.copy(small_model(), tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", ')
    loaded = Tokenizer.load(tmp_path)
    assert loaded.fingerprint == small().fingerprint
    assert loaded.repairs[0].startswith("tokenizer.json cannot be read (")


def test_tokens_that_only_the_json_has_are_not_lost(tmp_path: Path) -> None:
    small().save(tmp_path)
    more = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    more.add_special_tokens(["<|im_start|>"])
    more.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(
        ValueError, match=r"tokenizer\.json: adds the tokens <\|im_start\|>; only <unk>, <s>, </s>"
    ):
        Tokenizer.load(tmp_path)
    shutil.copy(small_model(), tmp_path / "tokenizer.model")
    with pytest.raises(ValueError, match=r"adds '<\|im_start\|>', which tokenizer\.model lacks"):
        Tokenizer.load(tmp_path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds neither tokenizer\.json nor tokenizer\.model"):
        Tokenizer.load(tmp_path)
    for name in ("nowhere", "tokenizer.json", "tokenizer.model"):
        with pytest.raises(FileNotFoundError, match=f"{name}: no such file"):
            Tokenizer.load(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no such file"):
        Tokenizer.from_sentencepiece(tmp_path / "tokenizer.model")
    with pytest.raises(ValueError, match="is a directory"):
        Tokenizer.from_sentencepiece(tmp_path)


def changed(content: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    """`content` with the item at a path such as "model.vocab" set to `value`."""
    first, _, rest = path.partition(".")
    return content | {first: changed(content[first], rest, value) if rest else value}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model", None, "no model with a vocabulary"),
        ("model.type", "WordPiece", "is a WordPiece tokenizer; only BPE"),
        ("model.vocab", {"<unk>": 0, "<s>": 2}, "without gaps"),
        ("model.vocab", ["<unk>"], "without gaps"),
        ("model.vocab", {"<unk>": "0"}, "without gaps"),
        ("model.vocab", {"<s>": 0, "</s>": 1, "<unk>": 2}, "<unk> is 2; only tokenizers with <unk>=0"),
        ("model.vocab", {"<|endoftext|>": 0, "a": 1}, "<unk> is missing"),
        ("model.vocab", {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3}, "token 3 is 'a'; .* has '<0x00>' there"),
        (
            "model.vocab",
            {piece: index for index, piece in enumerate(LAYOUT_HEAD)},
            "no piece '▁' for a space",
        ),
        ("model.merges", None, "no list of merges"),
        ("model.merges", ["t h e"], "the merge 't h e' is no pair"),
        ("model.merges", [["q", "qqq"]], "the merge of 'q' and 'qqq' is not made of pieces"),
        ("model.byte_fallback", False, "no byte_fallback"),
        ("model.dropout", 0.1, "dropout=0.1"),
        ("model.ignore_merges", True, "ignore_merges=True"),
        ("pre_tokenizer", {"type": "ByteLevel"}, "prepares text differently"),
        ("normalizer", {"type": "NFKC"}, "prepares text differently"),
    ],
)
def test_a_json_of_another_kind_is_refused(tmp_path: Path, path: str, value: object, message: str) -> None:
    trained().save(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(changed(json.loads(file.read_text()), path, value)))
    with pytest.raises(ValueError, match=message) as refused:
        Tokenizer.load(tmp_path)
    assert str(refused.value).startswith(f"{file}: ")
    assert "\n" not in str(refused.value)


def test_a_truncated_json_is_refused(tmp_path: Path) -> None:
    trained().save(tmp_path)
    whole = (tmp_path / "tokenizer.json").read_bytes()
    for length in (0, 1, len(whole) // 2, whole.rindex(b"}")):
        (tmp_path / "tokenizer.json").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"tokenizer\.json: not JSON, or not all of it") as refused:
            Tokenizer.load(tmp_path)
        assert "\n" not in str(refused.value)


def test_older_files_with_merges_as_text_are_read(tmp_path: Path) -> None:
    trained().save(tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["merges"] = [" ".join(merge) for merge in content["model"]["merges"]]
    file.write_text(json.dumps(content))
    assert Tokenizer.load(tmp_path).fingerprint == trained().fingerprint


def test_stock_transformers_loads_what_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without a config.json, and over the files of an official download."""
    alone, with_config, official = (tmp_path / name for name in ("alone", "with-config", "official"))
    official.mkdir()
    shutil.copy(small_model(), official / "tokenizer.model")
    (official / "tokenizer_config.json").write_text(OFFICIAL_CONFIG)
    saved = {alone: trained(), with_config: trained(), official: Tokenizer.load(official)}
    for directory, tokenizer in saved.items():
        tokenizer.save(directory, model_max_length=77)
    for directory in (with_config, official):
        (directory / "config.json").write_text(
            '{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}'
        )

    from transformers import AutoTokenizer

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    texts = [text for text in HARD_TEXTS if "<" not in text]
    for directory, tokenizer in saved.items():
        stock = AutoTokenizer.from_pretrained(directory)
        stock.save_pretrained(f"{directory}-again")
        ids = tokenizer.encode_batch(texts)
        for each in (stock, AutoTokenizer.from_pretrained(f"{directory}-again")):
            assert [each(text).input_ids for text in texts] == ids
        decoded = [stock.decode(row, skip_special_tokens=True) for row in ids]
        assert decoded == [text.replace(SPACE, " ") for text in texts]
        special = [stock.bos_token, stock.eos_token, stock.unk_token, stock.pad_token]
        assert special == ["<s>", "</s>", "<unk>", "<unk>"]
        special_ids = [stock.bos_token_id, stock.eos_token_id, stock.unk_token_id, stock.pad_token_id]
        assert special_ids == [BOS_ID, EOS_ID, UNK_ID, PAD_ID]
        assert (len(stock), stock.model_max_length) == (tokenizer.vocab_size, 77)
        longer, shorter = tokenizer.encode_batch(["Hello hello", "Hi"])
        padded = stock(["Hello hello", "Hi"], padding=True).input_ids
        assert padded == [longer, [PAD_ID] * (len(longer) - len(shorter)) + shorter]
        # As documented, it takes special tokens out of text unless it is told not to.
        assert EOS_ID in stock("a </s> b").input_ids
        assert stock("a </s> b", split_special_tokens=True).input_ids == tokenizer.encode("a </s> b")
