"""Likelihoods by the logits of a runtime are those of the evaluation's own way into it."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from mobilellm.eval.interface import Request
from mobilellm.eval.models import open_model
from mobilellm.export.engine_runtime import engine_runtime
from mobilellm.export.scored import ArtefactModel

sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))
from gguf_files import SHAPE, exported


def test_they_are_those_of_the_faster_way(tmp_path: Path) -> None:
    file, _ = exported(tmp_path, "q8_0")
    requests = [
        Request((1, 30, 40), (50, 60)),
        Request((1, 30), (40,)),
        Request((1,), (7, 8, 9)),
        Request((1, 30), (40,)),
    ]
    report = {"options": {"type": "Q8_0"}, "sha256": "0", "parameters": 1, "bytes": 2}
    with engine_runtime(file) as runtime:
        model = ArtefactModel(runtime, file, SHAPE, report)
        found = dict(model.log_likelihoods(requests))
        wanted = dict(open_model(file).log_likelihoods(requests))
        assert model.encode(["some words"], special=False) == open_model(file).encode(
            ["some words"], special=False
        )
        with pytest.raises(ValueError, match="does not tell the text"):
            model.greedy([[1]], [], 3)
        with pytest.raises(ValueError, match="does not lie in the model's vocabulary"):
            model.log_likelihoods([Request((1,), (400,))])
    assert found.keys() == wanted.keys() == {0, 1, 2, 3}
    for number, answer in wanted.items():
        np.testing.assert_allclose(found[number].tokens, answer.tokens, atol=1e-5)
        assert found[number].greedy == answer.greedy
