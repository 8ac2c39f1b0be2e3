"""The page in a real browser, against a server that says what each test needs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from chromium import chromium
from fake_server import PAGE, Script, fake_server
from gguf_files import SHAPE, random_model, small_tokenizer

from exported_gguf import export_gguf
from mobilellm.chat_template import DEFAULT
from mobilellm.model import checkpoint
from mobilellm.serve.web.packages import Package, files_of

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

Opener = Callable[..., "Page"]
AXE = Package(
    "axe-core",
    "4.14.1",
    "sha512-FHfa+lmNjQZfJz1q8wKqIDwC6DExcHt/pkjNQb09a3NPjCKg2rhu5qb2S4r76ASyFNNtuFooJpZe37OgudVGtQ==",
    "MPL-2.0",
    {"axe.min.js": "axe.min.js"},
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as launched:
        yield launched


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def opened(browser: Browser, script: Script) -> Iterator[Opener]:
    """Opens the page in a browser of its own; afterwards nothing must have gone wrong in its scripts."""
    wrong: list[str] = []
    with fake_server(script) as address:
        context = browser.new_context()

        def opener(**options: Any) -> Page:
            nonlocal context
            if options:
                context.close()
                context = browser.new_context(**options)
            page = context.new_page()
            page.set_default_timeout(60_000)
            page.on("pageerror", lambda error: wrong.append(str(error)))
            page.on("request", lambda request: _note_stranger(request.url, address, wrong))
            page.goto(address)
            page.wait_for_selector("#loading", state="hidden")
            return page

        yield opener
        context.close()
    assert not wrong


@pytest.fixture
def page(opened: Opener) -> Page:
    return opened()


def _note_stranger(url: str, address: str, wrong: list[str]) -> None:
    if not url.startswith((address, "blob:", "data:")):
        wrong.append(f"asked {url}")


def send(page: Page, text: str) -> None:
    page.fill("#prompt", text)
    page.keyboard.press("Enter")


def answered(page: Page) -> None:
    page.wait_for_selector("#send", state="visible")


def said(page: Page) -> list[str]:
    return [text.strip() for text in page.locator(".content").all_inner_texts()]


def until(page: Page, expression: str) -> None:
    """Wait for it to be true; `wait_for_function` evaluates text, which the page's policy forbids."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if page.evaluate(expression):
            return
        time.sleep(0.02)
    raise AssertionError(f"never true: {expression}")


# Talking


def test_what_a_wrong_setting_holds_up_is_not_lost(page: Page, script: Script) -> None:
    page.click("#show-settings")
    page.fill("#max_tokens", "-1")
    send(page, "Hi you")
    until(page, "document.getElementById('prompt').value === 'Hi you'")
    assert script.requests == []
    page.fill("#max_tokens", "8")
    page.click("#send")
    answered(page)
    assert said(page) == ["Hi you", "Hello there."]


def test_sends_and_shows_the_answer(page: Page, script: Script) -> None:
    page.click("#show-settings")
    page.fill("#system", "Be brief.")
    page.fill("#seed", "7")
    page.fill("#stop_strings", "END\n###")
    page.fill("#temperature", "0.3")
    send(page, "Hi *you*")
    answered(page)
    assert said(page) == ["Hi *you*", "Hello there."]
    assert script.requests == [
        {
            "model": "fake-125m",
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi *you*"}],
            "temperature": 0.3, "top_p": 0.95, "max_tokens": 512, "seed": 7, "stop": ["END", "###"],
            "stream": True, "stream_options": {"include_usage": True},
        }
    ]  # fmt: skip
    assert page.inner_text(".answer .info") == "3 tokens · 235 tok/s"
    assert page.inner_text("#meters").split("\n") == ["235 tok/s", "13 of 2,048 tokens", "160 MB"]
    send(page, "And?")
    answered(page)
    assert [message["role"] for message in script.requests[1]["messages"]] == [
        "system",
        "user",
        "assistant",
        "user",
    ]


