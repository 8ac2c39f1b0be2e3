"""Recipes as TOML: strict, all complaints at once, and what is written is read back equal."""

from __future__ import annotations

import tomllib
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_runs import build, leaves

from mobilellm.train.lora import TARGETS
from mobilellm.train.recipe import Recipe, RecipeError, load_recipe, parse_recipe, to_toml

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
PATHS = TEXT.map(Path)
COUNT = st.integers(1, 10**12)
POSITIVE = st.floats(0, exclude_min=True, allow_infinity=False)
NOT_NEGATIVE = st.floats(0, allow_infinity=False)
BELOW_ONE = st.floats(0, 1, exclude_max=True)
FINITE = st.floats(allow_infinity=False, allow_nan=False)

LEAVES: dict[str, st.SearchStrategy[Any]] = {
    "steps": COUNT,
    "seed": st.integers(0, 2**63 - 1),
    "evaluate_every": COUNT,
    "batch.micro_batch": COUNT,
    "optim.lr": POSITIVE,
    "optim.beta1": BELOW_ONE,
    "optim.beta2": BELOW_ONE,
    "optim.epsilon": POSITIVE,
    "optim.weight_decay": NOT_NEGATIVE,
    "optim.clip_norm": POSITIVE,
    "schedule.name": st.sampled_from(["cosine", "wsd", "linear"]),
    "schedule.warmup_steps": st.integers(0, 10**9),
    "schedule.final_fraction": st.floats(0, 1),
    "schedule.decay_fraction": st.floats(0, 1, exclude_min=True),
    "compute.precision": st.sampled_from(["bfloat16", "float32"]),
    "compute.compile": st.booleans(),
    "compute.activation_checkpointing": st.booleans(),
    "compute.z_loss": NOT_NEGATIVE,
    "checkpoint.every": COUNT,
    "checkpoint.keep_last": COUNT,
    "checkpoint.milestone_every": st.integers(0, 10**9),
    "checkpoint.asynchronous": st.booleans(),
    "guard.spike_factor": st.just(0.0) | st.floats(1, exclude_min=True, allow_infinity=False),
    "guard.window": COUNT,
    "model.preset": TEXT,
    "model.init_from": PATHS,
    "model.vocab_size": st.integers(),
    "model.hidden_size": st.integers(),
    "model.intermediate_size": st.integers(),
    "model.num_layers": st.integers(),
    "model.num_heads": st.integers(),
    "model.num_kv_heads": st.integers(),
    "model.head_dim": st.integers(),
    "model.max_position_embeddings": st.integers(),
    "model.rope_theta": FINITE,
    "model.rms_norm_eps": FINITE,
    "model.initializer_range": FINITE,
    "model.tie_word_embeddings": st.booleans(),
    "model.repeats": st.integers(),
    "model.order": TEXT,
    "data.held_out": st.lists(PATHS).map(tuple),
    "data.held_out_tokens": COUNT.map(lambda count: count + 1),
    "data.document_mask": st.booleans(),
    "chat.held_out": st.lists(PATHS).map(tuple),
    "chat.held_out_fraction": BELOW_ONE,
    "chat.held_out_tokens": COUNT,
    "chat.template": PATHS,
    "chat.assistant_only": st.booleans(),
    "chat.packing": st.booleans(),
    "chat.over_long": st.sampled_from(["skip", "truncate"]),
    "distill.teacher": TEXT,
    "distill.cache": PATHS,
    "distill.top_k": COUNT,
    "distill.temperature": POSITIVE,
    "distill.ce_weight": NOT_NEGATIVE,
    "distill.kl_weight": POSITIVE,
    "distill.dtype": st.sampled_from(["float32", "bfloat16"]),
    "lora.rank": COUNT,
    "lora.alpha": POSITIVE,
    "lora.dropout": BELOW_ONE,
    "lora.targets": st.lists(st.sampled_from(TARGETS), min_size=1, unique=True).map(tuple),
    "lora.dora": st.booleans(),
    "lora.rslora": st.booleans(),
    "qat.scheme": TEXT,
    "qat.embedding": TEXT,
    "qat.group": st.integers(),
    "qat.after_steps": st.just(0),
    "sample.prompts": st.lists(TEXT).map(tuple),
    "sample.tokens": COUNT,
    "sample.temperature": NOT_NEGATIVE,
    "log.tensorboard": st.booleans(),
    "log.tracker": st.sampled_from(["none", "trackio", "wandb"]),
    "log.project": TEXT,
}
TOGETHER = {  # leaves that must fit each other
    "batch.tokens_per_step", "batch.sequence_length", "data.train", "data.weights", "optim.name",
    "compute.strategy", "chat.train", "epochs",
}  # fmt: skip
NEEDED = {"steps", "batch.micro_batch", "model.preset"}
MINIMAL = """
steps = 3
[model]
preset = "test"
[data]
train = ["shards"]
[batch]
tokens_per_step = 64
sequence_length = 16
micro_batch = 2
"""


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """Any set of leaves with any good values, of a run on shards or on conversations."""
    source, other = draw(st.permutations(["data", "chat"]))
    length, per_step = draw(st.integers(1, 10**5)), draw(st.integers(1, 10**5))
    train = draw(st.lists(PATHS, min_size=1, max_size=3))
    values: dict[str, Any] = {
        "batch.sequence_length": length,
        "batch.tokens_per_step": length * per_step,
        f"{source}.train": tuple(train),
        "epochs": draw(NOT_NEGATIVE),
    }
    if source == "data" and draw(st.booleans()):
        values["data.weights"] = tuple(draw(POSITIVE) for _ in train)
    values |= draw(
        st.sampled_from(
            [{}, {"optim.name": "muon"}, {"compute.strategy": "fsdp"}, {"compute.strategy": "ddp"}]
        )
    )
    chosen = NEEDED | draw(st.sets(st.sampled_from(sorted(LEAVES))))
    chosen = {leaf for leaf in chosen if not leaf.startswith(f"{other}.")}
    if "muon" in values.values() or "fsdp" in values.values():
        chosen = {leaf for leaf in chosen if not leaf.startswith("lora.")}
    adapted = any(leaf.startswith("lora.") for leaf in chosen)
    if values.get("compute.strategy") == "fsdp" or adapted:
        chosen = {leaf for leaf in chosen if not leaf.startswith("qat.")}
    chosen |= {"model.init_from"} if source == "chat" or adapted else set()
    values |= {leaf: draw(LEAVES[leaf]) for leaf in sorted(chosen)}
    built = build(Recipe, values)
    assert isinstance(built, Recipe)
    return built


