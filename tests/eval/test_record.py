from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from table_model import TableModel

from mobilellm.eval.record import Record, read, record, save, to_json


@pytest.fixture
def made() -> Record:
    return record(
        "perplexity", TableModel().identity, {"name": "reference"}, {"a": {"nats": 1.5}}, {"a": {"nats": [1.5]}},
        0.5, 3, 1,
    )  # fmt: skip


def test_a_record_comes_back_as_it_was(made: Record, tmp_path: Path) -> None:
    save(made, tmp_path / "a.json")
    assert read(tmp_path / "a.json") == made
    assert made.environment["packages"]["numpy"] != "absent"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.pop("format"), 'its "format" is not'),
        (lambda content: content.pop("items"), "fields missing or not known: items"),
        (lambda content: content.update(extra=1), "fields missing or not known: extra"),
        (lambda content: content.update(kind="other"), "kind = 'other' is not one of perplexity, zero-shot"),
        (lambda content: content["model"].pop("dtype"), "model: "),
    ],
)
def test_what_is_no_record_is_refused_in_one_line(
    made: Record, tmp_path: Path, change: Any, message: str
) -> None:
    content = to_json(made)
    change(content)
    file = tmp_path / "a.json"
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=r"a\.json: ") as caught:
        read(file)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_cut_off_file_is_named(made: Record, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    save(made, file)
    file.write_text(file.read_text(encoding="utf-8")[:-20], encoding="utf-8")
    with pytest.raises(ValueError, match=r"a\.json: is no evaluation record"):
        read(file)
    with pytest.raises(ValueError, match="is a directory; name a record, which mobilellm eval ppl"):
        read(tmp_path)


def test_fields_are_those_the_docs_name(made: Record) -> None:
    assert set(to_json(made)) == {"format", *(field.name for field in dataclasses.fields(Record))}
