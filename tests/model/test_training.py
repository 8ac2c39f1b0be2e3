"""The faster way of training on a CPU against the plain modules; document masks; recomputation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mobilellm.config import ModelConfig
from mobilellm.model import cpu_kernels, training, training_steps
from mobilellm.model.cpu_kernels import Kernels
from mobilellm.model.products import FLOATS, PAIRS, KernelProducts, TorchProducts
from mobilellm.model.rounding import ROUNDINGS, Rounding
from mobilellm.model.training import training_hidden, why_plain
from mobilellm.model.transformer import Linear, MobileLLM
from mobilellm.presets import preset

Gradients = dict[str, Tensor]


def lively(config: ModelConfig, seed: int = 0) -> MobileLLM:
    """Weights that attend to something and norms that are not one."""
    draw = torch.Generator().manual_seed(seed)
    model = MobileLLM(config, draw)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.normal_(1.0, 0.2, generator=draw)
            else:
                parameter.normal_(0.0, 0.1, generator=draw)
    return model


def gradients(
    model: MobileLLM,
    tokens: Tensor,
    segments: Tensor | None = None,
    *,
    narrow: bool,
    activation_checkpointing: bool = False,
) -> tuple[Tensor, Gradients]:
    """Hidden states, and gradients of a fixed random projection of them."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
        hidden = training_hidden(model, tokens, segments, activation_checkpointing)[0].float()
    shape, draw = hidden.shape, torch.Generator().manual_seed(9)
    (hidden * torch.randn(shape, generator=draw)).sum().backward()  # type: ignore[no-untyped-call]
    return hidden.detach(), {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def distances(a: tuple[Tensor, Gradients], b: tuple[Tensor, Gradients]) -> dict[str, float]:
    """Relative; for gradients far smaller than the others (that of q where nothing is to choose from), to those."""
    assert a[1].keys() == b[1].keys()
    floor = 1e-2 * torch.stack([y.norm() for y in b[1].values()]).norm()
    found = {
        name: ((a[1][name] - y).norm() / torch.maximum(y.norm(), floor)).item() for name, y in b[1].items()
    }
    return found | {"hidden states": ((a[0] - b[0]).norm() / b[0].norm()).item()}


def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_kernels, "load", lambda: "turned off for this test")