def test_every_leaf_is_drawn() -> None:
    assert LEAVES.keys() | TOGETHER == set(leaves(Recipe))


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine
@given(recipes())
def test_what_is_written_is_read_back(recipe: Recipe) -> None:
    text = to_toml(recipe)
    assert parse_recipe(text, "here") == recipe
    assert to_toml(parse_recipe(text, "here")) == text
    optional = {"model", "chat", "distill", "lora", "qat"}
    told = {
        f"{section}.{leaf}" if isinstance(value, dict) else section
        for section, value in tomllib.loads(text).items()
        for leaf in (value if isinstance(value, dict) else [""])
    }
    assert told <= set(leaves(Recipe))
    untold = {leaf for leaf in leaves(Recipe) if leaf not in told}
    absent = {leaf for leaf in untold if getattr(recipe, leaf.partition(".")[0]) is None}
    assert {leaf.partition(".")[0] for leaf in untold - absent} <= optional


def test_the_least_that_must_be_said() -> None:
    recipe = parse_recipe(MINIMAL, "here")
    assert recipe.optim.lr == 2e-3
    assert recipe.data.train == (Path("shards"),)
    for field in fields(Recipe):
        if field.default_factory is not MISSING and field.name != "data":
            assert getattr(recipe, field.name) == field.default_factory()
    assert recipe.model.config(500).vocab_size == 500
    assert recipe.model.config().vocab_size == 384


def complaint(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "here.toml")
    message = str(caught.value)
    assert message.startswith("here.toml: ")
    assert "\n" not in message
    return message.removeprefix("here.toml: ")


def test_all_wrong_keys_at_once() -> None:
    text = MINIMAL.replace("micro_batch = 2", "micro_bach = 2").replace("steps = 3", "stepps = 3\nlr = 1")
    found = complaint(text + '[optim]\nlearning_rate = 1e-3\nname = "adamw"\n[optimiser]\nlr = 1\n')
    for words in (
        "unknown key stepps", "unknown key lr", "unknown key batch.micro_bach (known here: ",
        "missing key batch.micro_batch", "unknown key optim.learning_rate", "unknown key optimiser (known here: ",
    ):  # fmt: skip
        assert words in found


