"""What transformers is not asked to run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mobilellm.layouts import config_json
from mobilellm.presets import preset

pytest.importorskip("transformers", reason="needs transformers (extra hf)")


def test_a_layout_that_it_has_no_class_for(tmp_path: Path) -> None:
    """Its own refusal asks for trust_remote_code, which no flag of the benchmark gives."""
    from mobilellm.bench.transformers_contestant import TransformersContestant

    (tmp_path / "config.json").write_text(json.dumps(config_json(preset("test-ls"), "mobilellm", "float32")))
    with pytest.raises(ValueError, match=f"mobilellm convert {tmp_path} OUT --to llama --unroll"):
        TransformersContestant(str(tmp_path), 1, 8)
