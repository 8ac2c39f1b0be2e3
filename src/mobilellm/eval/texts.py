"""Texts to measure perplexity on: any text file, and the WikiText-2 test split by rows and by articles."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mobilellm.hub_connection import hub_or_cache

WIKITEXT2 = "wikitext2"
_ROWS = ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")
"""Repository, configuration and split on the Hub."""

_WORDS_APART = re.compile(r"\s+")


@dataclass(frozen=True)
class Text:
    """A text and where it came from."""

    name: str
    content: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content.encode()).hexdigest()


@dataclass(frozen=True)
class Document:
    """A text that is predicted by itself.

    Its words and bytes are counted on `original`, which may differ from what the model reads: WikiText is
    published with spaces around its punctuation, and models are given ordinary English.
    """

    content: str
    original: str

    @property
    def words(self) -> int:
        """As lm-eval counts: the pieces between runs of white space, empty ones at the ends included."""
        return len(_WORDS_APART.split(self.original))

    @property
    def bytes(self) -> int:
        return len(self.original.encode())


def read_text(source: str | Path) -> Text:
    """A UTF-8 text file, or the raw WikiText-2 test file from the Hub where `source` is "wikitext2".

    A file of that name wins over the Hub. Raises FileNotFoundError, or ValueError for what is no text.
    """
    path = Path(source)
    if not path.exists() and str(source) == WIKITEXT2:
        return _wikitext2()
    if path.is_dir():
        raise ValueError(f"{source}: is a directory; name a text file, or {WIKITEXT2}")
    try:
        content = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: is no UTF-8 text (byte {error.start}: {error.reason})") from None
    if not content.strip():
        raise ValueError(f"{source}: is empty; there is nothing to predict")
    return Text(path.name, content)


def joined_rows(text: Text) -> str:
    """The file as the reference's evaluation reads it: its rows joined by blank lines.

    A row is a line with its line break, and empty where the line holds only white space, as the data set is
    served on the Hub.
    """
    return "\n\n".join(line if line.strip() else "" for line in _lines(text.content))


def articles(text: Text) -> list[Document]:
    """WikiText by articles, each from its heading " = Title = " to the next one's, in ordinary English.

    Cut as EleutherAI/wikitext_document_level is, which lm-eval's `wikitext` reads, and rewritten by lm-eval's
    own function. Raises ValueError for a text without such a heading.
    """
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

    pages: list[str] = []
    lines: list[str] = []
    found = False
    for line in [*text.content.split("\n"), None]:
        heading = line is not None and _is_title(line)
        found |= heading
        if line is None or heading:
            page = "\n".join(lines)
            if page.strip():
                pages.append(page)
            lines = []
        if line is not None:
            lines.append(line)
    if not found:
        raise ValueError(
            f'{text.name}: has no heading of the form " = Title = "; it is not WikiText, so read it with '
            "--documents whole"
        )
    return [Document(wikitext_detokenizer({"page": page}), page) for page in pages]


def whole(text: Text) -> list[Document]:
    return [Document(text.content, text.content)]


def _is_title(line: str) -> bool:
    """A heading of the first level: " = Title = ", not " = = Section = = "."""
    line = line.replace("= = =", "===").replace("= =", "==").strip()
    return line.startswith("= ") and line.endswith(" =")


def _lines(content: str) -> Iterator[str]:
    """Lines with their line breaks; only \\n ends one (WikiText has other separators inside lines)."""
    *ended, rest = content.split("\n")
    yield from (f"{line}\n" for line in ended)
    if rest:
        yield rest


def _wikitext2() -> Text:
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    repository, configuration, split = _ROWS
    with hub_or_cache() as unreachable:
        try:
            rows = datasets.load_dataset(repository, configuration, split=split)["text"]
        except (OSError, ConnectionError, HfHubHTTPError, ValueError) as error:
            reason = unreachable or str(error).splitlines()[0]
            raise FileNotFoundError(
                f"{WIKITEXT2}: {repository} ({configuration}) is neither in the local cache nor to be had: "
                f"{reason}; name a file instead: --data wiki.test.raw"
            ) from None
    # The file: on the Hub a row of white space only lost its line " \n".
    return Text(WIKITEXT2, "".join(row or " \n" for row in rows))
