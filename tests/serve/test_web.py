"""`mobilellm web`: the folder in a real browser, with a model that runs there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from chromium import chromium
from static_files import static_server

pytest.importorskip("onnxruntime", reason="needs the extra onnx")

from gguf_files import SHAPE, random_model, small_tokenizer

from mobilellm.chat_template import DEFAULT, ChatTemplate
from mobilellm.cli.main import _main
from mobilellm.model import checkpoint
from mobilellm.model.generate import generate_tokens
from mobilellm.serve.web.folder import PACKAGES, write_folder
from mobilellm.serve.web.packages import files_of
from mobilellm.text_stream import TextStream
from mobilellm.tokenizer import Tokenizer

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Route

pytestmark = pytest.mark.slow
MESSAGES = [
    {"role": "system", "content": "Be  brief."},
    {"role": "user", "content": "some   words </s> <s> 🎈\n\n\tand <unk>"},
    {"role": "assistant", "content": " more"},
    {"role": "user", "content": "words of all kinds\ue000"},
]
PROMPTS = """async ([messages, text]) => {
    const { PreTrainedTokenizer } = await import("./transformers.min.js");
    const { Prompts } = await import("./prompts.js");
    const read = async (name) => (await fetch(`model/${name}`)).json();
    const tokenizer = { ...await read("tokenizer.json"), added_tokens: [] };
    const plain = new PreTrainedTokenizer(tokenizer, await read("tokenizer_config.json"));
    const template = await (await fetch("model/chat_template.jinja")).text();
    const prompts = new Prompts(plain, await read("generation_config.json"), template);
    return [prompts.ofMessages(messages), prompts.ofText(text), prompts.ofText("")];
}"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that has the template of a chat."""
    try:
        for package in PACKAGES:
            files_of(package)
    except ConnectionError as error:
        pytest.skip(f"needs the npm registry: {error}")
    directory = tmp_path_factory.mktemp("models") / "tiny"
    checkpoint.save(directory, random_model(SHAPE, 0), small_tokenizer(), chat_template=DEFAULT)
    return directory


@pytest.fixture(scope="module")
def folder(model: Path) -> Path:
    return write_folder(model, model.parent / "site", "fp32").path


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as launched:
        yield launched


@pytest.fixture
def page(folder: Path, browser: Browser) -> Iterator[Page]:
    wrong: list[str] = []
    with static_server(folder) as address:
        page = browser.new_page()
        page.set_default_timeout(120_000)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda asked: None if asked.url.startswith(address) else wrong.append(asked.url))
        page.goto(address)
        page.wait_for_selector("#welcome, #notice", state="visible")
        assert not page.is_visible("#notice"), page.inner_text("#notice")
        page.click("#show-settings")
        page.fill("#temperature", "0")
        page.fill("#max_tokens", "24")
        yield page
        page.close()
    assert not wrong


LAST_TURN = """() => {
    const key = `mobilellm.conversation.${localStorage["mobilellm.current"]}`;
    return JSON.parse(localStorage[key]).turns.at(-1).content;
}"""


def answer(page: Page, text: str) -> str:
    """What the model says, to the letter."""
    before = page.locator(".answer .info").count()
    page.fill("#prompt", text)
    page.keyboard.press("Enter")
    page.locator(".answer .info").nth(before).wait_for()
    assert not page.is_visible("#notice"), page.inner_text("#notice")
    return str(page.evaluate(LAST_TURN))


def own_answer(model: Path, messages: list[dict[str, str]], stop: tuple[str, ...] = ()) -> str:
    """What PyTorch says, greedily."""
    tokenizer = Tokenizer.load(model)
    prompt = ChatTemplate(DEFAULT, tokenizer).prompt(messages)
    stream = TextStream(tokenizer, stop)
    drawn = generate_tokens(random_model(SHAPE, 0), [prompt], max_new_tokens=24)
    return "".join([*(stream.push(new.token) for new in drawn if new.token is not None), stream.finish()])


def test_asks_with_the_same_ids(page: Page, model: Path) -> None:
    tokenizer = Tokenizer.load(model)
    text = "some  words </s>\n  and 🎈 more"
    wanted = [ChatTemplate(DEFAULT, tokenizer).prompt(MESSAGES), tokenizer.encode(text), tokenizer.encode("")]
    assert page.evaluate(PROMPTS, [MESSAGES, text]) == wanted


def test_answers_as_pytorch_does(page: Page, model: Path) -> None:
    first = own_answer(model, [{"role": "user", "content": "some words"}])
    assert answer(page, "some words") == first
    assert page.inner_text("#context").endswith("of 96 tokens")
    page.click("[aria-label='Another answer']")
    page.wait_for_selector("#send", state="visible")
    assert page.evaluate(LAST_TURN) == first
    stop = first[len(first) // 2 :][:3]
    page.fill("#stop_strings", stop)
    page.click("#new")
    assert answer(page, "some words") == own_answer(
        model, [{"role": "user", "content": "some words"}], (stop,)
    )


def test_stops_and_says_what_does_not_fit(page: Page) -> None:
    page.fill("#prompt", "words " * 400)
    page.keyboard.press("Enter")
    page.wait_for_selector("#notice", state="visible")
    assert "the model reads 96" in page.inner_text("#notice-text")
    page.click("#new")
    page.evaluate("window.slow = setInterval(() => document.querySelector('#stop').click(), 1)")
    page.fill("#prompt", "more words")
    page.keyboard.press("Enter")
    page.wait_for_selector("#send", state="visible")
    page.evaluate("clearInterval(window.slow)")
    assert len(answer(page, "and again")) > 0


def test_a_browser_without_vector_instructions_is_told(folder: Path, browser: Browser) -> None:
    with static_server(folder) as address:
        page = browser.new_page()
        page.route("**/model_worker.js", lambda route: _without_simd(route, folder))
        page.goto(address)
        page.wait_for_selector("#notice", state="visible")
        assert "no vector instructions (SIMD)" in page.inner_text("#notice-text")
        page.close()


def _without_simd(route: Route, folder: Path) -> None:
    script = (folder / "model_worker.js").read_text(encoding="utf-8")
    route.fulfill(body=f"WebAssembly.validate = () => false;\n{script}", content_type="text/javascript")


def test_takes_an_export_that_is_there(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _main(["export", str(model), str(tmp_path / "made-onnx"), "--to", "onnx", "--json"]) == 0
    capsys.readouterr()
    assert _main(["web", str(tmp_path / "made-onnx"), str(tmp_path / "site"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["path"] == str(tmp_path / "site")
    card = json.loads((tmp_path / "site" / "model" / "card.json").read_text())
    assert (card["name"], card["dtype"], card["facts"]["is_chat"]) == ("made-onnx", "q4", True)
    assert _main(["web", str(tmp_path / "made-onnx"), str(tmp_path / "site")]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert _main(["web", str(tmp_path / "made-onnx"), str(tmp_path / "site"), "--overwrite"]) == 0
    assert _main(["web", str(tmp_path / "made-onnx"), str(tmp_path / "other"), "--type", "int8"]) == 2
    assert "is an ONNX export already" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    assert _main(["web", str(tmp_path / "made-onnx"), str(tmp_path / "mine"), "--overwrite"]) == 2
    assert "there is no model/card.json" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir() if ".tmp-" in path.name) == []
