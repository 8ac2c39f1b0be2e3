"""acc, acc_norm and the paper column by hand; then beside lm-eval's own backend, on real data."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import task_rows
import transformers
from language_models import ToldModel
from tiny_baselines import edit_config, make, make_ours

from mobilellm.eval.interface import LanguageModel
from mobilellm.eval.models import open_model
from mobilellm.eval.paper import chosen
from mobilellm.eval.record import Record, read, save
from mobilellm.eval.tasks import BY_NAME, LoadedTasks, load_tasks, quiet
from mobilellm.eval.zero_shot import save_log_likelihoods, score

NAMES = list(BY_NAME)
_LONGER = 512
"""Tokens of context: some of BoolQ is cut, and no answer is longer."""

TOLD = {
    " a stone": -9.0, " a star": -6.0, " night": -7.0, " 4": -3.0, " 22": -2.0,
    " a cave": -6.0, " I": -1.0, " you": -5.0, " we": -1.5,
    " Push it.": -8.0, " Eat it.": -6.5, " wait a while": -11.0, " heat it": -7.0,
    " she was tired": -6.0, " to stay": -20.0, " rain": -5.0, " full": -2.0, " hungry": -30.0, " sad": -3.0,
    " eats .": -90.0, " sings.": -5.0, " takes off": -6.0, " sleeps": -90.0,
    " pull": -4.0, " cut it": -90.0, " wait a": -90.0, " run": -90.0,
    " hot": -4.0, " cold stuff": -50.0, " a cat": -60.0, " wet": -3.0,
    " fire": -60.0, " frozen water": -12.0, " tin": -8.0, " air": -5.0,
}  # fmt: skip
TOLD_ENDINGS = {
    ("is water wet?\nAnswer:", " no"): -1.0, ("is water wet?\nAnswer:", " yes"): -2.0,
    ("is it dry?\nAnswer:", " no"): -2.0, ("is it dry?\nAnswer:", " yes"): -3.0,
    ("because Ann", " was faster."): -5.0, ("because Bea", " was faster."): -4.0,
    ("so the table", " broke."): -3.0, ("so the cup", " broke."): -2.0,
}  # fmt: skip
"""(End of the context, continuation), for the tasks whose continuations do not tell."""
BEFORE = {
    " no": -1.0, " yes": -3.0, " hot": -9.0, " cold stuff": -50.0, " a cat": -60.0, " wet": -4.0,
    " fire": -60.0, " frozen water": -13.0, " tin": -30.0, " air": -5.0,
}  # fmt: skip
"""After "Answer:" alone."""

EXPECTED: dict[str, dict[str, list[float]]] = {
    # "a star" is right and leads by sum and by character (-6/6). Of "4" and "22" the longer wrong one leads.
    "arc_easy": {"acc": [1, 0], "acc_norm": [1, 0], "paper": [1, 0]},
    # "night" is right, "a cave" leads both ways. "we" is right: "I" leads by sum, "we" by character (-1.5/2).
    "arc_challenge": {"acc": [0, 0], "acc_norm": [0, 1], "paper": [0, 1]},
    # "yes" is right: -2 against -1, but -2 + 3 against -1 + 1. "no" is right: -2 against -3, -1 against 0.
    "boolq": {"acc": [0, 1], "paper": [1, 0]},
    # "Push it." is right: -8/8 against -6.5/7. "wait a while" is right: -11/12 against -7/7.
    "piqa": {"acc": [0, 0], "acc_norm": [0, 1], "paper": [0, 1]},
    # "rain" is right and leads by sum, "she was tired" by character (-6/13). "full" leads both ways.
    "social_iqa": {"acc": [1, 1], "paper": [0, 1]},
    # "takes off" is right: by sum "sings." leads, by character -6/9 against -5/6. "pull" leads both ways.
    "hellaswag": {"acc": [0, 1], "acc_norm": [1, 1], "paper": [1, 1]},
    # "hot" is right: "wet" leads by sum and by character, "hot" by -4 + 9. "frozen water" is right: by sum
    # "air" leads, by character it does itself (-12/12), by -8 + 30 "tin" does.
    "openbookqa": {"acc": [0, 0], "acc_norm": [0, 1], "paper": [1, 0]},
    "winogrande": {"acc": [0, 1], "paper": [0, 1]},
}


def evaluated(
    model: LanguageModel,
    tasks: Sequence[str] = (),
    data_dir: Path | None = None,
    limit: int | None = None,
    seed: int = 1234,
) -> Record:
    return score(model, load_tasks(tasks, data_dir), limit, seed).record


def told(context: str, continuation: str) -> float:
    if context == "Answer:":
        return BEFORE[continuation]
    for (ending, after), value in TOLD_ENDINGS.items():
        if continuation == after and context.endswith(ending):
            return value
    return TOLD[continuation]


@pytest.fixture(params=["hub", "local"])
def data(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    rows = task_rows.HUB if request.param == "hub" else {name: task_rows.local(name) for name in NAMES}
    return task_rows.write(tmp_path / "data", rows)


def test_all_scores_by_hand(data: Path, tmp_path: Path) -> None:
    model = ToldModel(told)
    record = evaluated(model, data_dir=data)
    assert len(model.calls) == 1  # all tasks together, the unconditional answers too
    assert record.items == EXPECTED
    assert list(record.results) == [*NAMES, "average"]
    for name, scores in EXPECTED.items():
        result = record.results[name]
        assert result["documents"] == 2
        assert result["num_fewshot"] == 0
        assert result["paper_scoring"] == BY_NAME[name].paper
        for metric, each in scores.items():
            mean = sum(each) / 2
            assert result[metric] == mean
            spread = math.sqrt(sum((x - mean) ** 2 for x in each) / (2 - 1))
            assert result[f"{metric}_stderr"] == pytest.approx(spread / math.sqrt(2))
        assert ("acc_norm" in result) == ("acc_norm" in scores)
    average = record.results["average"]
    for metric in ("acc", "acc_norm", "paper"):
        each = [scores.get(metric, scores["acc"]) for scores in EXPECTED.values()]
        assert average[metric] == pytest.approx(sum(map(sum, each)) / 16)
        names = [metric if metric in scores else "acc" for scores in EXPECTED.values()]
        errors = [record.results[task][f"{name}_stderr"] for task, name in zip(NAMES, names, strict=True)]
        assert average[f"{metric}_stderr"] == pytest.approx(math.hypot(*errors) / 8)
    assert record.scored == len(model.calls[0])
    assert record.cached == 0
    save(record, tmp_path / "record.json")
    assert read(tmp_path / "record.json") == record


def test_versions_are_those_of_the_installed_lm_eval(data: Path) -> None:
    record = evaluated(ToldModel(told), ["boolq", "piqa", "social_iqa"], data)
    assert {name: result["version"] for name, result in record.results.items()} == {
        "boolq": 2.0, "piqa": 1.0, "social_iqa": 0.0,
    }  # fmt: skip
    from importlib.metadata import version

    assert record.protocol["lm_eval"] == version("lm_eval") == record.environment["packages"]["lm_eval"]


def test_the_protocol_says_all_that_is_needed_to_run_it_again(data: Path) -> None:
    record = evaluated(ToldModel(told), data_dir=data, limit=1, seed=7)
    protocol = record.protocol
    assert (protocol["name"], protocol["num_fewshot"]) == ("lm-eval zero-shot", 0)
    assert (protocol["limit"], protocol["seed"]) == (1, 7)
    assert list(protocol["data"]) == NAMES
    assert protocol["data"]["social_iqa"]["file"] == "social_i_qa/validation.jsonl"
    assert all(len(each["sha256"]) == 64 for each in protocol["data"].values())
    preprocessed = "query" in (data / "hellaswag" / "validation.jsonl").read_text()
    assert sum("617" in note for note in protocol["notes"]) == preprocessed
    assert "only the first 1 documents of each task" in protocol["notes"]
    assert record.items["piqa"] == {"acc": [0], "acc_norm": [0], "paper": [0]}
    assert record.results["piqa"]["acc_stderr"] is record.results["piqa"]["paper_stderr"] is None
    assert record.results["average"]["acc_stderr"] is None


def test_no_average_of_fewer_than_eight(data: Path) -> None:
    record = evaluated(ToldModel(told), ["winogrande", "arc_easy"], data)
    assert list(record.results) == list(record.items) == ["arc_easy", "winogrande"]
    assert not any("average" in note for note in record.protocol["notes"])


def test_documents_have_one_hash_whatever_the_model_and_the_shape_of_the_rows(tmp_path: Path) -> None:
    hub = task_rows.write(tmp_path / "hub", task_rows.HUB)
    local = task_rows.write(tmp_path / "local", {name: task_rows.local(name) for name in NAMES})
    fewer = evaluated(ToldModel(told), data_dir=hub, limit=1)
    one = evaluated(ToldModel(told), data_dir=hub)
    other = evaluated(ToldModel(lambda context, continuation: -1.0), data_dir=local)
    for name in NAMES:
        sha256 = one.results[name]["documents_sha256"]
        assert sha256 == other.results[name]["documents_sha256"] != fewer.results[name]["documents_sha256"]


def test_requests_that_were_cut_are_counted(data: Path) -> None:
    model = ToldModel(lambda context, continuation: -1.0, context=33)
    assert len("Question: Cool tea\nAnswer: heat it") - 1 == 33
    record = evaluated(model, ["piqa"], data)
    (note,) = [note for note in record.protocol["notes"] if "longer than the model's context" in note]
    assert note.startswith("3 requests")  # both of the first document, one of the second


def test_a_bad_limit_is_refused(data: Path) -> None:
    with pytest.raises(ValueError, match="limit = 0 must be at least 1"):
        evaluated(ToldModel(told), data_dir=data, limit=0)


def test_log_likelihoods_are_written_in_full(data: Path, tmp_path: Path) -> None:
    scored = score(ToldModel(told), load_tasks(["openbookqa", "winogrande"], data))
    paths = [tmp_path / f"{number}.jsonl.gz" for number in range(2)]
    for path in paths:
        save_log_likelihoods(scored, path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    with gzip.open(paths[0], "rt", encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    assert len(lines) == 2 * 4 + 2 * 2
    assert lines[5] == {
        "task": "openbookqa", "document": 1, "choice": 1, "context": "Ice is", "continuation": " frozen water",
        "log_likelihood": -12.0, "is_greedy": False, "unconditional": -13.0,
    }  # fmt: skip
    assert lines[-1] == {
        "task": "winogrande", "document": 1, "choice": 1, "context": "The cup fell off the table so the cup",
        "continuation": " broke.", "log_likelihood": -2.0, "is_greedy": False,
    }  # fmt: skip


def test_other_tasks_give_their_own_metrics(tmp_path: Path) -> None:
    """Any task of lm-eval: here one that rolls and one that generates, with a filter of its own."""
    (tmp_path / "rolls.yaml").write_text(
        f"""
