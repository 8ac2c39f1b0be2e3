"""A report's folder: the page says what the numbers are, and no file of another is touched."""

from __future__ import annotations

import base64
import json
import math
from pathlib import Path
from typing import Any

import pytest
from run_folders import FACTS, RECIPE, evaluation, records, step_record, write_run
from test_page import HOSTILE, Reader
from test_plots import size_of

from mobilellm.report.history import read_history
from mobilellm.report.page import Name, Picture, report_page
from mobilellm.report.plots import LIGHT
from mobilellm.report.written import number_rows, read_runs, run_labels, write_report

PICTURES = [
    "loss.png",
    "loss-late.png",
    "learning-rate.png",
    "gradient-norm.png",
    "throughput.png",
    "mfu.png",
]


class PageReader(Reader):
    """Also the rows of the tables, cell by cell."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        super().handle_starttag(tag, attributes)
        if tag == "source":
            self.open.pop()
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        super().handle_data(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def read(text: str) -> PageReader:
    reader = PageReader()
    reader.feed(text)
    reader.close()
    assert not reader.open
    return reader


def report(out: Path, *folders: Path) -> PageReader:
    page, *_ = write_report(read_runs(folders), out)
    return read(page.read_text("utf-8"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PageReader]:
    """A report's folder and its page."""
    folder = tmp_path_factory.mktemp("report")
    return folder / "out", report(folder / "out", write_run(folder / "x"))


