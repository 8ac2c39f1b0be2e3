"""Messages of training as who typed a command reads them."""

from __future__ import annotations

import pytest

from mobilellm.cli.recipe_flags import in_flags
from mobilellm.train.recipe import RecipeError


@pytest.mark.parametrize(
    ("told", "read"),
    [
        ("make batch.tokens_per_step = 960", "make --batch.tokens-per-step 960"),
        ("choose another distill.cache", "choose another --distill.cache"),
        ("an optim.lr below 0.1", "an --optim.lr below 0.1"),
        ("train: missing key model.init_from; lora adapts", "train: missing --model.init-from; lora adapts"),
        ("data.document_mask = true goes by BOS", "--data.document-mask goes by BOS"),
        ("chat.packing = False, not True", "--chat.no-packing, not True"),
        ("compute.strategy = 'fsdp' splits", "--compute.strategy 'fsdp' splits"),
        ("lower batch.sequence_length.", "lower --batch.sequence-length."),
        ("data.weights = [1.0, 0.0] must", "--data.weights 1.0 0.0 must"),
        # No fields of a recipe, or named as flags already.
        ("model.safetensors is damaged", "model.safetensors is damaged"),
        ("--batch.tokens-per-step 9", "--batch.tokens-per-step 9"),
        ("/home/me/data.train: no such folder", "/home/me/data.train: no such folder"),
        ("batch.tokens_per_stepping", "batch.tokens_per_stepping"),
        ("steps = 0 must be above 0", "steps = 0 must be above 0"),
    ],
)
def test_fields_become_flags(told: str, read: str) -> None:
    assert in_flags(ValueError(told), told) == read


def test_what_is_wrong_with_a_file_is_told_by_what_stands_in_it() -> None:
    told = "mine.toml: batch.micro_batch = 0 must be above 0"
    assert in_flags(RecipeError(told), told) == told