task: rolls
custom_dataset: !function {__name__}.rows
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}]
""",
    )
    (tmp_path / "generates.yaml").write_text(
        f"""
task: generates
custom_dataset: !function {__name__}.rows
output_type: generate_until
test_split: test
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{text}}}}"
generation_kwargs: {{until: ["!"], max_gen_toks: 3, do_sample: false}}
filter_list: [{{name: before, filter: [{{function: regex, regex_pattern: "^(.*)[|]!", group_select: 0}}, {{function: take_first}}]}}]
metric_list: [{{metric: exact_match}}]
""",
    )
    from lm_eval.tasks import TaskManager

    with quiet():
        files = [str(tmp_path / f"{name}.yaml") for name in ("rolls", "generates")]
        tasks = TaskManager(include_defaults=False).load(files)["tasks"]
    scored = score(ToldModel(lambda context, continuation: -float(len(continuation))), LoadedTasks(tasks, {}))
    results = scored.record.results
    assert results["rolls"]["bits_per_byte"] == pytest.approx(1 / math.log(2))
    assert results["generates"]["exact_match,before"] == 1.0
    assert scored.record.items == {"rolls": {}, "generates": {"exact_match,before": [1.0, 1.0]}}
    assert "average" not in results
    assert scored.record.scored == 4
    save_log_likelihoods(scored, tmp_path / "none.jsonl.gz")
    assert gzip.decompress((tmp_path / "none.jsonl.gz").read_bytes()) == b""


def rows(**metadata: object) -> Any:
    import datasets

    return datasets.DatasetDict({"test": datasets.Dataset.from_list([{"text": "one"}, {"text": "and two"}])})


@pytest.mark.parametrize(
    ("scoring", "answer"),
    [("per character", 1), ("against the unconditional answer", 2), ("one continuation", 0)],
)
def test_what_the_paper_column_chooses(scoring: Any, answer: int) -> None:
    texts = [" ab", " abcdef", " äöü"]
    assert chosen(scoring, [-2.0, -3.0, -2.5], texts, [-1.0, -2.0, -9.0]) == answer


def test_characters_are_code_points_and_the_first_of_equals_wins() -> None:
    assert chosen("per character", [-3.0, -2.0], [" äöü", " ab"], []) == 0
    assert chosen("one continuation", [-1.0, -1.0], [" x", " x"], []) == 0


# Beside lm-eval's own backend


@pytest.fixture(scope="module")
def real(shared: Path) -> LoadedTasks:
    return load_tasks((), shared / "zeroshot")


@pytest.mark.parametrize(
    ("layout", "backend", "limit"),
    [
        ("llama", "mobilellm", 6),
        ("gpt-neox", "transformers", 6),
        pytest.param("llama", "mobilellm", 60, marks=pytest.mark.slow),
        pytest.param("llama", "transformers", 60, marks=pytest.mark.slow),
        pytest.param("gpt-neox", "transformers", 60, marks=pytest.mark.slow),
    ],
)
def test_the_same_answers_as_lm_evals_own_backend(
    layout: str, backend: str, limit: int, real: LoadedTasks, tmp_path: Path
) -> None:
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    if layout == "llama":
        make_ours(tmp_path / "model", layout="llama", context=_LONGER)
    else:
        make(layout, tmp_path / "model")
        edit_config(tmp_path / "model", max_position_embeddings=_LONGER)
    ours = score(open_model(tmp_path / "model", backend), real, limit)
    assert ours.record.model.backend == backend
    reference = HFLM(
        pretrained=transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model"),
        tokenizer=transformers.AutoTokenizer.from_pretrained(tmp_path / "model"),
        batch_size=16,
    )
    with quiet():
        theirs = evaluate(reference, {"tasks": real.tasks}, limit=limit)
    for name in NAMES:
        for one, other in zip(ours.samples[name], theirs["samples"][name], strict=True):
            assert one["arguments"] == other["arguments"]
            for (mine,), (lm_evals,) in zip(one["resps"], other["resps"], strict=True):
                assert mine[0] == pytest.approx(lm_evals[0], abs=1e-3)
                assert mine[1] == lm_evals[1]
        for metric in ("acc", "acc_norm"):
            if f"{metric},none" in theirs["results"][name]:
                assert ours.record.results[name][metric] == theirs["results"][name][f"{metric},none"]
                error = theirs["results"][name][f"{metric}_stderr,none"]
                assert ours.record.results[name][f"{metric}_stderr"] == error
        if BY_NAME[name].paper == "per character" and "acc_norm" in ours.record.items[name]:
            assert ours.record.items[name]["paper"] == ours.record.items[name]["acc_norm"]