@pytest.fixture
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A report draws twenty pictures, a second of work: left out where they are not what is tested."""
    monkeypatch.setattr("mobilellm.report.written.draw", lambda panel, *_, **__: panel.name.encode())


def test_the_page_of_a_run(whole: tuple[Path, PageReader]) -> None:
    out, reader = whole
    assert sorted(file.name for file in out.iterdir()) == sorted([*PICTURES, "report.html", "report.json"])
    assert all(size_of((out / name).read_bytes()) for name in PICTURES)
    rows = {row[0]: row[1:] for row in reversed(reader.rows)}  # the recipe has steps, too: the first count
    loss = sum(8 / math.sqrt(step) for step in range(51, 101)) / 50
    for name, value in {
        "parameters": "1,234,567",
        "device": "2 × NVIDIA H100 80GB HBM3",
        "steps": "100 of 200",
        "tokens": "100K",
        "train loss": f"{loss:.4f}",
        "held-out loss": "2.5000",
        "held-out perplexity": f"{math.exp(2.5):.2f}",
        "held-out bits per byte": f"{2.5 / 3:.4f}",
        "held-out loss at its best": "2.0000 (step 50)",
        "tokens/s": "10,000",
        "MFU (6N + attention)": "4.0%",
        "6N MFU": "3.0%",
        "waiting for data": "1.34%",
        "peak memory a device": "5.00 GB",
        "time in steps": "15 s",
        "optim.lr": "0.002",
        "data.train": '["shards"]',
    }.items():
        assert rows[name] == [value], name
    assert reader.texts["h1"] == ["a run"]
    assert reader.texts["h3"][-2:] == ["Step 100", "Step 50"]
    assert reader.texts["pre"] == ["Once at the end", "The end <b>&", "Once half-way"]
    assert reader.texts["p"][0] == (
        "1.2M parameters · 2 × NVIDIA H100 80GB HBM3 · step 100 of 200 (50%) · started 2026-11-20"
    )


def test_every_picture_is_in_it_for_light_and_dark(whole: tuple[Path, PageReader]) -> None:
    out, reader = whole
    values = [
        value for tag, name, value in reader.attributes if name in ("src", "srcset") and value is not None
    ]
    assert len(values) == 4 + 2 * (len(PICTURES) - 1)
    pictures = [base64.b64decode(value.removeprefix("data:image/png;base64,")) for value in values]
    assert all(size_of(picture) for picture in pictures)
    assert len(set(pictures)) == len(pictures)
    assert (out / "loss.png").read_bytes() in pictures
    conditions = [value for _, name, value in reader.attributes if name == "media"]
    assert conditions.count("(prefers-color-scheme: dark)") == len(PICTURES)
    assert all(value for tag, name, value in reader.attributes if (tag, name) == ("img", "alt"))
    # nothing from outside
    text = (out / "report.html").read_text("utf-8")
    for word in ("http:", "https:", "url(", "@import", "<script", "<link"):
        assert word not in text


@pytest.mark.usefixtures("no_drawing")
def test_runs_compared(tmp_path: Path) -> None:
    other = RECIPE.replace("0.002", "0.004").replace("adamw", "muon")
    lines = [*records(), evaluation(100, 2.25, **{"wiki/loss": 2.0})]
    first = write_run(tmp_path / "first", facts=FACTS | {"name": "first"})
    second = write_run(tmp_path / "second", lines, facts=FACTS | {"name": "second"}, recipe=other)
    old = write_run(tmp_path / "old", facts=None, recipe=None)
    reader = report(tmp_path / "out", first, second, old)
    assert reader.texts["h1"] == ["3 runs compared"]
    assert reader.texts["li"] == ["first", "second", "old"]
    lines = [value for tag, name, value in reader.attributes if (tag, name) == ("i", "style")]
    assert [line.split(";")[0] for line in lines] == [f"--light: {colour}" for colour in LIGHT.runs[:3]]
    rows = {row[0]: row[1:] for row in reader.rows}
    assert reader.rows[0] == ["", "first", "second", "old"]
    assert rows["held-out loss"] == ["2.5000", "2.2500", "2.5000"]
    assert rows["held-out loss (wiki)"] == ["-", "2.0000", "-"]
    assert rows["MFU (6N + attention)"] == ["4.0%", "4.0%", "-"]
    assert rows["optim.name"] == ["adamw", "muon", "-"]
    assert rows["optim.lr"] == ["0.002", "0.004", "-"]
    assert "seed" not in rows
    assert [title for title in reader.texts["h3"] if "step" in title] == [
        "first, step 100",
        "second, step 100",
        "old, step 100",
    ]
    same = report(tmp_path / "same", first, write_run(tmp_path / "copy"))
    assert not any(row[0].startswith("optim.") for row in same.rows)


def test_a_name_twice_is_told_by_folder_and_a_folder_twice_refused(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name) for name in ("one", "two")]
    assert run_labels(read_runs(folders)) == [str(folder) for folder in folders]
    with pytest.raises(ValueError, match="one/../one: named twice"):
        read_runs([folders[0], folders[0] / ".." / "one"])


@pytest.mark.usefixtures("no_drawing")
def test_the_numbers_as_json(tmp_path: Path) -> None:
    lines = [*records(), step_record(101, loss=math.nan)]
    report(tmp_path, write_run(tmp_path / "x", lines))
    values = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    (run,) = values["runs"]
    assert run["train_loss"] is None
    assert run["tokens_per_second"] == pytest.approx(10_000)
    assert set(values["files"]) == {file.name for file in tmp_path.iterdir() if file.is_file()}


@pytest.mark.usefixtures("no_drawing")
def test_a_report_replaces_its_own_files_only(tmp_path: Path) -> None:
    run, out = write_run(tmp_path / "x"), tmp_path / "out"
    report(out, run)
    (out / "notes.txt").write_text("mine")
    before = (out / "report.html").read_bytes()
    write_run(tmp_path / "x", facts=FACTS | {"peak_flops": None})
    report(out, run)
    assert (out / "report.html").read_bytes() != before
    assert not (out / "mfu.png").exists()  # of the report before, and not true any more
    assert (out / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["loss.png", "report.html", "report.json"])
@pytest.mark.parametrize("kind", ["file", "folder", "dead link", "older report"])
def test_files_of_others_are_refused(tmp_path: Path, name: str, kind: str) -> None:
    run, out = write_run(tmp_path / "x"), tmp_path / "out"
    out.mkdir()
    if kind == "older report":
        if name == "report.json":
            pytest.skip("is the list itself")
        (out / "report.json").write_text(
            json.dumps({"format": "mobilellm-report-1", "files": ["report.json"]})
        )
    if kind == "folder":
        (out / name).mkdir()
    elif kind == "dead link":
        (out / name).symlink_to(tmp_path / "gone")
    else:
        (out / name).write_text('{"format": "other"}')
    there = sorted(out.iterdir())
    with pytest.raises(FileExistsError, match=rf"{name}: is there and no report made it"):
        report(out, run)
    assert sorted(out.iterdir()) == there
    if kind in ("file", "older report"):
        assert (out / name).read_text() == '{"format": "other"}'


@pytest.mark.usefixtures("no_drawing")
def test_a_list_that_points_outside_deletes_nothing(tmp_path: Path) -> None:
    run, out = write_run(tmp_path / "x"), tmp_path / "out"
    out.mkdir()
    (tmp_path / "precious").write_text("here")
    listed = {"format": "mobilellm-report-1", "files": ["../precious", "report.json", 7, ".."]}
    (out / "report.json").write_text(json.dumps(listed))
    report(out, run)
    assert (tmp_path / "precious").read_text() == "here"


def page(**changes: Any) -> str:
    arguments: dict[str, Any] = {
        "title": "A run",
        "lead": "What it was.",
        "pictures": [
            Picture("Loss", "Of it.", "a line", b"1", b"2", b"3", b"4"),
            Picture("x", "y", "z", b"5", b"6"),
        ],
        "numbers": [("", "a"), ("loss", "1")],
        "notes": ["how"],
        "recipe": ("Recipe", [("", ""), ("steps", "1")]),
        "samples": [("Step 1", [("Once", " upon")])],
        "names": [Name("it", "#123", "#456", "solid")],
    }
    return report_page(**(arguments | changes))


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_text(text: str) -> None:
    plain = read(page())
    for changes in (
        {"title": text},
        {"lead": text},
        {"names": [Name(text, "#123", "#456", "solid")]},
        {
            "pictures": [
                Picture(text, text, text, b"1", b"2", b"3", b"4"),
                Picture(text, text, text, b"5", b"6"),
            ]
        },
        {"numbers": [("", text), (text, text)]},
        {"notes": [text]},
        {"recipe": (text, [("", ""), (text, text)])},
        {"samples": [(text, [(text, "")])]},
        {"samples": [("Step 1", [("Once", text)])]},
    ):
        reader = read(page(**changes))
        assert reader.tags == plain.tags
        assert [(tag, name) for tag, name, _ in reader.attributes] == [
            (tag, name) for tag, name, _ in plain.attributes
        ]
        everything = [part for parts in reader.texts.values() for part in parts]
        assert any(text in part for part in everything)


def test_a_long_recipe_stays_closed() -> None:
    fields = [("", ""), *((f"field {i}", "1") for i in range(60))]
    reader = read(page(recipe=("Recipe", fields)))
    assert reader.texts["summary"] == ["60 fields"]
    assert "details" not in read(page()).tags


def test_a_run_that_went_on_elsewhere(tmp_path: Path) -> None:
    starts = [
        {"step": 0, "device": "A", "world_size": 4, "peak_flops": 1e12},
        {"step": 50, "device": "B", "world_size": 1, "peak_flops": 1e12},
    ]
    history = read_history(write_run(tmp_path, facts=FACTS | {"starts": starts}))
    assert dict(number_rows([history], ["x"])[1:])["device"] == "4 × A, then B"
