"""`mobilellm quantize`, and what other commands do with what it wrote."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf_files import SHAPE, saved, shared
from safetensors.torch import load_file

import mobilellm
from mobilellm.cli import quantize_parts
from mobilellm.cli.main import _main
from mobilellm.gguf import read_gguf

from .refusals import refusal

TEXT = "some words to read, and some more words of all kinds\n" * 30


@pytest.fixture(scope="module", params=["plain", "shared"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp(request.param) / "model"
    saved(directory, shared("immediate", 2) if request.param == "shared" else SHAPE)
    (directory / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    (directory / "LICENSE").write_text("do as you like", encoding="utf-8")
    return directory


SHARED_ALONE = pytest.mark.parametrize("model", ["shared"], indirect=True)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    return file


def quantized(model: Path, out: Path, text: Path, *flags: str) -> dict[str, object]:
    assert (
        _main(["quantize", str(model), str(out), "--eval-data", str(text), "--eval-tokens", "300", *flags])
        == 0
    )
    return json.loads((out / "quantization.json").read_text(encoding="utf-8"))


@SHARED_ALONE
def test_the_report_is_printed_and_stored(
    model: Path, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "q"
    stored = quantized(model, out, text, "--scheme", "8da4w", "--json")
    printed = json.loads(capsys.readouterr().out)
    assert printed["out"] == str(out)
    assert printed["file_bytes"] == (out / "quantized.safetensors").stat().st_size
    assert stored["report"].items() <= printed.items()
    assert stored["bytes"] == printed["bytes"] < printed["file_bytes"]
    found = printed["comparison"]
    assert found["tokens"] > 250
    assert 0 < found["kl"] < 1
    assert found["perplexity_ratio"] == found["quantized"]["perplexity"] / found["source"]["perplexity"]
    assert len(found["errors"]) == 7 * 3 + 1
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (out / "LICENSE").is_file()
    quantized(model, out, text, "--scheme", "w8a8", "--overwrite")
    printed_text = capsys.readouterr().out
    assert "w8a8: int8, embedding and head int8, rtn" in printed_text
    assert "worst products" in printed_text


@pytest.mark.parametrize("flags", [["q8_0"], ["q4_0"], ["q4_0", "--embedding", "q8_0"]], ids=" ".join)
def test_export_writes_the_very_same_codes_and_scales(
    model: Path, tmp_path: Path, text: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "q"
    quantized(model, out, text, "--scheme", *flags)
    assert _main(["export", str(out), str(tmp_path / "exported.gguf")]) == 0
    arguments = [
        "quantize",
        str(model),
        str(tmp_path / "straight.gguf"),
        "--eval-tokens",
        "0",
        "--scheme",
        *flags,
    ]
    assert _main(arguments) == 0
    files = [read_gguf(tmp_path / name) for name in ("exported.gguf", "straight.gguf")]
    tensors = load_file(out / "quantized.safetensors")
    embedding = files[0].array("token_embd.weight")
    loaded = mobilellm.load(out).model
    np.testing.assert_array_equal(embedding, loaded.model.embed_tokens.weight.detach().numpy())
    assert {"model.embed_tokens.weight.codes", "model.embed_tokens.weight.scales"} <= tensors.keys()
    for name in files[0].tensors:
        np.testing.assert_array_equal(files[0].array(name), files[1].array(name))
    assert json.loads((tmp_path / "straight.quantization.json").read_text())["scheme"] == flags[0]
    assert json.loads((tmp_path / "straight.gguf.verify.json").read_text())["passed"]
    capsys.readouterr()


@SHARED_ALONE
def test_keys_and_values_in_8_bits_are_not_dropped_silently(
    model: Path, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quantized(model, tmp_path / "q", text, "--kv", "int8")
    assert _main(["export", str(tmp_path / "q"), str(tmp_path / "q.gguf")]) == 2
    assert "rounds keys and values, which what runs a gguf artefact does not" in capsys.readouterr().err


def test_codes_that_no_rounding_would_choose_are_exported_as_they_are(
    model: Path, tmp_path: Path, text: Path
) -> None:
    """A calibrated method's: rounding the values again would give others."""
    from safetensors.torch import save_file

    out = tmp_path / "q"
    quantized(model, out, text, "--scheme", "q4_0")
    file = out / "quantized.safetensors"
    tensors = load_file(file)
    for name in tensors:
        if name.endswith(".codes"):
            tensors[name] = (tensors[name] & 0x33) + 0x44  # codes -4 … -1: nothing of the largest magnitude
    save_file(tensors, file)
    assert _main(["export", str(out), str(tmp_path / "m.gguf")]) == 0
    named = dict(mobilellm.load(out).model.named_parameters())
    found = read_gguf(tmp_path / "m.gguf")
    for ours, theirs in (
        ("embed_tokens.weight", "token_embd.weight"),
        ("layers.1.mlp.down_proj.weight", "blk.1.ffn_down.weight"),
        ("layers.2.self_attn.v_proj.weight", "blk.2.attn_v.weight"),
    ):
        np.testing.assert_array_equal(found.array(theirs), named[f"model.{ours}"].detach().numpy())
    q = named["model.layers.0.self_attn.q_proj.weight"].detach().numpy()
    permuted = q.reshape(SHAPE.num_heads, 2, SHAPE.head_dim // 2, -1).swapaxes(1, 2).reshape(q.shape)
    np.testing.assert_array_equal(found.array("blk.0.attn_q.weight"), permuted)


@pytest.mark.parametrize("scheme", ["q8_0", "q4_0"])
def test_perplexity_in_torch_is_that_of_the_runtime(
    model: Path, tmp_path: Path, text: Path, scheme: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out, file = tmp_path / "q", tmp_path / "q.gguf"
    quantized(model, out, text, "--scheme", scheme)
    assert _main(["export", str(out), str(file)]) == 0
    found = []
    for source in (out, file):
        record = tmp_path / "record.json"
        command = ["eval", "ppl", str(source), "--data", str(text), "--no-cache", "--json", str(record)]
        assert _main(command) == 0
        found.append(json.loads(record.read_text(encoding="utf-8")))
    torch_nats, file_nats = (record["results"]["text.txt"]["nats"] for record in found)
    assert file_nats == pytest.approx(torch_nats, rel=1e-3)
    assert found[0]["model"]["dtype"] == f"float32 of {scheme}"
    assert found[0]["model"]["bytes"] == json.loads((out / "quantization.json").read_text())["bytes"]
    capsys.readouterr()


@SHARED_ALONE
def test_a_calibrated_model_loses_less(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "".join(chr(97 + (7 * i * i + i // 3) % 26) for i in range(6_000))
    (tmp_path / "calibration.txt").write_text(words[:5_000], encoding="utf-8")
    (tmp_path / "held-out.txt").write_text(words[5_000:], encoding="utf-8")
    found = {}
    for method in ("rtn", "gptq"):
        flags = ["--calibration", str(tmp_path / "calibration.txt")] if method == "gptq" else []
        flags += ["--scheme", "q4_0", "--method", method, "--eval-tokens", "900"]
        found[method] = quantized(model, tmp_path / method, tmp_path / "held-out.txt", *flags)["report"]
    assert found["gptq"]["comparison"]["kl"] < 0.8 * found["rtn"]["comparison"]["kl"]
    assert found["gptq"]["method"] == "gptq"
    assert found["gptq"]["calibrated_on"] == [str(tmp_path / "calibration.txt")]
    assert mobilellm.load(tmp_path / "gptq").model.quantization.scheme == "q4_0"
    capsys.readouterr()


@SHARED_ALONE
def test_a_sweep_compares_all_schemes(
    model: Path, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["quantize", str(model), "--sweep", str(tmp_path / "sweep"), "--eval-data", str(text)]
    command += ["--calibration", str(text), "--calibration-tokens", "200", "--eval-tokens", "200"]
    assert _main(command) == 0
    printed = capsys.readouterr().out
    assert "Source: perplexity" in printed
    report = json.loads((tmp_path / "sweep" / "sweep.json").read_text(encoding="utf-8"))
    assert {each["scheme"] for each in report["results"]} == {"q8_0", "int8", "w8a8", "8da4w", "q4_0"}
    by_size = sorted(report["results"], key=lambda each: each["bytes"])
    assert by_size[0]["comparison"]["kl"] > by_size[-1]["comparison"]["kl"]
    table = (tmp_path / "sweep" / "sweep.md").read_text(encoding="utf-8").splitlines()
    assert len(table) == 2 + len(report["results"])
    assert (tmp_path / "sweep" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert _main(command) == 2
    assert "sweep.json: exists; choose another folder or pass --overwrite" in capsys.readouterr().err


@SHARED_ALONE
def test_a_quantised_model_talks(
    model: Path, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "q"
    quantized(model, out, text, "--scheme", "8da4w", "--kv", "int8")
    capsys.readouterr()
    assert _main(["generate", str(out), "some words", "--max-tokens", "5"]) == 0
    assert capsys.readouterr().out.startswith("some words")
    assert mobilellm.load(out).model.model.layers[0].self_attn.kv_rounding is not None


@SHARED_ALONE
def test_without_a_text_pythons_documentation_is_compared_on(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _main(["quantize", str(model), str(tmp_path / "q"), "--eval-tokens", "100"]) == 0
    printed = capsys.readouterr()
    assert (
        "compared on a tenth of Python's language reference; --eval-data names your own text" in printed.err
    )
    assert "Python's language reference, every tenth topic" in printed.out


@SHARED_ALONE
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["MODEL", "there"], "there: exists and is not empty; choose another name or pass --overwrite"),
        (["MODEL", "there", "--overwrite"], "there: holds other things than a model"),
        (["MODEL", "there.gguf"], "there.gguf: exists; choose another name or pass --overwrite"),
        (["MODEL", "m.gguf", "--scheme", "w8a8"], "--scheme w8a8 is none of GGUF's; take q4_0 or q8_0"),
        (["MODEL", "m.gguf", "--kv", "int8"], "--kv int8 does not go with m.gguf"),
        (["MODEL", "q", "--group", "64"], "--group 64 does not go with q8_0"),
        (["MODEL", "q", "--scheme", "8da4w", "--group", "128"], "--group 128 does not divide the rows of 64"),
        (["MODEL", "q", "--embedding", "int8"], "--embedding int8 does not go with q8_0; choose q8_0"),
        (["MODEL", "q", "--eval-tokens", "-1"], "--eval-tokens -1 must be at least 0"),
        (["MODEL", "q", "--eval-data", "nowhere.txt"], "nowhere.txt: no such text file"),
        (["nowhere", "q"], "nowhere: no such directory"),
        (["MODEL"], "quantize: name what to write, OUT or OUT.gguf; or compare all schemes with --sweep DIR"),
        (["MODEL", "q", "--sweep", "s"], "--sweep writes no model; leave q out, or --sweep"),
        (["MODEL", "--sweep", "s", "--group", "64"], "--group is for one scheme; leave it out of a sweep"),
        (["MODEL", "--sweep", "s", "--kv", "int8"], "--kv is for one scheme; leave it out of a sweep"),
        (["MODEL", "q", "--calibration", "there.gguf"], "--calibration is for --method gptq"),
        (["MODEL", "q", "--method", "gptq", "--calibration-tokens", "0"], "--calibration-tokens 0 must be"),
        (["QUANTIZED", "q"], "is quantised already (q8_0); quantise what it was made from"),
    ],
)
def test_mistakes_are_one_line_and_code_2(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there.gguf").write_text("this is text, not a model at all")
    Path("there").mkdir()
    Path("there/letter.txt").write_text("dear all")
    if "QUANTIZED" in arguments:
        assert _main(["quantize", str(model), "made", "--eval-tokens", "0"]) == 0
    names = {"MODEL": model, "QUANTIZED": "made"}
    assert message in refusal(capsys, "quantize", *(names.get(each, each) for each in arguments))
    assert not Path("q").exists()
    assert not Path("m.gguf").exists()


def test_weights_that_are_not_finite_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tmp_path / "model"
    random = saved(directory, SHAPE)
    tensors = {name: tensor.clone() for name, tensor in random.state_dict().items()}
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = 1e9
    from safetensors.torch import save_file

    save_file(tensors, directory / "model.safetensors")
    assert (
        _main(["quantize", str(directory), str(tmp_path / "q"), "--scheme", "q4_0", "--eval-tokens", "0"])
        == 2
    )
    error = capsys.readouterr().err
    assert "model.layers.1.mlp.up_proj.weight: q4_0: there are weights too large for scales" in error
    assert torch.isfinite(tensors["model.norm.weight"]).all()


def test_long_work_is_told_in_a_pipe_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize_parts, "_SECONDS_A_LINE", 0)
    with quantize_parts.progress_bar("gptq: ") as progress:
        progress("matrices", 1, 2)
        progress("matrices", 2, 2)
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "mobilellm: gptq: 1 of 2 matrices\nmobilellm: gptq: 2 of 2 matrices\n"
    monkeypatch.setattr(quantize_parts, "_SECONDS_A_LINE", 60)
    with quantize_parts.progress_bar() as progress:
        progress("matrices", 2, 2)
    assert capsys.readouterr().err == ""
