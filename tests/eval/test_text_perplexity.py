from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from table_model import TableModel

from mobilellm.eval import protocols, text_perplexity
from mobilellm.eval.protocols import Unit
from mobilellm.eval.record import read, save
from mobilellm.eval.text_perplexity import PerplexitySettings, evaluate_perplexity
from mobilellm.eval.texts import Document, Text, joined_rows, read_text, whole


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("a line of text\n\nand another line\n" * 10, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("protocol", ["reference", "sliding", "document"])
def test_a_record_says_all_that_is_needed_to_run_it_again(file: str, protocol: str, tmp_path: Path) -> None:
    model = TableModel()
    record = evaluate_perplexity(model, [file], PerplexitySettings(protocol=protocol))  # type: ignore[arg-type]
    numbers = record.results["text.txt"]
    assert numbers["protocol"] == record.protocol["name"] == protocol
    assert record.protocol["window"] == 16
    assert record.scored == len(model.asked)
    assert sum(record.items["text.txt"]["tokens"]) == numbers["tokens"]
    save(record, tmp_path / "record.json")
    assert read(tmp_path / "record.json") == record


def twice(text: Text) -> list[Document]:
    """In place of the articles, which need lm-eval."""
    return whole(text) * 2


Cut = Callable[[TableModel, Text], list[Unit]]
SAID: list[tuple[PerplexitySettings, Cut, dict[str, Any]]] = [
    (
        PerplexitySettings(),
        lambda model, text: protocols.reference(model, joined_rows(text), 40),
        {"window": 40, "rows": "joined"},
    ),
    (
        PerplexitySettings(window=6, rows="as-is"),
        lambda model, text: protocols.reference(model, text.content, 6),
        {"window": 6, "rows": "as-is"},
    ),
    (
        PerplexitySettings("sliding"),
        lambda model, text: protocols.sliding(model, text.content, 40, 20),
        {"window": 40, "rows": "as-is", "stride": 20},
    ),
    (
        PerplexitySettings("sliding", window=7, stride=2, rows="joined"),
        lambda model, text: protocols.sliding(model, joined_rows(text), 7, 2),
        {"window": 7, "rows": "joined", "stride": 2},
    ),
    (
        PerplexitySettings("document"),
        lambda model, text: protocols.document(model, whole(text), 40),
        {"window": 40, "documents": {"text.txt": "whole"}},
    ),
    (
        PerplexitySettings("document", window=9, documents="articles"),
        lambda model, text: protocols.document(model, twice(text), 9),
        {"window": 9, "documents": {"text.txt": "articles"}},
    ),
]


@pytest.mark.parametrize(("settings", "cut", "protocol"), SAID)
def test_what_is_measured_is_what_the_settings_say(
    file: str,
    settings: PerplexitySettings,
    cut: Cut,
    protocol: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The very questions and numbers of the protocol, and all of it told in the record."""
    monkeypatch.setattr(text_perplexity, "articles", twice)
    model, twin, text = TableModel(40), TableModel(40), read_text(file)
    record = evaluate_perplexity(model, [file], settings)
    numbers, items = protocols.score(twin, cut(twin, text))
    assert model.asked == twin.asked
    told = {"protocol": settings.protocol, **numbers, "text_sha256": text.sha256}
    assert (record.results, record.items) == ({"text.txt": told}, {"text.txt": items})
    assert record.protocol == {"name": settings.protocol, **protocol}


@pytest.mark.parametrize(("protocol", "window"), [("reference", 2048), ("sliding", 3000), ("document", 3000)])
def test_the_window_is_the_context_and_of_the_reference_no_more_than_its_own(
    file: str, protocol: Any, window: int
) -> None:
    Path(file).write_text("a line of text\n" * 200, encoding="utf-8")
    record = evaluate_perplexity(TableModel(3000), [file], PerplexitySettings(protocol))
    assert record.protocol["window"] == window


def test_reference_joins_rows_and_sliding_leaves_the_text_alone(file: str) -> None:
    size = len(Path(file).read_bytes())
    model = TableModel()
    as_it_is = evaluate_perplexity(model, [file], PerplexitySettings("sliding"))
    joined = evaluate_perplexity(model, [file], PerplexitySettings("sliding", rows="joined"))
    assert as_it_is.results["text.txt"]["bytes"] == size
    assert joined.results["text.txt"]["bytes"] > size


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (PerplexitySettings(window=17), "window = 17 must lie in 2 … 16, the context of the model"),
        (PerplexitySettings(window=1), "window = 1 "),
        (PerplexitySettings(stride=4), "stride = 4 does not go with the reference protocol"),
        (
            PerplexitySettings("document", rows="joined"),
            "rows = joined does not go with the document protocol",
        ),
        (PerplexitySettings("sliding", documents="whole"), "documents = whole does not go with the sliding"),
        (PerplexitySettings("other"), "protocol = 'other' is not known"),  # type: ignore[arg-type]
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    file: str, settings: PerplexitySettings, message: str
) -> None:
    model = TableModel()
    with pytest.raises(ValueError, match="leave it out|must lie|choose one") as caught:
        evaluate_perplexity(model, [file], settings)
    assert message in str(caught.value)
    assert not model.asked


def test_two_texts_of_one_name_are_refused(file: str) -> None:
    with pytest.raises(ValueError, match="two texts are called text.txt"):
        evaluate_perplexity(TableModel(), [file, file], PerplexitySettings())