def test_text_comes_while_it_is_written(page: Page, script: Script) -> None:
    script.pieces, script.delay = ["word "] * 40, 0.05
    send(page, "Go on")
    until(page, "document.querySelector('.answer')?.innerText.includes('word word')")
    assert page.is_visible("#stop")
    assert not page.is_visible("#send")
    until(page, "/\\d tok.s/.test(document.querySelector('#rate-text').textContent)")
    assert page.inner_text("#announcer") == "The model is writing."
    page.click("#stop")
    answered(page)
    assert "stopped" in page.inner_text(".answer .info")
    words = page.inner_text(".answer .content").split()
    assert 2 <= len(words) < 40
    for _ in range(500):
        if script.unread:
            break
        time.sleep(0.02)
    assert script.unread == 1  # the server has seen that nobody reads any more


def test_another_answer_takes_the_place_of_the_last(page: Page, script: Script) -> None:
    send(page, "Hi")
    answered(page)
    script.pieces = ["Something ", "else."]
    page.click("[aria-label='Another answer']")
    until(page, "document.querySelector('.answer').innerText.includes('else')")
    assert said(page) == ["Hi", "Something else."]
    assert script.requests[0] == script.requests[1]
    script.status = 400
    page.click("[aria-label='Another answer']")
    page.wait_for_selector("#notice", state="visible")
    until(page, "document.querySelectorAll('.answer').length === 1")
    assert said(page) == ["Hi", "Something else."]  # nothing came in its place


def test_a_message_can_be_changed_and_sent_again(page: Page, script: Script) -> None:
    for text in ("First", "Second"):
        send(page, text)
        answered(page)
    page.locator("[aria-label='Edit and send again']").first.click()
    assert page.input_value("#prompt") == "First"
    page.keyboard.press("Escape")
    assert page.input_value("#prompt") == ""
    page.locator("[aria-label='Edit and send again']").first.click()
    send(page, "Other")
    answered(page)
    assert said(page) == ["Other", "Hello there."]
    assert [message["content"] for message in script.requests[-1]["messages"]] == ["Other"]


def test_a_base_model_goes_on_with_a_text(opened: Opener, script: Script) -> None:
    script.is_chat = False
    script.pieces = [" there", " was a *star*."]
    page = opened()
    assert "base model" in page.inner_text("#welcome-text")
    assert not page.locator("#system").is_visible()
    send(page, "Once upon a time")
    answered(page)
    assert said(page) == ["Once upon a time", "there was a *star*."]
    assert script.requests[0]["prompt"] == "Once upon a time"
    page.keyboard.press("Enter")  # nothing written: it goes on by itself
    until(page, "document.querySelectorAll('.answer').length === 2")
    answered(page)
    assert script.requests[1]["prompt"] == "Once upon a time there was a *star*."
    send(page, "It")
    answered(page)
    assert script.requests[2]["prompt"].endswith("*star*. It")


def test_what_a_base_model_had_written_stays_when_it_fails(opened: Opener, script: Script) -> None:
    """Going on with nothing typed, there is no message that could come back."""
    script.is_chat = False
    script.pieces = [" there", " was a star."]
    page = opened()
    send(page, "Once upon a time")
    answered(page)
    script.fail_after = 1
    page.keyboard.press("Enter")
    page.wait_for_selector("#notice", state="visible")
    assert page.inner_text("#notice-text") == "the server is shutting down"
    assert said(page) == ["Once upon a time", "there was a star.", "there"]


# What is kept


def test_a_reload_finds_the_conversation_again(page: Page, script: Script) -> None:
    send(page, "Remember me")
    answered(page)
    page.reload()
    page.wait_for_selector(".answer")
    assert said(page) == ["Remember me", "Hello there."]
    page.click("#new")
    assert page.locator(".turn").count() == 0
    send(page, "Another one")
    answered(page)
    assert page.locator("#list .title").all_inner_texts() == ["Another one", "Remember me"]
    page.click("text=Remember me")
    assert said(page)[0] == "Remember me"


def test_a_page_left_in_the_middle_keeps_what_had_come(page: Page, script: Script) -> None:
    script.pieces, script.delay = ["word "] * 200, 0.02
    send(page, "Go on")
    until(page, "document.querySelector('.answer')?.innerText.includes('word word')")
    page.reload()
    page.wait_for_selector(".answer")
    assert said(page)[1].startswith("word word")
    assert "cut off" in page.inner_text(".answer .info")


