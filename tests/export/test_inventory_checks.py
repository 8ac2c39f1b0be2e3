"""Whatever is missing, too much, of another shape, type or size in an artefact is told by the check of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from made_up_answers import CONFIG, INVENTORY

from mobilellm.export.inventory_checks import inventory_checks
from mobilellm.export.targets import Stored


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"config": replace(CONFIG, rope_theta=5e5)}, "configuration"),
        ({"config": replace(CONFIG, tie_word_embeddings=False)}, "tied head"),
        ({"tensors": {"a": Stored((2, 3), "Q8_0")}}, "tensors"),
        ({"tensors": {**INVENTORY.tensors, "c": Stored((1,), "F32")}}, "tensors"),
        ({"tensors": {**INVENTORY.tensors, "a": Stored((3, 2), "Q8_0")}}, "tensors"),
        ({"tensors": {**INVENTORY.tensors, "a": Stored((2, 3), "F16")}}, "types"),
        ({"bytes": 106_000}, "bytes"),
        ({"bytes": 94_000}, "bytes"),
    ],
)
def test_what_lies_in_it_is_compared(change: dict[str, object], name: str) -> None:
    assert all(check.passed for check in inventory_checks(INVENTORY, INVENTORY))
    found = inventory_checks(replace(INVENTORY, **change), INVENTORY)  # type: ignore[arg-type]
    assert [check.name for check in found if not check.passed] == [name]
