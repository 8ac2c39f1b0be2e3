"""`mobilellm eval ppl` against the protocols written out once more, for a model of ours and one of others'."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny_baselines
import torch
import transformers

import mobilellm.hf  # noqa: F401  (makes transformers know our layout)
from mobilellm.cli.main import _main

ARCHITECTURES = ["mobilellm-shared", "opt"]
TITLED = "".join(f' = Title {n} = \n \n Words , and {n} more " of " them . \n \n' * 3 for n in range(3))


@pytest.fixture(scope="module", params=ARCHITECTURES)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_baselines.make(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TITLED, encoding="utf-8")
    return file


def measured(directory: Path, text: Path, *flags: str) -> dict[str, Any]:
    out = text.with_suffix(".json")
    assert (
        _main(["eval", "ppl", str(directory), "--data", str(text), "--no-cache", "--json", str(out), *flags])
        == 0
    )
    record: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return record


def stock(directory: Path) -> tuple[Any, Any]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval(), tokenizer


@torch.no_grad()
def transcribed(directory: Path, rows: list[str], window: int) -> float:
    """Windows of the joined rows, each by itself; the mean loss of each weighs by the window."""
    model, tokenizer = stock(directory)
    ids = tokenizer("\n\n".join(rows), return_tensors="pt").input_ids
    samples = ids.shape[1] // window
    losses = []
    for i in range(samples):
        batch = ids[:, i * window : (i + 1) * window]
        logits = model(batch).logits[:, :-1].double()
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), batch[0, 1:])
        losses.append(loss.item() * window)
    return math.exp(sum(losses) / (samples * window))


def test_reference_is_the_published_protocol(directory: Path, text: Path) -> None:
    rows = [
        line if line.strip() else "" for line in text.read_text(encoding="utf-8").splitlines(keepends=True)
    ]
    record = measured(directory, text, "--protocol", "reference", "--window", "48")
    found = record["results"]["text.txt"]["token_perplexity"]
    assert found == pytest.approx(transcribed(directory, rows, 48), rel=1e-5)


def test_document_is_lm_evals_wikitext(directory: Path, text: Path) -> None:
    """Through lm-eval's own backend, functions and counts."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks.wikitext.preprocess_wikitext import process_results, wikitext_detokenizer

    model, tokenizer = stock(directory)
    backend = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=tiny_baselines.CONTEXT)
    *pages, last = [f" = Title{part}" for part in TITLED.split(" = Title")[1:]]
    pages = [*(page.removesuffix("\n") for page in pages), last]  # as the data set is cut: between lines
    requests = [
        Instance("loglikelihood_rolling", {}, (wikitext_detokenizer({"page": page}),), 0) for page in pages
    ]
    scored = [
        process_results({"page": page}, (answer,))["word_perplexity"]
        for page, answer in zip(
            pages, backend.loglikelihood_rolling(requests, disable_tqdm=True), strict=True
        )
    ]
    expected = math.exp(-sum(nats for nats, _ in scored) / sum(words for _, words in scored))
    record = measured(directory, text, "--protocol", "document", "--documents", "articles")
    found = record["results"]["text.txt"]
    assert found["units"] == len(pages) == 9
    assert found["word_perplexity"] == pytest.approx(expected, rel=1e-4)


def test_what_is_printed_names_the_protocol_and_is_not_to_be_compared(
    directory: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured(directory, text, "--protocol", "sliding", "--stride", "10")
    out = capsys.readouterr().out
    assert f"sliding, window {tiny_baselines.CONTEXT}, stride 10, text as it is" in out
    assert "Compare with numbers of the same protocol and window only." in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--window", "97"), "--window 97 must lie in 2 … 96"),
        (("--protocol", "document", "--stride", "3"), "--stride 3 does not go with the document protocol"),
        (("--data", "nowhere.txt"), "nowhere.txt: No such file"),
        (("--dtype", "int7"), "int7"),
    ],
)
def test_mistakes_are_one_line_and_code_2(
    directory: Path, text: Path, flags: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = () if "--data" in flags else ("--data", str(text))
    assert _main(["eval", "ppl", str(directory), "--no-cache", *data, *flags]) == 2
    *notices, error = capsys.readouterr().err.splitlines()
    assert error.startswith("mobilellm: error: ")
    assert message in error
    assert all("run by transformers" in notice for notice in notices)


def test_a_run_that_was_stopped_goes_on(
    directory: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from mobilellm.eval import answers

    command = [
        "eval",
        "ppl",
        str(directory),
        "--data",
        str(text),
        "--cache",
        str(tmp_path / "cache"),
        "--window",
        "24",
    ]
    whole = answers.Cached.log_likelihoods

    def cut(self: Any, requests: Any) -> Any:
        for count, answer in enumerate(whole(self, requests)):
            if count == 5:
                raise KeyboardInterrupt
            yield answer

    with monkeypatch.context() as patched:
        patched.setattr(answers.Cached, "log_likelihoods", cut)
        assert _main(command) == 130
    assert "answers of this run are kept, and the same command goes on" in capsys.readouterr().err
    assert _main(command) == 0
    printed = capsys.readouterr().out
    assert "0 from the cache" not in printed