def test_deleting_can_be_taken_back(page: Page) -> None:
    send(page, "Keep this")
    answered(page)
    page.hover("#list li")
    page.click("[aria-label='Delete “Keep this”']")
    assert page.locator(".turn").count() == 0
    assert page.locator("#list li").count() == 0
    page.click("text=Undo")
    assert said(page) == ["Keep this", "Hello there."]
    page.click("#delete-all")
    page.reload()
    page.wait_for_selector("#welcome", state="visible")
    assert page.locator("#list li").count() == 0


def test_saves_and_opens_files(page: Page, tmp_path: Path) -> None:
    page.click("#show-settings")
    page.fill("#system", "Be kind.")
    send(page, "What a day")
    answered(page)
    files = {}
    for kind in ("json", "markdown"):
        with page.expect_download() as download:
            page.click(f"#save-{kind}")
        files[kind] = tmp_path / download.value.suggested_filename
        download.value.save_as(files[kind])
    assert files["markdown"].name == "What-a-day.md"
    assert files["markdown"].read_text() == (
        "# What a day\n\n> Be kind.\n\n**You**\n\nWhat a day\n\n**fake-125m**\n\nHello there.\n"
    )
    roles = [(each["role"], each["content"]) for each in json.loads(files["json"].read_text())["messages"]]
    assert roles == [("system", "Be kind."), ("user", "What a day"), ("assistant", "Hello there.")]
    page.click("#new")
    page.set_input_files("#file", files["json"])
    page.wait_for_selector(".answer")
    assert said(page) == ["What a day", "Hello there."]
    assert page.input_value("#system") == "Be kind."
    (tmp_path / "no.json").write_text("[1]")
    page.set_input_files("#file", tmp_path / "no.json")
    page.wait_for_selector("#notice", state="visible")
    assert "no conversation" in page.inner_text("#notice-text")


# What a model says is text

INJECTIONS = """<script>window.broken = 1</script>
<img src=x onerror="window.broken = 1"><svg onload="window.broken=1"></svg>
</div></article><iframe srcdoc="<script>parent.broken=1</script>"></iframe>

[click](javascript:window.broken=1) [data](data:text/html,<script>parent.broken=1</script>)
[tab](java\tscript:broken=1) ![picture](https://example.org/track.png) <https://example.org/"onclick=broken=1>
[quote](https://example.org/"onmouseover="broken=1) `<b>code</b>` **<i>bold</i>** &lt;b&gt;

```html"><img src=x onerror=broken=1>
<script>window.broken = 1</script>
```
<style>body { display: none }</style><meta http-equiv="refresh" content="0;url=https://example.org/">
"""


def test_nothing_a_model_says_becomes_part_of_the_page(page: Page, script: Script) -> None:
    script.pieces = [INJECTIONS[start : start + 7] for start in range(0, len(INJECTIONS), 7)]
    send(page, INJECTIONS)
    answered(page)
    page.reload()
    page.wait_for_selector(".answer")
    assert page.evaluate("window.broken") is None
    assert page.locator("#turns :is(script, img, iframe, style, meta, b, i)").count() == 0
    links = page.locator("#turns a").evaluate_all("links => links.map((a) => [a.href, a.rel, a.target])")
    assert all(re.match(r"https://example\.org/", href) for href, _, _ in links)
    assert all(rel == "noopener noreferrer" and target == "_blank" for _, rel, target in links)
    handlers = "nodes => nodes.some((node) => node.getAttributeNames().some((name) => name.startsWith('on')))"
    assert not page.locator("#turns *").evaluate_all(handlers)
    shown = page.inner_text(".answer .content")
    for text in (
        "<script>window.broken = 1</script>",
        "[click](javascript:",
        "![picture](",
        "<i>bold</i>",
        "&lt;b&gt;",
    ):
        assert text in shown
    assert page.locator("#list .title").inner_text().startswith("<script>")


