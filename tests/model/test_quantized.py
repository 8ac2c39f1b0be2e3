from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quantized_models import SPELLINGS, rounded, shared, small_tokenizer, some_tokens

import mobilellm
from mobilellm.eval.torch_model import fingerprint
from mobilellm.model import checkpoint
from mobilellm.model.convert import convert
from mobilellm.model.fused import fuse
from mobilellm.model.quantized import DESCRIPTION, WEIGHTS, Origin, packed, read_quantized, unpacked
from mobilellm.model.scoring import states_at
from mobilellm.quant.artefact import save

TOKENS = some_tokens(300, 2, 40)


@given(seed=st.integers(0, 2**31))
def test_packed_codes_come_back(seed: int) -> None:
    codes = torch.randint(-8, 8, (3, 10), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    assert packed(codes).shape == (3, 5)
    assert torch.equal(unpacked(packed(codes)), codes)


@pytest.fixture(params=SPELLINGS)
def spelling(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_a_directory_loads_as_what_was_saved(spelling: str, tmp_path: Path) -> None:
    source, stored, model = rounded(SPELLINGS[spelling], shared("immediate", 2))
    save(tmp_path / "q", source, stored, small_tokenizer(), {"method": "rtn"})
    loaded = mobilellm.load(tmp_path / "q")
    assert loaded.repairs == ()
    assert loaded.model.quantization == model.quantization
    assert torch.equal(loaded.model(TOKENS), model(TOKENS))
    assert json.loads((tmp_path / "q" / DESCRIPTION).read_text())["report"] == {"method": "rtn"}


def test_rounding_is_the_same_by_every_way_through_the_model(spelling: str) -> None:
    _, _, model = rounded(SPELLINGS[spelling], shared("reverse", 2))
    with torch.inference_mode():
        plain = model.hidden(TOKENS)
        fused = fuse(model)
        positions = torch.arange(40).expand(2, 40)
        scored = states_at(model, fused, TOKENS, positions, None, torch.arange(80)).view(2, 40, -1)
        cache = model.new_cache(2, 40)
        stepped = torch.cat([model.hidden(part, cache, fused=fused) for part in TOKENS.split(8, dim=1)], 1)
        logits = model.logits(plain), model.logits(plain, fused)
    # Sums in another order now and then fall on the other side of a rounding step.
    for other in (model.hidden(TOKENS, fused=fused), scored, stepped):
        assert (plain - other).norm() < 2e-2 * plain.norm()
        assert ((plain - other).abs() < 1e-4).float().mean() > 0.3
    assert (logits[0] - logits[1]).norm() < 1e-2 * logits[0].norm()


def test_roundings_change_the_outcome_and_the_fingerprint() -> None:
    models = {name: rounded(SPELLINGS[name])[2] for name in ("int8", "w8a8", "w8a8, kv")}
    weights = [model.head_weight for model in models.values()]
    assert torch.equal(weights[0], weights[1])
    assert len({fingerprint(model, small_tokenizer()) for model in models.values()}) == 3
    logits = [model(TOKENS) for model in models.values()]
    assert not torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[1], logits[2])


def test_a_quantised_model_is_not_written_as_plain_weights(tmp_path: Path) -> None:
    source, stored, model = rounded(SPELLINGS["w8a8"], shared("immediate", 2))
    save(tmp_path / "q", source, stored, small_tokenizer(), {})
    with pytest.raises(
        ValueError, match="is quantised .w8a8., which a directory of plain weights cannot say"
    ):
        checkpoint.save(tmp_path / "plain", model, None)
    with pytest.raises(ValueError, match="is quantised"):
        convert(tmp_path / "q", tmp_path / "llama", "llama", None, True, False, lambda notice: None)
    assert not (tmp_path / "plain").exists()
    assert not (tmp_path / "llama").exists()


def spoil_description(**changes: object) -> object:
    def spoil(directory: Path) -> None:
        file = directory / DESCRIPTION
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return spoil


def test_what_it_was_made_of_is_told_but_for_older_directories(tmp_path: Path) -> None:
    source, stored, _ = rounded(SPELLINGS["q4_0"])
    for origin in (Origin("0" * 64, "gptq"), None):
        save(tmp_path / "q", source, stored._replace(origin=origin), small_tokenizer(), {}, overwrite=True)
        assert read_quantized(tmp_path / "q").origin == origin
    description = json.loads((tmp_path / "q" / DESCRIPTION).read_text())
    del description["origin"]
    (tmp_path / "q" / DESCRIPTION).write_text(json.dumps(description))
    assert read_quantized(tmp_path / "q").origin is None


def truncate(directory: Path) -> None:
    file = directory / WEIGHTS
    file.write_bytes(file.read_bytes()[:-10])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_description(format=2), "format = 2 is not known; this version reads 1"),
        (spoil_description(activations="other"), "is no description of a quantised model"),
        (spoil_description(origin="a model"), "is no description of a quantised model"),
        (spoil_description(bytes=1), "speaks of 1 bytes of tensors and quantized.safetensors has"),
        (lambda directory: (directory / DESCRIPTION).write_text("{"), "is no description of a quantised model"),
        (lambda directory: (directory / WEIGHTS).unlink(), "quantized.safetensors: missing"),
        (truncate, "not a whole safetensors file"),
        (lambda directory: (directory / "model.safetensors").touch(), "so that it is two models"),
    ],
)  # fmt: skip
def test_damaged_directories_are_refused(spoil: object, message: str, tmp_path: Path) -> None:
    source, stored, _ = rounded(SPELLINGS["q4_0"])
    save(tmp_path / "q", source, stored, small_tokenizer(), {})
    spoil(tmp_path / "q")  # type: ignore[operator]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        mobilellm.load(tmp_path / "q")


def test_tensors_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source, stored, _ = rounded(SPELLINGS["q4_0"])
    save(tmp_path / "q", source, stored, small_tokenizer(), {})
    file = tmp_path / "q" / WEIGHTS
    tensors = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    for change, message in (
        (
            {f"{name}.scales": tensors[f"{name}.scales"][:, :1].repeat(1, 2)[:80].contiguous()},
            "do not belong together",
        ),
        ({f"{name}.codes": tensors[f"{name}.codes"].to(torch.int16)}, "expected a matrix of int8"),
    ):
        changed = {**tensors, **change}
        save_file(changed, file)
        spoil_description(bytes=sum(t.numel() * t.element_size() for t in changed.values()))(tmp_path / "q")  # type: ignore[operator]
        with pytest.raises(ValueError, match=message):
            mobilellm.load(tmp_path / "q")
