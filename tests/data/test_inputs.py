"""What a word on the command line stands for."""

from __future__ import annotations

from pathlib import Path

import pytest

from mobilellm.data.inputs import find_sources, format_of


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in (
        "b.txt",
        "a.jsonl.gz",
        "sub/c.ndjson.xz",
        "sub/deep/d.PARQUET",
        "sub/readme.md",
        ".hidden.txt",
        "sub/.git/e.txt",
        "wiki_00",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("text")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def found(*words: str, format: str | None = None) -> list[tuple[str, str]]:
    return [(source.name, source.format) for source in find_sources(words, format).read]  # type: ignore[arg-type]


def test_a_folder_in_order_to_the_bottom(tree: Path) -> None:
    assert found(".") == [
        ("a.jsonl.gz", "jsonl"),
        ("b.txt", "text"),
        ("sub/c.ndjson.xz", "jsonl"),
        ("sub/deep/d.PARQUET", "parquet"),
    ]
    assert find_sources(["."]).passed_over == ("wiki_00", "sub/readme.md")


def test_a_format_for_names_that_tell_none(tree: Path) -> None:
    assert ("wiki_00", "jsonl") in found(".", format="jsonl")
    assert ("b.txt", "text") in found(".", format="jsonl")
    assert not find_sources(["."], "jsonl").passed_over
    assert found("wiki_00", format="text") == [("wiki_00", "text")]
    with pytest.raises(ValueError, match=r"wiki_00: its name does not tell .* --format"):
        found("wiki_00")


def test_patterns_and_repetitions(tree: Path) -> None:
    assert found("*.txt", "b.txt", str(tree / "b.txt")) == [("b.txt", "text")]
    assert found("sub/**/*.xz", "*.gz") == [("sub/c.ndjson.xz", "jsonl"), ("a.jsonl.gz", "jsonl")]
    assert found("su?") == [("sub/c.ndjson.xz", "jsonl"), ("sub/deep/d.PARQUET", "parquet")]
    with pytest.raises(FileNotFoundError, match=r"\*.csv: no file matches this pattern"):
        found("*.csv")


def test_folders_a_pattern_matches_are_not_passed_over_for_files_beside_them(tree: Path) -> None:
    assert found("[bs]*") == [
        ("b.txt", "text"),
        ("sub/c.ndjson.xz", "jsonl"),
        ("sub/deep/d.PARQUET", "parquet"),
    ]
    assert found("sub/**/*.PARQUET") == [("sub/deep/d.PARQUET", "parquet")]
    (tree / "deep.txt").write_text("beside a folder of that name")
    assert found("**/deep*") == [("deep.txt", "text"), ("sub/deep/d.PARQUET", "parquet")]


def test_links_that_lead_back_up_are_followed_once(tree: Path) -> None:
    everything = found(".")
    (tree / "there").symlink_to("sub")
    assert found("there") == [("there/c.ndjson.xz", "jsonl"), ("there/deep/d.PARQUET", "parquet")]
    for name, target in (("aa", "."), ("sub/a", ".."), ("sub/deep/a", "../.."), ("sub/deep/z", "..")):
        (tree / name).symlink_to(target)
    assert sorted(found(".")) == sorted(everything)  # each loop would double the names at every level


def test_an_empty_word_is_not_the_folder_one_stands_in(tree: Path) -> None:
    for word in ("", "hf://"):
        with pytest.raises(ValueError, match=f"'{word}': an input without a name"):
            found(word)


def test_a_format_that_no_input_has(tree: Path) -> None:
    with pytest.raises(ValueError, match=r"format = 'jsonl'.* b.txt is text"):
        found("b.txt", format="jsonl")
    assert found("a.jsonl.gz", format="jsonl") == [("a.jsonl.gz", "jsonl")]


def test_a_name_with_the_signs_of_a_pattern(tree: Path) -> None:
    (tree / "a[1].txt").write_text("x")
    assert found("a[1].txt") == [("a[1].txt", "text")]


def test_sizes_and_times(tree: Path) -> None:
    (source,) = find_sources(["b.txt"]).read
    assert source.size == 4
    assert source.modified == (tree / "b.txt").stat().st_mtime_ns


def test_the_hub_and_standard_input(tree: Path) -> None:
    assert found("hf://org/name", "org/other.v2") == [("org/name", "hub"), ("org/other.v2", "hub")]
    assert found("-", format="text") == [("-", "text")]
    for format in (None, "parquet"):
        with pytest.raises(ValueError, match="standard input: say what it holds"):
            found("-", format=format)


@pytest.mark.parametrize("word", ["missing.txt", "missing/file.jsonl", "./org/name", "a/b/c", "missing"])
def test_what_is_not_there(tree: Path, word: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"{word}: no such file or folder"):
        found(word)


def test_nothing_to_read(tree: Path) -> None:
    (tree / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty: no file there whose name tells its format"):
        found("empty")
    with pytest.raises(ValueError, match="no input"):
        found()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("x.txt", "text"),
        ("x.TEXT.zst", "text"),
        ("x.jsonl", "jsonl"),
        ("x.v1.ndjson.bz2", "jsonl"),
        ("x.parquet", "parquet"),
        ("x.gz", None),
        ("txt", None),
        ("x.md", None),
    ],
)
def test_what_a_name_tells(name: str, expected: str | None) -> None:
    assert format_of(Path(name)) == expected
