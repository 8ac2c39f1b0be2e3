"""A model's Markdown as elements, in a real browser."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from chromium import chromium
from fake_server import Script, fake_server
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

if TYPE_CHECKING:
    from playwright.sync_api import Page

SHOW = """async (text) => {
    const { MarkdownView } = await import("./markdown.js");
    const element = document.createElement("div");
    const view = new MarkdownView(element);
    view.show(text);
    return element.innerHTML;
}"""
SHOW_GROWING = """async ([text, step]) => {
    const { MarkdownView } = await import("./markdown.js");
    const [whole, grown] = [document.createElement("div"), document.createElement("div")];
    new MarkdownView(whole).show(text);
    const view = new MarkdownView(grown);
    for (let end = 0; end < text.length + step; end += step) view.show(text.slice(0, end));
    const names = new Set();
    for (const node of whole.querySelectorAll("*")) {
        for (const attribute of node.attributes) names.add(`${node.localName} ${attribute.name}`);
        names.add(node.localName);
    }
    return [whole.innerHTML, grown.innerHTML, [...names]];
}"""
SECONDS = """async (text) => {
    const { MarkdownView } = await import("./markdown.js");
    const start = performance.now();
    new MarkdownView(document.createElement("div")).show(text);
    return (performance.now() - start) / 1000;
}"""
ALLOWED = {
    "p", "h3", "h4", "h5", "h6", "ul", "ol", "li", "blockquote", "hr", "pre", "code", "em", "strong", "del", "a",
    "div", "span", "button",
    "a href", "a title", "a rel", "a target", "ol start", "div class", "pre tabindex",
    "button type", "button class", "button data-copies", "button aria-label",
}  # fmt: skip


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with fake_server(Script()) as address, chromium() as browser:
        page = browser.new_page()
        page.goto(address)
        yield page


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("One\ntwo\n\nthree", "<p>One\ntwo</p><p>three</p>"),
        ("# A *b*\ntext\n####### no", "<h3>A <em>b</em></h3><p>text\n####### no</p>"),
        ("**a *b* c** _d_ ~~e~~ ***f***", "<p><strong>a <em>b</em> c</strong> <em>d</em> <del>e</del> <strong><em>f</em></strong></p>"),
        ("2 * 3 * 4, snake_case_name, a ** b, ~c~, *", "<p>2 * 3 * 4, snake_case_name, a ** b, ~c~, *</p>"),
        ("`a *b* <i>` and ``c ` d``", "<p><code>a *b* &lt;i&gt;</code> and <code>c ` d</code></p>"),
        (r"\*not\* \`code\`", "<p>*not* `code`</p>"),
        ("- a\n- b\n  - c\n\n  more b\n- d", "<ul><li>a</li><li>b<ul><li>c</li></ul><p>more b</p></li><li>d</li></ul>"),
        ("3. x\n4. y\n\ntext", '<ol start="3"><li>x</li><li>y</li></ol><p>text</p>'),
        ("text\n- a\nlazy\n\n1. b", "<p>text</p><ul><li>a\nlazy</li></ul><ol><li>b</li></ol>"),
        ("> a\n> - b\n\nc", "<blockquote><p>a</p><ul><li>b</li></ul></blockquote><p>c</p>"),
        ("a\n\n---\nb", "<p>a</p><hr><p>b</p>"),
        ("<b>&amp;</b>", "<p>&lt;b&gt;&amp;amp;&lt;/b&gt;</p>"),
        ("[a](ftp://x.org) [b](/etc) [c]( https://x.org) ![d](https://x.org/e.png)",
         "<p>[a](ftp://x.org) [b](/etc) [c]( <a>) ![d](<a>)</p>"),
        ("see https://x.org/a_b_c.", "<p>see <a>.</p>"),
        ("[**t**](http://x.org/(y))", "<p><a>)</p>"),
    ],
)  # fmt: skip
def test_what_it_understands(page: Page, text: str, wanted: str) -> None:
    shown = re.sub(r"<a [^>]*>.*?</a>", "<a>", page.evaluate(SHOW, text), flags=re.DOTALL)
    assert shown == wanted


def test_a_link_tells_where_it_leads(page: Page) -> None:
    assert page.evaluate(SHOW, "[https://bank.example](https://other.example/?a=1&b)") == (
        '<p><a href="https://other.example/?a=1&amp;b" title="https://other.example/?a=1&amp;b" '
        'rel="noopener noreferrer" target="_blank">https://bank.example</a></p>'
    )


def test_code_keeps_every_space(page: Page) -> None:
    code = "  if a:\n\n\t`b` **c**  \n~~~"
    shown = page.evaluate(SHOW, f"before\n```py\n{code}\n```\nafter")
    assert f'<pre tabindex="0"><code>{code}</code></pre>' in shown
    assert shown.endswith("<p>after</p>")
    assert "<code>open end</code>" in page.evaluate(SHOW, "````\nopen end")


PIECES = st.sampled_from(
    ["a", "b c", " ", "  ", "\n", "\n\n", "*", "**", "_", "`", "```", "~~", "~~~", "[", "](", ")", "https://x.org/", "# ",
     "- ", "1. ", "> ", "---", "\\", "<", "<img src=x onerror=y>", "javascript:", "\t", "é", "🎈"]
)  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(PIECES, max_size=40).map("".join), st.integers(1, 9))
def test_any_text_gives_only_known_elements_and_grows_into_the_same(page: Page, text: str, step: int) -> None:
    whole, grown, names = page.evaluate(SHOW_GROWING, [text, step])
    assert whole == grown
    assert set(names) <= ALLOWED


@pytest.mark.parametrize(
    "unit",
    ["*", "* ", "_a", "[", "[a](", "`", "` ``", "> ", "- ", "**a*", "~~", "\n", "1. \n  ", "https://", "\\"],
)
def test_time_is_not_wasted_on_hostile_text(page: Page, unit: str) -> None:
    text = unit * (60_000 // len(unit))
    assert page.evaluate(SECONDS, text) < 2
