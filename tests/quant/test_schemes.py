from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from quantized_models import SHAPE, SPELLINGS, rounded

from mobilellm.accounting import stored_parameters
from mobilellm.model.quantized import stored_tensors, tensors_bytes
from mobilellm.presets import preset
from mobilellm.quant.schemes import SCHEMES, check_widths, scheme


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("change", [{}, {"intermediate_size": 172}, {"tie_word_embeddings": False}])
def test_the_size_is_predicted_to_the_byte(name: str, change: dict[str, int]) -> None:
    chosen, config = SPELLINGS[name], replace(SHAPE, **change)  # type: ignore[arg-type]
    source, stored, _ = rounded(chosen, config)
    size = chosen.size(config)
    assert tensors_bytes(stored_tensors(stored.matrices, stored.others)) == size.bytes
    assert stored.quantization.bytes == size.bytes
    assert size.weights == sum(parameter.numel() for parameter in source.parameters())


@pytest.mark.parametrize(
    ("name", "bits"), [("q8_0", 8.5), ("q4_0", 4.5), ("int8", 8.0), ("w8a8", 8.0), ("8da4w", 4.5)]
)
def test_bits_of_the_published_shapes(name: str, bits: float) -> None:
    """Scales counted; what is above the format's own is norms, and int8 for the embedding of 8da4w."""
    for shape in ("125m", "350m", "600m", "1b", "1.5b"):
        config = preset(shape)
        size = SCHEMES[name].size(config)
        assert size.weights == stored_parameters(config).total
        assert not SCHEMES[name].wider(config)
        embedding = (stored_parameters(config).embedding + stored_parameters(config).head) / size.weights
        wanted = bits + (embedding * (8 - bits) if name == "8da4w" else 0)
        assert wanted < size.bits_per_weight < wanted + 0.08


def test_q4_0_of_125m_is_as_large_as_llama_cpp_says() -> None:
    """llama-quantize's dry run: 67 MiB with the embedding in Q4_0, 76 MiB in Q8_0, 126 MiB for Q8_0."""
    config = preset("125m")
    found = [
        scheme(*spelled).size(config).bytes / 2**20 for spelled in (("q4_0",), ("q4_0", "q8_0"), ("q8_0",))
    ]
    assert [round(size) for size in found] == [67, 76, 126]


def test_rows_that_groups_do_not_divide_take_a_wider_format() -> None:
    config = replace(SHAPE, intermediate_size=172)
    down = [f"model.layers.{block}.mlp.down_proj.weight" for block in range(3)]
    for name, wider in (("q4_0", "float16"), ("8da4w", "int8")):
        reason = f"{wider}, because rows of 172 are no multiple of 32"
        assert scheme(name).wider(config) == dict.fromkeys(down, reason)
    _, stored, model = rounded(scheme("q4_0"), config)
    assert stored.others[down[0]].dtype == torch.float16
    block = model.model.layers[0]
    assert block.mlp.down_proj.rounding is None  # as the runtime: float16 matrices take their input as it is
    assert block.mlp.up_proj.rounding is not None
    _, stored, model = rounded(scheme("8da4w"), config)
    assert stored.matrices[down[0]].bits == 8
    assert model.model.layers[0].mlp.down_proj.rounding is not None


@pytest.mark.parametrize("shape", ["125m", "350m", "600m", "1b", "1.5b"])
@pytest.mark.parametrize("group", [32, 64, 128, 256])
def test_groups_that_do_not_divide_are_refused_with_a_better_one(shape: str, group: int) -> None:
    chosen, config = scheme("8da4w", group=group), preset(shape)
    widths = {config.hidden_size, config.intermediate_size}
    if all(width % group == 0 for width in widths):
        check_widths(chosen, config)
        return
    assert group > 64
    with pytest.raises(ValueError, match=f"group = {group} does not divide the rows of") as refused:
        check_widths(chosen, config)
    better = int(str(refused.value).partition("take ")[2].partition(",")[0])
    assert better < group
    check_widths(scheme("8da4w", group=better), config)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("q5_k",), "scheme = 'q5_k' is not known; choose one of q8_0, q4_0, 8da4w, int8, w8a8"),
        (("q4_0", "int8"), "embedding = int8 does not go with q4_0; choose q4_0 or q8_0"),
        (("q4_0", None, 64), "group = 64 does not go with q4_0, which has blocks of 32; leave it out"),
        (("int8", None, 64), "group = 64 does not go with int8, which has a scale a row; leave it out"),
        (("8da4w", None, 48), "group = 48 must be a multiple of 32"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments: tuple[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scheme(*arguments)
