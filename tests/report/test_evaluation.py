"""Pictures of evaluations: PNGs that show the data and refuse to mix what is not comparable."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_plots import pixels, size_of

from evaluation_records import all_eight, identity, perplexity, zero_shot
from mobilellm.eval.compare import compare
from mobilellm.eval.published import find
from mobilellm.eval.table import Measured
from mobilellm.report.evaluation import accuracy_picture, difference_picture, perplexity_picture
from mobilellm.report.plots import DARK

OPT = find("OPT-125M")


def measured(
    accuracy: float = 0.45, seed: int = 0, parameters: int = 124_635_456, name: str = "mine"
) -> Measured:
    return Measured(name, None, all_eight(accuracy, seed=seed, model=identity(name, parameters)))


def places(png: bytes, colour: tuple[int, int, int]) -> np.ndarray:
    """(N, 2): row and column of the pixels of a colour."""
    return np.argwhere(np.abs(pixels(png)[..., :3] - np.array(colour) / 255).max(axis=-1) < 0.05)


def test_accuracy_shows_the_measured_before_the_published() -> None:
    part = Measured("without all eight tasks there is no mean to draw", None, zero_shot({"piqa": [1, 0]}))
    alone = accuracy_picture([part], "paper")
    assert size_of(alone) == (1300, 1690)
    two = accuracy_picture([measured(0.4), measured(0.6, parameters=10**9, name="more")], "paper")
    assert size_of(two) == (1300, 1690)
    for first_half in (True, False):  # one panel below the other
        blue, red = (
            where[(where[:, 0] < 845) == first_half]
            for where in (places(two, (0x2F, 0x5D, 0x9B)), places(two, (0xD1, 0x49, 0x5B)))
        )
        assert min(len(blue), len(red)) > 80
        assert blue[:, 0].mean() > red[:, 0].mean() + 200  # the better above
        assert blue[:, 1].mean() < red[:, 1].mean() - 200  # the larger to the right
    assert not len(places(alone, (0x2F, 0x5D, 0x9B)))


@pytest.mark.filterwarnings("ignore:Glyph")
def test_any_name_is_taken_as_it_is() -> None:
    names = ["$x_$", "a\\frac", "日本 <b>&", "_hidden", "", "x" * 300]
    many = [measured(0.4 + 0.02 * i, name=name) for i, name in enumerate(names)]
    assert size_of(accuracy_picture(many, "acc"))[0] == 1300
    records = [
        (name, perplexity([3000.0 + i, 4000.0], identity(name), name="$t_")) for i, name in enumerate(names)
    ]
    assert size_of(perplexity_picture(records, "$t_"))[0] == 1300
    first, *others = (record for _, record in records)
    assert size_of(difference_picture([compare(first, other) for other in others]))[0] == 1118


def test_perplexity_of_one_text_and_protocol() -> None:
    a, b = perplexity([5000.0], identity("a")), perplexity([6000.0], identity("b", 10**7))
    one, two = (
        perplexity_picture([("a", a)], "wikitext2"),
        perplexity_picture([("a", a), ("b", b)], "wikitext2"),
    )
    assert size_of(one) == size_of(two) == (1300, 598)
    assert one != two
    with pytest.raises(ValueError, match="several protocols or texts"):
        perplexity_picture([("a", a), ("b", perplexity([6000.0], protocol="sliding"))], "wikitext2")
    with pytest.raises(ValueError, match="several protocols or texts"):
        perplexity_picture([("a", a), ("b", perplexity([6000.0], text_sha256="b" * 64))], "wikitext2")
    with pytest.raises(ValueError, match=r"b: has no text 'wikitext2' \(it has books\)"):
        perplexity_picture([("a", a), ("b", perplexity([6000.0], name="books"))], "wikitext2")
    with pytest.raises(ValueError, match="no record"):
        perplexity_picture([], "wikitext2")


def test_differences_grow_with_tasks_and_show_the_numbers() -> None:
    a, b, c = (
        all_eight(x, seed=i, model=identity(n))
        for i, (x, n) in enumerate(((0.4, "a"), (0.5, "b"), (0.45, "c")))
    )
    one = difference_picture([compare(a, b)])
    both = difference_picture([compare(a, b), compare(a, c)])
    assert size_of(one)[1] < size_of(both)[1]
    assert one != difference_picture([compare(a, c)])
    text = difference_picture([compare(perplexity([3e3, 4e3]), perplexity([2e3, 4e3]))])
    assert size_of(text)[1] < size_of(one)[1]
    with pytest.raises(ValueError, match="no comparison"):
        difference_picture([])


def test_a_dark_theme_is_dark() -> None:
    record = all_eight(0.4)
    pictures = (
        perplexity_picture([("a", perplexity([5e3]))], "wikitext2", DARK),
        difference_picture([compare(record, record)], DARK),
    )  # fmt: skip
    for png in pictures:
        assert pixels(png)[..., :3].mean() < 0.25


def test_no_torch_and_no_display() -> None:
    script = (
        f"import sys\nsys.path.append({str(Path(__file__).parents[1])!r})\n"
        "from evaluation_records import perplexity\n"
        "from mobilellm.report.evaluation import perplexity_picture as draw\nrecord = perplexity([5e3])\n"
        "assert 'matplotlib' not in sys.modules\ndraw([('a', record)], 'wikitext2')\n"
        "assert not {'torch', 'matplotlib.pyplot'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)
