"""The published figures: whole, in the right columns, found by every name, and strictly read."""

from __future__ import annotations

import re
from importlib.resources import files
from statistics import mean

import pytest

from mobilellm.accounting import stored_parameters
from mobilellm.eval.published import SIZES, TASKS, TITLES, find, parse, published
from mobilellm.presets import PUBLISHED, preset

PAPER = {
    # The paper's table 8, written down apart from the card: ARC-e … WinoGrande, average.
    "125m": (43.9, 27.1, 60.2, 65.3, 42.4, 38.9, 39.5, 53.1, 46.3),
    "ls-125m": (45.8, 28.7, 60.4, 65.7, 42.9, 39.5, 41.1, 52.1, 47.0),
    "350m": (53.8, 33.5, 62.4, 68.6, 44.7, 49.6, 40.0, 57.6, 51.3),
    "ls-350m": (54.4, 32.5, 62.8, 69.8, 44.1, 50.6, 45.8, 57.2, 52.1),
    "600m": (58.1, 35.8, 61.0, 72.3, 44.9, 55.9, 47.9, 58.6, 54.3),
    "1b": (63.0, 39.0, 66.7, 74.4, 45.0, 61.4, 46.8, 62.3, 57.3),
    "1.5b": (67.5, 40.9, 65.7, 74.8, 46.4, 64.5, 50.5, 64.7, 59.4),
}
PAPER_AVERAGES = {
    "OPT-125M": 42.6, "GPT-neo-125M": 42.9, "Pythia-160M": 42.5, "OPT-350M": 43.9, "Pythia-410M": 46.6,
    "BLOOM-560M": 44.2, "Qwen1.5-500M": 48.8, "MobiLlama-800M": 50.7, "TinyLlama-1.1B": 54.2,
    "MobiLlama-1B": 55.2, "Falcon-1B": 56.3, "Qwen1.5-1.8B": 56.5,
}  # fmt: skip


def text() -> str:
    return (files("mobilellm.eval") / "published.toml").read_text(encoding="utf-8")


def test_every_system_of_the_card_is_there() -> None:
    names = [system.name for system in published()]
    assert len(names) == 28
    assert [sum(system.size == size for system in published()) for size in SIZES] == [5, 4, 4, 6, 9]
    for family, sizes in {
        "OPT": "125M 350M 1.3B 2.7B", "GPT-neo": "125M 1.3B 2.7B", "Pythia": "160M 410M 1B 2.8B",
        "Qwen1.5": "500M 1.8B", "BLOOM": "560M 1.1B 1.7B 3B", "MobiLlama": "800M 1B", "Falcon": "1B",
        "TinyLlama": "1.1B", "MobileLLM": "125M 350M 600M 1B 1.5B", "MobileLLM-LS": "125M 350M",
    }.items():  # fmt: skip
        assert {f"{family}-{size}" for size in sizes.split()} <= set(names)


def test_they_agree_with_the_paper() -> None:
    assert set(PAPER) == set(PUBLISHED)
    for name, values in PAPER.items():
        system = find(name)
        assert system is not None
        assert (*system.percent.values(), system.average) == values
    for name, average in PAPER_AVERAGES.items():
        system = find(name)
        assert system is not None
        assert system.average == average


@pytest.mark.parametrize("system", published(), ids=lambda system: system.name)
def test_averages_recompute_from_the_eight(system: object) -> None:
    """Of all 28, no exception: each value is rounded to 0.1, so is the mean, and that is all."""
    assert abs(mean(system.percent.values()) - system.average) <= 0.06  # type: ignore[attr-defined]


def test_columns_are_in_the_corrected_order() -> None:
    """WinoGrande has two answers, ARC-c four: under the card's own header both would be impossible."""
    assert tuple(published()[0].percent) == TASKS
    assert len(TITLES) == len(TASKS)
    for system in published():
        assert system.percent["winogrande"] > 50
        assert system.percent["arc_challenge"] < 41
        assert system.percent["piqa"] > 60
        assert system.percent["arc_easy"] > system.percent["arc_challenge"]


def test_parameters_of_ours_are_exact() -> None:
    for name in PUBLISHED:
        system = find(name)
        assert system is not None
        assert system.parameters == stored_parameters(preset(name)).total
        assert not system.approximate
    for system in published():  # a size in a name is a rounded count
        size = re.search(r"([0-9.]+)([MB])$", system.name)
        assert size is not None
        stated = float(size[1]) * {"M": 1e6, "B": 1e9}[size[2]]
        assert 0.75 < system.parameters / stated < 1.32


def test_found_by_any_name() -> None:
    for system in published():
        for name in (system.name, system.hub, system.preset or system.hub):
            assert find(name) is system
            assert find(name.upper()) is system
    assert find("gpt2") is None
    assert find("") is None


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ('hub = "facebook/opt-125m"', 'hubb = "facebook/opt-125m"', "OPT-125M: missing or not known: hub, hubb"),
        ('hub = "facebook/opt-125m"', 'hub = "facebook/opt-350m"', "hub facebook/opt-350m stands there twice"),
        ('name = "OPT-125M"', 'name = "OPT-350M"', "name opt-350m stands there twice"),
        ("parameters = 125_239_296", 'parameters = "125M"', "OPT-125M: parameters = '125M' must be a int"),
        ("[41.3, 25.2,", "[41.3,", "OPT-125M: percent and average must be 8 + 1"),
        ("[41.3, 25.2,", "[413.0, 25.2,", "OPT-125M: percent and average must be 8 + 1"),
        ("average = 42.6", "average = 142.6", "OPT-125M: percent and average must be 8 + 1"),
        ('size = "125m"', 'size = "130m"', "size = '130m' must be one of 125m, 350m"),
        ('"arc_easy", "arc_challenge"', '"arc_challenge", "arc_easy"', "tasks ="),
        ("source =", "sauce =", "the file: missing or not known: sauce, source"),
    ],
)  # fmt: skip
def test_the_file_is_read_strictly(old: str, new: str, complaint: str) -> None:
    assert old in text()
    with pytest.raises(ValueError, match="published figures") as caught:
        parse(text().replace(old, new, 1))
    assert complaint in str(caught.value)


def test_the_file_is_in_the_package() -> None:
    assert parse(text()) == published()