def test_the_policy_would_stop_what_slips_through(page: Page) -> None:
    """A second wall: a script or picture that did get in would not run or load."""
    page.evaluate("""() => {
        window.violations = [];
        addEventListener("securitypolicyviolation", (event) => violations.push(event.effectiveDirective));
        const script = document.createElement("script");
        script.textContent = "window.broken = 1";
        const image = document.createElement("img");
        image.src = "data:image/gif;base64,R0lGODlhAQABAAAAACw=";
        document.body.append(script, image);
        document.body.insertAdjacentHTML("beforeend", "<p onclick='window.broken = 1' id='trap'>x</p>");
        document.querySelector("#trap").click();
    }""")
    until(page, "violations.length >= 3")
    assert page.evaluate("window.broken") is None
    assert set(page.evaluate("violations")) == {"script-src-elem", "script-src-attr", "img-src"}


# Where it goes wrong


def test_a_busy_server_is_asked_again(page: Page, script: Script) -> None:
    script.status = 429
    send(page, "Hi")
    page.wait_for_selector("#notice", state="visible")
    assert page.inner_text("#notice-text") == "The server is busy with other requests. Trying again in 1 s."
    script.status = 200
    page.wait_for_selector(".answer")
    answered(page)
    assert said(page) == ["Hi", "Hello there."]
    assert not page.is_visible("#notice")


def test_a_refusal_is_shown_in_the_servers_words(page: Page, script: Script) -> None:
    script.status = 400
    send(page, "Hi")
    page.wait_for_selector("#notice", state="visible")
    assert page.inner_text("#notice-text") == "max_tokens: should be at least 1"
    assert not page.is_visible("#notice-action")


def test_a_refused_message_comes_back(page: Page, script: Script) -> None:
    """It is no part of the conversation: what is said next would be refused with it."""
    script.status = 400
    send(page, "Too long")
    page.wait_for_selector("#notice", state="visible")
    assert said(page) == []
    assert page.input_value("#prompt") == "Too long"
    assert page.evaluate("document.activeElement.id") == "prompt"
    assert page.locator("#list li").count() == 0
    script.status = 200
    send(page, "Short")
    answered(page)
    assert said(page) == ["Short", "Hello there."]
    script.status = 400
    send(page, "Too long again")
    page.wait_for_selector("#notice", state="visible")
    assert said(page) == ["Short", "Hello there."]
    page.reload()
    page.wait_for_selector(".answer")
    assert said(page) == ["Short", "Hello there."]  # nor of what the browser keeps
    script.status = 200
    send(page, "And now?")
    answered(page)
    assert [message["content"] for message in script.requests[-1]["messages"]] == [
        "Short", "Hello there.", "And now?",
    ]  # fmt: skip


def test_a_refused_change_leaves_what_was_there(page: Page, script: Script) -> None:
    for text in ("First", "Second"):
        send(page, text)
        answered(page)
    script.status = 400
    page.locator("[aria-label='Edit and send again']").first.click()
    send(page, "Too long")
    page.wait_for_selector("#notice", state="visible")
    assert said(page) == ["First", "Hello there.", "Second", "Hello there."]
    assert page.input_value("#prompt") == "Too long"
    assert page.inner_text("#prompt-hint").startswith("Editing")
    script.status = 200
    send(page, "Other")  # still in place of the first
    answered(page)
    assert said(page) == ["Other", "Hello there."]


def test_refused_when_it_is_asked_again(page: Page, script: Script) -> None:
    """After a failure of another kind: a message that is still there goes back, an answer stays."""
    page.route("**/v1/chat/**", lambda route: route.abort())
    send(page, "Hi")
    page.wait_for_selector("#notice", state="visible")
    assert said(page) == ["Hi"]
    page.unroute("**/v1/chat/**")
    script.status = 400
    page.click("text=Try again")
    until(page, "document.querySelector('#prompt').value === 'Hi'")
    assert said(page) == []


def test_a_lost_connection_keeps_what_had_come(page: Page, script: Script) -> None:
    script.cut_after = 2
    send(page, "Hi")
    page.wait_for_selector("#notice", state="visible")
    assert said(page) == ["Hi", "Hello there"]
    assert "cut off" in page.inner_text(".answer .info")
    script.cut_after = None
    page.click("text=Try again")
    until(page, "document.querySelector('.answer').innerText.includes('there.')")
    assert said(page) == ["Hi", "Hello there."]