def multiply_by(way: str, kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    if way != "torch" and way not in kernels:
        pytest.skip("this processor multiplies no pairs of bfloat16")
    ways = TorchProducts() if way == "torch" else KernelProducts(kernels, way)
    monkeypatch.setattr(training, "products", lambda _: ways)


CONFIGS = {
    "shared blocks": preset("test-ls"),
    "no groups": replace(preset("test"), num_kv_heads=4),
    "one key/value head, head untied": replace(preset("test"), num_kv_heads=1, tie_word_embeddings=False),
    "odd sizes": replace(preset("test"), hidden_size=65, intermediate_size=71, head_dim=10),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("B", "T"), [(3, 21), (1, 1), (2, 16)])
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("way", ["torch", FLOATS, PAIRS])
def test_the_faster_way_is_as_near_to_float32_as_autocast(
    kernels: Kernels, name: str, B: int, T: int, packed: bool, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every gradient too. The blocks of queries are made small, so that there are several, the last one short."""
    multiply_by(way, kernels, monkeypatch)
    monkeypatch.setattr(training_steps, "BLOCK", 8)
    model, draw = lively(CONFIGS[name]), torch.Generator().manual_seed(1)
    tokens = torch.randint(384, (B, T), generator=draw)
    segments = (torch.rand(B, T, generator=draw) < 0.3).cumsum(1) if packed else None
    exact = gradients(model, tokens, segments, narrow=False)
    fast = distances(gradients(model, tokens, segments, narrow=True), exact)
    assert max(fast.values()) > 1e-3  # it did run in bfloat16
    without_kernels(monkeypatch)
    plain = distances(gradients(model, tokens, segments, narrow=True), exact)
    assert fast.keys() == plain.keys()
    for part, distance in fast.items():
        assert distance < 1.5 * plain[part] + 4e-3, part
    assert sum(fast.values()) < 1.2 * sum(plain.values())


ROUNDED = replace(preset("test-ls"), intermediate_size=160)


def with_roundings(model: MobileLLM, rounding: Rounding) -> MobileLLM:
    """As a quantised model has them, but for one matrix in each block that is not quantised."""
    for part in model.modules():
        if isinstance(part, Linear):
            part.rounding = rounding
    for block in model.model.layers:
        block.mlp.down_proj.rounding = None  # type: ignore[union-attr, assignment]
    model.head_rounding = rounding
    return model


@pytest.mark.parametrize("rounding", ROUNDINGS.values(), ids=lambda rounding: rounding.name)
def test_the_faster_way_with_rounded_activations(
    kernels: Kernels, rounding: Rounding, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Almost as near to float32 as autocast of the plain modules, whose gradients go straight through too: those
    round numbers of float32, where the kernels have bfloat16 ones, and some come out a step further."""
    model = with_roundings(lively(ROUNDED), rounding)
    tokens = torch.randint(384, (3, 40), generator=torch.Generator().manual_seed(1))
    exact = gradients(model, tokens, narrow=False)
    fast = distances(gradients(model, tokens, narrow=True), exact)
    again = distances(gradients(model, tokens, narrow=True, activation_checkpointing=True), exact)
    assert again == fast
    without_kernels(monkeypatch)
    plain = distances(gradients(model, tokens, narrow=True), exact)
    for part, distance in fast.items():
        assert distance < 1.5 * plain[part] + 4e-3, part
    assert sum(fast.values()) < 1.3 * sum(plain.values())
    unrounded = distances(gradients(lively(ROUNDED), tokens, narrow=False), exact)
    assert sum(unrounded.values()) > 0.01  # the rounding does count


@pytest.mark.parametrize("rounding", ROUNDINGS.values(), ids=lambda rounding: rounding.name)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**31), exponent=st.integers(-34, 30), shift=st.sampled_from([0.0, 5.0, -5.0]))
def test_the_kernel_rounds_as_the_definition_bit_for_bit(
    kernels: Kernels, rounding: Rounding, seed: int, exponent: int, shift: float
) -> None:
    draw = torch.Generator().manual_seed(seed)
    x = ((torch.randn(5, 96, generator=draw) + shift) * 10.0**exponent).bfloat16()
    x[0], x[1, :32], x[2, 3] = 0, -0.0, 0
    expected = rounding(x)
    kernels("round_activations", x, x.numel(), rounding.group or 96, int(rounding.symmetric))
    assert torch.equal(x.view(torch.int16), expected.view(torch.int16))


