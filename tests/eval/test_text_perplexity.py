from __future__ import annotations

from pathlib import Path

import pytest
from table_model import TableModel

from mobilellm.eval.record import read, save
from mobilellm.eval.text_perplexity import PerplexitySettings, evaluate_perplexity


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
