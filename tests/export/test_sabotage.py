"""Ten ways to spoil an artefact: each is caught, by the name of the check that is made for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_files import SHAPE, saved, shared

from mobilellm import gguf_model
from mobilellm.chat_template import DEFAULT
from mobilellm.cli.main import _main
from mobilellm.export.export import export, verify_artefact
from mobilellm.export.source import open_source
from mobilellm.export.targets import KINDS, Options
from mobilellm.export.to_gguf import TARGET as GGUF
from mobilellm.export.verify import Report, Settings, report_path
from mobilellm.gguf import read_gguf
from mobilellm.gguf_blocks import TYPES
from mobilellm.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("source") / "model"
    saved(directory, SHAPE)
    return directory


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("some words to read, and some more words of all kinds, naïve ones too\n" * 40, "utf-8")
    return Settings(text=text, tokens=160)


@pytest.fixture
def artefact(model: Path, settings: Settings, tmp_path: Path) -> Path:
    exported = export(model, tmp_path / "m.gguf", KINDS["gguf"], Options(), settings)
    assert exported.report is not None
    assert exported.report.failed == []
    return exported.path


def write(
    path: Path,
    model: Path,
    changed: Callable[[str, np.ndarray], np.ndarray] = lambda name, values: values,
    tokenizer: Tokenizer | None = None,
    **shape: object,
) -> None:
    """The artefact anew, but for what is changed."""
    source = open_source(model, print)

    def weight(name: str) -> np.ndarray:
        return changed(name, source.weight("model.embed_tokens.weight" if name == "lm_head.weight" else name))

    roles = gguf_model.Roles(TYPES["Q8_0"], TYPES["Q8_0"])
    config = replace(source.config, **shape)  # type: ignore[arg-type]
    gguf_model.write_model(path, config, weight, tokenizer or source.tokenizer, roles, "m")


def swapped_rows(path: Path, model: Path, patch: pytest.MonkeyPatch) -> None:
    info = read_gguf(path).tensors["blk.1.ffn_up.weight"]
    row = info.nbytes // info.shape[0]
    data = bytearray(path.read_bytes())
    first, second = slice(info.offset, info.offset + row), slice(info.offset + row, info.offset + 2 * row)
    data[first], data[second] = data[second], data[first]
    path.write_bytes(data)


def missing_layer(path: Path, model: Path, patch: pytest.MonkeyPatch) -> None:
    write(path, model, num_layers=2)


def untied_head(path: Path, model: Path, patch: pytest.MonkeyPatch) -> None:
    write(path, model, tie_word_embeddings=False)


def wrong_rope_layout(path: Path, model: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(gguf_model, "interleaved", lambda values, head_dim: values)
    write(path, model)


def dropped_eos(path: Path, model: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(gguf.GGUFWriter, "add_eos_token_id", lambda self, id: None)
    write(path, model)


def unquantised_layer(path: Path, model: Path, patch: pytest.MonkeyPatch) -> None:
    plan = gguf_model.layout

    def with_one_in_f16(config: object, roles: object) -> object:
        for name, stored in plan(config, roles):  # type: ignore[arg-type]
            yield (
                name,
                stored._replace(type=TYPES["F16"]) if stored.name == "blk.1.ffn_gate.weight" else stored,
            )

    patch.setattr(gguf_model, "layout", with_one_in_f16)
    write(path, model)


def shifted_tokenizer(path: Path, model: Path, patch: pytest.MonkeyPatch) -> None:
    whole = open_source(model, print).tokenizer
    pieces = list(whole.pieces)
    pieces[259:] = pieces[260:] + pieces[259:260]
    write(path, model, tokenizer=Tokenizer(pieces, whole.merges))


def truncated(path: Path, model: Path, patch: pytest.MonkeyPatch) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def other_models_report(path: Path, model: Path, patch: pytest.MonkeyPatch) -> None:
    other = path.parent / "other"
    saved(other, SHAPE, seed=1)
    exported = export(other, path.parent / "o.gguf", KINDS["gguf"], Options(), Settings(tokens=96))
    report_path(path).write_bytes(report_path(exported.path).read_bytes())


@pytest.mark.parametrize(
    ("sabotage", "name"),
    [
        (swapped_rows, "weights"),
        (missing_layer, "tensors"),
        (untied_head, "tied head"),
        (wrong_rope_layout, "rotary layout"),
        (dropped_eos, "stop token"),
        (unquantised_layer, "types"),
        (shifted_tokenizer, "tokenizer"),
        (truncated, "file"),
        (other_models_report, "report"),
    ],
)
def test_a_spoilt_file_is_caught_by_name(
    sabotage: Callable[[Path, Path, pytest.MonkeyPatch], None],
    name: str,
    artefact: Path,
    model: Path,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if sabotage is not other_models_report:
        report_path(artefact).unlink()
    with monkeypatch.context() as patch:
        sabotage(artefact, model, patch)
    report = verified(artefact, model, settings)
    assert name in report.failed, report.failed
    told = json.loads(report_path(artefact).read_text("utf-8"))
    assert told["passed"] == (name == "report")  # another artefact's report stays what it is
    command = ["verify", str(artefact), "--against", str(model), "--text", str(settings.text)]
    assert _main([*command, "--tokens", "96"]) == 1


def test_a_stale_cache_slot_of_a_shared_block_is_caught(tmp_path: Path, settings: Settings) -> None:
    """As in the reference code, whose runs of a block read one slot: here the second run reads the first's."""
    saved(tmp_path / "model", shared("immediate", 2))
    exported = export(tmp_path / "model", tmp_path / "out", KINDS["hf"], Options(), compare=False)
    code = exported.path / "modeling_mobilellm.py"
    right = "            key, value = past_key_values.update(key, value, step)\n"
    assert right in code.read_text("utf-8")
    stale = (
        "            new, new_values = key, value\n"
        "            key, value = past_key_values.update(key, value, step)\n"
        "            if step % 2:\n"
        "                slot, count = past_key_values.layers[step - 1], new.shape[2]\n"
        "                key = torch.cat([slot.keys[:, :, :-count], new], dim=2)\n"
        "                value = torch.cat([slot.values[:, :, :-count], new_values], dim=2)\n"
    )
    code.write_text(code.read_text("utf-8").replace(right, stale), "utf-8")
    report = verified(exported.path, tmp_path / "model", settings)
    assert "cache" in report.failed
    assert set(report.failed) <= {"cache", "greedy text", "bytes"}
    assert exported.path.name == "out.unverified"


@pytest.mark.parametrize(
    ("template", "fault"),
    [
        ("{{ bos_token }}" + DEFAULT, "token 1 stands twice in front"),
        (DEFAULT.replace("'assistant\\n'", "'assistant:\\n'"), "they differ from the"),
        (None, "the artefact has no chat template, and its source has"),
    ],
    ids=["doubled bos", "other words", "lost"],
)
def test_another_chat_template_is_caught(
    template: str | None, fault: str, settings: Settings, tmp_path: Path
) -> None:
    saved(tmp_path / "model", SHAPE)
    (tmp_path / "model" / "chat_template.jinja").write_text(DEFAULT, "utf-8")
    source = open_source(tmp_path / "model", print)
    options = GGUF.complete(Options(), source)
    GGUF.write(replace(source, chat_template=template), tmp_path / "m.gguf", options)
    report = verified(tmp_path / "m.gguf", tmp_path / "model", settings)
    (check,) = [each for each in report.checks if each.name == "chat prompt"]
    assert fault in check.detail
    assert not check.passed


def verified(path: Path, model: Path, settings: Settings) -> Report:
    report = verify_artefact(path, model, settings).report
    assert report is not None
    return report