@pytest.mark.parametrize("way", ["torch", FLOATS, PAIRS])
@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_come_in_the_dtype_that_weights_ask_for(
    kernels: Kernels, name: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16 they are those of float32, rounded; a token that comes often is summed before it is."""
    multiply_by(way, kernels, monkeypatch)
    model, tokens = lively(CONFIGS[name]), torch.randint(3, (2, 100))
    wide = gradients(model, tokens, narrow=True)[1]
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.grad, parameter.grad_dtype = None, torch.bfloat16
    narrow = gradients(model, tokens, narrow=True)[1]
    for part, gradient in narrow.items():
        assert gradient.dtype == (torch.float32 if "norm" in part else torch.bfloat16)
        assert (gradient.float() - wide[part]).norm() <= 2**-7 * wide[part].norm()


@pytest.mark.parametrize("narrow", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_packed_row_is_its_documents_alone(
    narrow: bool, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hidden states and the sum of gradients, whatever the numbers the documents have."""
    monkeypatch.setattr(training_steps, "BLOCK", 16)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    model, lengths = lively(preset("test-ls")), [7, 1, 20, 12]
    tokens = torch.randint(384, (1, 40), generator=torch.Generator().manual_seed(2))
    segments = torch.repeat_interleave(torch.tensor([5, 2, 9, 4]), torch.tensor(lengths))[None]
    projection = torch.randn(1, 40, 64, generator=torch.Generator().manual_seed(3))

    def run(pieces: list[int]) -> tuple[Tensor, Gradients]:
        model.zero_grad()
        outs = []
        parts = (torch.split(x, pieces, dim=1) for x in (tokens, segments, projection))
        for part, numbers, direction in zip(*parts, strict=True):
            with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
                out = training_hidden(model, part, numbers if len(pieces) == 1 else None)[0].float()
            (out * direction).sum().backward()  # type: ignore[no-untyped-call]
            outs.append(out.detach())
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return torch.cat(outs, dim=1), grads

    together, alone = run([40]), run(lengths)
    torch.set_num_threads(before)
    for part, distance in distances(together, alone).items():
        assert distance < (2e-2 if narrow else 1e-5), part


def test_threads_share_the_work(kernels: Kernels) -> None:
    """Their number changes no more than the order in which gradients of norms are summed."""
    model, before = lively(preset("test-ls")), torch.get_num_threads()
    tokens = torch.randint(384, (3, 21), generator=torch.Generator().manual_seed(2))
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(gradients(model, tokens, narrow=True))
    torch.set_num_threads(before)
    for part, distance in distances(*found).items():
        assert distance < (1e-5 if "norm" in part else 1e-9), part


def test_nothing_leaks_between_documents(kernels: Kernels) -> None:
    """Bit for bit: other tokens in the first document leave the second as it is."""
    model = lively(preset("test"))
    tokens = torch.randint(384, (2, 30), generator=torch.Generator().manual_seed(2))
    segments = (torch.arange(30) >= 11).long().expand(2, 30)
    other = tokens.clone()
    other[:, :11] += 1
    with torch.autocast("cpu", torch.bfloat16):
        a, b = (training_hidden(model, x, segments)[0] for x in (tokens, other % 384))
    assert torch.equal(a[:, 11:], b[:, 11:])
    assert not torch.equal(a[:, :11], b[:, :11])


@pytest.mark.parametrize("narrow", [False, True], ids=["float32", "bfloat16"])
def test_recomputation_changes_no_gradient(narrow: bool) -> None:
    model = lively(preset("test-ls"))
    tokens = torch.randint(384, (2, 30), generator=torch.Generator().manual_seed(2))
    segments = (torch.arange(30) >= 11).long().expand(2, 30)
    kept = gradients(model, tokens, segments, narrow=narrow)
    again = gradients(model, tokens, segments, narrow=narrow, activation_checkpointing=True)
    assert max(distances(again, kept).values()) == 0


def test_recomputation_keeps_less() -> None:
    model, tokens = lively(preset("test")), torch.randint(384, (2, 64))
    sizes: dict[bool, int] = {}
    for activation_checkpointing in (False, True):
        kept: dict[int, int] = {}

        def pack(x: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[x.data_ptr()] = x.untyped_storage().nbytes()
            return x

        own = {p.data_ptr() for p in model.parameters()}
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
            torch.autocast("cpu", torch.bfloat16),
        ):
            training_hidden(model, tokens, None, activation_checkpointing)
        sizes[activation_checkpointing] = sum(size for address, size in kept.items() if address not in own)
    assert sizes[True] < sizes[False] / 3


def test_twenty_steps_follow_float32(kernels: Kernels) -> None:
    """The losses of twenty AdamW steps: at most 1 % from float32's while they fall by a third."""

    def losses(narrow: bool) -> list[float]:
        model = MobileLLM(preset("test-ls"), torch.Generator().manual_seed(0))
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
        draw, found = torch.Generator().manual_seed(1), []
        rows = (torch.randint(384, (64, 1), generator=draw) + 7 * torch.arange(33)) % 384
        for step in range(20):
            batch = rows[step % 4 * 16 :][:16]
            with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
                hidden, head = training_hidden(model, batch[:, :-1])
                logits = torch.nn.functional.linear(hidden, head).float()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            found.append(loss.item())
        return found

    exact, fast = losses(False), losses(True)
    assert exact[-1] < exact[0] * 2 / 3
    assert fast == pytest.approx(exact, rel=1e-2)
    assert fast != exact


def test_numbers_that_are_not_finite_stay_so(kernels: Kernels) -> None:
    """A guard looks for them in the loss and the gradients."""
    for poison in (float("nan"), float("inf")):
        model = lively(preset("test"))
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight[3, 5] = poison  # type: ignore[index, union-attr]
        hidden, grads = gradients(model, torch.randint(384, (1, 20)), narrow=True)
        assert not hidden.isfinite().any()
        assert not grads["model.embed_tokens.weight"].isfinite().all()


# When which way is taken


def ways(model: MobileLLM, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """Notes which kernels are called."""
    names: list[str] = []
    call = Kernels.__call__

    def noted(self: Kernels, name: str, *arguments: Tensor | float | None) -> None:
        names.append(name)
        call(self, name, *arguments)

    monkeypatch.setattr(Kernels, "__call__", noted)

    def run() -> list[str]:
        names.clear()
        with torch.autocast("cpu", torch.bfloat16):
            training_hidden(model, torch.randint(384, (1, 5)))
        return list(names)

    return run


def test_a_block_with_a_foreign_part_goes_the_plain_way_alone(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replaced modules and hooks: the modules are called as they are. A frozen weight is no such thing."""
    model = lively(preset("test"))
    run = ways(model, monkeypatch)
    assert run().count("swiglu") == 2
    mlp = model.model.layers[0].mlp
    handle = mlp.gate_proj.register_forward_hook(lambda *_: None)  # type: ignore[union-attr, operator]
    assert run().count("swiglu") == 1
    handle.remove()
    mlp.down_proj = torch.nn.Sequential(mlp.down_proj)  # type: ignore[union-attr, arg-type]
    assert run().count("swiglu") == 1
    projection = model.model.layers[1].self_attn.q_proj  # type: ignore[union-attr]
    projection.weight.requires_grad_(False)  # type: ignore[union-attr, operator]
    assert run().count("swiglu") == 1
    projection.bfloat16()  # type: ignore[operator]
    assert run().count("swiglu") == 1
    projection.weight.requires_grad_(True)  # type: ignore[union-attr, operator]
    assert run().count("swiglu") == 0


def test_sequences_for_which_c_has_no_room_go_the_plain_way(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ways(lively(preset("test")), monkeypatch)
    assert "softmax" in run()
    monkeypatch.setattr(training, "LONGEST", 4)
    assert run() == []
    with pytest.raises(MemoryError, match="softmax"):
        kernels("softmax", None, None, None, 1.0, 1, 1, 1, 0, 1, cpu_kernels.LONGEST + 1)


def test_why_the_plain_way_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lively(preset("test"))
    assert "bfloat16" in str(why_plain(model))
    with torch.no_grad():
        assert "gradients" in str(why_plain(model))
    assert "meta" in str(why_plain(MobileLLM(preset("test")).to("meta")))
    without_kernels(monkeypatch)
    with torch.autocast("cpu", torch.bfloat16):
        assert why_plain(model) == "turned off for this test"


def test_float32_is_the_plain_model() -> None:
    model, tokens = lively(preset("test-ls")), torch.randint(384, (2, 12))
    assert torch.equal(training_hidden(model, tokens)[0], model.hidden(tokens))


def test_segments_take_the_place_of_positions_and_mask() -> None:
    model, tokens = lively(preset("test")), torch.randint(384, (1, 4))
    with pytest.raises(ValueError, match="follow from segments"):
        model.hidden(tokens, positions=torch.arange(4), segments=torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="follow from the cache"):
        model.hidden(tokens, model.new_cache(1, 8), segments=torch.zeros(1, 4, dtype=torch.long))


# The compiler


@pytest.mark.parametrize("compiler", ["false", "/nowhere/cc"])
def test_without_a_compiler_there_is_a_reason(
    compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", compiler)
    reason = cpu_kernels.load.__wrapped__()
    assert isinstance(reason, str)
    assert reason.startswith(compiler)
    assert "\n" not in reason
