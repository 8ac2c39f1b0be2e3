"""Models of every baseline's architecture, scored as a plain loop over transformers scores them."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import tiny_baselines
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_baselines import ARCHITECTURES, CONTEXT, OURS, ROWS, TEXT, VOCABULARY

from mobilellm.eval import transformers_model as module
from mobilellm.eval.greedy_text import GreedyDecoder, _Stopped
from mobilellm.eval.interface import Request
from mobilellm.eval.models import open_model
from mobilellm.eval.transformers_model import TransformersModel, transformers_model

Directory = Callable[[str], Path]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Directory:
    made: dict[str, Path] = {}

    def directory_of(architecture: str) -> Path:
        if architecture not in made:
            made[architecture] = tiny_baselines.make(
                architecture, tmp_path_factory.mktemp("m") / architecture
            )
        return made[architecture]

    return directory_of


def opened(path: Path, **options: Any) -> TransformersModel:
    """Without a word, unless one is expected."""
    said: list[str] = []
    model = open_model(path, backend="transformers", say=said.append, **options)
    assert said == []
    assert isinstance(model, TransformersModel)
    return model


def some_requests(seed: int = 0, vocabulary: int = VOCABULARY) -> list[Request]:
    """Of every length up to a full context, some equal, some the beginning of others."""
    generator = random.Random(seed)
    requests = []
    for length in (2, 3, 9, 30, 31, 64, CONTEXT, CONTEXT + 1):
        ids = tuple(generator.randrange(vocabulary) for _ in range(length))
        cut = generator.randint(1, length - 1)
        requests += [Request(ids[:cut], ids[cut:])]
    first = requests[3]
    requests += [Request(first.context, (token,)) for token in (5, 6, 7, first.continuation[0])]
    requests += [Request(first.context[:1], first.context[1:2]), first, requests[0]]
    generator.shuffle(requests)
    return requests


def plain(model: Any, request: Request) -> tuple[list[float], bool]:
    """The whole text through the whole model by itself, a softmax in float64."""
    ids = torch.tensor([request.context + request.continuation])
    with torch.no_grad():
        logits = model(ids[:, :-1]).logits[0, len(request.context) - 1 :].double().numpy()
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    chosen = weights[range(len(request.continuation)), request.continuation] / weights.sum(axis=-1)
    return np.log(chosen).tolist(), logits.argmax(-1).tolist() == list(request.continuation)


def whole_model(path: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def assert_equals_plain(model: TransformersModel, whole: Any, requests: list[Request]) -> None:
    found = dict(model.log_likelihoods(requests))
    assert sorted(found) == list(range(len(requests)))
    for number, request in enumerate(requests):
        tokens, greedy = plain(whole, request)
        assert found[number].tokens.dtype == np.float32
        assert found[number].tokens == pytest.approx(tokens, abs=1e-4)
        assert found[number].greedy == greedy
        assert found[number].total == pytest.approx(sum(tokens), abs=1e-3)


def continued(whole: Any, context: tuple[int, ...], length: int) -> Request:
    """What the model itself goes on with."""
    ids = list(context)
    with torch.no_grad():
        for _ in range(length):
            ids.append(int(whole(torch.tensor([ids])).logits[0, -1].argmax()))
    return Request(context, tuple(ids[len(context) :]))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_equals_a_plain_loop(architecture: str, directory: Directory) -> None:
    path = directory(architecture)
    model, whole = opened(path, tokens_at_once=3 * CONTEXT), whole_model(path)
    assert model.network.splits
    assert model.context == CONTEXT
    requests = some_requests()
    requests += [continued(whole, requests[0].context, 1), continued(whole, (9, 8, 7), 4)]
    assert_equals_plain(model, whole, requests)
    assert [answer.greedy for _, answer in sorted(model.log_likelihoods(requests[-2:]))] == [True, True]


@pytest.mark.parametrize("architecture", ["opt", "bloom", "mobilellm-shared"])
def test_answers_do_not_depend_on_the_company(architecture: str, directory: Directory) -> None:
    path = directory(architecture)
    requests = some_requests()
    alone = opened(path, tokens_at_once=1)
    wanted = [next(alone.log_likelihoods([request]))[1] for request in requests]

    @settings(deadline=None, max_examples=10)
    @given(st.permutations(range(len(requests))), st.integers(1, 20), st.integers(1, 600))
    def check(order: list[int], count: int, tokens_at_once: int) -> None:
        alone._tokens_at_once = tokens_at_once
        found = dict(alone.log_likelihoods([requests[i] for i in order[:count]]))
        for place, number in enumerate(order[:count]):
            assert found[place].tokens == pytest.approx(wanted[number].tokens, abs=2e-5)
            assert found[place].greedy == wanted[number].greedy

    check()


def test_logits_in_chunks(directory: Directory, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = dict(opened(directory("qwen2")).log_likelihoods(some_requests()))
    monkeypatch.setattr(module, "_LOGITS_AT_ONCE", 7 * ROWS)
    parts = dict(opened(directory("qwen2")).log_likelihoods(some_requests()))
    for number, answer in whole.items():
        assert parts[number].tokens == pytest.approx(answer.tokens, abs=1e-5)


@pytest.mark.parametrize("kind", ["capped", "scaled"])
def test_a_head_that_does_more_is_not_split(kind: str, tmp_path: Path) -> None:
    """Gemma caps its logits and Cohere scales them, after the head."""
    shape = tiny_baselines._like_llama() | {
        "head_dim": 8,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config: Any
    if kind == "capped":
        config = transformers.Gemma2Config(**shape, final_logit_softcapping=1.5)
    else:
        config = transformers.CohereConfig(**shape, logit_scale=0.3)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny_baselines.tokenizer("gpt2").save_pretrained(tmp_path)
    model = opened(tmp_path)
    assert not model.network.splits
    assert_equals_plain(model, whole_model(tmp_path), some_requests())


def test_a_model_that_looks_ahead_is_refused(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=ROWS, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=CONTEXT, is_decoder=False, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.BertLMHeadModel(config).save_pretrained(tmp_path)
    tiny_baselines.tokenizer("gpt2").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="looks at what comes after a token"):
        opened(tmp_path)


# Beside lm-evaluation-harness

TEXTS = ["Hello, world", " a leading space", "", "naïve — 中文 🙂", "two\n\nparagraphs  ", TEXT[:300]]


@pytest.mark.parametrize("architecture", ["opt", "gpt-neox", "llama", "bloom", "mobilellm"])
def test_equals_the_harness(architecture: str, directory: Directory) -> None:
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    path = directory(architecture)
    theirs = huggingface.HFLM(pretrained=str(path), device="cpu", dtype="float32", batch_size=4)
    model = opened(path)
    assert model.bos == theirs.prefix_token_id
    if (
        architecture != "bloom"
    ):  # whose seq_length the harness does not read: it takes 2048, as the real ones have
        assert model.context == theirs.max_length
    spelled = theirs.tokenizer.decode(theirs.prefix_token_id)
    texts = [*TEXTS, f"{spelled} begins with it", f"{spelled}x"]
    assert model.encode(texts) == [theirs.tok_encode(text) for text in texts]
    assert model.encode(texts, special=False) == [
        theirs.tok_encode(text, add_special_tokens=False) for text in texts
    ]
    requests = [
        request for request in some_requests() if len(request.context + request.continuation) <= CONTEXT
    ]
    asked = [(("", ""), list(request.context), list(request.continuation)) for request in requests]
    wanted = theirs._loglikelihood_tokens(asked, disable_tqdm=True)
    found = dict(model.log_likelihoods(requests))
    for number, (total, greedy) in enumerate(wanted):
        assert found[number].total == pytest.approx(total, abs=1e-3)
        assert found[number].greedy == greedy


@pytest.mark.parametrize(
    ("architecture", "first", "bos"),
    [("opt", [2], 2), ("llama", [1], 1), ("gpt-neox", [], 0), ("bloom", [], 1), ("mobilellm", [1], 1)],
)
def test_what_stands_before_a_text(
    architecture: str, first: list[int], bos: int, directory: Directory
) -> None:
    model = opened(directory(architecture))
    ((*start,), (*bare,)) = (*model.encode(["Hello"]), *model.encode(["Hello"], special=False))
    assert start == first + bare
    assert model.bos == bos
    assert model.encode([]) == []


@pytest.mark.parametrize("architecture", ["opt", "llama", "mobilellm"])
def test_places_of_tokens(architecture: str, directory: Directory) -> None:
    model = opened(directory(architecture))
    for text in TEXTS:
        ids, places = model.encode_with_places(text)
        assert [ids] == model.encode([text], special=False)
        assert places == sorted(places)
        assert places[:1] in ([], [0])
        assert all(0 <= place < len(text) for place in places)
        if text.isascii():
            lengths = [len(model._tokenizer.decode(ids[:i])) for i in range(len(ids))]
            assert places == lengths


def test_a_tokenizer_without_places(tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=384, n_positions=CONTEXT, n_embd=32, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    transformers.ByT5Tokenizer().save_pretrained(tmp_path)  # in Python, without a tokenizer.json
    model = opened(tmp_path)
    assert model.encode(["abc"], special=False) == [[100, 101, 102]]
    assert len(dict(model.log_likelihoods(some_requests()))) == len(some_requests())
    with pytest.raises(ValueError, match=r"its tokenizer \(ByT5Tokenizer\) does not tell where"):
        model.encode_with_places("abc")


# Greedy text


@pytest.mark.parametrize("architecture", ["opt", "bloom", "mobilellm-shared"])
def test_greedy_equals_a_plain_loop(architecture: str, directory: Directory, tmp_path: Path) -> None:
    path = shutil.copytree(directory(architecture), tmp_path / "m")
    settings_file = {"repetition_penalty": 5.0, "max_length": 3, "eos_token_id": 3}
    (path / "generation_config.json").write_text(json.dumps(settings_file))
    model = opened(path)
    whole = whole_model(directory(architecture))
    prompts = [
        ids[:length] for text in TEXTS[-1:] for ids in model.encode([text]) for length in (4, 7, 7, 20)
    ]
    prompts[2] = prompts[2][::-1]
    ends = {3, model._tokenizer.eos_token_id}
    wanted, drawn = [], []
    for prompt in prompts:
        ids = list(prompt)
        while len(ids) < len(prompt) + 12:
            with torch.no_grad():
                following = int(whole(torch.tensor([ids])).logits[0, -1].argmax())
            if following in ends:
                break
            ids.append(following)
        drawn.append((ids[len(prompt) :], "length" if len(ids) == len(prompt) + 12 else "eos"))
        before, after = (model._tokenizer.decode(part, skip_special_tokens=True) for part in (prompt, ids))
        wanted.append(after.removeprefix(before))
    found = model.greedy(prompts, [], 12)
    assert [completion.text for completion in found] == wanted
    for completion, (ids, finish) in zip(found, drawn, strict=True):
        assert completion.finish == finish
        assert completion.tokens[: len(ids)] == ids
        assert len(completion.tokens) == len(ids) + (finish == "eos")
    assert len(set(wanted)) > 1
    stop = wanted[0][2:4]
    assert len(stop) == 2
    stopped = model.greedy(prompts, [stop, "never in there"], 12)
    assert [completion.text for completion in stopped] == [text.partition(stop)[0] for text in wanted]
    assert stopped[0].text != wanted[0]
    assert stopped[0].finish == "stop"
    assert len(stopped[0].tokens) < 12


def test_greedy_ends_where_the_context_is_full(directory: Directory) -> None:
    model = opened(directory("opt"))
    prompt = list(some_requests()[0].context[:1]) + [5] * (CONTEXT - 3)
    (completion,) = model.greedy([prompt], [], 50)
    assert (completion.finish, len(completion.tokens)) in {("context", 3), ("eos", 1), ("eos", 2), ("eos", 3)}
    for prompts, stop, count in (
        ([[1] * (CONTEXT + 1)], [], 5),
        ([[]], [], 5),
        ([[1]], [""], 5),
        ([[1]], [], 0),
    ):
        with pytest.raises(ValueError):
            model.greedy(prompts, stop, count)


# What a model is, and what is refused


def test_the_identity(directory: Directory, tmp_path: Path) -> None:
    model = opened(directory("qwen2"))
    identity = model.identity
    assert (identity.backend, identity.dtype, identity.device) == ("transformers", "float32", "cpu")
    assert identity.name == str(directory("qwen2"))
    tensors = safetensors.torch.load_file(directory("qwen2") / "model.safetensors")
    assert identity.parameters == sum(tensor.numel() for tensor in tensors.values())  # the tied head once
    assert identity.bytes == 4 * identity.parameters
    assert identity.config["model_type"] == "qwen2"
    assert (
        identity.fingerprint
        == opened(shutil.copytree(directory("qwen2"), tmp_path / "same")).identity.fingerprint
    )


@pytest.mark.parametrize("change", ["weight", "config", "tokenizer"])
def test_the_fingerprint_changes_with(change: str, directory: Directory, tmp_path: Path) -> None:
    path = shutil.copytree(directory("qwen2"), tmp_path / "m")
    if change == "weight":
        tensors = safetensors.torch.load_file(path / "model.safetensors")
        tensors["model.norm.weight"][3] += 1e-3
        safetensors.torch.save_file(tensors, path / "model.safetensors", {"format": "pt"})
    elif change == "config":
        tiny_baselines.edit_config(path, rms_norm_eps=1e-4)
    else:
        content = json.loads((path / "tokenizer.json").read_text())
        content["model"]["merges"].pop()
        (path / "tokenizer.json").write_text(json.dumps(content))
    assert opened(path).identity.fingerprint != opened(directory("qwen2")).identity.fingerprint


def test_dtypes(directory: Directory, tmp_path: Path) -> None:
    """What is kept as 16 bits is computed as quickly as the CPU can, and is the same model in every dtype."""
    path = directory("opt")
    for kind in (torch.float16, torch.bfloat16):
        stored = tmp_path / str(kind)
        transformers.AutoModelForCausalLM.from_pretrained(path, dtype=kind).save_pretrained(stored)
        tiny_baselines.tokenizer("opt").save_pretrained(stored)
        quick = torch.ops.mkldnn._is_mkldnn_bf16_supported() and kind == torch.bfloat16
        usual = opened(stored)
        assert usual.identity.dtype == ("bfloat16" if quick else "float32")
        for name in ("float16", "bfloat16", "float32"):
            model = opened(stored, dtype=name)
            assert model.identity.dtype == name
            assert str(model._model.dtype) == f"torch.{name}"
            assert model.identity.fingerprint == usual.identity.fingerprint
            assert model.identity.bytes == 2 * model.identity.parameters
        if not quick:
            assert_equals_plain(usual, whole_model(stored), some_requests())
    exact = dict(opened(path).log_likelihoods(some_requests()))
    for number, answer in opened(path, dtype="bfloat16").log_likelihoods(some_requests()):
        count = len(answer.tokens)
        assert answer.total / count == pytest.approx(exact[number].total / count, abs=0.2)


def test_a_context_that_is_nowhere_said(directory: Directory, tmp_path: Path) -> None:
    path = shutil.copytree(directory("bloom"), tmp_path / "m")
    tiny_baselines.edit_config(path, seq_length=None)
    said: list[str] = []
    assert transformers_model(path, say=said.append).context == 2048
    assert said == [f"{path}: neither config.json nor the tokenizer tells the longest context; 2048 is taken"]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request((1,) * CONTEXT, (2, 3)), f"feeds {CONTEXT + 1} tokens and the model's context is {CONTEXT}"),
        (Request((), (2,)), "empty context"),
        (Request((2,), ()), "empty continuation"),
        (Request((1, ROWS), (2,)), f"token id {ROWS} does not lie in the model's vocabulary of {ROWS}"),
        (Request((1,), (-1,)), "token id -1 does not lie"),
    ],
)
def test_a_wrong_request_is_refused_at_once(request_: Request, message: str, directory: Directory) -> None:
    with pytest.raises(ValueError, match=message):
        opened(directory("opt")).log_likelihoods([Request((1,), (2,)), request_])


def test_likelihoods_that_are_not_numbers(directory: Directory, tmp_path: Path) -> None:
    path = shutil.copytree(directory("opt"), tmp_path / "m")
    tensors = safetensors.torch.load_file(path / "model.safetensors")
    tensors["model.decoder.layers.0.fc1.weight"][0] = float("nan")
    safetensors.torch.save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="not numbers in float32"):
        dict(opened(path).log_likelihoods(some_requests()))


def test_what_is_not_whole_is_refused(directory: Directory, tmp_path: Path) -> None:
    def damaged(name: str) -> Path:
        return shutil.copytree(directory("gpt-neox"), tmp_path / name)

    path = damaged("no-weight")
    tensors = safetensors.torch.load_file(path / "model.safetensors")
    del tensors["gpt_neox.layers.1.mlp.dense_h_to_4h.weight"]
    tensors["gpt_neox.more"] = torch.zeros(1)
    safetensors.torch.save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"^\S+no-weight: the weights lack gpt_neox.layers.1.mlp.dense_h_to_4h"
    ):
        opened(path)
    path = damaged("cut-off")
    (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"^\S+cut-off: transformers cannot load it: .+$"):
        opened(path)
    path = damaged("no-tokenizer")
    (path / "tokenizer.json").unlink()
    (path / "tokenizer_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="the files of its tokenizer are missing"):
        opened(path)
    path = damaged("no-weights")
    (path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"^\S+no-weights: transformers cannot load it: .+$"):
        opened(path)
    path = damaged("misfit")
    tokenizer = tiny_baselines.tokenizer("gpt-neox")
    tokenizer.add_tokens([f"<extra_{i}>" for i in range(ROWS - VOCABULARY + 1)])
    tokenizer.save_pretrained(path)
    with pytest.raises(ValueError, match=f"tokenizer has {ROWS + 1} tokens and the embedding {ROWS} rows"):
        opened(path)
    path = damaged("own-code")
    tiny_baselines.edit_config(
        path, model_type="unheard-of", auto_map={"AutoConfig": "x.X", "AutoModelForCausalLM": "x.Y"}
    )
    with pytest.raises(
        ValueError, match=r"^\S+own-code: transformers cannot load it: it brings its own code"
    ):
        opened(path)


def test_unused_weights_are_told(directory: Directory, tmp_path: Path) -> None:
    path = shutil.copytree(directory("gpt-neox"), tmp_path / "m")
    tensors = safetensors.torch.load_file(path / "model.safetensors")
    tensors["gpt_neox.more"] = torch.zeros(1)
    safetensors.torch.save_file(tensors, path / "model.safetensors", {"format": "pt"})
    said: list[str] = []
    transformers_model(path, say=said.append)
    assert said == [f"{path}: the model does not use these stored weights: gpt_neox.more"]


def test_wrong_settings(directory: Directory) -> None:
    for options, message in (
        ({"dtype": "float8"}, "dtype = 'float8'"),
        ({"device": "nowhere"}, "device = 'nowhere'"),
        ({"tokens_at_once": 0}, "tokens_at_once = 0"),
    ):
        with pytest.raises(ValueError, match=message):
            transformers_model(directory("opt"), **options)  # type: ignore[arg-type]


def test_ours_are_the_same_as_in_our_own_code(directory: Directory) -> None:
    from mobilellm.model.api import load

    for architecture in OURS:
        loaded = load(directory(architecture))
        assert loaded.tokenizer is not None
        model = opened(directory(architecture))
        assert model.encode(TEXTS) == loaded.tokenizer.encode_batch(TEXTS)
        requests = some_requests()
        for number, answer in model.log_likelihoods(requests):
            ids = torch.tensor([requests[number].context + requests[number].continuation])
            with torch.no_grad():
                logits = loaded.model(ids[:, :-1])[0, len(requests[number].context) - 1 :].log_softmax(-1)
            tokens = logits[range(len(answer.tokens)), list(requests[number].continuation)]
            assert answer.tokens == pytest.approx(tokens.numpy(), abs=1e-4)


class OfBytes:
    """A tokenizer whose ids are bytes: a character may be cut in two."""

    eos_token_id = 0

    def decode(self, ids: list[int], **_: Any) -> str:
        return bytes(each for each in ids if each).decode("utf-8", errors="replace")


def test_what_is_added_to_a_prompt_that_ends_within_a_character() -> None:
    decoder = GreedyDecoder(SimpleNamespace(generation_config=None), OfBytes(), 8, 256)
    assert decoder.added([0x61], [0x62, 0, 0x63]) == "b"
    assert decoder.added([0xC3], [0xA9, 0x62]) == "\ufffdb"


def test_rows_are_stopped_as_soon_as_a_stop_string_is_there() -> None:
    decoder = GreedyDecoder(SimpleNamespace(generation_config=None), OfBytes(), 8, 256)
    rows = torch.tensor([[*b"xbcd"], [*b"xbdc"], [*b"bcdd"]])
    assert _Stopped(decoder, 1, ["bc", "dcd"])(rows, torch.empty(0)).tolist() == [True, False, False]