def test_all_wrong_types_at_once() -> None:
    text = MINIMAL.replace('train = ["shards"]', 'train = "shards"\nweights = [1, "2"]\ndocument_mask = 1')
    text = text.replace("steps = 3", 'steps = "3"\nseed = true\nlog = 7').replace('"test"', "12")
    found = complaint(text + '[optim]\nlr = "1e-3"\nbeta1 = 0\n[sample]\ntokens = 4.0\n')
    for words in (
        "steps = '3' must be of type int", "seed = True must be of type int", "log = 7 must be a table",
        "data.train = 'shards' must be a list", "data.weights = [1, '2'] must be", "model.preset = 12 must be",
        "data.document_mask = 1 must be of type bool", "optim.lr = '1e-3' must be of type float",
        "sample.tokens = 4.0 must be of type int",
    ):  # fmt: skip
        assert words in found
    assert "beta1" not in found  # a whole number is a float, too


def test_all_wrong_values_at_once() -> None:
    """Of the loop's settings and of the rest of the recipe."""
    text = MINIMAL.replace('["shards"]', '["a", "b"]\nweights = [1, 0, 2]\nheld_out_tokens = 0')
    text = text.replace("steps = 3", "steps = 0")
    found = complaint(
        text
        + '[optim]\nlr = -1\nname = "sgd"\n[sample]\ntokens = 0\ntemperature = -1\n[log]\ntracker = "paper"\n'
    )
    for words in (
        "steps = 0 must be above 0", "optim.lr = -1.0 must be above 0", "optim.name = 'sgd' must be adamw or muon",
        "data.weights has 3 numbers, data.train 2 names", "data.weights = [1.0, 0.0, 2.0] must all be above 0",
        "data.held_out_tokens = 0 must be at least 2", "sample.tokens = 0 must be at least 1",
        "sample.temperature = -1.0 must be 0 or above", "log.tracker = 'paper' must be none, trackio or wandb",
    ):  # fmt: skip
        assert words in found


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (('["shards"]', "[]"), "data.train is empty; name at least one folder"),
        (("steps = 3", ""), "steps = 0 must be above 0, unless epochs are given"),
        (("steps = 3", "epochs = -1"), "epochs = -1.0 must be 0 or above"),
        (('preset = "test"', ""), "missing key model.preset, or model.init_from"),
        (('[data]\ntrain = ["shards"]', '[chat]\ntrain = ["a.jsonl"]'), "missing key model.init_from"),
        (
            ('"test"\n[data]', '"test"\ninit_from = "m"\n[chat]\ntrain = ["a.jsonl"]\n[data]'),
            "data and chat exclude each other",
        ),
        (
            (
                '[data]\ntrain = ["shards"]',
                '[chat]\nheld_out_fraction = 1.0\nover_long = "drop"\nheld_out_tokens = 0',
            ),
            "chat.train is empty; name at least one file of conversations; chat.held_out_fraction = 1.0 must "
            "be 0 or above, below 1; chat.held_out_tokens = 0 must be at least 1; chat.over_long = 'drop' must be",
        ),
        (('["shards"]', '["a"]\nweights = [nan]'), "data.weights = [nan] must all be above 0"),
        (('["shards"]', '["a"]\nweights = [inf]'), "data.weights = [inf] must all be above 0"),
        (("steps = 3", "steps = 3\nsteps = 4"), "not TOML ("),
        (("64", "63"), "batch.tokens_per_step = 63 must be a multiple of batch.sequence_length = 16"),
        (("steps = 3", f"steps = 3\nseed = {2**63}"), "seed = 9223372036854775808 must be 0 or above"),
    ],
    ids=str,
)
def test_refusals(change: tuple[str, str], words: str) -> None:
    assert words in complaint(MINIMAL.replace(*change))


def test_files(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(MINIMAL)
    assert load_recipe(file) == load_recipe(str(file)) == parse_recipe(MINIMAL, "x")
    with pytest.raises(
        FileNotFoundError, match=r"absent: no such recipe file; recipes of the package are .*tiny-cpu"
    ):
        load_recipe("absent")
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match="mine.toml: not UTF-8 text, so no TOML"):
        load_recipe(file)