def test_a_server_that_is_gone(page: Page, script: Script) -> None:
    page.route("**/v1/**", lambda route: route.abort())
    send(page, "Hi")
    page.wait_for_selector("#notice", state="visible")
    assert page.inner_text("#notice-text") == "The server does not answer. Is it still running?"
    page.reload()
    page.wait_for_selector("#notice", state="visible")
    page.unroute("**/v1/**")
    page.click("text=Try again")
    page.wait_for_selector(".mine")
    assert said(page) == ["Hi"]


def test_opened_as_a_file_it_says_what_to_do(browser: Browser) -> None:
    page = browser.new_page()
    page.goto((PAGE / "index.html").as_uri())
    assert "python3 -m http.server" in page.inner_text("#notice")
    page.close()


def test_asks_for_the_key_of_a_server_that_wants_one(opened: Opener, script: Script) -> None:
    script.key = "sesame"
    page = opened()
    page.wait_for_selector("#key-dialog[open]")
    page.fill("#key", "wrong")
    page.keyboard.press("Enter")
    until(page, "document.querySelector('#key-text').textContent.includes('was not it')")
    page.fill("#key", "sesame")
    page.keyboard.press("Enter")
    page.wait_for_selector("#welcome", state="visible")
    send(page, "Hi")
    answered(page)
    assert said(page) == ["Hi", "Hello there."]
    assert "sesame" not in page.evaluate("JSON.stringify(localStorage)")


def test_a_setting_out_of_range_is_named(page: Page, script: Script) -> None:
    page.click("#show-settings")
    page.fill("#max_tokens", "0")
    send(page, "Hi")
    page.wait_for_selector("#notice", state="visible")
    assert page.inner_text("#notice-text").startswith("Most tokens in an answer: ")
    assert script.requests == []


# For everybody


def test_by_keyboard_alone(page: Page, script: Script) -> None:
    script.pieces, script.delay = ["word "] * 200, 0.02
    page.keyboard.type("One line")  # the text field has the focus
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("and another")
    page.keyboard.press("Enter")
    until(page, "document.querySelector('.answer')?.innerText.includes('word word')")
    page.keyboard.press("Escape")
    answered(page)
    assert script.requests[0]["messages"][-1]["content"] == "One line\nand another"
    assert page.evaluate("document.activeElement.id") == "prompt"
    names = []
    page.evaluate("document.activeElement.blur()")
    for _ in range(40):
        page.keyboard.press("Tab")
        names.append(
            page.evaluate("document.activeElement.ariaLabel || document.activeElement.textContent.trim()")
        )
    wanted = ["Skip to the text field", "New conversation", "One line", "Delete “One line”", "Save as Markdown",
              "Conversations", "Settings", "Conversation", "Copy", "Another answer"]  # fmt: skip
    places = [names.index(name) for name in wanted]
    assert places == sorted(places)
    page.focus("[aria-label='Another answer']")
    script.pieces, script.delay = ["New"], 0
    page.keyboard.press("Enter")
    until(page, "document.querySelector('.answer').innerText.includes('New')")


@pytest.mark.parametrize("mode", ["chat", "text"])
def test_on_a_phone(opened: Opener, script: Script, mode: str) -> None:
    script.is_chat = mode == "chat"
    script.pieces = [
        "averylongword" * 20,
        "\n\n```\n",
        "x" * 200,
        "\n```\n",
        "https://example.org/" + "y" * 100,
    ]
    page = opened(viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True)
    assert not page.is_visible("#conversations")
    send(page, "z" * 200)
    answered(page)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert page.evaluate("document.querySelector('#scroll').scrollWidth") <= 360
    for selector in ("#send", "#show-settings", "#show-conversations"):
        box = page.locator(selector).bounding_box()
        assert box is not None
        assert box["width"] >= 40
        assert box["x"] + box["width"] <= 360
    page.tap("#show-settings")
    assert page.is_visible("#temperature")
    page.keyboard.press("Escape")
    assert not page.is_visible("#temperature")
    assert page.evaluate("document.activeElement.id") == "show-settings"
    page.tap("#show-conversations")
    page.tap("#new")
    assert not page.is_visible("#conversations")


