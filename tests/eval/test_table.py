"""The tables: published, ours and the difference, in the right rows and columns."""

from __future__ import annotations

import pytest

from evaluation_records import all_eight, identity, zero_shot
from mobilellm.eval.published import SIZES, TASKS, find, published
from mobilellm.eval.table import HEADER, Measured, by_table, differences, entries, rows, scores, table_json

OPT, MOBILE = find("OPT-125M"), find("125m")


def test_the_published_tables_are_the_cards() -> None:
    found = entries(SIZES, [])
    assert [entry.system for entry in found] == list(published())
    assert [title for title, _ in by_table(found)] == ["125M", "350M", "600M", "1B", "1.5B"]
    lines = rows(entries(["125m"], []), "paper")
    assert lines[0] == ("OPT-125M", "41.3", "25.2", "57.5", "62.0", "41.9", "31.1", "31.2", "50.8", "42.6")
    assert all(len(line) == len(HEADER) for line in lines)


def test_ours_and_the_difference_stand_below_the_published() -> None:
    record = zero_shot({task: [1.0] * 3 + [0.0] * 5 for task in TASKS}, identity("x"))  # 37.5 % of each
    lines = rows(entries(["125m"], [Measured("facebook/opt-125m", OPT, record)]), "paper")
    names = [line[0] for line in lines]
    assert names[:4] == ["OPT-125M", "  ours: facebook/opt-125m", "  difference", "GPT-neo-125M"]
    assert lines[1][1:] == ("37.5",) * 9
    assert lines[2][1:] == ("-3.8", "+12.3", "-20.0", "-24.5", "-4.4", "+6.4", "+6.3", "-13.3", "-5.1")


def test_two_models_of_one_row_both_stand_there() -> None:
    measured = [Measured(name, MOBILE, all_eight(0.4, seed=i)) for i, name in enumerate(("one", "two"))]
    names = [line[0] for line in rows(entries(["125m"], measured), "acc")]
    at = names.index("MobileLLM-125M")
    assert names[at : at + 5] == [
        "MobileLLM-125M",
        "  ours: one",
        "  difference",
        "  ours: two",
        "  difference",
    ]


def test_what_is_not_on_the_card_comes_last_and_other_sizes_are_not_lost() -> None:
    measured = [Measured("mine", None, all_eight(0.4)), Measured("x", find("OPT-1.3B"), all_eight(0.4))]
    tables = by_table(entries(["125m"], measured))
    assert [title for title, _ in tables] == ["125M", "1.5B", "not on the card"]
    assert [line[0] for line in rows(tables[1][1], "acc")] == ["OPT-1.3B", "  ours: x", "  difference"]
    assert [line[0] for line in rows(tables[2][1], "acc")] == ["mine"]


def test_missing_tasks_have_no_value_and_no_average() -> None:
    record = zero_shot({"piqa": [1, 0], "boolq": [1, 1]}, limit=2)
    lines = rows(entries([], [Measured("m", OPT, record)]), "acc")
    assert lines[1] == ("  ours: m (first 2 of each)", "-", "-", "100.0", "50.0", "-", "-", "-", "-", "-")
    assert lines[2][3:5] == ("+42.5", "-12.0")
    assert lines[2][-1] == "-"


def test_the_metric_is_the_one_asked_for_and_the_average_is_the_records() -> None:
    answers = {task: [1.0, 0.0, 0.0, 0.0] for task in TASKS}
    record = zero_shot(answers, norm={task: [1, 1, 0, 0] for task in TASKS}, paper={task: [1, 1, 1, 0] for task in TASKS})  # fmt: skip
    for metric, value in (("acc", 25.0), ("acc_norm", 50.0), ("paper", 75.0)):
        found = scores(record, metric)
        assert found.percent["piqa"] == value
        assert found.average == pytest.approx(100 * record.results["average"][metric])
    assert scores(record, "acc_norm").percent["boolq"] == 25.0  # has no acc_norm
    del record.results["piqa"]["paper"]
    with pytest.raises(ValueError, match="piqa has no paper"):
        scores(record, "paper")


def test_as_plain_values() -> None:
    record = all_eight(0.4)
    (line,) = [x for x in table_json(entries(["125m"], [Measured("m", OPT, record)]), "acc") if x["measured"]]
    assert (line["name"], line["hub"], line["published"]["average"]) == (
        "OPT-125M",
        "facebook/opt-125m",
        42.6,
    )
    ours = line["measured"][0]
    assert OPT is not None
    change = differences(OPT, scores(record, "acc"))
    assert (
        ours["difference"]["piqa"] == pytest.approx(ours["percent"]["piqa"] - 62.0) == change.percent["piqa"]
    )
    assert ours["difference"]["average"] == pytest.approx(ours["percent"]["average"] - 42.6)
    assert (
        table_json(entries([], [Measured("m", None, record)]), "acc")[0]["measured"][0]["difference"] is None
    )
