"""From a model to an artefact under its name: what is written, and what is left when it does not go well."""

from __future__ import annotations

import errno
import json
import resource
import signal
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from gguf_files import SHAPE, saved, shared

from mobilellm.cli.main import _main
from mobilellm.export import to_gguf
from mobilellm.export.export import export, verify_artefact
from mobilellm.export.targets import KINDS, Options, kind_of
from mobilellm.export.to_gguf import GgufTarget
from mobilellm.export.verify import Settings, fingerprint, report_path
from mobilellm.installation import missing_packages
from mobilellm.model import checkpoint
from mobilellm.model.api import load
from mobilellm.model.tensor_files import read_tensors, write_tensors

SETTINGS = Settings(tokens=96)
GGUF, HF = KINDS["gguf"], KINDS["hf"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("source") / "model"
    saved(directory, SHAPE)
    (directory / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    (directory / "LICENSE").write_text("as you like")
    return directory


def test_a_report_tells_all_that_was_compared(model: Path, tmp_path: Path) -> None:
    exported = export(model, tmp_path / "m.gguf", GGUF, Options("q4_0", "q8_0"), SETTINGS)
    assert exported.path == tmp_path / "m.gguf"
    report = json.loads(report_path(exported.path).read_text())
    assert report["passed"]
    assert report["sha256"] == fingerprint(exported.path)
    assert report["artefact"] == "m.gguf"
    assert {check["name"] for check in report["checks"]} >= {
        "file", "configuration", "tied head", "tensors", "types", "bytes", "rotary layout", "weights", "tokenizer",
        "logits", "scheme's cost", "cache", "greedy text", "stop token", "chat prompt", "stops as its source does",
    }  # fmt: skip
    fidelity = report["fidelity"]["engine"]
    assert 0 < fidelity["kl"] < 1.25 * fidelity["cost"] + 1e-3
    assert report["options"] == asdict(Options("Q4_0", "Q8_0"))
    assert report["bits_per_weight"] == pytest.approx(8 * exported.path.stat().st_size / report["parameters"])


def test_a_plain_directory_loads_in_stock_transformers(tmp_path: Path, model: Path) -> None:
    exported = export(model, tmp_path / "out", HF, Options("bfloat16"), SETTINGS)
    assert exported.report is not None
    assert exported.report.failed == []
    assert exported.report.runtimes["transformers"].endswith("LlamaForCausalLM")
    config = json.loads((exported.path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["tie_word_embeddings"] is True
    assert "auto_map" not in config
    assert json.loads((exported.path / "generation_config.json").read_text())["eos_token_id"] == 2
    assert "<assistant>" in (exported.path / "chat_template.jinja").read_text()
    assert (exported.path / "LICENSE").is_file()
    ours = load(exported.path).model.state_dict()
    for name, tensor in load(model).model.state_dict().items():
        assert torch.equal(ours[name], tensor.to(torch.bfloat16))


def test_unrolling_says_what_it_costs(tmp_path: Path) -> None:
    saved(tmp_path / "model", shared("reverse", 2))
    sizes = {}
    for unroll in (False, True):
        exported = export(
            tmp_path / "model", tmp_path / f"{unroll}.gguf", GGUF, Options(unroll=unroll), SETTINGS
        )
        assert exported.report is not None
        assert exported.report.failed == []
        sizes[unroll] = exported.path.stat().st_size
        said = " ".join(exported.notes)
        assert ("3 stored blocks become 6" in said and "grows 2 times" in said) == unroll
    assert sizes[True] > 1.5 * sizes[False]


def test_verify_gives_the_name(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "m.gguf"
    assert _main(["export", str(model), str(out), "--no-verify"]) == 0
    assert "Not compared" in capsys.readouterr().out
    assert not out.exists()
    unverified = tmp_path / "m.gguf.unverified"
    assert kind_of(unverified) is GGUF
    assert _main(["verify", str(unverified), "--against", str(model), "--tokens", "96", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["verified"]
    assert out.is_file()
    assert report_path(out).is_file()
    assert not unverified.exists()


@pytest.mark.parametrize(
    ("kind", "stop", "code"),
    [*((kind, KeyboardInterrupt(), 130) for kind in KINDS), ("gguf", ValueError("no such runtime"), 2)],
)
def test_what_was_written_and_not_compared_is_told(
    kind: str,
    stop: BaseException,
    code: int,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It stays, for to write it may take long, with the word for what it lacks."""
    if missing := missing_packages(*KINDS[kind].packages):
        pytest.skip(f"needs {' and '.join(missing)}")
    out = tmp_path / f"m{KINDS[kind].suffix}"

    def stopped(*arguments: object) -> None:
        raise stop

    monkeypatch.setattr("mobilellm.export.export.verify", stopped)
    assert _main(["export", str(model), str(out), "--to", kind]) == code
    unverified = out.with_name(f"{out.name}.unverified")
    assert [path.name for path in tmp_path.iterdir()] == [unverified.name]
    said = capsys.readouterr().err
    assert f"{unverified} is whole, but was not compared with its source; " in said
    assert f"verify {unverified} --against {model} does that" in said
    assert _main(["verify", str(out), "--against", str(model)]) == 2
    assert f"{out}: no such artefact; {unverified} is there" in capsys.readouterr().err


def test_what_cannot_be_written_leaves_an_older_one_untold(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _main(["export", str(model), str(tmp_path / "m.gguf"), "--no-verify"]) == 0

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(GgufTarget, "write", full)
    capsys.readouterr()
    assert _main(["export", str(model), str(tmp_path / "m.gguf")]) == 2
    assert "is whole" not in capsys.readouterr().err
    assert _main(["export", str(model), str(tmp_path / "m.gguf"), "--text", "absent"]) == 2
    assert "writing" not in capsys.readouterr().err  # what is wrong with the text is seen before


def test_below_the_bar_it_gets_no_name(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(to_gguf, "interleaved", lambda values, head_dim: -values)  # what the check expects
    assert _main(["export", str(model), str(tmp_path / "m.gguf"), "--tokens", "96"]) == 1
    said = capsys.readouterr().out
    assert "Not verified: rotary layout, weights." in said
    table = said[said.index("check ") : said.index("Not verified")]
    assert max(map(len, table.splitlines())) <= 100
    assert "blk.0.attn_q.weight: its rows lie half a head apart; blk.0.attn_k.weight: " in " ".join(
        table.split()
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "m.gguf.unverified",
        "m.gguf.unverified.verify.json",
    ]


def test_an_older_artefact_stays_until_the_new_one_passed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "m.gguf"
    export(model, out, GGUF, Options(), SETTINGS)
    before = out.read_bytes(), report_path(out).read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(to_gguf, "interleaved", lambda values, head_dim: -values)
        export(model, out, GGUF, Options("q4_0"), SETTINGS, overwrite=True)
    assert (out.read_bytes(), report_path(out).read_bytes()) == before
    export(model, out, GGUF, Options("q4_0"), SETTINGS, overwrite=True)
    assert out.stat().st_size < len(before[0])
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["m.gguf", "m.gguf.verify.json"]


def test_files_for_ollama(model: Path, tmp_path: Path) -> None:
    export(model, tmp_path / "m.gguf", GGUF, Options(ollama=True), SETTINGS)
    text = (tmp_path / "m.Modelfile").read_text()
    assert text.startswith("FROM ./m.gguf\n")
    assert '{{ if eq .Role "system" }}<system>{{ .Content }}\n' in text
    assert (tmp_path / "m.chat_template.jinja").is_file()
    with pytest.raises(FileExistsError, match="m.Modelfile: exists"):
        (tmp_path / "m.gguf").unlink()
        export(model, tmp_path / "m.gguf", GGUF, Options(ollama=True), SETTINGS)


@pytest.mark.parametrize("kind", [GGUF, HF], ids=["gguf", "hf"])
def test_nothing_half_written_is_left(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: object
) -> None:
    def stop(*arguments: object, **named: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gguf.GGUFWriter.write_tensor_data", stop)
    monkeypatch.setattr(checkpoint, "write_tensors", stop)
    with pytest.raises(KeyboardInterrupt):
        export(model, tmp_path / ("m" + kind.suffix), kind, Options(), SETTINGS)  # type: ignore[attr-defined, arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    try:
        code = _main(["export", str(model), str(tmp_path / "m.gguf")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert code == 2
    assert "m.gguf.unverified: could not be written whole; is the disk full?" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_finite_are_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(tmp_path / "model", SHAPE)
    _, tensors = read_tensors(tmp_path / "model")
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    tensors["model.norm.weight"][3] = float("nan")
    write_tensors(tmp_path / "model" / "model.safetensors", tensors)
    assert _main(["export", str(tmp_path / "model"), str(tmp_path / "m.gguf")]) == 2
    assert "model.norm.weight holds NaN or infinity" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_models_that_are_not_ours_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "gpt").mkdir()
    (tmp_path / "gpt" / "config.json").write_text('{"model_type": "gpt2"}')
    assert _main(["export", str(tmp_path / "gpt"), str(tmp_path / "m.gguf")]) == 2
    assert "model_type = 'gpt2' is not one we can run" in capsys.readouterr().err


def test_a_quantised_model_keeps_its_own_numbers(model: Path, tmp_path: Path) -> None:
    quantised, out = tmp_path / "q", tmp_path / "q.gguf"
    command = ["quantize", str(model), str(quantised), "--scheme", "q4_0", "--embedding", "q8_0"]
    assert _main([*command, "--eval-tokens", "0"]) == 0
    exported = export(quantised, out, GGUF, Options(), SETTINGS)
    assert exported.report is not None
    assert exported.report.failed == []
    assert exported.report.options["type"] == "Q4_0"
    assert exported.report.options["embedding_type"] == "Q8_0"
    (weights,) = [check for check in exported.report.checks if check.name == "weights"]
    assert weights.figure == 0
    with pytest.raises(ValueError, match="q: the model is quantised"):
        export(quantised, tmp_path / "hf", HF, Options(), SETTINGS)
    with pytest.raises(ValueError, match="would round .* again"):
        export(quantised, tmp_path / "f.gguf", GGUF, Options("f16"), SETTINGS)


def test_an_option_without_meaning_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shares no layers; leave it out"):
        export(model, tmp_path / "m.gguf", GGUF, Options(unroll=True), SETTINGS)
    with pytest.raises(ValueError, match="runtime = tflite cannot run"):
        export(model, tmp_path / "m.gguf", GGUF, Options(), replace(SETTINGS, runtime="tflite"))
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf.unverified"]
    with pytest.raises(FileNotFoundError, match="no such artefact"):
        verify_artefact(tmp_path / "m.gguf", model, SETTINGS)