def test_light_and_dark(opened: Opener) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    page = opened(color_scheme="dark")
    dark = page.evaluate(background)
    page.click("#theme")
    light = page.evaluate(background)
    assert light != dark
    page.reload()
    assert page.evaluate(background) == light  # it stays as it was switched
    page.evaluate("localStorage.clear()")
    page.reload()
    assert page.evaluate(background) == dark
    page.emulate_media(color_scheme="light")
    assert page.evaluate(background) == light


# With the server itself


@pytest.fixture(scope="module", params=["chat", "base"])
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, str]]:
    """(kind of model, address) of `mobilellm serve` with a random model."""
    pytest.importorskip("uvicorn", reason="needs the extra serve")
    folder = tmp_path_factory.mktemp("served")
    template = DEFAULT if request.param == "chat" else None
    checkpoint.save(folder / "model", random_model(SHAPE, 0), small_tokenizer(), chat_template=template)
    export_gguf(folder / "model", folder / "tiny.gguf", "q8_0")
    command = [sys.executable, "-m", "mobilellm", "serve", str(folder / "tiny.gguf"), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = ""
        while not (found := re.search(r"http://\S+", said)):
            line = process.stderr.readline()
            assert line, said
            said += line
        yield request.param, found[0].rstrip("/") + "/"
        process.terminate()
        process.stderr.read()


def test_with_the_server_itself(served: tuple[str, str], browser: Browser) -> None:
    kind, address = served
    page = browser.new_page()
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.goto(address)
    page.wait_for_selector("#welcome", state="visible")
    assert page.inner_text("#model") == "tiny"
    page.click("#show-settings")
    assert "Q8_0" in page.inner_text("#card")
    page.fill("#max_tokens", "20")
    page.fill("#temperature", "0")
    send(page, "some words")
    page.wait_for_selector(".answer .info")
    first = page.inner_text(".answer .content")
    assert re.match(r"\d+ tokens", page.inner_text(".answer .info"))
    assert re.search(r"\d+ of 96 tokens\s+[\d.]+ MB", page.inner_text("#meters"))
    page.click("[aria-label='Another answer']")
    page.wait_for_selector(".answer .info")
    assert page.inner_text(".answer .content") == first  # greedy: it says the same
    assert (page.locator("#system").is_visible(), page.locator(".text-mode").count()) == (
        kind == "chat",
        kind == "base",
    )
    much = "more words " * 100
    send(page, much)
    page.wait_for_selector("#notice", state="visible")
    assert "context of 96" in page.inner_text("#notice-text")
    assert page.input_value("#prompt") == (much.strip() if kind == "chat" else much)  # a text as it is
    page.fill("#max_tokens", "2")
    send(page, "a")
    page.wait_for_selector("#notice", state="hidden")
    until(page, "document.querySelector('#send').hidden === false")
    assert not page.is_visible("#notice")  # it goes on
    page.close()
    wrong = [each for each in wrong if "400" not in each]  # which Chromium notes by itself
    assert not wrong


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(opened: Opener, script: Script, scheme: str) -> None:
    """Deque's checks of what software can check for people who see, hear or move otherwise."""
    try:
        axe = files_of(AXE)["axe.min.js"].decode()
    except ConnectionError as error:
        pytest.skip(f"needs the npm registry: {error}")
    script.pieces = ["# Title\n\n- a\n- `b` [c](https://example.org)\n\n```py\nx\n```\n> said"]
    page = opened(color_scheme=scheme)
    found = []
    for _ in range(2):  # empty, then with a conversation and a notice
        page.evaluate(axe)
        found += page.evaluate(
            "async () => (await axe.run()).violations.map((v) => [v.id, v.nodes.map((n) => n.html)])"
        )
        send(page, "Hi")
        answered(page)
        page.click("#show-settings")
        script.status = 400
        send(page, "Again")
        page.wait_for_selector("#notice", state="visible")
    assert not found
